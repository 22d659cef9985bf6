"""A server that knows nothing of keepalive: prints its port, then each connection that an error ends, by its peer's.

What it is sent is thrown away; a connection that sent something is sent a byte now and then.
"""

from __future__ import annotations

import asyncio
import errno


class Server(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.port: int = transport.get_extra_info("peername")[1]
        self.feeding: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if self.feeding is None:
            self.feed()

    def feed(self) -> None:
        self.transport.write(b".")
        self.feeding = asyncio.get_running_loop().call_later(0.2, self.feed)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.feeding is not None:
            self.feeding.cancel()
        if isinstance(exc, OSError) and exc.errno is not None:
            print(self.port, errno.errorcode[exc.errno], flush=True)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=200)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
