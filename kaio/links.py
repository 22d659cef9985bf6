"""Other people's connections as the monitor knows them: the transports of any asyncio library, and bare descriptors.

Rules kept here: nothing is put between a library and its connection, and its protocol hears only what the system would
have said: an ETIMEDOUT on its ordinary path. kaio's own log, counters and hook tell the rest. What the application
sets later stands, and the monitor follows it. A connection that has ended is noticed at the next look, if not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Final, Literal

from ._sockopt import SocketLike, platform
from .descriptors import Descriptor
from .errors import Cause, DeadPeerError, KeepaliveError
from .keepalive import logger
from .monitor import Event, Monitor
from .policy import Keepalive, SocketState
from .tcpinfo import TcpInfo
from .verdict import Decision, Health, Limits, cause_of_death, fell_silent, limits_of_state

__all__ = ["DescriptorLink", "TransportLink"]

_GONE: Final = (OSError, ValueError, AttributeError, RuntimeError)  # what a closed socket says, on one loop or another
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing drops what is unsent and resets
_AT_ONCE: Final = 0.001  # seconds of user timeout: at the kernel's next timer


class _Link:
    """What both kinds have in common."""

    __slots__ = (
        "_backoff",
        "_due",
        "_ended",
        "_limits",
        "_monitor",
        "_policy",
        "_state",
        "_suspect",
        "_waiting_since",
        "_watched_fd",
    )

    def __init__(self, policy: Keepalive, state: SocketState, monitor: Monitor) -> None:
        self._policy = policy
        self._state: SocketState = state  # what the socket has, as far as it is known
        self._monitor = monitor
        self._limits: Limits | None = limits_of_state(policy, state)
        self._due: int = -1
        self._watched_fd: int = -1
        self._suspect: bool = False
        self._ended: bool = False
        self._waiting_since: float | None = None
        self._backoff: int | None = None
        monitor.counters.watched += 1

    # -- what differs

    @property
    def _owner(self) -> Any:
        """What events name."""
        raise NotImplementedError

    def _find(self) -> SocketLike | None:
        """The socket, while there is one."""
        raise NotImplementedError

    def _deliver(self) -> None:
        """Let the owner hear that the connection has timed out."""
        raise NotImplementedError

    def _help(self) -> None:
        """The kernel has ended the connection: let a loop that does not listen hear of it."""

    # -- for the monitor

    def _socket(self) -> SocketLike:
        sock = None
        with contextlib.suppress(*_GONE):
            sock = self._find()
            if sock is not None and sock.fileno() < 0:
                sock = None
        if sock is None:
            self._end()
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return sock

    def _looked(self, sock: SocketLike, decision: Decision) -> None:
        self._follow(sock)

    def _follow(self, sock: SocketLike) -> bool:
        """See whether the application has set other times since; they stand."""
        try:
            state = platform.read(sock)
        except _GONE:
            return False
        if state == self._state:
            return False
        if self._is_hybrid(state):
            with contextlib.suppress(OSError, KeepaliveError):
                platform.bound_connect(sock, None)
                state = platform.read(sock)
        self._state = state
        limits = limits_of_state(self._policy, state)
        if limits == self._limits:
            return False
        self._limits = limits
        self._monitor.watch(self)
        return True

    def _is_hybrid(self, state: SocketState) -> bool:
        """The policy's user timeout with the application's times: it might kill after one lost probe."""
        policy = self._policy
        return (
            policy.stalled == "drop"
            and state.user_timeout is not None
            and state.user_timeout == policy.effective_user_timeout
            and limits_of_state(policy, state) != limits_of_state(policy, self._state)
        )

    def _tell(self, name: str, argument: object) -> None:
        """A library's protocol has no such callbacks."""

    def _event(self, kind: Literal["suspect", "recovered"], health: Health) -> Event:
        if kind == "suspect":
            self._monitor.watch_errors(self)  # from now on, when it ends, know why
        return Event(kind, self._owner, health, None)

    def _condemn(self, exc: OSError, cause: Cause | None, sample: TcpInfo | None) -> None:
        try:
            sock = self._socket()
        except OSError:
            return
        if self._follow(sock):  # the verdict was by times that no longer hold
            return
        self._report(sock, cause or Cause.UNACKNOWLEDGED, sample)
        self._deliver()

    def _kernel_ended(self, sample: TcpInfo | None) -> None:
        try:
            sock = self._socket()
            sample = sample or platform.tcp_info(sock)
        except _GONE:
            return
        if fell_silent(sample, self._state):
            self._report(sock, cause_of_death(errno.ETIMEDOUT, sample), sample)
        self._help()

    def _report(self, sock: SocketLike, cause: Cause, sample: TcpInfo | None) -> None:
        """Count and log a death, once."""
        if self._ended:
            return
        silence = None if sample is None else sample.silence
        error = DeadPeerError(
            cause,
            errno.ETIMEDOUT,
            silence=math.nan if silence is None else silence,
            peername=self._peername(sock),
            policy=self._policy,
            info=sample,
        )
        error.__cause__ = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        self._monitor.emit(Event("dead", self._owner, None, error))
        self._end()

    def _peername(self, sock: SocketLike) -> Any:
        with contextlib.suppress(*_GONE):
            return sock.getpeername()  # type: ignore[attr-defined]
        return None

    def retire(self) -> None:
        """It is somebody else's to watch, or it has ended."""
        self._end()

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._limits = None
            self._monitor.forget(self)
            self._monitor.counters.watched -= 1


