"""The monitor: what the kernel and the loop leave out. One for each event loop.

It has two parts. The *wheel* looks at a connection when it could be in trouble: half an interval after its first probe
went out if nothing was heard since the last look, and once an interval while the peer is suspect. The *error watch* is
an epoll instance inside the loop's own, in which connections are registered for errors only once the loop may have
stopped listening to them: when their reading was paused or their peer closed its half.

A connection enters the wheel once it has lived for a second; most of a busy server's do not.

Rules kept here: one timer a loop, not one a connection; no look before its time, so no more of them than connections
divided by their idle time; a turn ends after a few milliseconds and goes on in the loop's next one; whatever ends is
out of every table at once.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import errno
import heapq
import logging
import math
import os
import select
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Protocol

from ..errors import Cause, DeadPeerError, KeepaliveError, format_address
from ..kernel.options import SocketLike, platform
from ..kernel.tcpinfo import TcpInfo
from ..liveness.health import Health, State, judge
from ..liveness.limits import Limits
from ..liveness.watch import Decision, Watch, look_at_rest
from . import owners
from .deadline import cap_backoff

__all__ = ["TURN", "Counters", "Event", "Link", "Monitor", "bare", "close_monitor", "get_monitor"]

logger: Final = logging.getLogger("kaio")

_TICKS: Final = 4  # of the wheel, a second
TURN: Final = 0.005
"""Seconds that work of kaio's own may take in one turn of a loop."""
_AT_REST: Final = Decision(State.ALIVE, None, 0.0)  # what is to be thought of a connection that is
_CHILDHOOD: Final = 1.0  # seconds; no policy asks for a look before, but for a user timeout that is shorter
SILENCE_BOUNDS: Final = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, math.inf)
"""Upper bounds of the histogram of silence at death, in seconds."""


@dataclasses.dataclass(slots=True)
class Counters:
    """What has happened to the connections of a loop or a server since its start."""

    watched: int = 0
    """Connections that are watched now."""
    suspects: int = 0
    recoveries: int = 0
    deaths: dict[Cause, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(Cause, 0))
    silence: dict[float, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SILENCE_BOUNDS, 0))
    """Deaths by the silence before them: upper bound in seconds to number."""
    looks: int = 0
    """How often the kernel was asked about a connection; a loop's counters only."""
    wakeups: int = 0
    """How often the wheel's timer fired; a loop's counters only."""

    def count(self, event: Event) -> None:
        """Count a suspicion, a recovery or a death."""
        if event.kind == "suspect":
            self.suspects += 1
        elif event.kind == "recovered":
            self.recoveries += 1
        elif event.error is not None:
            self.deaths[event.error.cause] += 1
            silence = event.error.silence
            if not math.isnan(silence):
                self.silence[SILENCE_BOUNDS[bisect.bisect_left(SILENCE_BOUNDS, silence)]] += 1


class Event(NamedTuple):
    """What the metrics hook is called with."""

    kind: Literal["suspect", "recovered", "dead"]
    transport: Any
    """The connection's transport; None where it died while connecting."""
    health: Health | None
    """The sample, with "suspect" and "recovered"."""
    error: DeadPeerError | None
    """With "dead"."""


