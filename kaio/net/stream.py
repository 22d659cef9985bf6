"""The loop's side of a `Connection`: what it has received, and which tasks wait for what.

A task that waits for data waits for the protocol itself, and goes on inside `data_received`: a future, its callback and
the loop's next turn would cost as much as all else together. It is handed the bytes only there, where nothing can come
between; otherwise it is woken in the loop's next turn, and takes what is in the buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import types
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Final, NoReturn

from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError, EndOfStream

from ..errors import DeadPeerError, RememberedError, as_stream_error, remember
from ..kernel.descriptors import take_unread, unacknowledged, unread
from .connection import Connection
from .protocols import KeepaliveProtocol
from .receivebuffer import EMPTY, ReceiveBuffer
from .transports import WatchedTransport

__all__ = ["StreamProtocol"]

_HIGH_WATER: Final = 128 * 1024  # bytes received and not yet asked for, above which reading is paused
_LOW_WATER: Final = 32 * 1024  # and below which it is resumed


class StreamProtocol(KeepaliveProtocol):
    """The loop's side of a `Connection`: its buffer, and who waits for what."""

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_drain_waiter",
        "_eof",
        "_lingering",
        "_loop",
        "_lost_waiter",
        "_needed",
        "_on_connect",
        "_reading_paused",
        "_transport",
        "_woken",
        "_writing_paused",
        "buffer",
        "connection",
        "error",
        "handed",
        "is_closed",
        "is_lost",
        "receivable",
        "result",
        "sendable",
        "sends_since_wait",
        "sent_eof",
    )

    def __init__(self, on_connect: Callable[[Connection], None] | None = None) -> None:
        self._on_connect = on_connect  # called with the connection once it stands
        self.buffer = EMPTY  # what was received and not yet asked for
        self._needed = 0  # how many the receiver waits for; 0: as many as come next
        self._woken = False  # whether the task that waited is to go on in the loop's next turn
        self._callback: Callable[[StreamProtocol], object] | None = None  # wakes the task that waits; None: none waits
        self._context: Context | None = None  # in which it is woken
        self.result: Callable[[], None] = _RETURN_NONE  # what it is woken with
        self.handed: bytes | None = None  # what it was handed
        self._asyncio_future_blocking = False
        self._drain_waiter: asyncio.Future[None] | None = None  # the sender that waits
        self._lost_waiter: asyncio.Future[None] | None = None  # who waits for connection_lost
        self.sends_since_wait = 0  # sends since data was waited for, or since the loop had its turn
        self._reading_paused = False
        self._writing_paused = False
        self._eof = False  # the peer will send no more
        self.sent_eof = False  # we will send no more
        self.is_closed = False  # we have closed it
        self._lingering = False  # we have, and throw away what the peer still sends until it closes, too
        self.is_lost = False  # connection_lost has come
        self.error: RememberedError | BaseException | None = None  # what it came with, as `remember` keeps it
        self.receivable = True  # whether a receiver need only wait: none does, and nothing is here or has happened
        self.sendable = True  # whether a sender need only write

    def _kaio_entry(self, transport: WatchedTransport) -> Connection:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self.connection: Connection = Connection(transport, self)
        return self.connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        on_connect, self._on_connect = self._on_connect, None
        if on_connect is not None:
            on_connect(self.connection)

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
        self.store(data)
        if callback is not None:
            if self.buffer.size >= self._needed:
                self._wake_receiver()
        elif self.buffer.size > _HIGH_WATER and not self._reading_paused and not self.is_closed:
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
                self._wake_receiver()
            except (SystemExit, KeyboardInterrupt) as exc:
                self._loop.call_soon(_raise, exc)
        # True keeps our half open. TLS has no halves and warns when asked to.
        return not self._lingering and self._transport.get_extra_info("sslcontext") is None

    def pause_writing(self) -> None:
        self._writing_paused = True
        self.sendable = False

    def resume_writing(self) -> None:
        self._writing_paused = False
        self.update_flags()
        _wake_waiter(self._drain_waiter)

    def peer_dead(self, error: DeadPeerError) -> None:
        self._kaio_ending(error)

    def _kaio_ending(self, error: BaseException) -> None:
        """The transport knows how it will end, before the loop does.

        A sender is told at once; a receiver first gets what is still in the socket, and then connection_lost.
        """
        self.error = remember(error)
        self.sendable = False
        _wake_waiter(self._drain_waiter)
        if self._reading_paused and self.receiving:
            self._resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self.is_closed:
            self._store_unread()
        self.error = remember(exc)
        self._mark_lost()

    def _kaio_handed_over(self, _: asyncio.BaseProtocol) -> None:
        """Another protocol takes the connection over: to this stream, and to no one else, it is closed."""
        self.is_closed = True
        self._mark_lost()
        if self._reading_paused:  # of which the other knows nothing
            self._reading_paused = False
            self._resume_transport()

    def _mark_lost(self) -> None:
        self.is_lost = self._eof = True
        self.receivable = self.sendable = False
        self._wake_receiver()
        _wake_waiter(self._drain_waiter)
        _wake_waiter(self._lost_waiter)
        del self.connection  # so that what has ended goes away without the garbage collector's help

    def _store_unread(self) -> None:
        """Take what is left in the socket: a loop whose write fails closes at once, whatever had arrived."""
        transport = self._transport
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if transport.get_extra_info("sslcontext") is None:
                data = take_unread(transport.get_extra_info("socket"))
                if data:
                    self.store(data)

    def update_flags(self) -> None:
        """Something has changed: see what the short ways have to know."""
        self.receivable = not (
            self.buffer.size
            or self._eof
            or self.is_closed
            or self._reading_paused
            or self._callback is not None
            or self._woken
        )
        self.sendable = not (
            self.is_lost
            or self.is_closed
            or self.sent_eof
            or self._writing_paused
            or self.error is not None
            or self._drain_waiter is not None
        )

    # -- the task that waits for data: to asyncio this is the future for which it waits

    @types.coroutine
    def wait(self, needed: int) -> Generator[object, None, bytes | None]:
        """Wait for the next data, which is handed over, or until the buffer has that many bytes or its end is here."""
        self._needed = needed
        self.sends_since_wait = 0  # the loop has its turn
        self.receivable = False
        self._asyncio_future_blocking = True
        try:
            yield self
        finally:
            self._needed = 0
            self.stop_waiting()
        handed, self.handed = self.handed, None
        return handed

    @property
    def receiving(self) -> bool:
        """Whether a task waits for data, or was woken and has not gone on yet."""
        return self._callback is not None or self._woken

    def stop_waiting(self) -> None:
        """The task that waited does not wait any more."""
        self._callback = None
        self._woken = False
        self.update_flags()

    def add_done_callback(
        self, callback: Callable[[StreamProtocol], object], *, context: Context | None = None
    ) -> None:
        """The task says how it is to be woken."""
        self._callback = callback
        self._context = context

    def done(self) -> bool:
        """Whether the task is woken; anyio asks."""
        return self._callback is None

    def cancel(self, msg: object = None) -> bool:
        """The task is cancelled."""
        if self._callback is None:  # it is woken already: then it cancels itself when it goes on
            return False
        self.result = _Cancelled(self, msg)
        self._wake_receiver()
        return True

    def _wake_receiver(self) -> None:
        """Let the task go on in the loop's next turn."""
        callback, self._callback = self._callback, None
        if callback is not None:
            self._woken = True
            self._loop.call_soon(callback, self, context=self._context)

    # -- for Connection

    def raise_error(self) -> NoReturn:
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
        if self._callback is not None or self._woken:  # `receiving`, without the call
            raise BusyResourceError("receiving from")

    def check_wait(self) -> None:
        """Before waiting: raise EndOfStream or the error when no more will come."""
        if self.is_closed:
            raise ClosedResourceError
        if self.is_lost and self.error is not None:
            self.raise_error()
        if self._eof and self.error is None:
            raise EndOfStream
        if self._reading_paused:
            self._resume_reading()

    async def wait_for_bytes(self, needed: int) -> None:
        """Wait until that many bytes are here; raise EndOfStream or the error when they will not come."""
        while self.buffer.size < needed:
            self.check_wait()
            await self.wait(needed)

    async def receive_next(self, most: int) -> bytes:
        """Wait for data, and take at most that many bytes of it."""
        while not self.buffer.size:
            self.check_wait()
            data = await self.wait(0)
            if data is not None:
                if len(data) <= most:
                    return data
                self.store(data)
        return self.take(most)

    def store(self, data: bytes) -> None:
        """What nobody has taken."""
        if self._lingering:
            return
        if self.buffer is EMPTY:
            self.buffer = ReceiveBuffer()
        self.buffer.append(data)
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
        self.update_flags()
        if not self.is_lost and not self.is_closed:
            self._resume_transport()

    def _resume_transport(self) -> None:
        self._transport.resume_reading()
        self._resume_below()

    def _resume_below(self) -> None:
        below = _below_uvloops_tls(self._transport.loop_transport)
        if below is not None:
            with contextlib.suppress(RuntimeError):  # closing
                below.resume_reading()

    def take(self, most: int) -> bytes:
        """At most that many of the bytes that are here, up to the end of the first chunk."""
        data = self.buffer.take(most)
        if self._reading_paused:
            self._resume_if_low()
        elif not self.buffer.size:
            self.update_flags()
        return data

    def take_exactly(self, count: int) -> bytes:
        """That many of the bytes that are here, across chunks."""
        data = self.buffer.take_exactly(count)
        if self._reading_paused:
            self._resume_if_low()
        elif not self.buffer.size:
            self.update_flags()
        return data

    def _resume_if_low(self) -> None:
        """Something was taken from the buffer: read on when there is room again."""
        if self.buffer.size <= _LOW_WATER:
            self._resume_reading()

    def check_send(self) -> None:
        """Raise what stands in the way of sending."""
        if self.error is not None:
            self.raise_error()
        if self.is_closed:
            raise ClosedResourceError
        if self.is_lost:
            raise BrokenResourceError
        if self.sent_eof:
            raise ClosedResourceError
        if self._drain_waiter is not None:
            raise BusyResourceError("sending to")

    async def drain(self) -> None:
        """Wait until the transport takes more; raise when it never will."""
        while self._writing_paused:
            if self.is_lost or self.is_closed or self.error is not None:
                break
            self._drain_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._drain_waiter
            finally:
                self._drain_waiter = None
                self.update_flags()
        if self.is_lost or self.is_closed or self.error is not None:
            self.check_send()

    def mark_closed(self) -> None:
        """We close: whoever waits is told."""
        self.is_closed = True
        self.receivable = self.sendable = False
        self._wake_receiver()
        _wake_waiter(self._drain_waiter)
        if self._reading_paused:
            self._resume_below()  # TLS waits for the peer's farewell

    def start_lingering_close(self) -> bool:
        """Close in a way that a peer who still sends gets the whole answer; False: an ordinary close is as good.

        A socket that is closed with input unread sends a reset, and what was not acknowledged until then is lost. So,
        as nginx's lingering_close: say that no more will be sent, and throw away what comes until the peer closes, too.
        Costs nothing where the peer has said that it sends no more, or nothing was sent since it was last waited for;
        else one look at the socket.
        """
        if self._lingering:
            return True
        if (
            self._eof
            or self.error is not None
            or not (self.buffer.size or self._reading_paused or self.sends_since_wait)
        ):
            return False
        transport = self._transport
        try:
            sock = transport.get_extra_info("socket")
            if not (self.buffer.size or self._reading_paused or unread(sock)) or transport.is_closing():
                return False
            if not transport.can_write_eof() or not (transport.get_write_buffer_size() or unacknowledged(sock)):
                return False
            if not self.sent_eof:
                transport.write_eof()
        except (OSError, ValueError, AttributeError, RuntimeError):  # it has ended
            return False
        transport.mark_closing()
        self._lingering = self.sent_eof = True
        self.buffer = EMPTY
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

    async def wait_lost(self) -> None:
        """Wait for connection_lost."""
        while not self.is_lost:
            if self._lost_waiter is None or self._lost_waiter.done():
                self._lost_waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._lost_waiter)


_RETURN_NONE: Final = type(None)  # called, it returns None: the quickest function to do so


class _Cancelled:
    """What a task that is cancelled while it waits is woken with, once."""

    __slots__ = ("_message", "_protocol")

    def __init__(self, protocol: StreamProtocol, message: object) -> None:
        self._protocol = protocol
        self._message = message

    def __call__(self) -> None:
        self._protocol.result = _RETURN_NONE
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


def _wake_waiter(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
