"""Other libraries' connections as the monitor knows them: the transports of any asyncio library, and bare descriptors.

Rules kept here: nothing is put between a library and its connection, and its protocol gets the error that the system
would have reported: an ETIMEDOUT on its ordinary path. kaio's log, counters and hook report the cause. Options that the
application sets later are kept, and the monitor uses them. An ended connection is noticed at its next check at the
latest.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, Final, Literal

from ..errors import Cause, KeepaliveError
from ..kernel.descriptors import Descriptor
from ..kernel.options import SocketLike, platform
from ..kernel.queues import reset_on_close, unread
from ..kernel.tcpinfo import TcpInfo, TcpState
from ..liveness.causes import dead_peer, fell_silent
from ..liveness.health import Health, State
from ..liveness.limits import Limits, limits_of_state
from ..liveness.watch import Decision, Watch
from ..monitor.counters import Event
from ..monitor.monitor import Monitor
from ..net.ending import Stage, Trigger, next_stage
from ..net.internals import force_close, is_sending_file, stop_sending_file, take_error, with_reason
from ..policy import Keepalive, SocketState

__all__ = ["ForeignDescriptor", "ForeignTransport", "read_state"]

_GONE: Final = (OSError, ValueError, AttributeError, RuntimeError)  # what a closed socket says, on one loop or another
_PIECE: Final = 0.01  # seconds for a loop to read a piece of what waits
_PATIENCE: Final = 10  # times that long for a loop that reads to find the error by itself
_TURNS: Final = 20  # of the loop in which loop.sendfile may end
_AT_ONCE: Final = 0.001  # seconds of user timeout: at the kernel's next timer


def read_state(sock: SocketLike, policy: Keepalive) -> SocketState:
    """What a socket has now. Raises OSError.

    The policy's user timeout with other times, which the application has set since, might kill after one lost probe:
    it is taken off.
    """
    state = platform.read(sock)
    if policy.stalled != "drop" or state.user_timeout is None or state.user_timeout != policy.effective_user_timeout:
        return state
    times = (policy.idle, policy.interval, policy.count)
    if all(mine in (None, has) for mine, has in zip(times, state.times, strict=True)):
        return state
    with contextlib.suppress(KeepaliveError):
        platform.set_user_timeout(sock, None)
    return platform.read(sock)


class ForeignConnection:
    """What both kinds of other libraries' connections have in common, as the monitor knows them."""

    __slots__ = (
        "_home",
        "_key",
        "_monitor",
        "_policy",
        "_stage",
        "_state",
        "due",
        "inode",
        "limits",
        "watch",
        "watched_fd",
    )

    def __init__(
        self, policy: Keepalive, state: SocketState, monitor: Monitor, home: MutableMapping[int, Any], key: int
    ) -> None:
        self._home = home  # the table that it is in
        self._key = key  # and under what
        home[key] = self
        self._policy = policy
        self._state: SocketState = state  # what the socket has, as far as it is known
        self._monitor = monitor
        self.limits: Limits | None = limits_of_state(policy, state)
        self.due: int = -1
        self.watched_fd: int = -1
        self._stage: Stage = Stage.OPEN  # how far it is on the way to its end
        self.inode: int = 0
        self.watch: Watch | None = None
        monitor.counters.watched += 1

    # -- what differs

    @property
    def _subject(self) -> Any:
        """The transport that events name."""
        raise NotImplementedError

    def _find(self) -> SocketLike | None:
        """Return the socket, or None when there is none."""
        raise NotImplementedError

    def _with_reason(self, sock: SocketLike, exc: OSError, cause: Cause) -> tuple[OSError, Cause | None]:
        """Return the error and cause of a verdict, with what the socket itself reports."""
        return exc, cause

    def _deliver(self, exc: OSError) -> None:
        """Report a death that the monitor has found to the owner of the connection."""
        raise NotImplementedError

    def _report_kernel_end(self, sock: SocketLike, silent: bool) -> None:
        """The kernel has ended the connection: report it where the loop does not listen."""

    # -- for the monitor

    def get_socket(self) -> SocketLike:
        sock = None
        with contextlib.suppress(*_GONE):
            sock = self._find()
            if sock is not None and sock.fileno() < 0:
                sock = None
        if sock is None:
            self._on_vanished()
            self._end()
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return sock

    def _on_vanished(self) -> None:
        """Its socket was closed for an unknown reason."""

    def on_look(self, sock: SocketLike, decision: Decision) -> None:
        self._expect_end(decision.state is not State.ALIVE)
        self._update_limits(sock)

    def _expect_end(self, near: bool) -> None:
        """Watch for errors while the kernel may end the connection soon, to know the reason."""
        if near:
            self._monitor.watch_errors(self)

    def _read(self, sock: SocketLike) -> SocketState:
        """Return the options of the socket."""
        return read_state(sock, self._policy)

    def _fell_silent(self, sample: TcpInfo) -> bool:
        """Return whether a connection that the kernel has ended had a silent peer."""
        state, watch, silence = self._state, self.watch, sample.silence
        bound = state.user_timeout or (None if self.limits is None else self.limits.user_timeout)
        if bound and silence and watch is not None and watch.waiting and silence >= bound - (state.interval or 0) / 2:
            return True
        return fell_silent(sample, dataclasses.replace(state, user_timeout=bound))

    def _update_limits(self, sock: SocketLike) -> bool:
        """Use the times that the application has set since, if any; return whether there are new ones."""
        try:
            state = self._read(sock)
        except _GONE:
            return False
        if state == self._state:
            return False
        self._state = state
        limits = limits_of_state(self._policy, state)
        if limits == self.limits:
            return False
        if limits is None:  # keepalive is off: nobody is to watch
            self._end()
        else:
            self._monitor.change_limits(self, limits)
        return True

    def call_back(self, name: str, argument: object) -> None:
        """Other libraries' protocols have no such callbacks."""

    def make_event(self, kind: Literal["suspect", "recovered"], health: Health) -> Event:
        return Event(kind, self._subject, health, None)

    def end_dead(self, exc: OSError, cause: Cause | None, sample: TcpInfo | None) -> None:
        try:
            sock = self.get_socket()
        except OSError:
            return
        if self._update_limits(sock):  # the verdict was by times that no longer hold
            return
        exc, cause = self._with_reason(sock, exc, cause or Cause.UNACKNOWLEDGED)
        if cause is None:
            self._end(Trigger.VERDICT)
        else:
            self._report(sock, exc, cause, sample)
        self._deliver(exc)

    def on_kernel_end(self, sample: TcpInfo | None) -> None:
        try:
            sock = self.get_socket()
            sample = sample or platform.tcp_info(sock)
        except _GONE:
            return
        if sample.state != TcpState.CLOSE:
            return
        silent = self._fell_silent(sample)
        if silent:
            self._report(sock, TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)), None, sample)
        else:
            self._end(Trigger.VERDICT)
        self._report_kernel_end(sock, silent)

    def on_socket_closed(self) -> None:
        """Nothing more is to be done: `_socket` has seen it."""

    def _report(self, sock: SocketLike, exc: OSError, cause: Cause | None, sample: TcpInfo | None) -> None:
        """Count and log a death, once."""
        if self.ended:
            return
        error = dead_peer(exc, cause, sample, peername=self._peername(sock), policy=self._policy)
        self._monitor.emit(Event("dead", self._subject, None, error))
        self._end(Trigger.VERDICT)

    def _peername(self, sock: SocketLike) -> Any:
        """The peer's address, for the log."""
        raise NotImplementedError

    @property
    def ended(self) -> bool:
        """Whether it is watched no more."""
        return self._stage is not Stage.OPEN

    def is_of(self, transport: object) -> bool:
        """Whether it is that transport's."""
        return False

    def stop(self) -> None:
        """Stop watching it: its descriptor belongs to another connection."""
        self._end()

    def _end(self, trigger: Trigger = Trigger.LOST) -> None:
        watched = not self.ended
        self._stage = next_stage(self._stage, trigger)
        if watched:
            self.limits = None
            self._monitor.discard(self)
            self._monitor.counters.watched -= 1
            if self._home.get(self._key) is self:
                del self._home[self._key]


