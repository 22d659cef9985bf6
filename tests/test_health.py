"""Judgement: samples in, verdicts out."""

from __future__ import annotations

import errno
import pickle
from typing import Any

import pytest

from kaio import Cause, Health, Keepalive, SocketState, State, TcpInfo, TcpState
from kaio.liveness.causes import DEATHS, NO_WAY, cause_of_death, dead_peer, fell_silent, is_death
from kaio.liveness.health import judge
from kaio.liveness.limits import Limits, limits_of, limits_of_state

UP = TcpState.ESTABLISHED
GONE = TcpState.CLOSE


@pytest.mark.parametrize(
    ("info", "state"),
    [
        (TcpInfo(state=UP), State.ALIVE),
        (TcpInfo(state=UP, probes=0, retransmits=0, unacked=0, notsent_bytes=0, snd_wnd=65535), State.ALIVE),
        (TcpInfo(state=UP, unacked=10, notsent_bytes=5000, snd_wnd=65535), State.ALIVE),
        (TcpInfo(state=UP, total_retrans=7, retrans=1), State.ALIVE),
        (TcpInfo(state=UP, last_ack_recv=3600.0, last_data_recv=3600.0), State.ALIVE),
        (TcpInfo(state=TcpState.CLOSE_WAIT), State.ALIVE),
        (TcpInfo(state=TcpState.FIN_WAIT2, probes=0), State.ALIVE),
        (TcpInfo(state=TcpState.LISTEN), State.ALIVE),
        (TcpInfo(state=99), State.ALIVE),
        (TcpInfo(state=UP, probes=1), State.SUSPECT),
        (TcpInfo(state=UP, probes=9, retransmits=0), State.SUSPECT),
        (TcpInfo(state=UP, retransmits=1, unacked=1), State.SUSPECT),
        (TcpInfo(state=TcpState.SYN_SENT, retransmits=2), State.SUSPECT),
        (TcpInfo(state=TcpState.LAST_ACK, retransmits=2), State.SUSPECT),
        (TcpInfo(state=UP, notsent_bytes=1, snd_wnd=0, unacked=0), State.STALLED),
        (TcpInfo(state=TcpState.CLOSE_WAIT, notsent_bytes=1, snd_wnd=0, unacked=0, backoff=3), State.STALLED),
        (TcpInfo(state=UP, notsent_bytes=1, snd_wnd=0, unacked=0, probes=1), State.SUSPECT),
        (TcpInfo(state=UP, notsent_bytes=0, snd_wnd=0), State.ALIVE),
        (TcpInfo(state=UP, notsent_bytes=0, snd_wnd=0, unacked=1), State.STALLED),  # it shrank under data in flight
        (TcpInfo(state=UP, notsent_bytes=1), State.STALLED),  # before Linux 5.4 there is no snd_wnd
        (TcpInfo(state=UP, notsent_bytes=1, unacked=1), State.ALIVE),
        (TcpInfo(state=UP, snd_wnd=0), State.ALIVE),
        (TcpInfo(state=TcpState.SYN_SENT, unacked=1, snd_wnd=0), State.ALIVE),
        (TcpInfo(state=GONE), State.DEAD),
        (TcpInfo(state=GONE, probes=4), State.DEAD),
        (TcpInfo(state=GONE, retransmits=4, notsent_bytes=1, snd_wnd=0), State.DEAD),
    ],
    ids=str,
)
def test_a_sample_is_judged(info: TcpInfo, state: State) -> None:
    """Dead before suspect before stalled before alive; silence alone is no reason for suspicion."""
    assert judge(info).state is state


def test_health_has_what_the_sample_has() -> None:
    """The fields that people ask for, and the whole sample."""
    info = TcpInfo(
        state=UP, probes=2, last_ack_recv=31.5, last_data_recv=40.0, rtt=0.025, unacked=3, notsent_bytes=1000, snd_wnd=1
    )
    assert judge(info) == Health(
        state=State.SUSPECT, probes=2, retransmits=None, silence=31.5, rtt=0.025, unacked=3, unsent=1000, info=info
    )


def test_health_has_none_for_what_the_platform_does_not_say() -> None:
    """What the sample lacks is None, and not zero."""
    health = judge(TcpInfo(state=UP))
    assert (health.probes, health.silence, health.rtt, health.unacked, health.unsent) == (None,) * 5


