"""An echo server as a protocol: callbacks instead of a handler, for whoever comes from asyncio's protocols.

python examples/echo_protocol.py --port 9000
"""

from __future__ import annotations

import argparse
import signal

import kaio


class Echo(kaio.KeepaliveProtocol):
    """One client. Whatever is overridden here needs no super()."""

    keepalive = kaio.Keepalive.detect(within=10)  # for all connections of this class, unless an argument says otherwise

    def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    # A client that sends and does not read would fill our memory with its echo: so while it takes nothing, neither do
    # we. It may do so for an hour and is not taken for dead: its kernel answers.
    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def peer_dead(self, error: kaio.DeadPeerError) -> None:
        # Here is the place for what only a death asks for; what any end asks for belongs into connection_lost, which
        # follows at once with the same error.
        print(f"{error}, watched by {error.policy}", flush=True)

    def connection_lost(self, exc: Exception | None) -> None:
        print(f"closed: {exc!r}", flush=True)


async def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--keepalive", help=f"in place of the protocol's own {Echo.keepalive}")
    options = parser.parse_args()
    async with kaio.serve(Echo, "0.0.0.0", options.port, keepalive=options.keepalive) as server:
        (listener,) = server.listeners
        print(f"listening on {listener.address}, keepalive {listener.keepalive}", flush=True)
        await server.serve_until(signal.SIGTERM, signal.SIGINT, grace=5)


if __name__ == "__main__":
    kaio.run(main())