class ForeignTransport(ForeignConnection):
    """A transport of another library, on any loop; held by a weak reference."""

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.Transport, *common: Any) -> None:
        self._transport: Callable[[], Any] = weakref.ref(transport, self._gone)
        super().__init__(*common)

    def _gone(self, _: object) -> None:
        self._end()

    def is_of(self, transport: object) -> bool:
        return self._transport() is transport

    @property
    def _subject(self) -> Any:
        return self._transport()

    def _find(self) -> SocketLike | None:
        transport = self._transport()
        return None if transport is None else transport.get_extra_info("socket")

    def _peername(self, sock: SocketLike) -> Any:
        transport = self._transport()
        return None if transport is None else transport.get_extra_info("peername")

    def _with_reason(self, sock: SocketLike, exc: OSError, cause: Cause) -> tuple[OSError, Cause | None]:
        return with_reason(sock, exc, cause)

    def _deliver(self, exc: OSError) -> None:
        self._read_out(exc, 0)

    def _report_kernel_end(self, sock: SocketLike, silent: bool) -> None:
        error = None
        if is_sending_file(self._transport()):  # which may have taken the error, and the loop then sees none
            number = take_error(sock) or (errno.ETIMEDOUT if silent else errno.ECONNRESET)
            error = OSError(number, os.strerror(number))
        self._read_out(error, _PATIENCE)

    def _read_out(self, error: OSError | None, patience: int) -> None:
        """Let the library read what its peer had sent, even if it has paused reading; then end the connection.

        A loop takes a paused connection out of its epoll: reading again, it finds the data. A protocol may pause at
        each piece of it. Without an error, the loop has some time to find the kernel's by itself.
        """
        transport: Any = self._transport()
        if transport is None or self._stage is not Stage.VERDICT:
            return
        with contextlib.suppress(*_GONE):
            sock = transport.get_extra_info("socket")
            if not transport.is_closing():
                if is_sending_file(transport):
                    stop_sending_file(sock)
                    self._wait_for_sendfile(error, 0)
                    return
                paused = not transport.is_reading()
                if unread(sock) or (patience > 0 and not paused):
                    if paused:
                        transport.resume_reading()
                    asyncio.get_running_loop().call_later(_PIECE, self._read_out, error, patience - (not paused))
                    return
            self._stage = next_stage(self._stage, Trigger.READ_ALL)
            if error is None:  # the loop has not heard it: it does not listen after a peer's EOF
                number = take_error(sock)
                error = OSError(number, os.strerror(number)) if number else None
            if error is not None:
                reset_on_close(sock)
                force_close(transport, error)

    def _wait_for_sendfile(self, error: OSError | None, turns: int) -> None:
        """Wait for loop.sendfile to end, and end the connection before the loop reads, which would lose the error."""
        loop = asyncio.get_running_loop()
        if not is_sending_file(self._transport()):
            self._read_out(error, 0)
        elif turns < _TURNS:
            loop.call_soon(self._wait_for_sendfile, error, turns + 1)
        else:
            loop.call_later(_PIECE, self._wait_for_sendfile, error, turns)


