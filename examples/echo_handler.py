"""An echo server with two listeners, each with its own idea of a dead peer.

    python examples/echo_handler.py --port 9000

The first listener is for the own network, where a dead peer should free its connection in seconds. The second is for
clients behind a NAT or a load balancer that forgets connections which were silent for 350 s: there keepalive is what
keeps the connection open.
"""

from __future__ import annotations

import argparse
import signal

import kaio


async def echo(connection: kaio.Connection) -> None:
    """Serve one client; the server closes the connection afterwards."""
    try:
        async for data in connection:
            await connection.send(data)
    except kaio.DeadPeerError as error:
        # Raised wherever the handler waits: in receive() and in send(). Without this clause the handler just ends.
        print(f"{error}, watched by {error.policy}", flush=True)
    else:
        print("a client has left", flush=True)


async def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=9000, help="of the first listener; the second has the next one")
    parser.add_argument("--keepalive", default="detect=10s", help="the first listener's policy")
    options = parser.parse_args()
    near = kaio.Listener(f"0.0.0.0:{options.port}", keepalive=options.keepalive)
    far = kaio.Listener(f"0.0.0.0:{options.port and options.port + 1}", keepalive=kaio.Keepalive.hold(against=350))
    async with kaio.serve(echo, listeners=[near, far]) as server:
        for listener in server.listeners:
            print(f"listening on {listener.address}, keepalive {listener.keepalive}", flush=True)
        await server.serve_until(signal.SIGTERM, signal.SIGINT, grace=5)


if __name__ == "__main__":
    kaio.run(main())
