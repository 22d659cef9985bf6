"""`Connection`: a TCP or Unix connection as a stream, for handlers and clients.

Rules kept here: a byte that arrived is delivered, before any error and in spite of any cancellation. What a dead peer
raises is one `DeadPeerError`, the same object everywhere. Both directions have backpressure. Closing takes no longer
than its timeout, and does not lose the answer because the request was not read.

A task that waits for data waits for the protocol itself, and goes on inside `data_received`: a future, its callback and
the loop's next turn would cost as much as all else together. It is handed the bytes only there, where nothing can come
between; otherwise it is woken in the loop's next turn, and takes what is in the buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import types
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextvars import Context
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeVar, cast

from anyio import (
    BrokenResourceError,
    BusyResourceError,
    ClosedResourceError,
    DelimiterNotFound,
    EndOfStream,
    IncompleteRead,
    TypedAttributeProvider,
)
from anyio.abc import SocketStream

from ..errors import DeadPeerError, KeepaliveError, as_stream_error, format_address, remember
from ..kernel.descriptors import take_unread, unacknowledged, unread
from ..liveness.health import Health
from ..policy import Keepalive, KeepaliveArg, SocketState
from .protocols import KeepaliveProtocol
from .transports import AliveScope, KeepaliveTransport, WatchedTransport

__all__ = ["CLOSE_TIMEOUT", "Connection", "StreamProtocol", "finish"]

T = TypeVar("T")

CLOSE_TIMEOUT: Final = 10.0
"""Seconds that closing waits for what was sent to leave, unless told otherwise."""

_HIGH_WATER: Final = 128 * 1024  # bytes received and not yet asked for, above which reading is paused
_ALL: Final = 1 << 62  # as many as there are
_TURN: Final = 64  # sends without waiting, after which the loop gets a turn
_LOW_WATER: Final = 32 * 1024  # and below which it is resumed


class StreamProtocol(KeepaliveProtocol):
    """The loop's side of a `Connection`: its buffer, and who waits for what."""

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_chunks",
        "_consumed",
        "_context",
        "_drained",
        "_eof",
        "_lingering",
        "_loop",
        "_lost_waiter",
        "_made",
        "_needed",
        "_reading_paused",
        "_transport",
        "_woken",
        "_writing_paused",
        "connection",
        "error",
        "handed",
        "is_closed",
        "is_lost",
        "receivable",
        "result",
        "sendable",
        "sent_eof",
        "size",
        "unturned",
    )

    def __init__(self, made: Callable[[Connection], None] | None = None) -> None:
        self._made = made  # called with the connection once it stands
        self._chunks: deque[bytes | bytearray] = _EMPTY  # received and not yet asked for
        self._consumed = 0  # bytes of the first chunk that are gone already
        self.size = 0  # bytes that are left in all chunks
        self._needed = 0  # how many the receiver waits for; 0: as many as come next
        self._woken = False  # whether the task that waited is to go on in the loop's next turn
        self._callback: Callable[[Any], object] | None = None  # wakes the task that waits; None: none waits
        self._context: Context | None = None  # in which it is woken
        self.result: Callable[[], None] = _NOTHING  # what it is woken with
        self.handed: bytes | None = None  # what it was handed
        self._asyncio_future_blocking = False
        self._drained: asyncio.Future[None] | None = None  # the sender that waits
        self._lost_waiter: asyncio.Future[None] | None = None  # who waits for connection_lost
        self.unturned = 0  # sends since data was waited for, or since the loop had its turn
        self._reading_paused = False
        self._writing_paused = False
        self._eof = False  # the peer will send no more
        self.sent_eof = False  # we will send no more
        self.is_closed = False  # we have closed it
        self._lingering = False  # we have, and throw away what the peer still sends until it closes, too
        self.is_lost = False  # connection_lost has come
        self.error: Any = None  # what it came with, as `remember` keeps it
        self.receivable = True  # whether a receiver need only wait: none does, and nothing is here or has happened
        self.sendable = True  # whether a sender need only write

    def _kaio_entry(self, transport: WatchedTransport) -> Connection:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self.connection: Connection = Connection(transport, self)
        return self.connection

    def connection_made(self, transport: Any) -> None:
        made, self._made = self._made, None
        if made is not None:
            made(self.connection)

    def data_received(self, data: bytes) -> None:
        callback = self._callback
        # What fills a loop's buffer is followed by more at once, before anybody else has a turn: that waits for one.
        if callback is not None and not self._needed and len(data) <= _HIGH_WATER:
            self._callback = None
            self.handed = data
            try:
                self._context.run(callback, self)  # type: ignore[union-attr]
                callback = None  # from 3.12 on the task's traceback holds this frame, which would hold the task
                return
            except RuntimeError:
                if self.handed is None:  # the task has gone on, and this is its own
                    raise
                # Not while another task runs: this was called by hand, in that task.
                self.handed = None
                self._callback = callback
            except (SystemExit, KeyboardInterrupt) as exc:  # uvloop keeps to itself what a callback for data raises
                self._loop.call_soon(_raise, exc)
                return
        self.keep(data)
        if callback is not None:
            if self.size >= self._needed:
                self._wake()
        elif self.size > _HIGH_WATER and not self._reading_paused and not self.is_closed:
            self._pause_reading()

    def eof_received(self) -> bool:
        self._eof = True
        self.receivable = False
        callback = self._callback
        if callback is not None:
            self._callback = None
            self._woken = True
            try:
                self._context.run(callback, self)  # type: ignore[union-attr]
                callback = None  # as in data_received
            except RuntimeError:
                if not self._woken:
                    raise
                self._callback = callback
                self._wake()
            except (SystemExit, KeyboardInterrupt) as exc:
                self._loop.call_soon(_raise, exc)
        # True keeps our half open. TLS has no halves and warns when asked to.
        return not self._lingering and self._transport.get_extra_info("sslcontext") is None

    def pause_writing(self) -> None:
        self._writing_paused = True
        self.sendable = False

    def resume_writing(self) -> None:
        self._writing_paused = False
        self.settle()
        _wake(self._drained)

    def peer_dead(self, error: DeadPeerError) -> None:
        self._kaio_ending(error)

    def _kaio_ending(self, error: BaseException) -> None:
        """The transport knows how it will end, before the loop does.

        A sender is told at once; a receiver first gets what is still in the socket, and then connection_lost.
        """
        self.error = remember(error)
        self.sendable = False
        _wake(self._drained)
        if self._reading_paused and self.receiving:
            self._resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self.is_closed:
            self._keep_unread()
        self.error = remember(exc)
        self._ended()

    def _kaio_handed_over(self, _: asyncio.BaseProtocol) -> None:
        """Another protocol takes the connection over: to this stream, and to no one else, it is closed."""
        self.is_closed = True
        self._ended()
        if self._reading_paused:  # of which the other knows nothing
            self._reading_paused = False
            self._read_on()

    def _ended(self) -> None:
        self.is_lost = self._eof = True
        self.receivable = self.sendable = False
        self._wake()
        _wake(self._drained)
        _wake(self._lost_waiter)
        del self.connection  # so that what has ended goes away without the garbage collector's help

    def _keep_unread(self) -> None:
        """Take what is left in the socket: a loop whose write fails closes at once, whatever had arrived."""
        transport = self._transport
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if transport.get_extra_info("sslcontext") is None:
                data = take_unread(transport.get_extra_info("socket"))
                if data:
                    self.keep(data)

    def settle(self) -> None:
        """Something has changed: see what the short ways have to know."""
        self.receivable = not (self.size or self._eof or self.is_closed or self._reading_paused or self.receiving)
        self.sendable = not (
            self.is_lost
            or self.is_closed
            or self.sent_eof
            or self._writing_paused
            or self.error is not None
            or self._drained is not None
        )

    # -- the task that waits for data: to asyncio this is the future for which it waits

    @types.coroutine
    def wait(self, needed: int) -> Generator[Any, None, bytes | None]:
        """Wait for the next data, which is handed over, or until the buffer has that many bytes or its end is here."""
        self._needed = needed
        self.unturned = 0  # the loop has its turn
        self.receivable = False
        self._asyncio_future_blocking = True
        try:
            yield self
        finally:
            self._needed = 0
            self.goes_on()
        handed, self.handed = self.handed, None
        return handed

    @property
    def receiving(self) -> bool:
        """Whether a task waits for data, or was woken and has not gone on yet."""
        return self._callback is not None or self._woken

    def goes_on(self) -> None:
        """The task that waited does not wait any more."""
        self._callback = None
        self._woken = False
        self.settle()

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context | None = None) -> None:
        """The task says how it is to be woken."""
        self._callback = callback
        self._context = context

    def done(self) -> bool:
        """Whether the task is woken; anyio asks."""
        return self._callback is None

    def cancel(self, msg: Any = None) -> bool:
        """The task is cancelled."""
        if self._callback is None:  # it is woken already: then it cancels itself when it goes on
            return False
        self.result = _Cancelled(self, msg)
        self._wake()
        return True

    def _wake(self) -> None:
        """Let the task go on in the loop's next turn."""
        callback, self._callback = self._callback, None
        if callback is not None:
            self._woken = True
            self._loop.call_soon(callback, self, context=self._context)

    # -- for Connection

    def fail(self) -> NoReturn:
        """Raise what ended the connection."""
        error = as_stream_error(self.error)
        assert error is not None
        try:
            raise error.with_traceback(None)
        finally:
            del error  # which holds this frame

    def check_receive(self) -> None:
        """Raise what stands in the way of receiving."""
        if self.is_closed:
            raise ClosedResourceError
        if self.receiving:
            raise BusyResourceError("receiving from")

    def check_more(self) -> None:
        """Before waiting: raise EndOfStream or the error when no more will come."""
        if self.is_closed:
            raise ClosedResourceError
        if self.is_lost and self.error is not None:
            self.fail()
        if self._eof and self.error is None:
            raise EndOfStream
        if self._reading_paused:
            self._resume_reading()

    async def more(self, needed: int) -> None:
        """Wait until that many bytes are here; raise EndOfStream or the error when they will not come."""
        while self.size < needed:
            self.check_more()
            await self.wait(needed)

    async def next(self, most: int) -> bytes:
        """Wait for data, and take at most that many bytes of it."""
        while not self.size:
            self.check_more()
            data = await self.wait(0)
            if data is not None:
                if len(data) <= most:
                    return data
                self.keep(data)
        return self.take(most)

    def keep(self, data: bytes) -> None:
        """What nobody has taken."""
        if self._lingering:
            return
        if self._chunks is _EMPTY:  # a deque is large, and most connections never need one
            self._chunks = deque()
        self._chunks.append(data)
        self.size += len(data)
        self.receivable = False

    def _pause_reading(self) -> None:
        """Stop reading. The TLS layer of uvloop is let run dry first: of what it holds, an end of file loses a part."""
        self._reading_paused = True
        below = _below_uvloops_tls(self._transport.loop_transport)
        if below is None:
            self._transport.pause_reading()
        else:
            with contextlib.suppress(RuntimeError):  # closing
                below.pause_reading()
            self._loop.call_soon(self._pause_tls)

    def _pause_tls(self) -> None:
        if self._reading_paused and not self.is_lost and not self.is_closed:
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        self._reading_paused = False
        self.settle()
        if not self.is_lost and not self.is_closed:
            self._read_on()

    def _read_on(self) -> None:
        self._transport.resume_reading()
        self._resume_below()

    def _resume_below(self) -> None:
        below = _below_uvloops_tls(self._transport.loop_transport)
        if below is not None:
            with contextlib.suppress(RuntimeError):  # closing
                below.resume_reading()

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
        self.size -= len(data)
        if self._reading_paused and self.size <= _LOW_WATER:
            self._resume_reading()
        elif not self.size:
            self.settle()
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
        if self.error is not None:
            self.fail()
        if self.is_closed:
            raise ClosedResourceError
        if self.is_lost:
            raise BrokenResourceError
        if self.sent_eof:
            raise ClosedResourceError
        if self._drained is not None:
            raise BusyResourceError("sending to")

    async def drain(self) -> None:
        """Wait until the transport takes more; raise when it never will."""
        while self._writing_paused:
            if self.is_lost or self.is_closed or self.error is not None:
                break
            self._drained = asyncio.get_running_loop().create_future()
            try:
                await self._drained
            finally:
                self._drained = None
                self.settle()
        if self.is_lost or self.is_closed or self.error is not None:
            self.check_send()

    def closing(self) -> None:
        """We close: whoever waits is told."""
        self.is_closed = True
        self.receivable = self.sendable = False
        self._wake()
        _wake(self._drained)
        if self._reading_paused:
            self._resume_below()  # TLS waits for the peer's farewell

    def linger(self) -> bool:
        """Close in a way that a peer who still sends gets the whole answer; False: an ordinary close is as good.

        A socket that is closed with input unread sends a reset, and what was not acknowledged until then is lost. So,
        as nginx's lingering_close: say that no more will be sent, and throw away what comes until the peer closes, too.
        Costs nothing where the peer has said that it sends no more, or nothing was sent since it was last waited for;
        else one look at the socket.
        """
        if self._lingering:
            return True
        if self._eof or self.error is not None or not (self.size or self._reading_paused or self.unturned):
            return False
        transport = self._transport
        try:
            sock = transport.get_extra_info("socket")
            if not (self.size or self._reading_paused or unread(sock)) or transport.is_closing():
                return False
            if not transport.can_write_eof() or not (transport.get_write_buffer_size() or unacknowledged(sock)):
                return False
            if not self.sent_eof:
                transport.write_eof()
        except (OSError, ValueError, AttributeError, RuntimeError):  # it has ended
            return False
        transport.note_closing()
        self._lingering = self.sent_eof = True
        self._chunks, self.size = _EMPTY, 0
        if self._reading_paused:
            self._reading_paused = False
            transport.resume_reading()
        return True

    def abort_after(self, timeout: float) -> None:
        """Let what was sent leave for so many seconds."""
        handle = self._loop.call_later(timeout, self._transport.abort)
        if self._lost_waiter is None or self._lost_waiter.done():
            self._lost_waiter = self._loop.create_future()
        self._lost_waiter.add_done_callback(lambda _: handle.cancel())

    async def lost(self) -> None:
        """Wait for connection_lost."""
        while not self.is_lost:
            if self._lost_waiter is None or self._lost_waiter.done():
                self._lost_waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._lost_waiter)