class ForeignDescriptor(ForeignConnection):
    """A socket that a library only ever gives to `add_reader`, `add_writer` or `sock_*`.

    The kernel delivers a verdict on it, at its next timer: so the user timeout is set while the peer is suspect, unless
    its window is zero, because the kernel does not count the peer's answers then. A user timeout that the application
    has set is kept.
    """

    __slots__ = ("_bound", "_peer", "descriptor")

    def __init__(self, descriptor: Descriptor, *common: Any) -> None:
        self.descriptor: Descriptor = descriptor
        self._bound: float | None = None  # the user timeout that was set here
        self._peer: Any = None  # once it has ended, the kernel does not tell
        with contextlib.suppress(OSError):
            self._peer = descriptor.getpeername()
        super().__init__(*common)

    @property
    def _subject(self) -> None:
        return None

    def _find(self) -> SocketLike:
        return self.descriptor

    def _peername(self, sock: SocketLike) -> Any:
        return self._peer

    def _read(self, sock: SocketLike) -> SocketState:
        state = super()._read(sock)
        if self._bound is not None and state.user_timeout == self._bound:
            return dataclasses.replace(state, user_timeout=None)
        self._bound = None
        return state

    def _expect_end(self, near: bool) -> None:
        super()._expect_end(near)
        if near:
            self._monitor.suspect_descriptors.add(self)
        else:
            self._monitor.suspect_descriptors.discard(self)

    def on_look(self, sock: SocketLike, decision: Decision) -> None:
        self._expect_end(decision.state is not State.ALIVE)
        if not self._update_limits(sock) and self.limits is not None and self._state.user_timeout is None:
            suspect = decision.state is State.SUSPECT and decision.waiting and not decision.spare
            bound = self.limits.user_timeout if suspect else None
            if bound != self._bound:
                with contextlib.suppress(*_GONE):
                    platform.set_user_timeout(sock, bound)
                    self._bound = bound

    def look_whether_closed(self) -> None:
        """Report the death of a socket whose owner heard of it first, and closed it."""
        if self.watch is not None and self.descriptor.fileno() < 0:
            self._report_if_silent(self.watch.at_end(self.watch.silence(asyncio.get_running_loop().time())))
            self._end()

    def _on_vanished(self) -> None:
        # When it was closed is not known: what the last look saw must be enough.
        if self.watch is not None:
            self._report_if_silent(self.watch.at_end(self.watch.silence()))

    def _report_if_silent(self, ended: TcpInfo | None) -> None:
        if ended is not None and self._fell_silent(ended):
            self._report(self.descriptor, TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)), None, ended)

    def _end(self, trigger: Trigger = Trigger.LOST) -> None:
        self._monitor.suspect_descriptors.discard(self)
        super()._end(trigger)

    def _deliver(self, exc: OSError) -> None:
        with contextlib.suppress(*_GONE):
            platform.cap_backoff(self.descriptor, 1.0)
            platform.set_user_timeout(self.descriptor, _AT_ONCE)
