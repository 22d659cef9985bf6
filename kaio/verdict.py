"""Judgement: from what the kernel says of a connection to alive, suspect, stalled or dead, and to the cause of a death.

Rules kept here: plain functions on plain data, no I/O and no clock.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
from typing import Final

from .errors import Cause
from .tcpinfo import TcpInfo, TcpState

__all__ = ["DEATHS", "Health", "State", "cause_of_death", "judge"]

_UNREACHABLE: Final = frozenset(
    getattr(errno, name)
    for name in ("EHOSTUNREACH", "ENETUNREACH", "EHOSTDOWN", "ENETDOWN")
    if hasattr(errno, name)  # Windows lacks some
)
# Windows has its own numbers for the same: WSAETIMEDOUT, WSAEHOSTUNREACH, WSAENETUNREACH, WSAEHOSTDOWN, WSAENETDOWN.
_WINDOWS_TIMED_OUT: Final = frozenset({10060})
_WINDOWS_UNREACHABLE: Final = frozenset({10065, 10051, 10064, 10050})

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
    elif _window_is_shut(info):
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


def _window_is_shut(info: TcpInfo) -> bool:
    return bool(info.notsent_bytes) and info.snd_wnd == 0 and not info.unacked


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