class Link(Protocol):
    """A connection as the monitor knows it; `net.transports.WatchedTransport` is one."""

    due: int
    """The wheel's tick at which it is looked at; -1: it is not in the wheel."""
    watched_fd: int
    """Its descriptor in the error watch; -1: it is not there."""
    inode: int
    """Its socket in the registry of what this process watches (`owners`); 0: it is not there."""
    watch: Watch | None
    """What the last looks remember; None: nothing."""
    limits: Limits | None

    @property
    def ended(self) -> bool:
        """Whether it is watched no more."""
        ...

    def get_socket(self) -> SocketLike:
        """Its socket. Raises OSError, ValueError, AttributeError once it is closed."""
        ...

    def on_look(self, sock: SocketLike, decision: Decision) -> None:
        """The monitor has looked, and lets it live."""
        ...

    def on_kernel_end(self, sample: TcpInfo | None) -> None:
        """The kernel has ended the connection, or may have: let its owner hear of it if the loop does not listen."""
        ...

    def call_back(self, name: str, argument: object) -> None:
        """Call back the protocol, whatever it raises."""
        ...

    def make_event(self, kind: Literal["suspect", "recovered"], health: Health) -> Event: ...

    def end_dead(self, exc: OSError, cause: Cause | None, sample: TcpInfo | None) -> None:
        """End the connection with a verdict that the loop has not heard, or would not hear."""
        ...

    def on_socket_closed(self) -> None:
        """Its socket is closed, and its owner was not told yet."""
        ...


class SuspectDescriptor(Protocol):
    """A bare descriptor that may be closed behind the monitor's back."""

    def look_whether_closed(self) -> None:
        """Report its death if its owner has closed it when it was due."""
        ...


