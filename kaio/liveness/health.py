"""Judgement: from what the kernel says of a connection to alive, suspect, stalled or dead, and to the cause of a death.

Rules kept here: plain functions on plain data, no I/O and no clock; only `health` takes the sample by itself.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import functools
import math
from typing import Any, Final

from ..errors import Cause, DeadPeerError
from ..kernel.sockets import tcp_info
from ..kernel.tcpinfo import TcpInfo, TcpState
from ..policy import Keepalive, SocketState

__all__ = [
    "DEATHS",
    "NO_WAY",
    "Health",
    "Limits",
    "State",
    "cause_of_death",
    "dead_peer",
    "fell_silent",
    "health",
    "is_death",
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
_STOOD: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("EINVAL", "EACCES", "EPERM", "EADDRNOTAVAIL"),  # no route that lets it out, a filter, the address is gone
        *("ENONET", "ECONNREFUSED", "ENOPROTOOPT", "EOPNOTSUPP", "EPROTO"),  # ICMP (net/ipv4/icmp.c: icmp_err_convert)
    )
    if hasattr(errno, name)
)
_THIS_HOST: Final = frozenset(
    getattr(errno, name) for name in ("EINVAL", "EPERM", "ENETDOWN", "EADDRNOTAVAIL") if hasattr(errno, name)
)
# Windows has its own numbers for the same: WSAETIMEDOUT, WSAEHOSTUNREACH, WSAENETUNREACH, WSAEHOSTDOWN, WSAENETDOWN.
_WINDOWS_TIMED_OUT: Final = frozenset({10060})
_WINDOWS_UNREACHABLE: Final = frozenset({10065, 10051, 10064, 10050})

_WITHOUT_WINDOW: Final = frozenset({TcpState.SYN_SENT, TcpState.SYN_RECV, TcpState.NEW_SYN_RECV, TcpState.LISTEN})
_LONG: Final = 60.0  # seconds; without a user timeout the kernel goes on for many minutes (tcp_retries2)

DEATHS: Final = _UNREACHABLE | _WINDOWS_UNREACHABLE | _WINDOWS_TIMED_OUT | {errno.ETIMEDOUT}
"""The error numbers with which a kernel reports that a peer no longer answers. A reset is not among them."""
NO_WAY: Final = (DEATHS | _STOOD) - _WINDOWS_TIMED_OUT - {errno.ETIMEDOUT}
"""The error numbers that say, of a connection that stood and fell silent, that there is no way to its peer. An
application that misuses a socket gets some of them, too: then the connection still stands."""


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


def health(sock_or_transport: Any) -> Health:
    """How the peer is, by a sample of the kernel's TCP_INFO.

    Takes what `apply` takes. Raises `KeepaliveError` when it is not a TCP socket or is closed, and on platforms that
    tell nothing.
    """
    return judge(tcp_info(sock_or_transport))


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
    Before the handshake is over no window is known.
    """
    if info.state in _WITHOUT_WINDOW:
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

    def longest_backoff(self, *, under_shrunk_window: bool = False) -> float | None:
        """Seconds between two of the kernel's questions, at most, for the user timeout to hold; None: there is none.

        Not less than a seventh of it: the kernel itself gives up after tcp_retries2 (15) of them. Where a window has
        shrunk under a segment in flight, not less than half: there it gives up after two of the longest
        (net/ipv4/tcp_timer.c, tcp_rtx_probe0_timed_out). Not more than a third of it, else: two must fit.
        """
        bound = self.user_timeout
        if bound is None:
            return None
        return bound / 2 if under_shrunk_window else min(max(self.interval, bound / 7), bound / 3)


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


def _shrank(info: TcpInfo) -> bool:
    """Whether the window was shut under a segment in flight, which the kernel then resends and does not count.

    (net/ipv4/tcp_timer.c, tcp_retransmit_timer: "our retransmits become zero probes".) Sent since the peer was heard.
    """
    sent, silence = info.last_data_sent, info.silence
    asked = info.retransmits or info.probes
    return info.snd_wnd == 0 and not asked and sent is not None and silence is not None and sent < silence


