"""Idle and send timeouts: connections that end because nothing was received, or nothing sent was acknowledged.

Rules kept here: they wait in a wheel of their own, so that there is one timer a loop and no work for a message, and
connections without a timeout are not in it. A connection is never ended before its time, and at most a quarter of it
and half a second (two ticks of the wheel) later.

What is looked at differs. A stream says for what its receiver waits: a handler that works is not waiting, and the same
wait at two looks means that nothing was received between them. So does another wait, when the kernel says so: of a
handler that waits again and again for a while. Of other protocols only the kernel knows when data was received last.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, Final, Protocol

from ..errors import IdleTimeoutError, SendTimeoutError
from ..kernel.options import SocketLike, platform
from ..kernel.tcpinfo import TcpInfo
from .counters import Counters
from .wheel import Wheel

__all__ = ["NOT_A_STREAM", "TimedConnection", "Timeouts"]

NOT_A_STREAM: Final = object()
"""What a connection says that cannot tell whether somebody waits for data."""

_LOOKS: Final = 4  # in a timeout
_JIFFIES: Final = 0.05  # seconds by which the kernel's clock, in steps of up to 10 ms, and the loop's may differ
_CLOSED: Final = (OSError, ValueError, AttributeError, RuntimeError)  # what a socket or transport raises once closed


class TimedConnection(Protocol):
    """A connection as its timeouts know it."""

    @property
    def peername(self) -> Any: ...

    @property
    def ended(self) -> bool: ...

    def get_socket(self) -> SocketLike: ...

    def receive_wait(self) -> Any:
        """Return what identifies the wait for data, and how much has come for it; None when nobody waits."""
        ...

    def send_wait(self) -> object:
        """Return what identifies a wait until data was sent; None when nobody waits."""
        ...

    def is_listening(self) -> bool:
        """Return whether data can come: the application reads, and the peer has not sent EOF."""
        ...

    def unread(self) -> int:
        """Return the bytes that the socket has received, and the loop has not read."""
        ...

    def unacknowledged(self) -> int:
        """Return the bytes that the socket holds until they are acknowledged."""
        ...

    def get_write_buffer_size(self) -> int: ...

    def end_dead(self, exc: OSError, cause: None, sample: TcpInfo | None) -> None: ...


class _Timed:
    """The timeouts of one connection, and what was seen at the last look."""

    __slots__ = ("acknowledged", "connection", "due", "idle", "looked", "send", "stalled_since", "wait", "waits_since")

    def __init__(self, connection: TimedConnection, idle: float | None, send: float | None, now: float) -> None:
        self.connection = connection
        self.due: int = -1  # set by the wheel
        self.begin(idle, send, now)

    def begin(self, idle: float | None, send: float | None, now: float) -> None:
        """Count from now."""
        self.idle = idle
        self.send = send
        self.wait: tuple[object, int] | None = None
        self.waits_since = self.stalled_since = self.looked = now
        self.acknowledged: object = None  # what tells that something was acknowledged; None: nothing waits


class Timeouts:
    """The idle and send timeouts of the connections of one loop."""

    def __init__(self, loop: weakref.ref[asyncio.AbstractEventLoop], counters: Counters) -> None:
        self._loop = loop
        self._wheel: Wheel[_Timed] = Wheel(loop, counters, self._look)
        self._timed: dict[TimedConnection, _Timed] = {}

    def __bool__(self) -> bool:
        return bool(self._timed)

    def of(self, connection: TimedConnection) -> tuple[float | None, float | None]:
        """Return the idle and the send timeout of a connection."""
        timed = self._timed.get(connection)
        return (None, None) if timed is None else (timed.idle, timed.send)

    def set(self, connection: TimedConnection, idle: float | None, send: float | None) -> None:
        """Set both timeouts of a connection, which count from now."""
        loop = self._loop()
        if loop is None or connection.ended:
            return
        now = loop.time()
        timed = self._timed.get(connection)
        if timed is not None:
            self._wheel.discard(timed)
        if idle is None and send is None:
            self._timed.pop(connection, None)
            return
        if timed is None:
            self._timed[connection] = timed = _Timed(connection, idle, send, now)
        else:
            timed.begin(idle, send, now)
        self._wheel.add(timed, loop, now + min(each for each in (idle, send) if each is not None) / _LOOKS)

    def on_resume(self, connection: TimedConnection) -> None:
        """A connection reads again: what it has not read meanwhile does not count against its peer."""
        timed, loop = self._timed.get(connection), self._loop()
        if timed is not None and loop is not None:
            timed.waits_since = loop.time()

    def discard(self, connection: TimedConnection) -> None:
        """A connection has ended: forget it."""
        timed = self._timed.pop(connection, None)
        if timed is not None:
            self._wheel.discard(timed)

    def clear(self) -> None:
        """The loop is closed: forget everything."""
        self._wheel.clear()
        self._timed.clear()

    def _look(self, timed: _Timed, loop: asyncio.AbstractEventLoop, now: float) -> None:
        try:
            at = min(_check_idle(timed, now), _check_send(timed, now))
            timed.looked = now
        except _CLOSED:  # its end is about to be reported
            at = now + 1.0
        if timed.due < 0 and self._timed.get(timed.connection) is timed:  # a callback may have changed that
            self._wheel.add(timed, loop, at)


_NEVER: Final = float("inf")


def _check_idle(timed: _Timed, now: float) -> float:
    """End a connection that is idle for too long; return when to look again."""
    idle, connection = timed.idle, timed.connection
    if idle is None:
        return _NEVER
    wait = connection.receive_wait()
    since = _protocol_idle_since(timed, now) if wait is NOT_A_STREAM else _stream_idle_since(timed, wait, now)
    if now - since < idle:
        return min(now + idle / _LOOKS, since + idle)
    if connection.get_write_buffer_size() or connection.unacknowledged() or connection.unread():
        return now + idle / _LOOKS  # a matter of the send timeout, or of data that has come in this moment
    connection.end_dead(IdleTimeoutError(idle, connection.peername), None, None)
    return now + 1.0


def _protocol_idle_since(timed: _Timed, now: float) -> float:
    """Return since when a protocol that listens has received nothing; now when it does not listen."""
    if not timed.connection.is_listening():
        timed.waits_since = now
        return now
    received = platform.tcp_info(timed.connection.get_socket()).last_data_recv or 0.0
    return max(timed.waits_since, now - received)


def _stream_idle_since(timed: _Timed, wait: tuple[object, int] | None, now: float) -> float:
    """Return since when somebody has waited for data without receiving any; now when nobody waits."""
    if wait is None or not (_is_same(wait, timed.wait) or _goes_on(timed, wait, now)):
        timed.waits_since = now
    # What has come and was not read yet ends the wait: the kernel's clock alone would take it for something older.
    timed.wait = None if wait is None or timed.connection.unread() else wait
    return timed.waits_since


def _is_same(wait: tuple[object, int], before: tuple[object, int] | None) -> bool:
    """Return whether a wait is the one that was seen before. Each wait has its own object, which is kept till then."""
    return before is not None and wait[0] is before[0] and wait[1] == before[1]


def _goes_on(timed: _Timed, wait: tuple[object, int], now: float) -> bool:
    """Return whether a wait is another one, and nothing was received since the last look, when somebody waited, too."""
    if timed.wait is None or wait[1] != timed.wait[1]:
        return False
    sock = timed.connection.get_socket()
    if not platform.is_tcp(sock):
        return False
    received = platform.tcp_info(sock).last_data_recv
    return received is not None and received > now - timed.looked + _JIFFIES


def _check_send(timed: _Timed, now: float) -> float:
    """End a connection to which sending makes no progress for too long; return when to look again."""
    send, connection = timed.send, timed.connection
    if send is None:
        return _NEVER
    buffered, queued = connection.get_write_buffer_size(), connection.unacknowledged()
    acknowledged: object = None
    if buffered or queued:
        sock = connection.get_socket()
        if platform.is_tcp(sock):
            acknowledged = platform.tcp_info(sock).bytes_acked
        else:  # what is left shrinks while the same sender waits
            wait = connection.send_wait()
            acknowledged = None if wait is None else (wait, buffered, queued)
    if acknowledged is None or acknowledged != timed.acknowledged:
        timed.acknowledged, timed.stalled_since = acknowledged, now
        return now + send / _LOOKS
    if now - timed.stalled_since < send:
        return min(now + send / _LOOKS, timed.stalled_since + send)
    connection.end_dead(SendTimeoutError(send, connection.peername), None, None)
    return now + 1.0
