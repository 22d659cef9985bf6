"""Judgement: from what the kernel says of a connection to alive, suspect, stalled or dead, and to the cause of a death.

Rules kept here: plain functions on plain data, no I/O and no clock.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import functools
import math
from typing import Any, Final

from .errors import Cause, DeadPeerError
from .policy import Keepalive, SocketState
from .tcpinfo import TcpInfo, TcpState

__all__ = [
    "DEATHS",
    "Health",
    "Limits",
    "State",
    "cause_of_death",
    "dead_peer",
    "fell_silent",
    "judge",
    "limits_of",
    "limits_of_state",
    "window_is_shut",
]

_UNREACHABLE: Final = frozenset(
    getattr(errno, name)
    for name in ("EHOSTUNREACH", "ENETUNREACH", "EHOSTDOWN", "ENETDOWN")
    if hasattr(errno, name)  # Windows lacks some
)
# Windows has its own numbers for the same: WSAETIMEDOUT, WSAEHOSTUNREACH, WSAENETUNREACH, WSAEHOSTDOWN, WSAENETDOWN.
_WINDOWS_TIMED_OUT: Final = frozenset({10060})
_WINDOWS_UNREACHABLE: Final = frozenset({10065, 10051, 10064, 10050})

_HANDSHAKE: Final = frozenset({TcpState.SYN_SENT, TcpState.SYN_RECV, TcpState.NEW_SYN_RECV})
_LONG: Final = 60.0  # seconds; without a user timeout the kernel goes on for many minutes (tcp_retries2)

DEATHS: Final = _UNREACHABLE | _WINDOWS_UNREACHABLE | _WINDOWS_TIMED_OUT | {errno.ETIMEDOUT}
"""The error numbers with which a kernel reports that a peer no longer answers. A reset is not among them."""


class State(enum.StrEnum):
    """How a connection's peer is."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    """At least one probe or retransmission went unanswered."""
    STALLED = "stalled"
    """Alive, and its window is shut: it takes no data."""
    DEAD = "dead"
    """The kernel has ended the connection."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What the kernel knows of a connection's peer now. None: this platform does not say."""

    state: State
    probes: int | None
    """Keepalive or window probes that went unanswered so far."""
    retransmits: int | None
    """Retransmissions of the oldest unacknowledged segment that went unanswered so far."""
    silence: float | None
    """Seconds since the peer was last heard."""
    rtt: float | None
    """Smoothed round trip in seconds."""
    unacked: int | None
    """Segments in flight."""
    unsent: int | None
    """Bytes that the kernel holds and has not sent yet."""
    info: TcpInfo
    """The whole sample."""


def judge(info: TcpInfo) -> Health:
    """What a sample of TCP_INFO says of the peer."""
    if info.state == TcpState.CLOSE:
        state = State.DEAD
    elif info.probes or info.retransmits:
        state = State.SUSPECT
    elif window_is_shut(info):
        state = State.STALLED
    else:
        state = State.ALIVE
    return Health(
        state=state,
        probes=info.probes,
        retransmits=info.retransmits,
        silence=info.silence,
        rtt=info.rtt,
        unacked=info.unacked,
        unsent=info.notsent_bytes,
        info=info,
    )


def window_is_shut(info: TcpInfo) -> bool:
    """Whether data waits for the peer to take it: unsent, or in flight when the window shrank.

    Before Linux 5.4 the kernel does not tell the window: unsent data with nothing in flight then means that it is shut.
    Of a peer that has not answered the handshake no window is known.
    """
    if info.state in _HANDSHAKE:
        return False
    if info.snd_wnd is None:
        return bool(info.notsent_bytes) and not info.unacked
    return info.snd_wnd == 0 and bool(info.notsent_bytes or info.unacked)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The times by which a connection is watched, in seconds: a policy with nothing left to the system."""

    idle: float
    interval: float
    count: int
    user_timeout: float | None
    """How long nothing may be heard while data is in flight or the window is shut; None: the kernel's affair."""

    @property
    def first_look(self) -> float:
        """Seconds of silence after which a connection may be in trouble.

        The first probe goes out after `idle`; half an interval is time for its answer.
        """
        late = self.idle + self.interval / 2
        return late if self.user_timeout is None else min(late, self.user_timeout)

    @property
    def least_asking(self) -> float:
        """Seconds over which a peer must have been asked, at least: unanswered questions of one moment are no proof.

        What remains of the user timeout after the first look, and one and a half intervals are enough.
        """
        bound = self.user_timeout or 0.0
        rest = bound - self.first_look
        return min(rest if rest > 0 else bound, 1.5 * self.interval)

    @property
    def longest_backoff(self) -> float:
        """Seconds between window probes, at most, for the bound to hold.

        Not less than a seventh of the user timeout: the kernel itself gives up after tcp_retries2 (15) of them.
        """
        return max(self.interval, (self.user_timeout or 0.0) / 7)


