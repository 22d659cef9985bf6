"""Why a connection ended: which errors mean that the peer is dead, and the cause of death.

Rules kept here: plain functions on plain data, no I/O and no clock. One function makes a DeadPeerError.
"""

from __future__ import annotations

import errno
import math
from typing import TYPE_CHECKING, Final

from ..errors import Cause, DeadPeerError
from ..kernel.tcpinfo import TcpInfo, TcpState

if TYPE_CHECKING:
    from ..policy import Keepalive, SocketState

__all__ = ["DEATHS", "NO_WAY", "cause_of_death", "dead_peer", "fell_silent", "is_death"]

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

_LONG: Final = 60.0  # seconds; without a user timeout the kernel goes on for many minutes (tcp_retries2)

DEATHS: Final = _UNREACHABLE | _WINDOWS_UNREACHABLE | _WINDOWS_TIMED_OUT | {errno.ETIMEDOUT}
"""The error numbers with which a kernel reports that a peer no longer answers. A reset is not among them."""
NO_WAY: Final = (DEATHS | _STOOD) - _WINDOWS_TIMED_OUT - {errno.ETIMEDOUT}
"""The error numbers that say, of a connection that stood and fell silent, that there is no way to its peer. An
application that misuses a socket gets some of them, too, while the connection is established."""


def _shrank(info: TcpInfo) -> bool:
    """Return whether the window shrank to zero under a segment in flight, whose retransmissions are not counted.

    (net/ipv4/tcp_timer.c, tcp_retransmit_timer: "our retransmits become zero probes".) Sent since the peer was heard.
    """
    sent, silence = info.last_data_sent, info.silence
    asked = info.retransmits or info.probes
    return info.snd_wnd == 0 and not asked and sent is not None and silence is not None and sent < silence


def _never_left(info: TcpInfo) -> bool:
    """Return whether data waits though the window is open and nothing is in flight: it cannot leave this host."""
    return bool(info.notsent_bytes and info.snd_wnd and not info.unacked and not info.retransmits)


def fell_silent(info: TcpInfo, state: SocketState) -> bool:
    """Return whether a connection that the kernel has ended had a silent peer; else it was reset or closed.

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
    """Return the cause of death of an established connection, from its errno and its last TCP_INFO.

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
    """Return whether the error that ended an established connection means that its peer no longer answered.

    Some numbers say so only when it was the kernel that has ended the connection, whose questions were not answered:
    a call of the application's may have got them, too.
    """
    return number in DEATHS or (number in NO_WAY and info is not None and _was_given_up(info))


def _was_given_up(info: TcpInfo) -> bool:
    """Return whether the kernel has ended a connection while it waited for an acknowledgment."""
    wanted = info.retransmits or info.probes or info.notsent_bytes or _shrank(info)
    return info.state == TcpState.CLOSE and bool(wanted)


def dead_peer(
    exc: OSError,
    cause: Cause | None,
    sample: TcpInfo | None,
    *,
    peername: object,
    policy: Keepalive | None,
    silence: float | None = None,
    this_host: bool = False,
) -> DeadPeerError:
    """Make the DeadPeerError for the kernel's error and its last sample.

    A cause or a silence that is not given is derived from those two, and so is whether this host had no route out.
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


def _is_this_hosts(number: int, sample: TcpInfo | None, peername: object) -> bool:
    """Return whether it was this host that could not reach the peer, and not a router on the way.

    An IPv6 router that prohibits says EACCES (RFC 4443 3.1, code 1); of IPv4 only this host's own routes say that.
    """
    if number in _THIS_HOST or (number == errno.EACCES and isinstance(peername, tuple) and len(peername) == 2):
        return True
    return sample is not None and _never_left(sample)