WEDGED = TcpInfo(state=GONE, notsent_bytes=1, snd_wnd=0)
RESENT = TcpInfo(state=GONE, retransmits=7)
PROBED = TcpInfo(state=GONE, probes=4, retransmits=0, notsent_bytes=0, snd_wnd=65535)
SHRUNK = TcpInfo(state=GONE, probes=0, retransmits=0, notsent_bytes=0, snd_wnd=0, last_data_sent=0.4, last_ack_recv=3.2)
UNSENT = TcpInfo(state=GONE, probes=3, retransmits=0, unacked=0, notsent_bytes=5, snd_wnd=65535)
SAID = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EADDRNOTAVAIL, errno.ENONET, errno.ECONNREFUSED)


@pytest.mark.parametrize(
    ("number", "info", "cause"),
    [
        (errno.ETIMEDOUT, PROBED, Cause.KEEPALIVE),
        (errno.ETIMEDOUT, None, Cause.KEEPALIVE),
        (errno.ETIMEDOUT, TcpInfo(state=GONE), Cause.KEEPALIVE),
        (errno.ETIMEDOUT, RESENT, Cause.UNACKNOWLEDGED),
        (errno.ETIMEDOUT, TcpInfo(state=GONE, retransmits=7, notsent_bytes=1, snd_wnd=0), Cause.UNACKNOWLEDGED),
        (errno.ETIMEDOUT, TcpInfo(state=GONE, retransmits=7, probes=2), Cause.UNACKNOWLEDGED),
        (errno.ETIMEDOUT, WEDGED, Cause.ZERO_WINDOW),
        (errno.ETIMEDOUT, TcpInfo(state=GONE, notsent_bytes=1), Cause.ZERO_WINDOW),
        (errno.ETIMEDOUT, TcpInfo(state=GONE, notsent_bytes=1, snd_wnd=1, probes=4), Cause.UNREACHABLE),
        (errno.ETIMEDOUT, SHRUNK, Cause.ZERO_WINDOW),
        (errno.ETIMEDOUT, UNSENT, Cause.UNREACHABLE),
        (10060, PROBED, Cause.KEEPALIVE),
        *[
            (number, info, Cause.UNREACHABLE)
            for number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, *SAID)
            for info in (None, PROBED, RESENT, WEDGED)
        ],
        *[(number, None, Cause.UNREACHABLE) for number in (10065, 10051, 10064, 10050)],
    ],
)
def test_the_cause_follows_from_errno_and_the_last_sample(number: int, info: TcpInfo | None, cause: Cause) -> None:
    """The network's own word first, then what the kernel left standing."""
    assert cause_of_death(number, info) is cause


