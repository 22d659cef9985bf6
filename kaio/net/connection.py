"""`Connection`: a TCP or Unix connection as a stream, for handlers and clients.

Rules kept here: a byte that arrived is delivered, before any error and in spite of any cancellation. What a dead peer
raises is one `DeadPeerError`, the same object everywhere. Both directions have backpressure. Closing takes no longer
than its timeout, and does not lose the answer because the request was not read.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Callable, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from anyio import (
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
    TypedAttributeProvider,
)
from anyio.abc import SocketStream

from ..errors import DeadPeerError, KeepaliveError, as_stream_error, format_address
from ..liveness.health import Health
from ..policy import Keepalive, KeepaliveArg, SocketState
from .scopes import AliveScope
from .transports import KeepaliveTransport, WatchedTransport

if TYPE_CHECKING:
    from socket import socket

    from .stream import StreamProtocol

__all__ = ["CLOSE_TIMEOUT", "Connection", "finish"]

S = TypeVar("S")
T = TypeVar("T")

CLOSE_TIMEOUT: Final = 10.0
"""Seconds that closing waits for what was sent to leave, unless told otherwise."""

_ALL: Final = 1 << 62  # as many as there are
_TURN: Final = 64  # sends without waiting, after which the loop gets a turn


def _as_bytes(item: object) -> bytes:
    if not isinstance(item, (bytes, bytearray, memoryview)):
        raise TypeError(f"send() takes bytes, got {type(item).__name__}")
    return bytes(item)


def _real_coroutine(
    function: Callable[[S], Generator[object, None, T]],
) -> Callable[[S], types.CoroutineType[object, None, T]]:
    """A generator function as `async def` would make it: what it returns is a coroutine, which create_task() takes.

    As types.coroutine, which sets a flag of the code, too; but those are generators, and asyncio takes none from 3.12
    on. An `await` in place of the `yield` needs an object with __await__, a call that makes a message 10 % dearer.
    """
    code = function.__code__
    flags = code.co_flags & ~inspect.CO_GENERATOR | inspect.CO_COROUTINE
    made = types.FunctionType(code.replace(co_flags=flags), function.__globals__, function.__name__)
    return cast("Callable[[S], types.CoroutineType[object, None, T]]", made)


# An anyio stream to isinstance() and to type checkers, without what each object of anyio's classes holds: a dictionary,
# which makes 264 bytes on CPython 3.11.
if TYPE_CHECKING:
    _Stream = SocketStream
else:
    _Stream = object


class Connection(_Stream):
    """A connection as a stream: an `anyio.abc.SocketStream` that knows whether its peer is still there.

    Every method that waits raises `DeadPeerError` when the peer dies, `ResetError` when it resets the connection (both
    are `anyio.BrokenResourceError`, too), `anyio.ClosedResourceError` after `aclose`, and `anyio.BusyResourceError`
    when another task is in the same method. What arrived before is delivered first.

    A method that need not wait mostly returns without letting the loop turn, unlike anyio's own streams: a handler that
    works long on each of many small messages yields by itself, with `await asyncio.sleep(0)`.
    """

    __slots__ = ("__weakref__", "_protocol", "_transport")

    def __init__(self, transport: WatchedTransport, protocol: StreamProtocol) -> None:
        self._transport = transport
        self._protocol = protocol

    # -- receiving

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive at least one byte and at most `max_bytes`. Returns at once when something is here.

        Raises `anyio.EndOfStream` when the peer will send no more.
        """
        protocol = self._protocol
        protocol.check_receive()
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes}: must be at least 1")
        return protocol.take(max_bytes) if protocol.buffer.size else await protocol.receive_next(max_bytes)

    def __aiter__(self) -> Self:
        return self

    @_real_coroutine
    def __anext__(self) -> Generator[object, None, bytes]:
        protocol = self._protocol
        if protocol.receivable:  # `protocol.wait`, the short way
            protocol.receivable = False
            protocol.sends_since_wait = 0
            protocol._asyncio_future_blocking = True
            try:
                yield protocol
            except BaseException:
                protocol.stop_waiting()
                raise
            data = protocol.handed
            if data is not None:
                protocol.handed = None
                protocol.receivable = True
                return data
            protocol.stop_waiting()
        protocol.check_receive()
        try:
            return (yield from protocol.receive_next(_ALL).__await__())
        except EndOfStream:
            raise StopAsyncIteration from None

    async def receive_exactly(self, nbytes: int) -> bytes:
        """Receive exactly that many bytes.

        Raises `anyio.IncompleteRead` when the peer sends no more before; what there is stays and can be received.
        """
        protocol = self._protocol
        protocol.check_receive()
        if nbytes < 0:
            raise ValueError(f"nbytes={nbytes}: must not be negative")
        if protocol.buffer.size < nbytes:
            try:
                await protocol.wait_for_bytes(nbytes)
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
        while (at := protocol.buffer.find(delimiter, searched)) < 0:
            if protocol.buffer.size >= max_bytes:
                raise DelimiterNotFound(max_bytes)
            searched = max(0, protocol.buffer.size - len(delimiter) + 1)
            try:
                await protocol.wait_for_bytes(protocol.buffer.size + 1)
            except EndOfStream:
                raise IncompleteRead from None
        if at > max_bytes:
            raise DelimiterNotFound(max_bytes)
        data = protocol.buffer.take_exactly(at)
        protocol.take_exactly(len(delimiter))
        return data

    # -- sending

    async def send(self, item: bytes) -> None:
        """Send bytes. Returns at once while the transport's buffer has room (64 KiB), else when it has again.

        A send that is cancelled while it waits has been taken whole, and goes out.
        """
        protocol = self._protocol
        if not protocol.sendable:
            protocol.check_send()
        # Anything but bytes could be changed by its owner while the transport still holds it.
        self._transport.write(item if type(item) is bytes else _as_bytes(item))
        protocol.sends_since_wait = sends_since_wait = protocol.sends_since_wait + 1
        if not protocol.sendable:
            await protocol.drain()
        elif sends_since_wait >= _TURN:
            # Where writes vanish without a word, as after a reset, only the loop's turn can bring the news.
            await asyncio.sleep(0)
            protocol.sends_since_wait = 1  # there was something: see `start_lingering_close`
            if not protocol.sendable:
                protocol.check_send()

    async def send_eof(self) -> None:
        """Say that no more will be sent, and go on receiving. Raises NotImplementedError with TLS, which cannot."""
        protocol = self._protocol
        if protocol.sent_eof:
            return
        protocol.check_send()
        if not self._transport.can_write_eof():
            raise NotImplementedError("TLS cannot send an end of file and go on receiving")
        protocol.sent_eof = True
        protocol.update_flags()
        self._transport.write_eof()

    # -- the end

    async def aclose(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Close the connection: let what was sent leave for at most `timeout` seconds (None: for ever), then abort.

        When the peer still sends what was not received, and has not acknowledged all of what was sent to it, this side
        says that it sends no more, and throws away what comes until the peer closes, too, within the same time: an
        immediate close would reset the connection and lose the answer. With TLS, which has no such half close, it is
        reset and may be lost; receive up to the end of what the peer sends before closing.

        Never raises for what the network does. Whoever waits in another method gets `anyio.ClosedResourceError`. When
        cancelled, the connection is aborted at once.
        """
        protocol = self._protocol
        protocol.mark_closed()
        if protocol.is_lost:
            return
        if (timeout is not None and timeout <= 0) or not protocol.start_lingering_close():
            self._transport.close()
        try:
            async with asyncio.timeout(timeout):
                await protocol.wait_lost()
        except TimeoutError:
            self._transport.abort()
            await protocol.wait_lost()
        except BaseException:
            self._transport.abort()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def abort(self) -> None:
        """Close at once, and drop what has not left yet."""
        self._protocol.mark_closed()
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

    def _kaio_follow(self, policy: Keepalive, state: SocketState) -> None:
        self._transport._kaio_follow(policy, state)

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
        """The transport below.

        Its `set_protocol` hands the connection over to another protocol: to the stream it is closed then, but `aclose`
        closes nothing. What arrived and was not received is lost; receive it first.
        """
        return self._transport

    @property
    def peername(self) -> Any:
        """The peer's address as asyncio gives it: (host, port) or more; a path for a Unix socket."""
        return self._transport.peername

    @property
    def _raw_socket(self) -> socket:
        sock: socket | None = self._transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            raise ClosedResourceError
        return sock

    if not TYPE_CHECKING:
        extra = TypedAttributeProvider.extra

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        attributes = dict(_anyios_attributes.__get__(self))
        tls = self._transport.get_extra_info("ssl_object")
        if tls is not None:
            from anyio.streams.tls import TLSAttribute  # noqa: PLC0415 - most programs never need it

            attributes[TLSAttribute.alpn_protocol] = tls.selected_alpn_protocol
            attributes[TLSAttribute.cipher] = tls.cipher
            attributes[TLSAttribute.peer_certificate] = lambda: tls.getpeercert(False)
            attributes[TLSAttribute.peer_certificate_binary] = lambda: tls.getpeercert(True)
            attributes[TLSAttribute.server_side] = lambda: tls.server_side
            attributes[TLSAttribute.ssl_object] = lambda: tls
            attributes[TLSAttribute.tls_version] = tls.version
        return attributes

    def __repr__(self) -> str:
        protocol = self._protocol
        if protocol.is_lost:
            state = "dead" if isinstance(as_stream_error(protocol.error), DeadPeerError) else "closed"
        elif protocol.is_closed:
            state = "closing"
        else:
            try:
                state = str(self.health().state)
            except KeepaliveError:
                state = "open"
        return f"<Connection to {format_address(self.peername)} keepalive={str(self.keepalive)!r} {state}>"


_anyios_attributes: Final = cast("property", SocketStream.extra_attributes)
SocketStream.register(Connection)


def finish(connection: Connection, timeout: float) -> None:
    """Close a connection without waiting for it: what was sent has so many seconds to leave. For servers."""
    protocol, transport = connection._protocol, connection._transport  # noqa: SLF001 - not for users, so no method
    protocol.mark_closed()
    if protocol.is_lost:
        return
    if timeout > 0 and protocol.start_lingering_close():
        protocol.abort_after(timeout)
    else:
        transport.close()
        # TLS has its farewell to send and to wait for, of which the size says nothing.
        if transport.get_write_buffer_size() or transport.get_extra_info("sslcontext") is not None:
            protocol.abort_after(timeout)
