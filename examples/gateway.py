"""A gateway: devices connect here, and each is connected on to a backend.

    python examples/gateway.py --port 9000 --backend 127.0.0.1:9001

A TCP proxy hides each side from the other: the backend's kernel gets its probes answered by the gateway, however dead
the device is. So the gateway has to find out for both, and pass an end on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import kaio


async def pump(source: kaio.Connection, sink: kaio.Connection) -> None:
    """One direction. Its end is passed on by itself, for the other may have much to say yet."""
    async for data in source:
        await sink.send(data)  # waits while the sink takes nothing, and the source is not read meanwhile
    await sink.send_eof()


class Gateway:
    """What every device is forwarded to, and how the way there is watched."""

    def __init__(self, backend: str, keepalive: str) -> None:
        self.backend = backend
        self.keepalive = keepalive

    async def forward(self, device: kaio.Connection) -> None:
        """Serve one device. When one side dies, the task group ends the other direction, and both are closed."""
        try:
            async with kaio.connect(self.backend, keepalive=self.keepalive) as upstream, asyncio.TaskGroup() as pumps:
                pumps.create_task(pump(device, upstream))
                pumps.create_task(pump(upstream, device))
        except* kaio.DeadPeerError as dead:
            print(dead.exceptions[0], flush=True)  # both directions may have met with it: it is one error
        except* ConnectionRefusedError:
            print(f"backend {self.backend} refuses connections", flush=True)


async def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--backend", default="127.0.0.1:9001")
    # Devices are silent for long behind routers that forget them; the backend is near, and is to be found dead soon.
    parser.add_argument("--device-keepalive", default="hold=350s")
    parser.add_argument("--backend-keepalive", default="detect=10s")
    options = parser.parse_args()
    gateway = Gateway(options.backend, options.backend_keepalive)
    async with kaio.serve(gateway.forward, "0.0.0.0", options.port, keepalive=options.device_keepalive) as server:
        print(f"listening on {server.listeners[0].address}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        kaio.run(main())
