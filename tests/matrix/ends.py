"""Our side of a connection, for each kind that an event loop has: how it is made, used, and told of its end.

Rules kept here: an end only writes down what it is told, and when; what that ought to be is in `expect`. It is used as
its owner would use it: a protocol by its callbacks, a stream by the tasks that wait for it, a descriptor by a reader
that reads and on an error closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import ssl
import time
from collections.abc import Coroutine
from typing import Any, ClassVar

import anyio

import kaio

from .cells import Cell, policy

__all__ = ["ENDS", "End"]


class End:
    """One connection, as its owner has it."""

    kind: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]  # what its owner is to be told of a death, each once

    def __init__(self, cell: Cell, address: tuple[str, int], keepalive: kaio.Keepalive | None = None) -> None:
        self.cell = cell
        self.address = address
        self.policy = keepalive or policy(cell.mode)
        self.events: list[tuple[str, float, BaseException | None]] = []  # what the owner is told of the end
        self.heard = bytearray()  # what the peer has sent
        self.tasks: dict[str, asyncio.Task[Any]] = {}  # what waits for the peer beside that, by name
        self.dialing = False  # whether all that its owner has is a task that connects
        self.transport: Any = None
        self.paused_with_data = False

    # -- what states do with it

    async def connect(self, tls: ssl.SSLContext | None = None) -> None:
        """Connect. Raises what that raises."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """Send, and do not wait."""
        self.transport.write(data)

    def write_eof(self) -> None:
        """Send no more."""
        self.transport.write_eof()

    async def drained(self) -> None:
        """Until what was written is nobody's but the transport's and the kernel's."""

    def pause(self) -> None:
        """Read no more."""
        self.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        with contextlib.suppress(RuntimeError):
            self.transport.resume_reading()

    def start_tls(self, context: ssl.SSLContext) -> asyncio.Task[Any]:
        """Begin TLS on a connection that stands."""
        raise NotImplementedError

    def begin_tls(self, context: ssl.SSLContext) -> None:
        """The same, and do not wait for it."""
        self.start_tls(context)

    def sendfile(self, file: io.BufferedReader) -> None:
        """Send a file, and do not wait."""
        raise NotImplementedError

    def dial(self, tls: ssl.SSLContext | None = None) -> None:
        """Connect, and do not wait."""
        self.dialing = True

        async def dial() -> None:
            try:
                await self.connect(tls)
            except Exception as exc:
                self.told("error", exc)

        self.tasks["connect"] = asyncio.create_task(dial())

    # -- what is looked at

    @property
    def socket(self) -> Any:
        """What the kernel can be asked about."""
        return self.transport.get_extra_info("socket")

    @property
    def received(self) -> int:
        """How many bytes the peer's data is, as far as it was delivered."""
        return len(self.heard)

    @property
    def wanted(self) -> tuple[str, ...]:
        """What its owner is to be told of a death, each once."""
        return ("error",) if self.dialing else self.needs

    @property
    def complete(self) -> bool:
        """Whether all has been told that is to be told, and nothing waits any more."""
        names = [name for name, *_ in self.events]
        return all(name in names for name in self.wanted) and all(task.done() for task in self.tasks.values())

    def told(self, name: str, exc: BaseException | None) -> None:
        """The owner is told of the end."""
        self.events.append((name, time.monotonic(), exc))
        if name == "dead" and self.paused_with_data:  # what had arrived is to be read, and then the end comes
            asyncio.get_running_loop().call_later(0.05, self.resume)

    def spawn(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Something more that waits for the peer, and must come to an end with it."""
        task = self.tasks[name] = asyncio.create_task(coroutine)
        return task

    async def close(self) -> None:
        """The matrix is done with it."""
        for task in self.tasks.values():
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks.values(), timeout=1)
        if self.transport is not None:
            with contextlib.suppress(Exception):
                self.transport.abort()


class _OwnProtocol(kaio.KeepaliveProtocol):
    def __init__(self, end: End) -> None:
        self.end = end

    def connection_made(self, transport: Any) -> None:
        self.end.transport = transport

    def data_received(self, data: bytes) -> None:
        self.end.heard += data

    def eof_received(self) -> bool:
        return self.end.transport.get_extra_info("sslcontext") is None

    def peer_dead(self, error: kaio.DeadPeerError) -> None:
        self.end.told("dead", error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.end.told("lost", exc)


class Own(End):
    """A `KeepaliveProtocol`."""

    kind = "own"
    needs = ("dead", "lost")

    async def connect(self, tls: ssl.SSLContext | None = None) -> None:
        _, self.protocol = await kaio.create_connection(
            lambda: _OwnProtocol(self), *self.address, keepalive=self.policy, ssl=tls, server_hostname=_name(tls)
        )

    def start_tls(self, context: ssl.SSLContext) -> asyncio.Task[Any]:
        loop = asyncio.get_running_loop()
        upgrade = loop.start_tls(self.transport.inner, self.protocol, context, server_hostname="localhost")
        return self.spawn("start_tls", upgrade)

    def sendfile(self, file: io.BufferedReader) -> None:
        self.spawn("sendfile", asyncio.get_running_loop().sendfile(self.transport.inner, file))


class _OthersProtocol(asyncio.Protocol):
    def __init__(self, end: End) -> None:
        self.end = end

    def connection_made(self, transport: Any) -> None:
        self.end.transport = transport

    def data_received(self, data: bytes) -> None:
        self.end.heard += data

    def eof_received(self) -> bool:
        return self.end.transport.get_extra_info("sslcontext") is None

    def connection_lost(self, exc: Exception | None) -> None:
        self.end.told("lost", exc)


class Others(End):
    """Any library's protocol, on kaio's loop."""

    kind = "others"
    needs = ("lost",)

    async def connect(self, tls: ssl.SSLContext | None = None) -> None:
        loop = asyncio.get_running_loop()
        _, self.protocol = await loop.create_connection(
            lambda: _OthersProtocol(self), *self.address, ssl=tls, server_hostname=_name(tls)
        )

    def start_tls(self, context: ssl.SSLContext) -> asyncio.Task[Any]:
        loop = asyncio.get_running_loop()
        return self.spawn(
            "start_tls", loop.start_tls(self.transport, self.protocol, context, server_hostname="localhost")
        )

    def begin_tls(self, context: ssl.SSLContext) -> None:
        """asyncio calls no connection_lost while a connection that stood shakes hands: start_tls raises, and is all."""
        self.dialing = True
        upgrade = self.start_tls(context)

        def ended(task: asyncio.Task[Any]) -> None:
            if not task.cancelled():
                self.told("error", task.exception())

        upgrade.add_done_callback(ended)

    def sendfile(self, file: io.BufferedReader) -> None:
        self.spawn("sendfile", asyncio.get_running_loop().sendfile(self.transport, file))


class Stream(End):
    """A `Connection`: one task in its `while_alive`, and another that receives."""

    kind = "connection"
    needs = ("dead", "lost")

    def __init__(self, cell: Cell, address: tuple[str, int], keepalive: kaio.Keepalive | None = None) -> None:
        super().__init__(cell, address, keepalive)
        self._reading = asyncio.Event()
        self._reading.set()
        self._dead = asyncio.Event()

    async def connect(self, tls: ssl.SSLContext | None = None) -> None:
        self.connection = await kaio.connect(*self.address, keepalive=self.policy, ssl=tls, server_hostname=_name(tls))
        self.spawn("while_alive", self._stay())
        self.spawn("receive", self._receive())

    async def _stay(self) -> None:
        try:
            async with self.connection.while_alive():
                await asyncio.Event().wait()
        except Exception as exc:
            self.told("dead", exc)
            self._dead.set()
            self._reading.set()

    async def _receive(self) -> None:
        try:
            await self._read_to_the_end()
        except Exception as exc:
            self.told("lost", exc)

    async def _read_to_the_end(self) -> None:
        while True:
            await self._reading.wait()
            try:
                # Not receive() while it is to be paused: a stream that nobody reads from pauses by itself.
                self.heard += await self.connection.receive()
            except anyio.EndOfStream:
                if self._dead.is_set():
                    raise
                await self._dead.wait()

    def write(self, data: bytes) -> None:
        before = self.tasks.get("send")

        async def send() -> None:
            if before is not None:
                await before
            with contextlib.suppress(Exception):  # what it raises, the others are told too
                await self.connection.send(data)

        self.spawn("send", send())

    async def drained(self) -> None:
        if "send" in self.tasks:
            await self.tasks["send"]

    def write_eof(self) -> None:
        async def send_eof() -> None:
            with contextlib.suppress(Exception):
                await self.connection.send_eof()

        self.spawn("send_eof", send_eof())

    def pause(self) -> None:
        self._reading.clear()
        self.tasks["receive"].cancel()
        self.spawn("receive again", self._receive())

    def resume(self) -> None:
        self._reading.set()

    @property
    def socket(self) -> Any:
        return self.connection

    async def close(self) -> None:
        await super().close()
        if hasattr(self, "connection"):
            with contextlib.suppress(Exception):
                await self.connection.aclose(timeout=0)


class Twins(End):
    """asyncio's streams, by kaio's own `open_connection`: a task that reads, and after an end of file waits."""

    kind = "streams"
    needs = ("lost",)

    async def connect(self, tls: ssl.SSLContext | None = None) -> None:
        self._reader, self._writer = await kaio.open_connection(
            *self.address, keepalive=self.policy, ssl=tls, server_hostname=_name(tls)
        )
        self.transport = self._writer.transport
        self.spawn("read", self._read())

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(1 << 16):
                self.heard += data
            await self._writer.wait_closed()
        except Exception as exc:
            self.told("lost", exc)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def write_eof(self) -> None:
        self._writer.write_eof()

    def start_tls(self, context: ssl.SSLContext) -> asyncio.Task[Any]:
        self.tasks.pop("read").cancel()

        async def upgrade() -> Any:
            await self._writer.start_tls(context, server_hostname="localhost")
            self.spawn("read", self._read())
            return self._writer.transport

        return self.spawn("start_tls", upgrade())

    def begin_tls(self, context: ssl.SSLContext) -> None:
        self.dialing = True

        def ended(task: asyncio.Task[Any]) -> None:
            if not task.cancelled():
                self.told("error", task.exception())

        self.start_tls(context).add_done_callback(ended)


class Watched(End):
    """A descriptor that only `add_reader` and `add_writer` see, as libpq's and tornado's."""

    kind = "descriptor"
    needs = ("lost",)

    async def connect(self, tls: ssl.SSLContext | None = None) -> None:
        self.transport = self
        self._unsent = b""
        self._sock = socket.socket()
        self._sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        try:
            await self._loop.sock_connect(self._sock, self.address)
        except BaseException:
            self._sock.close()
            raise
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(self._sock.fileno(), self._read)

    def _read(self) -> None:
        try:
            data = self._sock.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._end(exc)
            return
        self.heard += data
        if not data:
            self._end(None)

    def _flush(self) -> None:
        try:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._end(exc)
            return
        if not self._unsent:
            self._loop.remove_writer(self._sock.fileno())

    def write(self, data: bytes) -> None:
        if self._sock.fileno() < 0:
            return
        self._unsent += data
        self._loop.add_writer(self._sock.fileno(), self._flush)
        self._flush()

    def write_eof(self) -> None:
        with contextlib.suppress(OSError):  # its end is told to the reader
            self._sock.shutdown(socket.SHUT_WR)

    async def drained(self) -> None:
        while self._unsent and self._sock.fileno() >= 0:
            await asyncio.sleep(0.05)

    def _end(self, exc: OSError | None) -> None:
        self.abort()
        self.told("lost", exc)

    def abort(self) -> None:
        """Close the descriptor."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()

    @property
    def socket(self) -> Any:
        return self._sock


def _name(tls: ssl.SSLContext | None) -> str | None:
    return None if tls is None else "localhost"


ENDS = {end.kind: end for end in (Own, Stream, Twins, Others, Watched)}
