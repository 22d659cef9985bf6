"""`asyncio.Protocol`, and the same class as a `kaio.KeepaliveProtocol`."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any, Final

import kaio

from . import journal
from .wire import ANSWER, CHUNK, DOWNLOADS, GREETING, HEADER, UPLOADS, checked_chunks

__all__ = ["bare", "kernel", "protocol", "unwatched"]


class Echo:
    """Sends back what comes."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Greet:
    """Greets, and waits for the end."""

    def connection_made(self, transport: Any) -> None:
        transport.write(GREETING)


class Report:
    """Notes when it is told that its peer is dead."""

    def connection_made(self, transport: Any) -> None:
        self.port = journal.connected(transport)

    def peer_dead(self, error: kaio.DeadPeerError) -> None:
        journal.died(self.port)

    def connection_lost(self, exc: Exception | None) -> None:
        journal.died(self.port)


class Bulk:
    """Receives or sends what the header asks for."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.head = b""  # until it is whole
        self.mode = b""
        self.total = self.received = self.checksum = 0
        self.chunks: Iterable[bytes] = ()
        self.paused = False

    def data_received(self, data: bytes) -> None:
        if self.mode:
            self.receive(data)
            return
        self.head += data
        if len(self.head) >= HEADER.size:
            self.mode, self.total = HEADER.unpack_from(self.head)
            if self.mode in DOWNLOADS:
                full, rest = divmod(self.total, CHUNK)
                same = bytes(CHUNK)
                checked = self.mode == DOWNLOADS[1]
                self.chunks = iter(checked_chunks(self.total) if checked else chain(repeat(same, full), [same[:rest]]))
                self.send()
            elif len(self.head) > HEADER.size:
                self.receive(self.head[HEADER.size :])

    def receive(self, data: bytes) -> None:
        self.received += len(data)
        if self.mode == UPLOADS[1]:
            self.checksum = zlib.crc32(data, self.checksum)
        if self.received >= self.total:
            self.transport.write(ANSWER.pack(self.received, self.checksum))

    def send(self) -> None:
        for chunk in self.chunks:
            self.transport.write(chunk)
            if self.paused:
                break

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.send()


_APPLICATIONS: Final[dict[str, type]] = {"echo": Echo, "greet": Greet, "bulk": Bulk, "report": Report}


def _as_protocol(application: str, base: type) -> Any:
    """The application as a class of protocols."""
    return type(application, (_APPLICATIONS[application], base), {})


async def bare(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """The loop's own server and transports; keepalive is set for the one application that needs peers to die."""
    await _serve_bare(application, policy if application == "report" else "off", ready)


async def kernel(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """The same with the kernel's keepalive, and nobody who looks beyond it."""
    await _serve_bare(application, policy, ready)


async def _serve_bare(application: str, policy: str, ready: Callable[[int], None]) -> None:
    factory = _as_protocol(application, asyncio.Protocol)
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0, backlog=4096)
    if policy != "off":
        kaio.apply(server.sockets[0], policy)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def protocol(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """`kaio.serve` with a protocol."""
    await _serve_kaio(application, policy, ready)


async def unwatched(application: str, policy: str, ready: Callable[[int], None]) -> None:
    """The same with keepalive off: the difference is what the monitor costs."""
    await _serve_kaio(application, "off", ready)


async def _serve_kaio(application: str, policy: str, ready: Callable[[int], None]) -> None:
    factory = _as_protocol(application, kaio.KeepaliveProtocol)
    async with kaio.serve(factory, "127.0.0.1", 0, keepalive=policy) as server:
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()
