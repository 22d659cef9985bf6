"""`kaio.Connection`: `kaio.serve` with an async handler."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

import kaio

from . import journal
from .wire import ANSWER, CHUNK, DOWNLOADS, GREETING, HEADER, UPLOADS, checked_chunks

__all__ = ["beating", "connection", "timed"]


async def echo(connection: kaio.Connection) -> None:
    async for data in connection:
        await connection.send(data)


async def greet(connection: kaio.Connection) -> None:
    await connection.send(GREETING)
    async for _ in connection:
        pass


async def bulk(connection: kaio.Connection) -> None:
    mode, total = HEADER.unpack(await connection.receive_exactly(HEADER.size))
    if mode in UPLOADS:
        received = checksum = 0
        while received < total:
            data = await connection.receive()
            received += len(data)
            if mode == UPLOADS[1]:
                checksum = zlib.crc32(data, checksum)
        await connection.send(ANSWER.pack(received, checksum))
    elif mode == DOWNLOADS[1]:
        for chunk in checked_chunks(total):
            await connection.send(chunk)
    else:
        same = bytes(CHUNK)
        for _ in range(total // CHUNK):
            await connection.send(same)
        await connection.send(same[: total % CHUNK])
    async for _ in connection:
        pass


async def report(connection: kaio.Connection) -> None:
    port = journal.connected(connection.transport)
    try:
        async for _ in connection:
            pass
    except kaio.DeadPeerError:
        journal.died(port)


_APPLICATIONS: Final = {"echo": echo, "greet": greet, "bulk": bulk, "report": report}


async def connection(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """`kaio.serve` with a handler."""
    await _serve(kaio.Listener("127.0.0.1:0", keepalive=policy), application, ready)


async def timed(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """The same with an idle timeout and a send timeout, which never pass."""
    listener = kaio.Listener("127.0.0.1:0", keepalive=policy, idle_timeout=300, send_timeout=300)
    await _serve(listener, application, ready)


async def beating(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """The same with a heartbeat for each connection, at the times of the others' pings; keepalive is off."""
    interval = kaio.Keepalive.parse(policy).idle or 20
    heartbeat = kaio.Heartbeat(b"p", every=interval, within=interval)
    handler = _APPLICATIONS[application]

    async def beat(connection: kaio.Connection) -> None:
        connection.heartbeat(heartbeat)
        await handler(connection)

    async with kaio.serve(beat, "127.0.0.1", 0, keepalive="off") as server:
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()


async def _serve(listener: kaio.Listener, application: str, ready: Callable[[int], None]) -> None:
    async with kaio.serve(_APPLICATIONS[application], listeners=[listener]) as server:
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()