_EMPTY: Final[deque[bytes | bytearray]] = deque(maxlen=0)  # of those that have never kept anything
_NOTHING: Final = type(None)  # called, it returns None: the quickest function to do so


class _Cancelled:
    """What a task that is cancelled while it waits is woken with, once."""

    __slots__ = ("_message", "_protocol")

    def __init__(self, protocol: StreamProtocol, message: Any) -> None:
        self._protocol = protocol
        self._message = message

    def __call__(self) -> None:
        self._protocol.result = _NOTHING
        raise asyncio.CancelledError if self._message is None else asyncio.CancelledError(self._message)


def _below_uvloops_tls(inner: asyncio.Transport) -> asyncio.Transport | None:
    """What uvloop's TLS reads from, of which only the garbage collector tells; None for any other transport."""
    if type(inner).__name__ != "_SSLProtocolTransport" or not type(inner).__module__.startswith("uvloop"):
        return None
    for protocol in gc.get_referents(inner):
        if type(protocol).__name__ == "SSLProtocol":
            for found in gc.get_referents(protocol):
                if found is not inner and hasattr(found, "pause_reading"):
                    return found  # type: ignore[no-any-return]
    return None


def _raise(exc: BaseException) -> None:
    raise exc


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


def _as_bytes(item: Any) -> bytes:
    if not isinstance(item, (bytes, bytearray, memoryview)):
        raise TypeError(f"send() takes bytes, got {type(item).__name__}")
    return bytes(item)


