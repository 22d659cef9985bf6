"""asyncio's streams, bare and with `asyncio.timeout` around every read."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from typing import Final

import kaio

from . import journal
from .wire import ANSWER, CHUNK, DOWNLOADS, GREETING, HEADER, UPLOADS, checked_chunks

__all__ = ["streams", "timeout"]

_READ_TIMEOUT: Final = 60.0  # seconds; what kaio's default policy takes to find a peer dead


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def echo_with_timeout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        async with asyncio.timeout(_READ_TIMEOUT):
            data = await reader.read(CHUNK)
        if not data:
            break
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GREETING)
    await writer.drain()
    await reader.read(CHUNK)
    writer.close()
    await writer.wait_closed()


async def bulk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    mode, total = HEADER.unpack(await reader.readexactly(HEADER.size))
    if mode in UPLOADS:
        received = checksum = 0
        while received < total:
            data = await reader.read(CHUNK)
            received += len(data)
            if mode == UPLOADS[1]:
                checksum = zlib.crc32(data, checksum)
        writer.write(ANSWER.pack(received, checksum))
    elif mode == DOWNLOADS[1]:
        for chunk in checked_chunks(total):
            writer.write(chunk)
            await writer.drain()
    else:
        same = bytes(CHUNK)
        for _ in range(total // CHUNK):
            writer.write(same)
            await writer.drain()
        writer.write(same[: total % CHUNK])
    await writer.drain()
    await reader.read(CHUNK)
    writer.close()
    await writer.wait_closed()


async def report(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    port = journal.connected(writer)
    try:
        while await reader.read(CHUNK):
            pass
    except OSError:
        journal.died(port)
    finally:
        writer.close()


_APPLICATIONS: Final = {"echo": echo, "greet": greet, "bulk": bulk, "report": report}


async def streams(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """`asyncio.start_server`; keepalive is set for the one application that needs peers to die."""
    await _serve(_APPLICATIONS[application], policy if application == "report" else "off", ready)


async def timeout(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """The same, and each read has a deadline."""
    await _serve({"echo": echo_with_timeout}[application], "off", ready)


async def _serve(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    policy: str,
    ready: Callable[[int], None],
) -> None:
    server = await asyncio.start_server(handler, "127.0.0.1", 0, backlog=4096)
    if policy != "off":
        kaio.apply(server.sockets[0], policy)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()
