"""A server that accepts 1,000 connections of its parent's and ends: run by test_costs under strace.

Arguments: which kind of server, which loop.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvloop

import kaio

COUNT = 1_000
POLICY = kaio.Keepalive(5, 2, 3)
ended = 0
done: asyncio.Event


def one_ended() -> None:
    global ended
    ended += 1
    if ended == COUNT:
        done.set()


class Echo:
    """Sends back what comes."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        one_ended()


class Bare(Echo, asyncio.Protocol):
    """What the others are compared with."""


class Ours(Echo, kaio.KeepaliveProtocol):
    """The same as a KeepaliveProtocol."""


async def handler(connection: kaio.Connection) -> None:
    """The same as a handler."""
    async for data in connection:
        await connection.send(data)
    one_ended()


async def main(kind: str) -> None:
    global done
    done = asyncio.Event()
    server: Any
    if kind == "bare":
        server = await asyncio.get_running_loop().create_server(Bare, "127.0.0.1", 0)
    elif kind == "protocol":
        server = await kaio.create_server(Ours, "127.0.0.1", 0, keepalive=POLICY)
    else:
        server = await kaio.serve(handler, "127.0.0.1", 0, keepalive=POLICY)
    print(server.sockets[0].getsockname()[1], flush=True)
    await done.wait()
    server.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if sys.argv[2] == "uvloop" else None) as runner:
        runner.run(main(sys.argv[1]))