@functools.lru_cache(maxsize=256)
def limits_of(policy: Keepalive) -> Limits | None:
    """How connections under a policy are watched; None when they are not, or when times are left to the system."""
    if not policy.enabled or policy.idle is None or policy.interval is None or policy.count is None:
        return None
    bound = policy.effective_user_timeout if policy.stalled == "keep" else None
    return Limits(policy.idle, policy.interval, policy.count, bound)


def limits_of_state(policy: Keepalive, state: SocketState) -> Limits | None:
    """How a connection is watched that has what a socket of somebody else's has; None when keepalive is off.

    Where it has the policy's times, the policy says it. Where the application chose others, they say it, and data in
    flight is bounded by the detection time that they make, unless the kernel has a user timeout of its own.
    """
    idle, interval, count = state.idle, state.interval, state.count
    if not state.enabled or idle is None or interval is None or count is None:
        return None
    filled = policy.filled(idle=idle, interval=interval, count=count) if policy.enabled else policy
    if (filled.idle, filled.interval, filled.count) == (idle, interval, count) and filled.enabled:
        return limits_of(filled)
    return Limits(idle, interval, count, None if state.user_timeout else idle + interval * count)


def fell_silent(info: TcpInfo, state: SocketState) -> bool:
    """Whether a connection that the kernel has ended had a peer that no longer answered; else it was reset or closed.

    What went unanswered stays in the sample, and an ordinary end has none of it. A reset that answers a probe comes
    within a round trip of it, so before the last interval is half over.
    """
    silence = info.silence
    if info.state != TcpState.CLOSE or silence is None:
        return False
    if info.retransmits or (info.notsent_bytes and not info.snd_wnd):
        return silence >= (state.user_timeout or _LONG)
    bounds = [bound for bound in (state.detection_time, state.user_timeout) if bound]
    return bool(info.probes and bounds) and silence >= min(bounds) - (state.interval or 0) / 2


def cause_of_death(number: int, info: TcpInfo | None) -> Cause:
    """Why a connection that once stood died, from its error number and its last TCP_INFO.

    The kernel wipes the send queue at death, but what stays tells the three timers apart (measured on Linux 6.18):
    retransmits after a retransmission death; unsent bytes (`write_seq` is kept) after a window probe death.
    """
    if number in _UNREACHABLE or number in _WINDOWS_UNREACHABLE:
        return Cause.UNREACHABLE
    if info is not None and info.retransmits:
        return Cause.UNACKNOWLEDGED
    if info is not None and info.notsent_bytes and not info.snd_wnd:
        return Cause.ZERO_WINDOW
    return Cause.KEEPALIVE


def dead_peer(
    exc: OSError, cause: Cause | None, sample: TcpInfo | None, *, peername: Any, policy: Keepalive | None
) -> DeadPeerError:
    """The error for a connection that stood, and of which the kernel's error and its last sample tell.

    A cause that is not known already is what those two say.
    """
    assert exc.errno is not None
    silence = None if sample is None else sample.silence
    error = DeadPeerError(
        cause or cause_of_death(exc.errno, sample),
        exc.errno,
        silence=math.nan if silence is None else silence,
        peername=peername,
        policy=policy,
        info=sample,
    )
    error.__cause__ = exc
    return error