class Monitor:
    """Watches the connections of one loop. `kaio.get_monitor()` gives the running loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._buckets: dict[int, set[Link]] = {}  # tick -> who is looked at then
        self._ticks: list[int] = []  # heap of the buckets' ticks
        self._timer: asyncio.TimerHandle | None = None
        self._timer_tick = 0  # the tick that it is set for
        self._now: set[Link] = set()  # due, and their turn has not come yet
        self._population = 0  # links in the wheel
        self._newcomers: set[Link] = set()  # not in the wheel yet
        self._newest_since = 0.0  # when the first of them came
        self._unheard: set[Link] = set()  # not in the error watch yet
        self._growing: asyncio.TimerHandle | None = None  # puts them there
        self._unlogged: deque[DeadPeerError] = deque()  # deaths that are not in the log yet
        self._errors: _ErrorWatch | None = None  # made when first needed, closed when no longer
        self.suspect_descriptors: Final[set[SuspectDescriptor]] = set()
        """Those in the error watch whose owner may take the error, and close them, before the watch is asked."""
        self._can_watch_errors = True
        self._can_look = True
        self.counters: Final = Counters()
        self.hook: Callable[[Event], None] | None = None
        """Called with every suspicion, recovery and death, for metrics. It must not raise, and not take long."""

    def __repr__(self) -> str:
        return f"<Monitor watching {self.counters.watched} connections>"

    # -- the wheel

    def watch(self, link: Link, since: float | None = None) -> None:
        """Begin to look after a connection, or begin anew after its policy has changed.

        `since` is when the connection was made, on the loop's clock; None: now.
        """
        due = link.due
        self._newcomers.discard(link)
        self._leave_bucket(link)
        limits, loop = link.limits, self._loop()
        if limits is None:
            _release(link)
        elif self._can_look and loop is not None:
            _claim(link, limits)
            now = loop.time() if since is None else since
            at = now + (limits.interval if is_suspect(link) else limits.first_look)
            # A policy that is set again and again does not put the look off.
            self._enter_bucket(link, loop, at if due < 0 else min(at, (due - 1) / _TICKS))

    def welcome(self, link: Link) -> None:
        """Begin to look after a connection that was just made."""
        self._newcomers.add(link)
        if self._growing is None:
            self._wait_a_moment()

    def _wait_a_moment(self) -> None:
        loop = self._loop()
        if loop is not None:
            self._newest_since = loop.time()
            self._growing = loop.call_later(_CHILDHOOD, self._grow_up)

    def _grow_up(self) -> None:
        """The newcomers that are still there go into the wheel, a few milliseconds' worth in a turn."""
        loop = self._loop()
        if loop is None:
            return
        began = loop.time()
        self._growing = None
        try:
            while (self._newcomers or self._unheard) and loop.time() - began <= TURN:
                if self._newcomers:
                    self.watch(self._newcomers.pop(), self._newest_since)
                else:
                    self.watch_errors(self._unheard.pop())
        finally:
            if self._newcomers or self._unheard:
                self._growing = loop.call_later(0, self._grow_up)

    def forget(self, link: Link) -> None:
        """A connection has ended."""
        if link.inode:
            _release(link)
        if self._unheard:
            self._unheard.discard(link)
        if link.due >= 0:
            self._leave_bucket(link)
        else:
            self._newcomers.discard(link)
        if self._growing is not None and not self._newcomers and not self._unheard:
            self._growing.cancel()  # it would hold the loop
            self._growing = None
        if link.watched_fd >= 0 and self._errors is not None:
            self._errors.discard(link)
            if not self._errors.links:
                self._close_errors()

    def close(self) -> None:
        """Let go of everything; the loop is closed."""
        for link in self._now.union(*self._buckets.values()):
            _release(link)
        self._population = 0
        self._newcomers.clear()
        self._unheard.clear()
        if self._growing is not None:
            self._growing.cancel()
            self._growing = None
        self._empty()
        self._close_errors()

    def _empty(self) -> None:
        """Nobody is in the wheel: nothing of it need stay, least of all a timer that holds the loop."""
        self._buckets.clear()
        self._ticks.clear()
        self._now.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _enter_bucket(self, link: Link, loop: asyncio.AbstractEventLoop, at: float) -> None:
        tick = int(at * _TICKS) + 1  # not before its time
        link.due = tick
        self._population += 1
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.add(link)
            return
        self._buckets[tick] = {link}
        heapq.heappush(self._ticks, tick)
        if self._timer is None or tick < self._timer_tick:
            self._set_timer(loop)

    def _leave_bucket(self, link: Link) -> None:
        if link.due >= 0:
            bucket = self._buckets.get(link.due, self._now)
            # A bucket may have been made anew for a tick whose turn has come.
            (bucket if link in bucket else self._now).discard(link)
            link.due = -1
            self._population -= 1
            if not self._population:
                self._empty()

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._ticks and not self._buckets[self._ticks[0]]:
            del self._buckets[heapq.heappop(self._ticks)]  # all of them have ended
        if self._ticks:
            self._timer_tick = self._ticks[0]
            self._timer = loop.call_at(self._timer_tick / _TICKS, self._turn)

    def _turn(self) -> None:
        """Look at those whose time has come, for a while."""
        loop = self._loop()
        if loop is None:
            return
        self._timer = None
        self.counters.wakeups += 1
        began = now = loop.time()
        tick = int(began * _TICKS)
        while self._ticks and self._ticks[0] <= tick:
            bucket = self._buckets.pop(heapq.heappop(self._ticks))
            self._now = self._now | bucket if self._now else bucket
        try:
            while self._now:
                link = self._now.pop()
                link.due = -1
                self._population -= 1
                self._look(link, loop, now)
                now = loop.time()
                if now - began > TURN:
                    break
        finally:
            if self._now:
                self._timer_tick = 0
                self._timer = loop.call_later(0, self._turn)
            else:
                self._set_timer(loop)

    def _look(self, link: Link, loop: asyncio.AbstractEventLoop, now: float) -> None:
        limits = link.limits
        if limits is None:
            return
        self.counters.looks += 1
        try:
            sock = link.get_socket()
            watch = link.watch
            if watch is None:
                silence = platform.idle_time(sock)
                if silence is not None:
                    link.on_look(sock, _AT_REST)
                    if link.due < 0 and link.limits is limits and not link.ended:
                        self._enter_bucket(link, loop, now + look_at_rest(limits, silence))
                    return
                watch = link.watch = Watch(limits)
            sample = platform.tcp_info(sock)
        except KeepaliveError:
            self._cannot_look()
            return
        except (OSError, ValueError, AttributeError):
            link.on_socket_closed()
            return
        now, was_suspect = loop.time(), watch.suspect
        decision = watch.look(sample, now)
        if decision.cause is not None:
            timed_out = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            link.end_dead(timed_out, decision.cause, sample)
            return
        if decision.state is State.DEAD:
            link.on_kernel_end(sample)
            return
        if decision.cap != watch.cap:
            with contextlib.suppress(OSError):
                cap_backoff(watch, sock, decision.cap)
        if watch.at_rest:
            link.watch = None
        link.on_look(sock, decision)
        if watch.suspect is not was_suspect:
            self._report(link, "suspect" if watch.suspect else "recovered", judge(sample))
        if link.due < 0 and link.limits is limits and not link.ended:  # a callback may have changed that
            self._enter_bucket(link, loop, now + decision.look_after)

    def begin_anew(self, link: Link, limits: Limits | None) -> None:
        """A connection is watched by other times from now on; None: not at all."""
        if limits == link.limits:  # the same once more puts nothing off
            self.watch(link)
            return
        link.limits = limits
        watch, loop = link.watch, self._loop()
        if watch is not None and watch.cap is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                cap_backoff(watch, link.get_socket(), None)
        if limits is None or loop is None:
            link.watch = None
        else:
            # Silence counts from now: the kernel may have had no reason to ask before.
            link.watch = watch = watch or Watch(limits)
            watch.begin_anew(limits, loop.time())
        self.watch(link)

    def _report(self, link: Link, kind: Literal["suspect", "recovered"], health: Health) -> None:
        self.emit(link.make_event(kind, health))
        link.call_back("peer_suspect" if kind == "suspect" else "peer_recovered", health)

    def _cannot_look(self) -> None:
        self._can_look = False
        logger.warning(
            "%s does not tell how a connection's peer is: no warnings before a death, and unacknowledged data is"
            ' bounded by the kernel alone; stalled="drop" has it bounded by the user timeout',
            platform.NAME,
        )

    # -- the error watch

    def watch_errors_soon(self, link: Link) -> None:
        """The loop does not listen to this connection any more, which mostly ends in a moment: its peer has closed."""
        if link.watched_fd < 0:
            self._unheard.add(link)
            if self._growing is None:
                self._wait_a_moment()

    def watch_errors(self, link: Link) -> None:
        """The loop may not listen to this connection from now on: hear of its errors."""
        loop = self._loop()
        if link.watched_fd >= 0 or loop is None or not self._can_watch_errors:
            return
        try:
            fd = link.get_socket().fileno()
            if self._errors is None:
                self._errors = _ErrorWatch(loop, self._on_errors)
            if fd >= 0:
                self._errors.add(fd, link)
        except NotImplementedError as exc:
            self._can_watch_errors = False
            logger.warning(
                "this event loop cannot tell of a death while reading is paused; it is told when reading resumes (%s)",
                exc,
            )
        except (OSError, ValueError, AttributeError, RuntimeError, KeepaliveError):  # closed, or no more can be watched
            return

    def _on_errors(self, links: list[Link]) -> None:
        for link in links:
            link.on_kernel_end(None)
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
        if error is not None and error.cause is not Cause.CONNECTING:  # whoever connects is told, and may try again
            self._unlogged.append(error)
            loop = self._loop()
            if len(self._unlogged) == 1 and loop is not None and not loop.is_closed():
                loop.call_soon(self._log_deaths)
        if self.hook is not None:
            try:
                self.hook(event)
            except Exception:
                logger.exception("the monitor's hook failed on %s", event.kind)

    def _log_deaths(self) -> None:
        """Write the deaths to the log, a few milliseconds' worth in a turn: thousands may come at once."""
        loop = self._loop()
        if loop is None:
            return
        until = loop.time() + TURN
        while self._unlogged:
            error = self._unlogged.popleft()
            logger.warning(
                "%s",
                error,
                extra={
                    "event": "peer_dead",
                    "cause": error.cause.value,
                    "silence": error.silence,
                    "peer": format_address(error.peername),
                    "policy": str(error.policy),
                    "errno": error.errno,
                },
            )
            if loop.time() > until and self._unlogged:
                loop.call_soon(self._log_deaths)
                return