class TransportLink(_Link):
    """A transport of any library, on any loop. It is not kept alive by this."""

    __slots__ = ("_transport",)

    def __init__(
        self, transport: Callable[[], asyncio.Transport | None], policy: Keepalive, state: SocketState, monitor: Monitor
    ) -> None:
        self._transport = transport
        super().__init__(policy, state, monitor)

    @property
    def _owner(self) -> asyncio.Transport | None:
        return self._transport()

    def _find(self) -> SocketLike | None:
        transport = self._transport()
        return None if transport is None else transport.get_extra_info("socket")

    def _peername(self, sock: SocketLike) -> Any:
        transport = self._transport()
        return None if transport is None else transport.get_extra_info("peername")

    def _deliver(self) -> None:
        transport: Any = self._transport()
        with contextlib.suppress(*_GONE):
            # Nobody is there to take what is left: the kernel need not go on trying.
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        # What both loops' own fatal errors do: connection_lost(exc) in the next turn, through TLS too.
        transport._force_close(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def _help(self) -> None:
        """A loop takes a paused connection out of its epoll: reading again, it finds what had come, and the error."""
        transport = self._transport()
        with contextlib.suppress(*_GONE):
            if transport is not None and not transport.is_reading() and not transport.is_closing():
                transport.resume_reading()


class DescriptorLink(_Link):
    """A socket that a library only ever gives to `add_reader`, `add_writer` or `sock_*`.

    A verdict on it is the kernel's to deliver, at its next timer: so data in flight puts the user timeout on the
    socket, which a shut window takes off again.
    """

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: Descriptor, policy: Keepalive, state: SocketState, monitor: Monitor) -> None:
        self.descriptor: Descriptor = descriptor
        super().__init__(policy, state, monitor)

    @property
    def _owner(self) -> None:
        return None

    def _find(self) -> SocketLike:
        return self.descriptor

    def _looked(self, sock: SocketLike, decision: Decision) -> None:
        if not self._follow(sock) and self._limits is not None and self._limits.user_timeout is not None:
            self._bound(sock, self._limits.user_timeout if decision.waiting and not decision.shut else None)

    def _bound(self, sock: SocketLike, seconds: float | None) -> None:
        if seconds != self._state.user_timeout:
            try:
                platform.bound_connect(sock, seconds)
                self._state = platform.read(sock)
            except (OSError, KeepaliveError) as exc:
                logger.debug("%r: %s", sock, exc)

    def _deliver(self) -> None:
        with contextlib.suppress(OSError, KeepaliveError):
            platform.cap_backoff(self.descriptor, 1.0)
            platform.bound_connect(self.descriptor, _AT_ONCE)
