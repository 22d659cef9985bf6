"""`Heartbeat`: signs of life of the far application, through proxies that end TCP and answer for it.

Rules kept here: they wait in a wheel of their own, so that there is one timer a loop, no task for a connection and no
work for a message: when data was received last, the kernel tells. Only where it does not (Unix sockets, other systems),
and where contents are looked at, is each piece of data seen on its way to the protocol. Each look is at most a tick of
the wheel late, so the question is asked two ticks early: the sum of both times holds.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import inspect
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from ..errors import ContentTimeoutError
from ..kernel.options import SocketLike, platform
from ..liveness.pulse import Act, Pulse, Signs
from ..policy import check_timeout
from .counters import Counters
from .wheel import TICK, Wheel

__all__ = ["BeatingConnection", "Heartbeat", "Heartbeats"]

_NEVER: Final = float("inf")
_CLOSED: Final = (OSError, ValueError, AttributeError, RuntimeError)  # what a socket or transport raises once closed
_SHORT: Final = 1.0  # seconds until the next look at a connection whose end is being reported


@dataclasses.dataclass(frozen=True, slots=True)
class Heartbeat:
    """How the far application is asked whether it is there, and how long it may be silent. Times in seconds.

    Raises TypeError and ValueError, which name the field.
    """

    send: bytes | Callable[[], object] | None = None
    """What is sent: bytes, or a function that is called and returns bytes, or sends by itself and returns None, or is
    asynchronous. It comes between two sends of the application's, so each of those should be a whole message. None:
    nothing is sent, and only `content_timeout` counts."""
    every: float = 30.0
    """It is sent when no data was received for so long (or up to half a second less)."""
    within: float = 10.0
    """And when no data is received for so long after that, the peer is dead: `DeadPeerError`, cause HEARTBEAT. So a
    death is found within the sum of both."""
    _: dataclasses.KW_ONLY
    content_timeout: float | None = None
    """How long no content may be received; then the connection is aborted: `ContentTimeoutError`. None: for ever."""
    is_content: Callable[[bytes], object] | None = None
    """Whether a piece of received data, of whatever size it comes in, counts as content; None: any data does."""

    def __post_init__(self) -> None:
        send: Any = self.send
        if isinstance(send, (bytearray, memoryview)):
            send = bytes(send)
            object.__setattr__(self, "send", send)  # the owner may change it
        if not (send is None or isinstance(send, bytes) or callable(send)):
            raise TypeError(f"send={send!r}: must be bytes, or a function that returns bytes or sends by itself")
        if send == b"":
            raise ValueError("send=b'': must not be empty")
        for name in ("every", "within"):
            if getattr(self, name) is None:
                raise TypeError(f"{name} must be a number of seconds, got None")
            object.__setattr__(self, name, check_timeout(name, getattr(self, name)))
        object.__setattr__(self, "content_timeout", check_timeout("content_timeout", self.content_timeout))
        if self.is_content is not None and not callable(self.is_content):
            raise TypeError(f"is_content={self.is_content!r}: must be a function of bytes")
        if self.is_content is not None and self.content_timeout is None:
            raise ValueError("is_content is only meaningful with content_timeout")
        if send is None and self.content_timeout is None:
            raise ValueError("send=None: is only meaningful with content_timeout")


class BeatingConnection(Protocol):
    """A connection as its heartbeat knows it."""

    @property
    def peername(self) -> Any: ...

    @property
    def ended(self) -> bool: ...

    def get_socket(self) -> SocketLike: ...

    def is_closing(self) -> bool: ...

    def is_listening(self) -> bool:
        """Return whether data can come: the application reads, and the peer has not sent EOF."""
        ...

    def unread(self) -> int: ...

    def unacknowledged(self) -> int: ...

    def get_write_buffer_size(self) -> int: ...

    def show_data(self) -> None:
        """Call `Heartbeats.on_data` from now on with all data that is received. Raises TypeError."""
        ...

    def ask(self, data: bytes) -> None:
        """Write a question."""
        ...

    def tells_silence(self) -> bool:
        """Return whether the kernel tells when data was received last."""
        ...

    def end_silent(self, silence: float) -> None:
        """End the connection: the far application has given no sign of life for so long."""
        ...

    def end_dead(self, exc: OSError, cause: None, sample: None) -> None: ...


class _Beat:
    """The heartbeat of one connection."""

    __slots__ = (
        "asking",
        "connection",
        "content_at",
        "context",
        "due",
        "heartbeat",
        "kernel_tells",
        "pulse",
        "received_at",
    )

    def __init__(self, connection: BeatingConnection, heartbeat: Heartbeat, kernel_tells: bool, now: float) -> None:
        self.connection = connection
        self.heartbeat = heartbeat
        self.kernel_tells = kernel_tells  # when data was received; else `received_at` does
        self.received_at = self.content_at = now
        self.pulse = None if heartbeat.send is None else Pulse(heartbeat.every, heartbeat.within, 2 * TICK, now)
        self.context: contextvars.Context = contextvars.copy_context()  # for the caller's functions
        self.asking: asyncio.Future[object] | None = None  # an asynchronous `send` that has not returned
        self.due: int = -1  # set by the wheel


class Heartbeats:
    """The heartbeats of the connections of one loop."""

    def __init__(self, loop: weakref.ref[asyncio.AbstractEventLoop], counters: Counters) -> None:
        self._loop = loop
        self._wheel: Wheel[_Beat] = Wheel(loop, counters, self._look)
        self._beats: dict[BeatingConnection, _Beat] = {}

    def __bool__(self) -> bool:
        return bool(self._beats)

    def set(self, connection: BeatingConnection, heartbeat: Heartbeat | None) -> None:
        """Give a connection a heartbeat, which counts from now; None takes it away."""
        loop = self._loop()
        if loop is None or connection.ended:
            return
        if heartbeat is None:
            self.discard(connection)
            return
        kernel_tells = connection.tells_silence()
        if heartbeat.content_timeout is not None or not kernel_tells:
            connection.show_data()
        self.discard(connection)
        self._beats[connection] = beat = _Beat(connection, heartbeat, kernel_tells, time.monotonic())
        self._look(beat, loop, loop.time())

    def of(self, connection: BeatingConnection) -> Heartbeat | None:
        """Return the heartbeat of a connection."""
        beat = self._beats.get(connection)
        return None if beat is None else beat.heartbeat

    def on_new_protocol(self, connection: BeatingConnection) -> None:
        """Another protocol has taken a connection over: it is to be shown the data, too."""
        beat = self._beats.get(connection)
        if beat is not None and (beat.heartbeat.content_timeout is not None or not beat.kernel_tells):
            connection.show_data()

    def on_data(self, connection: BeatingConnection, data: bytes) -> None:
        """A connection has received data, which its protocol gets next."""
        beat = self._beats.get(connection)
        if beat is None:
            return
        beat.received_at = time.monotonic()
        is_content = beat.heartbeat.is_content
        try:
            if is_content is None or beat.context.run(is_content, data):
                beat.content_at = beat.received_at
        except Exception as exc:
            beat.content_at = beat.received_at  # no reason to end the connection
            self._complain("is_content of a heartbeat failed", exc)

    def discard(self, connection: BeatingConnection) -> None:
        """A connection has ended: forget it."""
        beat = self._beats.pop(connection, None)
        if beat is not None:
            self._wheel.discard(beat)
            if beat.asking is not None:
                beat.asking.cancel()

    def clear(self) -> None:
        """The loop is closed: forget everything."""
        self._wheel.clear()
        self._beats.clear()

    # -- a look

    def _look(self, beat: _Beat, loop: asyncio.AbstractEventLoop, _: float) -> None:
        now = time.monotonic()  # not the loop's, which may stand still for as long as a callback takes
        try:
            ahead = min(self._check_pulse(beat, now), self._check_content(beat, now))
        except _CLOSED:  # its end is about to be reported
            ahead = _SHORT
        if beat.due < 0 and self._beats.get(beat.connection) is beat:  # a callback may have changed that
            self._wheel.add(beat, loop, loop.time() + ahead)

    def _check_pulse(self, beat: _Beat, now: float) -> float:
        """Ask for a sign of life, or end the connection; return the seconds until the next look."""
        pulse, connection = beat.pulse, beat.connection
        if pulse is None:
            return _NEVER
        received_at = beat.received_at
        if beat.kernel_tells:
            silence = platform.last_data_recv(connection.get_socket())
            received_at = now if silence is None else now - silence
        ahead = pulse.rest(received_at, now)
        if ahead > 0:
            return ahead
        signs = _signs(beat)
        act, ahead = pulse.look(signs, now)
        if act is Act.ASK:
            if connection.is_closing():
                return _SHORT
            pulse.asked(signs, now)
            self._ask(beat)
        elif act is Act.GIVE_UP:
            connection.end_silent(now - received_at)
        return ahead

    def _ask(self, beat: _Beat) -> None:
        send = beat.heartbeat.send
        try:
            asked = send if isinstance(send, bytes) else beat.context.run(send)  # type: ignore[arg-type]
            if inspect.isawaitable(asked):
                task = beat.context.run(asyncio.ensure_future, _wait_for(asked))
                beat.asking = task
                task.add_done_callback(lambda task: self._on_asked(beat, task))
            elif asked is not None:
                beat.connection.ask(asked)  # type: ignore[arg-type]
        except Exception as exc:
            self._on_failure(beat, exc)

    def _on_asked(self, beat: _Beat, task: asyncio.Future[object]) -> None:
        beat.asking = None
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._on_failure(beat, exc)

    def _on_failure(self, beat: _Beat, exc: BaseException) -> None:
        """The application has not asked: its peer owes no answer."""
        if beat.pulse is not None:
            beat.pulse.begin_anew(time.monotonic())
        if not beat.connection.is_closing():
            self._complain("send of a heartbeat failed", exc)

    def _complain(self, message: str, exc: BaseException) -> None:
        loop = self._loop()
        if loop is not None:
            loop.call_exception_handler({"message": message, "exception": exc})

    def _check_content(self, beat: _Beat, now: float) -> float:
        """End a connection whose content does not come; return the seconds until the next look."""
        timeout, connection = beat.heartbeat.content_timeout, beat.connection
        if timeout is None:
            return _NEVER
        if not connection.is_listening() or connection.unread():
            beat.content_at = now
        left = beat.content_at + timeout - now
        if left > 0:
            return left
        connection.end_dead(ContentTimeoutError(timeout, connection.peername), None, None)
        return _SHORT


def _signs(beat: _Beat) -> Signs:
    connection = beat.connection
    deaf = not connection.is_listening() or connection.unread() > 0
    queued = connection.get_write_buffer_size() + connection.unacknowledged()
    acknowledged: int | None = queued  # what is left shrinks
    if queued and beat.kernel_tells:
        acknowledged = platform.tcp_info(connection.get_socket()).bytes_acked
    return Signs(deaf, queued, acknowledged, beat.asking is not None)


async def _wait_for(asking: Awaitable[object]) -> object:
    return await asking