class _ErrorWatch:
    """Sockets registered for errors only, in an epoll that the loop's own epoll watches; kqueue where there is none."""

    def __init__(self, loop: asyncio.AbstractEventLoop, report: Callable[[list[Link]], None]) -> None:
        self._report = report
        self.links: dict[int, Link] = {}
        self._poll: Any = _Epoll() if hasattr(select, "epoll") else _Kqueue()
        try:
            bare(loop).add_reader(self._poll.fileno(), self._ready)
        except BaseException:
            self._poll.close()
            raise

    def add(self, fd: int, link: Link) -> None:
        """Register a connection. One that had the descriptor before is closed, and out of the poll by that."""
        self._poll.register(fd)
        self.links[fd] = link
        link.watched_fd = fd

    def discard(self, link: Link) -> None:
        """Forget a connection. Its descriptor may be another one's by now, which stays."""
        if self.links.get(link.watched_fd) is link:
            del self.links[link.watched_fd]
            self._poll.unregister(link.watched_fd)
        link.watched_fd = -1

    def close(self, loop: asyncio.AbstractEventLoop | None) -> None:
        if loop is not None and not loop.is_closed():
            bare(loop).remove_reader(self._poll.fileno())
        self._poll.close()

    def _ready(self) -> None:
        self._report([self.links[fd] for fd in self._poll.ready() if fd in self.links])


