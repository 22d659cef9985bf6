"""A backend that answers lines, or HTTP requests, after a delay: python slow_backend.py lines|http DELAY.

It prints its port. A process of its own, so that it can be stopped by a signal while its kernel goes on.
"""

from __future__ import annotations

import asyncio
import sys

import kaio

KIND, DELAY = sys.argv[1], float(sys.argv[2])
END, ANSWER = {
    "lines": (b"\n", b"pong\n"),
    "http": (b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\npong\n"),
}[KIND]


async def handler(connection: kaio.Connection) -> None:
    while True:
        await connection.receive_until(END, 10_000)
        await asyncio.sleep(DELAY)
        await connection.send(ANSWER)


async def main() -> None:
    async with kaio.serve(handler, "127.0.0.1", 0) as server:
        print(server.listeners[0].address.port, flush=True)  # type: ignore[union-attr]
        await server.serve_forever()


asyncio.run(main())