@pytest.mark.parametrize("name", ["ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "EHOSTDOWN", "ENETDOWN"])
def test_deaths_are_the_errnos_of_a_silent_peer(name: str) -> None:
    """Timeouts and unreachable networks."""
    assert getattr(errno, name) in DEATHS


@pytest.mark.parametrize("name", ["ECONNRESET", "EPIPE", "ECONNREFUSED", "ECONNABORTED", "EBADF", "ENOTCONN", "EAGAIN"])
def test_a_live_peers_errors_are_not_deaths(name: str) -> None:
    """A reset or a refusal comes from somebody who answers."""
    assert getattr(errno, name) not in DEATHS


@pytest.mark.parametrize("number", SAID)
def test_some_errnos_are_deaths_only_when_the_kernel_ended_the_connection(number: int) -> None:
    """On a connection that stands, or that was reset, the same number is a mistake in a call."""
    assert all(is_death(number, info) for info in (PROBED, RESENT, WEDGED, UNSENT, SHRUNK))
    assert not any(is_death(number, info) for info in (None, TcpInfo(state=GONE), TcpInfo(state=UP, probes=3)))
    assert number in NO_WAY


V4, V6 = ("192.0.2.1", 80), ("2001:db8::1", 80, 0, 0)


@pytest.mark.parametrize(
    ("number", "info", "peername", "text"),
    [
        (errno.EHOSTUNREACH, RESENT, V4, "peer 192.0.2.1:80 is dead (unreachable)"),
        (errno.EACCES, RESENT, V4, "this host cannot reach peer 192.0.2.1:80 (unreachable): Permission denied"),
        (errno.EACCES, RESENT, V6, "peer [2001:db8::1]:80 is dead (unreachable)"),
        (errno.EPERM, PROBED, V4, "this host cannot reach peer 192.0.2.1:80 (unreachable): Operation not permitted"),
        (errno.EINVAL, PROBED, None, "this host cannot reach peer (unreachable): Invalid argument"),
        (errno.ETIMEDOUT, UNSENT, V4, "this host cannot reach peer 192.0.2.1:80 (unreachable)"),
        (errno.ETIMEDOUT, RESENT, V4, "peer 192.0.2.1:80 is dead (unacknowledged)"),
    ],
    ids=str,
)
def test_a_failure_of_this_host_is_distinguished_from_a_dead_peer(
    number: int, info: TcpInfo, peername: Any, text: str
) -> None:
    """By the number, or because what was written has never left."""
    error = dead_peer(OSError(number, ""), None, info, peername=peername, policy=None)
    assert str(error) == text
    assert error.this_host is text.startswith("this host")
    assert pickle.loads(pickle.dumps(error)).this_host is error.this_host


# -- times


@pytest.mark.parametrize(
    ("policy", "limits"),
    [
        (Keepalive(), Limits(20, 10, 4, 60)),
        (Keepalive(user_timeout=90), Limits(20, 10, 4, 90)),
        (Keepalive(user_timeout=None), Limits(20, 10, 4, None)),
        (Keepalive(stalled="drop"), Limits(20, 10, 4, None)),
        (Keepalive.OFF, None),
        (Keepalive.SYSTEM, None),
        (Keepalive(20, None, 4), None),
    ],
)
def test_limits_of_a_policy(policy: Keepalive, limits: Limits | None) -> None:
    """stalled="drop" leaves the user timeout to the kernel; a policy with gaps needs the kernel's values first."""
    assert limits_of(policy) == limits


# -- sockets of others

POLICY = Keepalive(20, 10, 4)


def state(
    enabled: bool,
    idle: float | None = None,
    interval: float | None = None,
    count: int | None = None,
    user_timeout: float | None = None,
) -> SocketState:
    """In the order of the text form."""
    return SocketState(enabled=enabled, idle=idle, interval=interval, count=count, user_timeout=user_timeout)


@pytest.mark.parametrize(
    ("policy", "has", "expected"),
    [
        (POLICY, state(True, 20, 10, 4), Limits(20, 10, 4, 60.0)),
        (Keepalive(20, 10, 4, stalled="drop"), state(True, 20, 10, 4, 60.0), Limits(20, 10, 4, None)),
        (Keepalive(20, 10, 4, user_timeout=90), state(True, 20, 10, 4), Limits(20, 10, 4, 90.0)),
        (POLICY, state(True, 30, 5, 3), Limits(30, 5, 3, 45)),
        (POLICY, state(True, 30, 5, 3, 50.0), Limits(30, 5, 3, None)),
        (Keepalive.SYSTEM, state(True, 7200, 75, 9), Limits(7200, 75, 9, None)),
        (Keepalive.OFF, state(True, 30, 5, 3), Limits(30, 5, 3, 45)),
        (POLICY, state(False, 20, 10, 4), None),
        (POLICY, state(True), None),
    ],
)
def test_limits_of_another_librarys_socket(policy: Keepalive, has: SocketState, expected: Limits | None) -> None:
    """The policy speaks for its own times; other times speak for themselves."""
    assert limits_of_state(policy, has) == expected


KEPT = state(True, 1, 1, 2)
BOUNDED = state(True, 1, 1, 2, 3.0)


@pytest.mark.parametrize(
    ("info", "has", "died"),
    [
        (TcpInfo(state=GONE, probes=2, last_ack_recv=3.0), KEPT, True),
        (TcpInfo(state=GONE, probes=2, last_ack_recv=2.6), KEPT, True),
        (TcpInfo(state=GONE, probes=2, last_ack_recv=2.0), KEPT, False),  # a reset that answered the last probe
        (TcpInfo(state=GONE, probes=0, last_ack_recv=9.0), KEPT, False),  # closed by both
        (TcpInfo(state=GONE, retransmits=3, last_ack_recv=3.2), BOUNDED, True),
        (TcpInfo(state=GONE, retransmits=3, last_ack_recv=2.0), BOUNDED, False),
        (TcpInfo(state=GONE, retransmits=3, last_ack_recv=9.0), KEPT, False),  # the kernel goes on for minutes
        (TcpInfo(state=GONE, retransmits=15, last_ack_recv=920.0), KEPT, True),
        (TcpInfo(state=GONE, notsent_bytes=9, snd_wnd=0, last_ack_recv=3.1), BOUNDED, True),
        (SHRUNK, BOUNDED, True),
        (SHRUNK._replace(last_data_sent=4.0), BOUNDED, False),  # nothing was sent since: nothing was asked
        (UNSENT._replace(last_ack_recv=3.1), BOUNDED, True),
        (TcpInfo(state=UP, probes=2, last_ack_recv=3.0), KEPT, False),
        (TcpInfo(state=GONE, probes=2), KEPT, False),
    ],
    ids=str,
)
def test_an_end_is_a_death_only_if_probes_were_unanswered(info: TcpInfo, has: SocketState, died: bool) -> None:
    """What the kernel ended for others' protocols, told apart from resets and ordinary ends."""
    assert fell_silent(info, has) is died