def _never_left(info: TcpInfo) -> bool:
    """Whether data waits though the window is open and nothing is in flight: it cannot leave this host."""
    return bool(info.notsent_bytes and info.snd_wnd and not info.unacked and not info.retransmits)


def fell_silent(info: TcpInfo, state: SocketState) -> bool:
    """Whether a connection that the kernel has ended had a peer that no longer answered; else it was reset or closed.

    What went unanswered stays in the sample, and an ordinary end has none of it. A reset that answers a probe comes
    within a round trip of it, so before the last interval is half over.
    """
    silence = info.silence
    if info.state != TcpState.CLOSE or silence is None:
        return False
    if info.retransmits or (info.notsent_bytes and not info.snd_wnd) or _shrank(info):
        # The user timeout counts from when the data was sent first, the silence from what was heard after that.
        return silence >= (state.user_timeout or _LONG) - (state.interval or 0) / 2
    bounds = [bound for bound in (state.detection_time, state.user_timeout) if bound]
    return bool(info.probes and bounds) and silence >= min(bounds) - (state.interval or 0) / 2


def cause_of_death(number: int, info: TcpInfo | None) -> Cause:
    """Why a connection that once stood died, from its error number and its last TCP_INFO.

    The kernel wipes the send queue at death, but what stays tells the timers apart (measured on Linux 6.18):
    retransmits after a retransmission death; unsent bytes (`write_seq` is kept) after a window probe death; a window
    that is shut, and nothing counted, when it shrank under a segment in flight.
    """
    if number in NO_WAY:
        return Cause.UNREACHABLE
    if info is None:
        return Cause.KEEPALIVE
    if info.retransmits:
        return Cause.UNACKNOWLEDGED
    if info.notsent_bytes and not info.snd_wnd:
        return Cause.ZERO_WINDOW
    if info.snd_wnd == 0 and info.retransmits == 0 and info.probes == 0:
        return Cause.ZERO_WINDOW
    return Cause.UNREACHABLE if _never_left(info) else Cause.KEEPALIVE


def is_death(number: int | None, info: TcpInfo | None) -> bool:
    """Whether an error that ended a connection which stood says that its peer no longer answered.

    Some numbers say so only when it was the kernel that has ended the connection, whose questions were not answered:
    a call of the application's may have got them, too.
    """
    return number in DEATHS or (number in NO_WAY and info is not None and _was_given_up(info))


def _was_given_up(info: TcpInfo) -> bool:
    """Whether the kernel has ended a connection of which it wanted something."""
    wanted = info.retransmits or info.probes or info.notsent_bytes or _shrank(info)
    return info.state == TcpState.CLOSE and bool(wanted)


def dead_peer(
    exc: OSError,
    cause: Cause | None,
    sample: TcpInfo | None,
    *,
    peername: Any,
    policy: Keepalive | None,
    silence: float | None = None,
    this_host: bool = False,
) -> DeadPeerError:
    """The error for a peer that no longer answers; the kernel's error and its last sample tell of it.

    A cause, a silence that are not known already are what those two say, and so is whether this host had no way out.
    """
    assert exc.errno is not None
    if silence is None and sample is not None:
        silence = sample.silence
    found = cause or cause_of_death(exc.errno, sample)
    error = DeadPeerError(
        found,
        exc.errno,
        silence=math.nan if silence is None else silence,
        peername=peername,
        policy=policy,
        info=sample,
        this_host=this_host or (found is Cause.UNREACHABLE and _is_this_hosts(exc.errno, sample, peername)),
    )
    error.__cause__ = exc
    return error


def _is_this_hosts(number: int, sample: TcpInfo | None, peername: Any) -> bool:
    """Whether it was this host that had no way to the peer, and no router on the way.

    An IPv6 router that prohibits says EACCES (RFC 4443 3.1, code 1); of IPv4 only this host's own routes say that.
    """
    if number in _THIS_HOST or (number == errno.EACCES and isinstance(peername, tuple) and len(peername) == 2):
        return True
    return sample is not None and _never_left(sample)
