"""`Connection`: a TCP or Unix connection as a stream, for handlers and clients.

Rules kept here: a byte that arrived is delivered, before any error and in spite of any cancellation, because a waiting
receiver is only ever woken, never handed the bytes. What a dead peer raises is one `DeadPeerError`, the same object
everywhere. Both directions have backpressure. Closing takes no longer than its timeout.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
)
from anyio.abc import SocketStream
from anyio.streams.tls import TLSAttribute

from .errors import DeadPeerError, KeepaliveError, as_stream_error, format_address
from .policy import Keepalive, KeepaliveArg, SocketState
from .protocols import KeepaliveProtocol
from .transports import AliveScope, KeepaliveTransport
from .verdict import Health

__all__ = ["CLOSE_TIMEOUT", "Connection", "StreamProtocol"]

CLOSE_TIMEOUT: Final = 10.0
"""Seconds that closing waits for what was sent to leave, unless told otherwise."""

_HIGH_WATER: Final = 128 * 1024  # bytes received and not yet asked for, above which reading is paused
_TURN: Final = 64  # sends without waiting, after which the loop gets a turn
_LOW_WATER: Final = 32 * 1024  # and below which it is resumed


class StreamProtocol(KeepaliveProtocol):
    """The loop's side of a `Connection`: its buffer, and who waits for what."""

    __slots__ = (
        "_chunks",
        "_closed",
        "_consumed",
        "_drained",
        "_eof",
        "_error",
        "_lost",
        "_lost_waiter",
        "_made",
        "_needed",
        "_reading_paused",
        "_received",
        "_size",
        "_transport",
        "_unturned",
        "_writing_paused",
        "connection",
    )

    def __init__(self, made: Callable[[Connection], None] | None = None) -> None:
        self._made = made  # called with the connection once it stands
        self._chunks: deque[bytes | bytearray] = deque()  # received and not yet asked for
        self._consumed = 0  # bytes of the first chunk that are gone already
        self._size = 0  # bytes that are left in all chunks
        self._needed = 1  # how many the receiver waits for
        self._received: asyncio.Future[None] | None = None  # the receiver that waits
        self._drained: asyncio.Future[None] | None = None  # the sender that waits
        self._lost_waiter: asyncio.Future[None] | None = None  # who waits for connection_lost
        self._unturned = 0  # sends since one had to wait
        self._reading_paused = False
        self._writing_paused = False
        self._eof = False  # the peer will send no more
        self._closed = False  # we have closed it
        self._lost = False  # connection_lost has come
        self._error: BaseException | None = None  # what it came with, as it is raised

    def _live_entry(self, transport: KeepaliveTransport) -> Connection:
        self._transport = transport
        self.connection: Connection = Connection(transport, self)
        return self.connection

    def connection_made(self, transport: Any) -> None:
        if self._made is not None:
            self._made(self.connection)

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        waiting = self._received
        if waiting is not None:
            if self._size >= self._needed and not waiting.done():
                waiting.set_result(None)
        elif self._size > _HIGH_WATER and not self._reading_paused and not self._closed:
            self._reading_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._eof = True
        _wake(self._received)
        # True keeps our half open. TLS has no halves and warns when asked to.
        return self._transport.get_extra_info("sslcontext") is None

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        _wake(self._drained)

    def peer_dead(self, error: DeadPeerError) -> None:
        # A sender is told at once; a receiver first gets what is still in the socket, and then connection_lost.
        self._error = error
        _wake(self._drained)
        if self._reading_paused and self._received is not None:
            self._resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = self._eof = True
        self._error = as_stream_error(exc)
        for waiting in (self._received, self._drained, self._lost_waiter):
            _wake(waiting)
        del self.connection  # so that what has ended goes away without the garbage collector's help
        self._made = None

    # -- for Connection

    def check_receive(self) -> None:
        """Raise what stands in the way of receiving."""
        if self._closed:
            raise ClosedResourceError
        if self._received is not None:
            raise BusyResourceError("receiving from")

    async def more(self, needed: int) -> None:
        """Wait until that many bytes are here; raise EndOfStream or the error when they will not come."""
        while self._size < needed:
            if self._closed:
                raise ClosedResourceError
            if self._lost and self._error is not None:
                raise self._error.with_traceback(None)
            if self._eof and self._error is None:
                raise EndOfStream
            if self._reading_paused:
                self._resume_reading()
            self._needed = needed
            self._received = asyncio.get_running_loop().create_future()
            try:
                await self._received
            finally:
                self._received = None

    def _resume_reading(self) -> None:
        self._reading_paused = False
        if not self._lost and not self._closed:
            self._transport.resume_reading()

    def take(self, most: int) -> bytes:
        """At most that many of the bytes that are here, up to the end of the first chunk."""
        chunk = self._chunks[0]
        start = self._consumed
        if len(chunk) - start <= most:
            self._chunks.popleft()
            self._consumed = 0
            data = chunk[start:] if start else chunk
        else:
            self._consumed = start + most
            data = chunk[start : start + most]
        self._size -= len(data)
        if self._reading_paused and self._size <= _LOW_WATER:
            self._resume_reading()
        return data if type(data) is bytes else bytes(data)

    def take_exactly(self, count: int) -> bytes:
        """That many of the bytes that are here, across chunks."""
        parts = []
        while count:
            part = self.take(count)
            count -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def find(self, delimiter: bytes, start: int) -> int:
        """Where a delimiter first stands in the bytes that are here, from an offset on; -1: nowhere.

        Chunks are joined for it, each once: a line that comes byte by byte costs no more than its length.
        """
        chunks = self._chunks
        if not chunks:
            return -1
        if len(chunks) > 1:
            joined = chunks.popleft()
            if type(joined) is not bytearray:
                joined = bytearray(memoryview(joined)[self._consumed :])
            else:
                del joined[: self._consumed]
            self._consumed = 0
            for chunk in chunks:
                joined += chunk
            chunks.clear()
            chunks.append(joined)
        at = chunks[0].find(delimiter, self._consumed + start)
        return at if at < 0 else at - self._consumed

    def check_send(self) -> None:
        """Raise what stands in the way of sending."""
        if self._error is not None:
            raise self._error.with_traceback(None)
        if self._closed:
            raise ClosedResourceError
        if self._lost:
            raise BrokenResourceError
        if self._drained is not None:
            raise BusyResourceError("sending to")

    async def drain(self) -> None:
        """Wait until the transport takes more; raise when it never will."""
        while self._writing_paused:
            if self._lost or self._closed or self._error is not None:
                break
            self._drained = asyncio.get_running_loop().create_future()
            try:
                await self._drained
            finally:
                self._drained = None
        if self._lost or self._closed or self._error is not None:
            self.check_send()

    def closing(self) -> None:
        """We close: whoever waits is told."""
        self._closed = True
        _wake(self._received)
        _wake(self._drained)

    async def lost(self) -> None:
        """Wait for connection_lost."""
        while not self._lost:
            if self._lost_waiter is None or self._lost_waiter.done():
                self._lost_waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._lost_waiter)


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


