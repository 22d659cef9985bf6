"""The health of a connection's peer, from one sample of TCP_INFO: alive, suspect, stalled or dead.

Rules kept here: plain functions on plain data, no I/O and no clock.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from ..kernel.tcpinfo import TcpInfo, TcpState

__all__ = ["Health", "State", "judge", "window_is_shut"]

_WITHOUT_WINDOW: Final = frozenset({TcpState.SYN_SENT, TcpState.SYN_RECV, TcpState.NEW_SYN_RECV, TcpState.LISTEN})


class State(enum.StrEnum):
    """The state of a connection's peer."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    """At least one probe or retransmission went unanswered."""
    STALLED = "stalled"
    """Alive, and its window is shut: it takes no data."""
    DEAD = "dead"
    """The kernel has ended the connection."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What the kernel knows about a connection's peer now. None: the platform does not say."""

    state: State
    probes: int | None
    """Keepalive or window probes sent and not answered so far."""
    retransmits: int | None
    """Retransmissions of the oldest unacknowledged segment so far."""
    silence: float | None
    """Seconds since a segment was last received from the peer."""
    rtt: float | None
    """Smoothed round-trip time in seconds."""
    unacked: int | None
    """Segments in flight."""
    unsent: int | None
    """Bytes that the kernel holds and has not sent yet."""
    info: TcpInfo
    """The whole sample."""


def judge(info: TcpInfo) -> Health:
    """Judge a peer by a sample of TCP_INFO."""
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
    """Return whether data waits for the peer to open its window: unsent, or in flight when the window shrank.

    Before Linux 5.4 the kernel does not tell the window: unsent data with nothing in flight then means that it is shut.
    Before the handshake is over no window is known.
    """
    if info.state in _WITHOUT_WINDOW:
        return False
    if info.snd_wnd is None:
        return bool(info.notsent_bytes) and not info.unacked
    return info.snd_wnd == 0 and bool(info.notsent_bytes or info.unacked)
