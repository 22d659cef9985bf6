"""The monitor: watches the connections of one event loop, for what the kernel and the loop leave out.

The *wheel* has a connection looked at when it could be in trouble: half an interval after its first probe went out if
nothing was heard since the last look, and once an interval while the peer is suspect. The *error watch* reports the
kernel's errors of connections that the loop no longer listens to, because their reading was paused or their peer closed
its half.

A connection enters either after it has lived for a second: most of a busy server's do not.

Rules kept here: one timer a loop, not one a connection; no look before its time, so no more of them than connections
divided by their idle time; whatever ends is out of every table at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Final, Literal

from ..errors import Cause, KeepaliveError
from ..kernel.options import platform
from ..liveness.health import Health, State, judge
from ..liveness.limits import Limits
from ..liveness.watch import Decision, Watch, look_at_rest
from . import owners
from .counters import Counters, Event
from .deadline import cap_backoff
from .death_log import DeathLog
from .error_watch import ErrorWatch
from .heartbeats import Heartbeats
from .timeouts import Timeouts
from .watched import SuspectDescriptor, WatchedConnection
from .wheel import TURN, Wheel

__all__ = ["Monitor", "close_monitor", "get_monitor"]

logger: Final = logging.getLogger("kaio")

_AT_REST: Final = Decision(State.ALIVE, None, 0.0)  # of a connection with which all is well
_ADMITTED_AFTER: Final = 1.0  # seconds; no policy has a look before, unless its user timeout is shorter


class Monitor:
    """Watches the connections of one loop. `kaio.get_monitor()` gives the running loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self.counters: Final = Counters()
        self.hook: Callable[[Event], None] | None = None
        """Called with every suspicion, recovery and death, for metrics. It must not raise, and not take long."""
        self._wheel: Wheel[WatchedConnection] = Wheel(self._loop, self.counters, self._look)
        self.timeouts: Final = Timeouts(self._loop, self.counters)
        self.heartbeats: Final = Heartbeats(self._loop, self.counters)
        self._deaths = DeathLog(self._loop)
        self._new: set[WatchedConnection] = set()  # just made: not in the wheel yet
        self._new_since = 0.0  # when the first of them was made
        self._half_closed: set[WatchedConnection] = set()  # just half-closed: not in the error watch yet
        self._admission: asyncio.TimerHandle | None = None  # puts both where they belong
        self._errors: ErrorWatch | None = None  # made when first needed, closed when no longer
        self.suspect_descriptors: Final[set[SuspectDescriptor]] = set()
        """Those in the error watch whose owner may take the error, and close them, before the watch is asked."""
        self._can_watch_errors = True
        self._can_look = True

    def __repr__(self) -> str:
        return f"<Monitor watching {self.counters.watched} connections>"

    # -- who is watched

    def add(self, connection: WatchedConnection) -> None:
        """Watch a connection that was just made, once it has lived for a second."""
        self._new.add(connection)
        if self._admission is None:
            self._admit_later()

    def watch(self, connection: WatchedConnection, since: float | None = None) -> None:
        """Watch a connection from now on, or start over after its policy has changed.

        `since` is when the connection was made, on the loop's clock; None: now.
        """
        due = self._wheel.due_at(connection)
        self._new.discard(connection)
        self._wheel.discard(connection)
        limits, loop = connection.limits, self._loop()
        if limits is None:
            _release(connection)
        elif self._can_look and loop is not None:
            _claim(connection, limits)
            now = loop.time() if since is None else since
            at = now + (limits.interval if _is_suspect(connection) else limits.first_look)
            # A policy that is set again and again does not put the look off.
            self._wheel.add(connection, loop, at if due is None else min(at, due))

    def change_limits(self, connection: WatchedConnection, limits: Limits | None) -> None:
        """Watch a connection by other times from now on; None: not at all."""
        if limits == connection.limits:  # the same once more puts nothing off
            self.watch(connection)
            return
        connection.limits = limits
        watch, loop = connection.watch, self._loop()
        if watch is not None and watch.cap is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                cap_backoff(watch, connection.get_socket(), None)
        if limits is None or loop is None:
            connection.watch = None
        else:
            # Silence counts from now: the kernel may have had no reason to ask before.
            connection.watch = watch = watch or Watch(limits)
            watch.begin_anew(limits, loop.time())
        self.watch(connection)

    def discard(self, connection: WatchedConnection) -> None:
        """A connection has ended: forget it."""
        if connection.inode:
            _release(connection)
        if self._half_closed:
            self._half_closed.discard(connection)
        if connection.due >= 0:
            self._wheel.discard(connection)
        else:
            self._new.discard(connection)
        if self._admission is not None and not self._new and not self._half_closed:
            self._admission.cancel()  # it would hold the loop
            self._admission = None
        if connection.watched_fd >= 0 and self._errors is not None:
            self._errors.discard(connection)
            if not self._errors.connections:
                self._close_errors()

    def close(self) -> None:
        """Forget everything; the loop is closed."""
        for connection in self._wheel:
            _release(connection)
        self._wheel.clear()
        self.timeouts.clear()
        self.heartbeats.clear()
        self._new.clear()
        self._half_closed.clear()
        if self._admission is not None:
            self._admission.cancel()
            self._admission = None
        self._close_errors()

    def _admit_later(self) -> None:
        loop = self._loop()
        if loop is not None:
            self._new_since = loop.time()
            self._admission = loop.call_later(_ADMITTED_AFTER, self._admit)

    def _admit(self) -> None:
        """Put those that are still there into the wheel and the error watch, a few milliseconds' worth in a turn."""
        loop = self._loop()
        if loop is None:
            return
        began = loop.time()
        self._admission = None
        try:
            while (self._new or self._half_closed) and loop.time() - began <= TURN:
                if self._new:
                    self.watch(self._new.pop(), self._new_since)
                else:
                    self.watch_errors(self._half_closed.pop())
        finally:
            if self._new or self._half_closed:
                self._admission = loop.call_later(0, self._admit)

    # -- a look

    def _look(self, connection: WatchedConnection, loop: asyncio.AbstractEventLoop, now: float) -> None:
        """Ask the kernel how a connection is, and act on the answer."""
        limits = connection.limits
        if limits is None:
            return
        self.counters.looks += 1
        try:
            sock = connection.get_socket()
            watch = connection.watch
            if watch is None:
                silence = platform.idle_time(sock)
                if silence is not None:
                    connection.on_look(sock, _AT_REST)
                    self._look_again(connection, limits, loop, now + look_at_rest(limits, silence))
                    return
                watch = connection.watch = Watch(limits)
            sample = platform.tcp_info(sock)
        except KeepaliveError:
            self._cannot_look()
            return
        except (OSError, ValueError, AttributeError):
            connection.on_socket_closed()
            return
        now, was_suspect = loop.time(), watch.suspect
        decision = watch.look(sample, now)
        if decision.cause is not None:
            timed_out = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            connection.end_dead(timed_out, decision.cause, sample)
            return
        if decision.state is State.DEAD:
            connection.on_kernel_end(sample)
            return
        if decision.cap != watch.cap:
            with contextlib.suppress(OSError):
                cap_backoff(watch, sock, decision.cap)
        if watch.at_rest:
            connection.watch = None
        connection.on_look(sock, decision)
        if watch.suspect is not was_suspect:
            self._report(connection, "suspect" if watch.suspect else "recovered", judge(sample))
        self._look_again(connection, limits, loop, now + decision.look_after)

    def _look_again(
        self, connection: WatchedConnection, limits: Limits, loop: asyncio.AbstractEventLoop, at: float
    ) -> None:
        """Unless a callback has changed that."""
        if connection.due < 0 and connection.limits is limits and not connection.ended:
            self._wheel.add(connection, loop, at)

    def _report(self, connection: WatchedConnection, kind: Literal["suspect", "recovered"], health: Health) -> None:
        self.emit(connection.make_event(kind, health))
        connection.call_back("peer_suspect" if kind == "suspect" else "peer_recovered", health)

    def _cannot_look(self) -> None:
        self._can_look = False
        logger.warning(
            "%s has no TCP_INFO: peer_suspect is never called, and unacknowledged data is bounded by the kernel alone; "
            'stalled="drop" has it bounded by the user timeout',
            platform.NAME,
        )

    # -- errors that the loop does not report

    def watch_errors_soon(self, connection: WatchedConnection) -> None:
        """The loop has stopped listening to a connection whose peer has closed its half: most end in a moment."""
        if connection.watched_fd < 0:
            self._half_closed.add(connection)
            if self._admission is None:
                self._admit_later()

    def watch_errors(self, connection: WatchedConnection) -> None:
        """Report a connection's errors from now on: the loop may not be listening to it."""
        loop = self._loop()
        if connection.watched_fd >= 0 or loop is None or not self._can_watch_errors:
            return
        try:
            fd = connection.get_socket().fileno()
            if self._errors is None:
                self._errors = ErrorWatch(loop, self._on_errors)
            if fd >= 0:
                self._errors.add(fd, connection)
        except NotImplementedError as exc:
            self._can_watch_errors = False
            logger.warning(
                "this event loop has no add_reader: a death while reading is paused is reported when it resumes (%s)",
                exc,
            )
        except (OSError, ValueError, AttributeError, RuntimeError, KeepaliveError):  # closed, or no more can be watched
            return

    def _on_errors(self, connections: list[WatchedConnection]) -> None:
        for connection in connections:
            connection.on_kernel_end(None)
        for each in list(self.suspect_descriptors):
            each.look_whether_closed()

    def _close_errors(self) -> None:
        if self._errors is not None:
            self._errors.close(self._loop())
            self._errors = None

    # -- what has happened

    def emit(self, event: Event) -> None:
        """Count an event, log the death of a connection, call the hook."""
        self.counters.count(event)
        error = event.error
        if error is not None and error.cause is not Cause.CONNECTING:  # the caller gets the error, and may try again
            self._deaths.add(error)
        if self.hook is not None:
            try:
                self.hook(event)
            except Exception:
                logger.exception("the monitor's hook failed on %s", event.kind)