def _as_bytes(item: Any) -> bytes:
    if not isinstance(item, (bytes, bytearray, memoryview)):
        raise TypeError(f"send() takes bytes, got {type(item).__name__}")
    return bytes(item)


class Connection(SocketStream):
    """A connection as a stream: an `anyio.abc.SocketStream` that knows whether its peer is still there.

    Every method that waits raises `DeadPeerError` when the peer dies, `ResetError` when it resets the connection (both
    are `anyio.BrokenResourceError`, too), `anyio.ClosedResourceError` after `aclose`, and `anyio.BusyResourceError`
    when another task is in the same method. What arrived before is delivered first.

    A method that need not wait mostly returns without letting the loop turn, unlike anyio's own streams: a handler that
    works long on each of many small messages yields by itself, with `await asyncio.sleep(0)`.
    """

    def __init__(self, transport: KeepaliveTransport, protocol: StreamProtocol) -> None:
        self._transport = transport
        self._protocol = protocol
        self._write = transport.write
        self._sent_eof = False

    # -- receiving

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive at least one byte and at most `max_bytes`. Returns at once when something is here.

        Raises `anyio.EndOfStream` when the peer will send no more.
        """
        protocol = self._protocol
        if protocol._closed or protocol._received is not None:
            protocol.check_receive()
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes}: must be at least 1")
        if not protocol._size:
            await protocol.more(1)
        return protocol.take(max_bytes)

    async def receive_exactly(self, nbytes: int) -> bytes:
        """Receive exactly that many bytes.

        Raises `anyio.IncompleteRead` when the peer sends no more before; what there is stays and can be received.
        """
        protocol = self._protocol
        protocol.check_receive()
        if nbytes < 0:
            raise ValueError(f"nbytes={nbytes}: must not be negative")
        try:
            await protocol.more(nbytes)
        except EndOfStream:
            raise IncompleteRead from None
        return protocol.take_exactly(nbytes)

    async def receive_until(self, delimiter: bytes, max_bytes: int) -> bytes:
        """Receive up to a delimiter, and return what stands before it; the delimiter is taken away.

        Raises `anyio.DelimiterNotFound` when it does not stand within the first `max_bytes` bytes, and
        `anyio.IncompleteRead` when the peer sends no more before it; what there is stays and can be received.
        """
        protocol = self._protocol
        protocol.check_receive()
        if not delimiter:
            raise ValueError("delimiter must not be empty")
        searched = 0
        while (at := protocol.find(delimiter, searched)) < 0:
            if protocol._size >= max_bytes:
                raise DelimiterNotFound(max_bytes)
            searched = max(0, protocol._size - len(delimiter) + 1)
            try:
                await protocol.more(protocol._size + 1)
            except EndOfStream:
                raise IncompleteRead from None
        if at > max_bytes:
            raise DelimiterNotFound(max_bytes)
        data = protocol.take_exactly(at) if at else b""
        protocol.take_exactly(len(delimiter))
        return data

    # -- sending

    async def send(self, item: bytes) -> None:
        """Send bytes. Returns at once while the transport's buffer has room (64 KiB), else when it has again.

        A send that is cancelled while it waits has been taken whole, and goes out.
        """
        protocol = self._protocol
        if protocol._lost or protocol._closed or protocol._error is not None or protocol._drained is not None:
            protocol.check_send()
        if self._sent_eof:
            raise ClosedResourceError
        # Anything but bytes could be changed by its owner while the transport still holds it.
        self._write(item if type(item) is bytes else _as_bytes(item))
        protocol._unturned += 1
        if protocol._writing_paused:
            await protocol.drain()
        elif protocol._unturned >= _TURN:
            # Where writes vanish without a word, as after a reset, only the loop's turn can bring the news.
            await asyncio.sleep(0)
            protocol._unturned = 0
            if protocol._lost or protocol._closed or protocol._error is not None:
                protocol.check_send()

    async def send_eof(self) -> None:
        """Say that no more will be sent, and go on receiving. Raises NotImplementedError with TLS, which cannot."""
        self._protocol.check_send()
        if not self._transport.can_write_eof():
            raise NotImplementedError("TLS cannot send an end of file and go on receiving")
        if not self._sent_eof:
            self._sent_eof = True
            self._transport.write_eof()

    # -- the end

    async def aclose(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Close the connection: let what was sent leave for at most `timeout` seconds (None: for ever), then abort.

        Never raises for what the network does. Whoever waits in another method gets `anyio.ClosedResourceError`. When
        cancelled, the connection is aborted at once.
        """
        protocol = self._protocol
        protocol.closing()
        if protocol._lost:
            return
        self._transport.close()
        try:
            async with asyncio.timeout(timeout):
                await protocol.lost()
        except TimeoutError:
            self._transport.abort()
            await protocol.lost()
        except BaseException:
            self._transport.abort()
            raise

    def abort(self) -> None:
        """Close at once, and drop what has not left yet."""
        self._protocol.closing()
        self._transport.abort()

    # -- keepalive

    @property
    def keepalive(self) -> Keepalive | None:
        """The policy of this connection; None when it is not TCP. Setting it changes the live connection.

        Raises `PolicyError`, `KeepaliveError`; then nothing has changed.
        """
        return self._transport.keepalive

    @keepalive.setter
    def keepalive(self, keepalive: KeepaliveArg) -> None:
        self._transport.keepalive = keepalive  # type: ignore[assignment,unused-ignore]

    def _follow(self, policy: Keepalive, state: SocketState) -> None:
        self._transport._follow(policy, state)

    def health(self) -> Health:
        """How the peer is now. Raises `KeepaliveError` when the connection is not TCP or is closed."""
        return self._transport.health()

    def while_alive(self) -> AliveScope:
        """A scope, like `asyncio.timeout`, whose block is cancelled when the connection ends meanwhile.

        It then raises `DeadPeerError` when the peer died, `ResetError` when it reset the connection,
        `anyio.EndOfStream` when it closed it, and `anyio.ClosedResourceError` when another task of this side did. A
        peer that only says that it sends no more (EOF) ends no block. Scopes nest, also with asyncio's and anyio's.
        """
        return AliveScope(self._transport)

    # -- what it is

    @property
    def transport(self) -> KeepaliveTransport:
        """The transport below."""
        return self._transport

    @property
    def peername(self) -> Any:
        """The peer's address as asyncio gives it: (host, port) or more; a path for a Unix socket."""
        return self._transport.peername

    @property
    def _raw_socket(self) -> Any:
        sock = self._transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            raise ClosedResourceError
        return sock

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        attributes = dict(super().extra_attributes)
        tls = self._transport.get_extra_info("ssl_object")
        if tls is not None:
            more: list[tuple[Any, Callable[[], Any]]] = [
                (TLSAttribute.alpn_protocol, tls.selected_alpn_protocol),
                (TLSAttribute.cipher, tls.cipher),
                (TLSAttribute.peer_certificate, lambda: tls.getpeercert(False)),
                (TLSAttribute.peer_certificate_binary, lambda: tls.getpeercert(True)),
                (TLSAttribute.server_side, lambda: tls.server_side),
                (TLSAttribute.ssl_object, lambda: tls),
                (TLSAttribute.tls_version, tls.version),
            ]
            attributes.update(more)
        return attributes

    def __repr__(self) -> str:
        protocol = self._protocol
        if protocol._lost:
            state = "dead" if isinstance(protocol._error, DeadPeerError) else "closed"
        elif protocol._closed:
            state = "closing"
        else:
            try:
                state = str(self.health().state)
            except KeepaliveError:
                state = "open"
        return f"<Connection to {format_address(self.peername)} keepalive={str(self.keepalive)!r} {state}>"
