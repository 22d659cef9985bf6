"""anyio's TCP streams."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

import anyio
from anyio.abc import SocketAttribute, SocketStream

from .wire import ANSWER, CHUNK, DOWNLOADS, GREETING, HEADER, UPLOADS, checked_chunks

__all__ = ["streams"]


async def echo(stream: SocketStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


async def greet(stream: SocketStream) -> None:
    async with stream:
        await stream.send(GREETING)
        async for _ in stream:
            pass


async def bulk(stream: SocketStream) -> None:
    async with stream:
        head = b""
        while len(head) < HEADER.size:
            head += await stream.receive(HEADER.size - len(head))
        mode, total = HEADER.unpack(head)
        if mode in UPLOADS:
            received = checksum = 0
            while received < total:
                data = await stream.receive()
                received += len(data)
                if mode == UPLOADS[1]:
                    checksum = zlib.crc32(data, checksum)
            await stream.send(ANSWER.pack(received, checksum))
        elif mode == DOWNLOADS[1]:
            for chunk in checked_chunks(total):
                await stream.send(chunk)
        else:
            same = bytes(CHUNK)
            for _ in range(total // CHUNK):
                await stream.send(same)
            await stream.send(same[: total % CHUNK])
        async for _ in stream:
            pass


_APPLICATIONS: Final = {"echo": echo, "greet": greet, "bulk": bulk}


async def streams(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """`anyio.create_tcp_listener`."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0, backlog=4096)
    ready(listener.extra(SocketAttribute.local_port))
    await listener.serve(_APPLICATIONS[application])