def _claim(connection: WatchedConnection, limits: Limits) -> None:
    """Register a connection's socket as watched."""
    try:
        connection.inode = owners.claim(connection.get_socket().fileno(), limits.user_timeout)
    except (OSError, ValueError, AttributeError):  # it is closed
        connection.inode = 0


def _release(connection: WatchedConnection) -> None:
    inode, connection.inode = connection.inode, 0
    owners.release(inode)  # harmless for 0


def _is_suspect(connection: WatchedConnection) -> bool:
    """Whether a connection's peer was suspect at the last look."""
    return connection.watch is not None and connection.watch.suspect


_monitors: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Monitor]] = weakref.WeakKeyDictionary()
_monitors_lock: Final = threading.Lock()  # loops of several threads come and go at the same time


def close_monitor(loop: asyncio.AbstractEventLoop) -> None:
    """A loop is closed: so is its monitor, and it holds neither any more."""
    with _monitors_lock:
        monitor = _monitors.pop(loop, None)
    if monitor is not None:
        monitor.close()


def get_monitor(loop: asyncio.AbstractEventLoop | None = None) -> Monitor:
    """The monitor of a loop; of the running one when none is given. Raises RuntimeError when none is running."""
    loop = asyncio.get_running_loop() if loop is None else loop
    abandoned: list[Monitor] = []  # of loops that were closed with connections that nobody closed
    with _monitors_lock:
        found = _monitors.get(loop)
        if found is None:
            abandoned = [_monitors.pop(other) for other in list(_monitors) if other.is_closed()]
            found = _monitors[loop] = Monitor(loop)
    for monitor in abandoned:
        monitor.close()
    return found
