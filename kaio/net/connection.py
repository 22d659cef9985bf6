"""`Connection`: a TCP or Unix connection as a stream, for handlers and clients.

Rules kept here: every byte that was received is delivered, before any error and despite any cancellation. A dead peer
raises one `DeadPeerError`, the same object in every method. Both directions have backpressure. Closing takes no longer
than its timeout, and does not lose what was sent because what was received is unread.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import types
from collections.abc import Callable, Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from anyio import DelimiterNotFound, TypedAttributeProvider
from anyio.abc import SocketAttribute, SocketStream

from ..errors import (
    ClosedResourceError,
    DeadPeerError,
    EndOfStream,
    IncompleteRead,
    KeepaliveError,
    as_stream_error,
    format_address,
)
from ..liveness.health import Health
from ..policy import Keepalive, KeepaliveArg, SocketState
from .draining import Draining
from .scopes import AliveScope
from .transports import KeepaliveTransport, WatchedTransport

if TYPE_CHECKING:
    from socket import socket

    from ..monitor.heartbeats import Heartbeat
    from .listeners import Listener
    from .server import Server
    from .stream import StreamProtocol

__all__ = ["CLOSE_TIMEOUT", "Connection", "end_of", "finish", "is_over"]

S = TypeVar("S")
T = TypeVar("T")

CLOSE_TIMEOUT: Final = 10.0
"""The default time in seconds that closing waits until everything written has been sent."""

_ALL: Final = 1 << 62  # no limit for `receive_next`
_numbers: Final = itertools.count(1)
_TURN: Final = 64  # sends without a wait after which send() yields to the loop


def _as_bytes(item: object) -> bytes:
    if not isinstance(item, (bytes, bytearray, memoryview)):
        raise TypeError(f"send() takes bytes, got {type(item).__name__}")
    return bytes(item)


def _real_coroutine(
    function: Callable[[S], Generator[object, None, T]],
) -> Callable[[S], types.CoroutineType[object, None, T]]:
    """Turn a generator function into a coroutine function, as `async def` does.

    `types.coroutine` also only sets a flag in the code object; but its functions return generators, which
    `create_task()` does not accept from Python 3.12 on. `await` in place of `yield` needs an object with `__await__`,
    whose call makes a message 10 % more expensive.
    """
    code = function.__code__
    flags = code.co_flags & ~inspect.CO_GENERATOR | inspect.CO_COROUTINE
    made = types.FunctionType(code.replace(co_flags=flags), function.__globals__, function.__name__)
    return cast("Callable[[S], types.CoroutineType[object, None, T]]", made)


# An anyio stream for isinstance() and type checkers, but not a subclass: objects of anyio's classes have a __dict__,
# which takes 264 bytes on CPython 3.11.
if TYPE_CHECKING:
    _Stream = SocketStream
else:
    _Stream = object


class Connection(_Stream):
    """A connection as a stream: an `anyio.abc.SocketStream` that knows whether its peer is still there.

    Every method that waits raises a kind of `ConnectionEnded` when the connection has ended: `DeadPeerError` when the
    peer died, `ResetError` when it reset the connection (both are `anyio.BrokenResourceError`, too),
    `ClosedResourceError` (anyio's, too) after `aclose`. What was received before is delivered first. Raises
    `anyio.BusyResourceError` when another task is in the same method.

    Unlike those of anyio's own streams, methods that need not wait mostly return without yielding to the loop. A
    handler that takes long for each of many small messages should yield itself, with `await asyncio.sleep(0)`.
    """

    __slots__ = ("__weakref__", "_draining", "_id", "_protocol", "_transport")

    _draining: Draining  # made when it is asked for
    _id: int  # given when it is asked for

    def __init__(self, transport: WatchedTransport, protocol: StreamProtocol) -> None:
        self._transport = transport
        self._protocol = protocol

    # -- receiving

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive at least one byte and at most `max_bytes`. Returns at once when the buffer is not empty.

        Raises `EndOfStream` when the peer has closed or sent EOF.
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
        if protocol.receivable:  # `protocol.wait`, without the call
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

        Raises `IncompleteRead` at an earlier end of the stream; what was received stays in the buffer.
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
        """Receive up to a delimiter and return what comes before it. The delimiter is removed.

        Raises `anyio.DelimiterNotFound` when the first `max_bytes` bytes do not contain it, and
        `IncompleteRead` at an end of the stream before it; what was received stays in the buffer.
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
        """Send bytes. Returns at once while the transport's buffer has room (64 KiB), else waits until it has.

        The bytes are in the transport's buffer before the wait, so cancelling it does not keep them from being sent.
        """
        protocol = self._protocol
        if not protocol.sendable:
            protocol.check_send()
        # A copy of everything but bytes: its owner may change it while it is in the transport's buffer.
        self._transport.write(item if type(item) is bytes else _as_bytes(item))
        protocol.sends_since_wait = sends_since_wait = protocol.sends_since_wait + 1
        if not protocol.sendable:
            await protocol.drain()
        elif sends_since_wait >= _TURN:
            # After an error transports drop writes silently: only the loop's next iteration can report it.
            await asyncio.sleep(0)
            protocol.sends_since_wait = 1  # not 0, which would tell `start_lingering_close` that nothing was sent
            if not protocol.sendable:
                protocol.check_send()

    async def send_eof(self) -> None:
        """Send EOF after what was written; receiving goes on.

        Raises NotImplementedError with TLS, which has no half close.
        """
        protocol = self._protocol
        if protocol.sent_eof:
            return
        protocol.check_send()
        if not self._transport.can_write_eof():
            raise NotImplementedError("TLS has no half close")
        protocol.sent_eof = True
        protocol.update_flags()
        self._transport.write_eof()

    # -- the end

    async def aclose(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Close the connection: wait at most `timeout` seconds (None: no limit) until everything is sent, then abort.

        If the peer has sent data that was not received and has not acknowledged all data sent to it, closing at once
        would reset the connection, and the data could be lost. This side then sends EOF and discards what it receives
        until the peer closes as well, within the same time. TLS has no half close: there the connection is reset, so
        receive everything that the peer sends before closing.

        Never raises errors of the network. Other tasks that wait in the connection get `ClosedResourceError`.
        When cancelled, it aborts the connection at once.
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
        """Close at once, and discard what has not been sent yet."""
        self._protocol.mark_closed()
        self._transport.abort()

    # -- keepalive

    @property
    def keepalive(self) -> Keepalive | None:
        """The policy of this connection; None if it is not TCP. Setting it changes the socket's options at once.

        Raises `PolicyError` or `KeepaliveError`, and then changes nothing.
        """
        return self._transport.keepalive

    @keepalive.setter
    def keepalive(self, keepalive: KeepaliveArg) -> None:
        self._transport.keepalive = keepalive  # type: ignore[assignment,unused-ignore]

    def _kaio_follow(self, policy: Keepalive, state: SocketState) -> None:
        self._transport._kaio_follow(policy, state)

    def health(self) -> Health:
        """Return the health of the peer. Raises `KeepaliveError` if the connection is not TCP or is closed."""
        return self._transport.health()

    def while_alive(self) -> AliveScope:
        """Return a scope, like `asyncio.timeout`, whose block is cancelled when the connection ends.

        The block then raises `DeadPeerError` if the peer died, `ResetError` if it reset the connection,
        `EndOfStream` if it closed it, and `ClosedResourceError` if another task of this side did. A mere
        EOF (half close) from the peer does not end the block. Scopes can be nested, also with asyncio's and anyio's.
        """
        return AliveScope(self._transport)

    # -- timeouts

    @property
    def idle_timeout(self) -> float | None:
        """Seconds that receiving may wait until the connection is closed; None: for ever.

        Receiving then raises `IdleTimeoutError`, and so does everything else. Only waits in methods that
        receive count, so a handler that works or sends is not idle. (On a Unix socket a wait that is cancelled
        counts from the beginning when it is repeated.) The connection never ends too early, and at most a
        quarter of the timeout and half a second too late. Setting it counts from now. Raises TypeError,
        ValueError.
        """
        return self._transport.idle_timeout

    @idle_timeout.setter
    def idle_timeout(self, timeout: float | None) -> None:
        self._transport.idle_timeout = timeout

    @property
    def send_timeout(self) -> float | None:
        """Seconds after which the connection is aborted when the peer acknowledged none of the data sent; None: never.

        It bounds how long a peer may be alive and not read; sending then raises `SendTimeoutError`. Setting it counts
        from now. Raises TypeError, ValueError.
        """
        return self._transport.send_timeout

    @send_timeout.setter
    def send_timeout(self, timeout: float | None) -> None:
        self._transport.send_timeout = timeout

    def heartbeat(self, heartbeat: Heartbeat | None) -> None:
        """Ask the far application for signs of life from now on; None: no longer.

        TCP's keepalive ends at the next host: a proxy answers for a far end that is gone, and a kernel for a process
        that hangs. A peer that gives no sign is dead: everything then raises `DeadPeerError` with the cause HEARTBEAT.
        Nothing is counted while nobody reads here.
        """
        self._transport.heartbeat(heartbeat)

    # -- where it belongs

    @property
    def server(self) -> Server[Connection] | None:
        """The server that accepted it; None for a client's connection."""
        endpoint = self._transport.endpoint
        return None if endpoint is None else endpoint.owners[0]

    @property
    def listener(self) -> Listener | None:
        """The listener that accepted it; None for a client's connection."""
        endpoint = self._transport.endpoint
        return None if endpoint is None else endpoint.owners[1]

    @property
    def id(self) -> int:
        """A number that no other connection of this process has, for logs."""
        try:
            return self._id
        except AttributeError:
            self._id = number = next(_numbers)
            return number

    @property
    def draining(self) -> Draining:
        """Whether the server drains: an event, which is true once it is set. It never is for a client's connection.

        See `Server.drain`. A handler finishes what is under way, and returns.
        """
        try:
            return self._draining
        except AttributeError:
            self._draining = draining = Draining()
            return draining

    def _kaio_drain(self) -> None:
        self.draining.set()

    # -- what it is

    @property
    def transport(self) -> KeepaliveTransport:
        """The connection's transport.

        Its `set_protocol` hands the connection over to another protocol. The stream is closed then, and `aclose` does
        not close the connection. Receive what is in the buffer first: it is discarded.
        """
        return self._transport

    @property
    def peername(self) -> Any:
        """The peer's address, as `get_extra_info("peername")` returns it; a path for a Unix socket."""
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
        if self._transport.get_extra_info("proxy_header") is not None:  # the client, and not the proxy
            peername = self.peername
            is_ip = isinstance(peername, tuple)
            attributes[SocketAttribute.remote_address] = lambda: peername[:2] if is_ip else peername
            if is_ip:
                attributes[SocketAttribute.remote_port] = lambda: peername[1]
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


# Functions and not methods, because they are not for users.


def is_over(connection: Connection) -> bool:
    """Return whether a connection has ended or been closed, or its peer has sent EOF."""
    return connection._protocol.is_over  # noqa: SLF001


def end_of(connection: Connection) -> BaseException | None:
    """Return the error that has ended a connection; None: it has not ended, or has been closed in good order."""
    return as_stream_error(connection._protocol.error)  # noqa: SLF001


def finish(connection: Connection, timeout: float) -> None:
    """Close a connection without waiting, and abort it unless everything is sent within that time. For servers."""
    protocol, transport = connection._protocol, connection._transport  # noqa: SLF001
    protocol.mark_closed()
    if protocol.is_lost:
        return
    if timeout > 0 and protocol.start_lingering_close():
        protocol.abort_after(timeout)
    else:
        transport.close()
        # TLS still exchanges close_notify, which the buffer's size does not include.
        if transport.get_write_buffer_size() or transport.get_extra_info("sslcontext") is not None:
            protocol.abort_after(timeout)
