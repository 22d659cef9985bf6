"""Watching over peers without kaio, by messages of the application: what is usually done, and as cheaply as it goes.

Both greet, ping a peer that was silent for the policy's idle time, and end the connection when no answer comes within
as long again. The load generator answers (native/load.c, `hold`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import kaio

from .wire import CHUNK, GREETING

__all__ = ["pings", "read_timeouts"]

_PING = b"p"


class Pinging(asyncio.Protocol):
    """A task for each connection, which sleeps, pings, and waits for the answer: the way of `websockets`."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.pong: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(GREETING)
        self.task = asyncio.get_running_loop().create_task(self.supervise())

    async def supervise(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.interval)
            self.pong = loop.create_future()
            self.transport.write(_PING)
            try:
                async with asyncio.timeout(self.interval):
                    await self.pong
            except TimeoutError:
                self.transport.abort()
                return

    def data_received(self, data: bytes) -> None:
        if self.pong is not None and not self.pong.done():
            self.pong.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.task.cancel()


async def pings(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """A ping task for each connection, on the loop's own transports."""
    interval = kaio.Keepalive.parse(policy).idle or 20
    server = await asyncio.get_running_loop().create_server(lambda: Pinging(interval), "127.0.0.1", 0, backlog=4096)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def read_timeouts(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """asyncio's streams, and each read has a deadline, at which the peer is pinged."""
    interval = kaio.Keepalive.parse(policy).idle or 20

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        asked = False
        while True:
            try:
                async with asyncio.timeout(interval):
                    if not await reader.read(CHUNK):
                        break
                asked = False
            except TimeoutError:
                if asked:
                    break
                asked = True
                writer.write(_PING)
        writer.close()

    server = await asyncio.start_server(handler, "127.0.0.1", 0, backlog=4096)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()