def _real_coroutine(
    function: Callable[[Any], Generator[Any, Any, T]],
) -> Callable[[Any], types.CoroutineType[Any, Any, T]]:
    """A generator function as `async def` would make it: what it returns is a coroutine, which create_task() takes.

    As types.coroutine, which sets a flag of the code, too; but those are generators, and asyncio takes none from 3.12
    on. An `await` in place of the `yield` needs an object with __await__, a call that makes a message 10 % dearer.
    """
    code = function.__code__
    flags = code.co_flags & ~inspect.CO_GENERATOR | inspect.CO_COROUTINE
    made = types.FunctionType(code.replace(co_flags=flags), function.__globals__, function.__name__)
    return cast("Callable[[Any], types.CoroutineType[Any, Any, T]]", made)


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
        return protocol.take(max_bytes) if protocol.size else await protocol.next(max_bytes)

    def __aiter__(self) -> Self:
        return self

    @_real_coroutine
    def __anext__(self) -> Generator[Any, Any, bytes]:
        protocol = self._protocol
        if protocol.receivable:  # `protocol.wait`, the short way
            protocol.receivable = False
            protocol.unturned = 0
            protocol._asyncio_future_blocking = True
            try:
                yield protocol
            except BaseException:
                protocol.goes_on()
                raise
            data = protocol.handed
            if data is not None:
                protocol.handed = None
                protocol.receivable = True
                return data
            protocol.goes_on()
        protocol.check_receive()
        try:
            return (yield from protocol.next(_ALL).__await__())
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
            if protocol.size >= max_bytes:
                raise DelimiterNotFound(max_bytes)
            searched = max(0, protocol.size - len(delimiter) + 1)
            try:
                await protocol.more(protocol.size + 1)
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
        if not protocol.sendable:
            protocol.check_send()
        # Anything but bytes could be changed by its owner while the transport still holds it.
        self._transport.write(item if type(item) is bytes else _as_bytes(item))
        protocol.unturned = unturned = protocol.unturned + 1
        if not protocol.sendable:
            await protocol.drain()
        elif unturned >= _TURN:
            # Where writes vanish without a word, as after a reset, only the loop's turn can bring the news.
            await asyncio.sleep(0)
            protocol.unturned = 1  # there was something: see `linger`
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
        protocol.settle()
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
        protocol.closing()
        if protocol.is_lost:
            return
        if (timeout is not None and timeout <= 0) or not protocol.linger():
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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

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
    def _raw_socket(self) -> Any:
        sock = self._transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            raise ClosedResourceError
        return sock

    if not TYPE_CHECKING:
        extra = TypedAttributeProvider.extra

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        attributes = dict(_anyios_attributes(self))
        tls = self._transport.get_extra_info("ssl_object")
        if tls is not None:
            from anyio.streams.tls import TLSAttribute  # noqa: PLC0415 - most programs never need it

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


_anyios_attributes: Final[Any] = SocketStream.extra_attributes.fget  # type: ignore[attr-defined]
SocketStream.register(Connection)


def finish(connection: Connection, timeout: float) -> None:
    """Close a connection without waiting for it: what was sent has so many seconds to leave. For servers."""
    protocol, transport = connection._protocol, connection._transport  # noqa: SLF001 - not for users, so no method
    protocol.closing()
    if protocol.is_lost:
        return
    if timeout > 0 and protocol.linger():
        protocol.abort_after(timeout)
    else:
        transport.close()
        # TLS has its farewell to send and to wait for, of which the size says nothing.
        if transport.get_write_buffer_size() or transport.get_extra_info("sslcontext") is not None:
            protocol.abort_after(timeout)
