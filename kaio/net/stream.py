"""The protocol of a `Connection`: its receive buffer, its flow control, and the tasks that wait in it.

Data is handed to the receiver inside `data_received` only while it waits for any number of bytes: there it cannot be
cancelled before it gets them. Otherwise it is resumed in the next iteration and takes the bytes from the buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import ClassVar, Final, NoReturn

import anyio
from anyio import BusyResourceError

from ..errors import (
    BrokenResourceError,
    ClosedResourceError,
    DeadPeerError,
    EndOfStream,
    RememberedError,
    as_stream_error,
    remember,
)
from ..kernel.queues import take_unread, unacknowledged, unread
from .awaited import RETURN_NONE, AwaitedProtocol
from .connection import Connection
from .internals import below_tls
from .receivebuffer import EMPTY, ReceiveBuffer
from .transports import WatchedTransport

__all__ = ["StreamProtocol"]

_HIGH_WATER: Final = 128 * 1024  # bytes in the receive buffer above which reading is paused
_LOW_WATER: Final = 32 * 1024  # bytes at or below which it is resumed


class StreamProtocol(AwaitedProtocol):
    """The protocol of a `Connection`."""

    __slots__ = (
        "_drain_waiter",
        "_eof",
        "_lingering",
        "_lost_waiter",
        "_on_connect",
        "_reading_paused",
        "_transport",
        "_writing_paused",
        "buffer",
        "connection",
        "error",
        "is_closed",
        "is_lost",
        "sendable",
        "sent_eof",
    )

    def __init__(self, on_connect: Callable[[Connection], None] | None = None) -> None:
        self._asyncio_future_blocking = False
        self._callback = self._context = self.handed = None
        self._needed = self.sends_since_wait = 0
        self._woken = False
        self.receivable: bool = True
        self.result: Callable[[], None] = RETURN_NONE
        self._on_connect = on_connect  # called with the connection in connection_made
        self.buffer: ReceiveBuffer = EMPTY  # bytes received and not yet taken
        self._drain_waiter: asyncio.Future[None] | None = None  # of the sender that waits in drain()
        self._lost_waiter: asyncio.Future[None] | None = None  # of those who wait for connection_lost
        self._reading_paused = False
        self._writing_paused = False
        self._eof = False  # the peer has sent FIN
        self.sent_eof: bool = False  # this side has sent FIN, or will after what was written
        self.is_closed: bool = False  # this side has closed it
        self._lingering = False  # in a lingering close: what still arrives is discarded until the peer closes
        self.is_lost: bool = False  # connection_lost was called
        self.error: RememberedError | BaseException | None = None  # its argument, as `remember` returns it
        self.sendable: bool = True  # whether sending can write without any other check

    connection_class: ClassVar[type[Connection]] = Connection

    def _kaio_entry(self, transport: WatchedTransport) -> Connection:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self.connection: Connection = self.connection_class(transport, self)
        return self.connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        on_connect, self._on_connect = self._on_connect, None
        if on_connect is not None:
            on_connect(self.connection)

    def data_received(self, data: bytes) -> None:
        callback = self._callback
        # A read that fills the loop's buffer is followed by the next at once. Such data goes to the receive buffer,
        # so that other connections have a turn before the receiver does.
        if callback is not None and not self._needed and len(data) <= _HIGH_WATER:
            self._callback = None
            self.handed = data
            try:
                self._context.run(callback, self)  # type: ignore[union-attr]
                # From 3.12 on the task's traceback refers to this frame, which would keep the task alive.
                callback = None
                return
            except RuntimeError:
                if self.handed is None:  # raised by the task after it was resumed
                    raise
                # Refused by asyncio because another task runs, in which somebody has called data_received.
                self.handed = None
                self._callback = callback
            except (SystemExit, KeyboardInterrupt) as exc:  # uvloop does not propagate exceptions of data_received
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
        # True keeps this side open for sending. TLS has no half close, and asyncio's warns about True.
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

    def _kaio_receive_wait(self) -> tuple[object, int] | None:
        """What identifies a wait for data, a new object each time, and how much has come for it."""
        return None if self._callback is None else (self._callback, self.buffer.size)

    def _kaio_send_wait(self) -> object:
        """What identifies a wait in send(), a new object each time."""
        return self._drain_waiter

    def _kaio_ending(self, error: BaseException) -> None:
        """Called by the transport when the connection has failed and connection_lost is still to come.

        Senders get the error at once. Receivers first get what is still in the socket.
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
        """Called by `set_protocol`: mark the stream, but not the connection, closed."""
        self.is_closed = True
        self._mark_lost()
        if self._reading_paused:  # the new protocol does not know that
            self._reading_paused = False
            self._resume_transport()

    def _mark_lost(self) -> None:
        self.is_lost = self._eof = True
        self.receivable = self.sendable = False
        self._wake_receiver()
        _wake_waiter(self._drain_waiter)
        _wake_waiter(self._lost_waiter)
        del self.connection  # a reference cycle
        self._context = None  # another: `current_connection` is in it

    def _store_unread(self) -> None:
        """Read what is left in the socket. A loop whose write fails closes it without that."""
        transport = self._transport
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if transport.get_extra_info("sslcontext") is None:
                data = take_unread(transport.get_extra_info("socket"))
                if data:
                    self.store(data)

    def update_flags(self) -> None:
        """Update `receivable` and `sendable`."""
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

    # -- called by Connection

    @property
    def is_over(self) -> bool:
        """Whether it has ended or been closed, or the peer has sent EOF."""
        return self._eof or self.is_closed or self.is_lost or self.error is not None

    def raise_error(self) -> NoReturn:
        """Raise the error that ended the connection."""
        error = as_stream_error(self.error)
        assert error is not None
        try:
            raise error.with_traceback(None)
        finally:
            del error  # its traceback refers to this frame

    def check_receive(self) -> None:
        """Raise ClosedResourceError or BusyResourceError where receiving is not possible."""
        if self.is_closed:
            raise ClosedResourceError
        if self._callback is not None or self._woken:  # `receiving`, without the call
            raise BusyResourceError("receiving from")

    def check_wait(self) -> None:
        """Before a wait: raise EndOfStream or the connection's error if no more data will come; resume reading."""
        if self.is_closed:
            raise ClosedResourceError
        if self.is_lost and self.error is not None:
            self.raise_error()
        if self._eof and self.error is None:
            raise EndOfStream
        if self._reading_paused:
            self._resume_reading()

    async def wait_for_bytes(self, needed: int) -> None:
        """Wait until the buffer has that many bytes. Raises EndOfStream or the error if they will not come."""
        while self.buffer.size < needed:
            self.check_wait()
            await self.wait(needed)

    async def receive_next(self, most: int) -> bytes:
        """Wait for data and return at most that many bytes of it."""
        while not self.buffer.size:
            self.check_wait()
            data = await self.wait(0)
            if data is not None:
                if len(data) <= most:
                    return data
                self.store(data)
        return self.take(most)

    def store(self, data: bytes) -> None:
        """Put data into the receive buffer."""
        if self._lingering:
            return
        if self.buffer is EMPTY:
            self.buffer = ReceiveBuffer()
        self.buffer.append(data)
        self.receivable = False

    def _pause_reading(self) -> None:
        """Pause reading: with uvloop's TLS first the transport below the TLS layer, which is paused once it is empty.

        An EOF that comes while that layer is paused loses part of the data that it holds.
        """
        self._reading_paused = True
        below = below_tls(self._transport.loop_transport)
        if below is None:
            self._transport.pause_reading()
        else:
            with contextlib.suppress(RuntimeError):  # it is closing
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
        below = below_tls(self._transport.loop_transport)
        if below is not None:
            with contextlib.suppress(RuntimeError):  # it is closing
                below.resume_reading()

    def take(self, most: int) -> bytes:
        """Take at most that many bytes from the buffer, up to the end of its first chunk."""
        data = self.buffer.take(most)
        if self._reading_paused:
            self._resume_if_low()
        elif not self.buffer.size:
            self.update_flags()
        return data

    def take_exactly(self, count: int) -> bytes:
        """Take that many bytes from the buffer."""
        data = self.buffer.take_exactly(count)
        if self._reading_paused:
            self._resume_if_low()
        elif not self.buffer.size:
            self.update_flags()
        return data

    def _resume_if_low(self) -> None:
        """Resume reading if the buffer is at its low-water mark."""
        if self.buffer.size <= _LOW_WATER:
            self._resume_reading()

    def check_send(self) -> None:
        """Raise the connection's error, ClosedResourceError or BusyResourceError where sending is not possible."""
        if self.error is not None:
            self.raise_error()
        if self.is_closed:
            raise ClosedResourceError
        if self.is_lost:
            raise BrokenResourceError
        if self.sent_eof:
            raise anyio.ClosedResourceError  # not an end of the connection: the peer may go on sending
        if self._drain_waiter is not None:
            raise BusyResourceError("sending to")

    async def drain(self) -> None:
        """Wait until the transport's buffer has room. Raises what `check_send` raises."""
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
        """Mark the stream closed and wake all who wait."""
        self.is_closed = True
        self.receivable = self.sendable = False
        self._wake_receiver()
        _wake_waiter(self._drain_waiter)
        if self._reading_paused:
            self._resume_below()  # TLS has to read the peer's close_notify

    def start_lingering_close(self) -> bool:
        """Start a lingering close if an ordinary one could lose data that was sent; return whether it was started.

        Closing a socket with unread input sends RST, and what the peer has not acknowledged until then is lost. So, as
        nginx's lingering_close does: send FIN, and discard what arrives until the peer closes as well. The socket is
        asked only if something was sent since data was last waited for, and the peer has not sent FIN.
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
        except (OSError, ValueError, AttributeError, RuntimeError):  # the socket is closed
            return False
        transport.mark_closing()
        self._lingering = self.sent_eof = True
        self.buffer = EMPTY
        if self._reading_paused:
            self._reading_paused = False
            transport.resume_reading()
        return True

    def abort_after(self, timeout: float) -> None:
        """Abort the transport after that many seconds, unless connection_lost comes first."""
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


def _raise(exc: BaseException) -> None:
    raise exc


def _wake_waiter(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