class _Epoll:
    """epoll(7): ERR and HUP are reported whatever was asked for, and edge-triggered they come once."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.fileno = self._epoll.fileno
        self.close = self._epoll.close

    def register(self, fd: int) -> None:
        try:
            self._epoll.register(fd, select.EPOLLET)
        except FileExistsError:
            self._epoll.modify(fd, select.EPOLLET)

    def unregister(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # closed already, and out of the epoll by that
            self._epoll.unregister(fd)

    def ready(self) -> list[int]:
        return [fd for fd, _ in self._epoll.poll(0)]


class _Kqueue:
    """kqueue(2), never run: a read filter whose low-water mark no data reaches fires on the end alone."""

    def __init__(self) -> None:
        self._select: Any = select  # typed for the platform that this is
        self._kqueue: Any = self._select.kqueue()
        self.fileno = self._kqueue.fileno
        self.close = self._kqueue.close

    def _control(self, fd: int, flags: int) -> None:
        lowat = 0x0001  # NOTE_LOWAT
        event = self._select.kevent(fd, self._select.KQ_FILTER_READ, flags, lowat, 2**31 - 1)
        self._kqueue.control([event], 0)

    def register(self, fd: int) -> None:
        self._control(fd, self._select.KQ_EV_ADD | self._select.KQ_EV_CLEAR)

    def unregister(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            self._control(fd, self._select.KQ_EV_DELETE)

    def ready(self) -> list[int]:
        return [event.ident for event in self._kqueue.control(None, 1024, 0)]


def _claim(link: Link, limits: Limits) -> None:
    """Register a connection's socket as watched."""
    try:
        link.inode = owners.claim(link.get_socket().fileno(), limits.user_timeout)
    except (OSError, ValueError, AttributeError):  # it is closed
        link.inode = 0


def _release(link: Link) -> None:
    inode, link.inode = link.inode, 0
    owners.release(inode)  # harmless for 0


def is_suspect(link: Link) -> bool:
    """Whether a connection's peer was suspect at the last look."""
    return link.watch is not None and link.watch.suspect


def bare(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """The methods of a loop without what kaio's own loop adds: kaio's own connections have their policy already."""
    return getattr(loop, "_kaio_bare", loop)


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
