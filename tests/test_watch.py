"""The watch: what a row of looks at a connection leads to. Times are seconds of silence, or of the caller's clock."""

from __future__ import annotations

from typing import Any

import pytest

from kaio import Cause, State, TcpInfo, TcpState
from kaio.liveness.limits import Limits
from kaio.liveness.watch import Decision, Watch, look_at_rest

UP = TcpState.ESTABLISHED
LIMITS = Limits(20, 10, 4, 60)
QUICK = Limits(1, 1, 2, 3)
KERNEL = Limits(20, 10, 4, None)  # the user timeout is the kernel's affair, or there is none
ONE = Limits(1, 1, 1, 2)
SHORT = Limits(20, 10, 1, 2)  # a user timeout below the idle time
SHUT = {"notsent_bytes": 1000, "snd_wnd": 0}
SHRUNK = {"unacked": 1, "snd_wnd": 0, "retransmits": 0}
UNSENT = {"notsent_bytes": 1000, "snd_wnd": 65535}


def seen(silence: float, *, state: int = UP, **fields: Any) -> TcpInfo:
    """A sample of a connection that has been silent for so long."""
    fields = {"snd_wnd": 65535, **fields}
    return TcpInfo(state=state, last_ack_recv=silence, last_data_recv=silence + 5, **fields)


def watched(limits: Limits, *samples: TcpInfo, since: float | None = None) -> list[Decision]:
    """The verdicts on one connection that fell silent at 100, looked at at the times that the samples tell."""
    watch = Watch(limits, since)
    return [watch.look(sample, 100 + (sample.silence or 0)) for sample in samples]


@pytest.mark.parametrize(
    ("sample", "limits", "state", "look_after"),
    [
        # Well: the next look is half an interval after the first probe.
        (seen(0), LIMITS, State.ALIVE, 25),
        (seen(5), LIMITS, State.ALIVE, 20),
        (seen(5), KERNEL, State.ALIVE, 20),
        (seen(0.1, unacked=3), LIMITS, State.ALIVE, 24.9),
        (seen(3, unacked=1, retransmits=3), LIMITS, State.ALIVE, 22),
        (seen(19.9, probes=1), LIMITS, State.ALIVE, 5.1),
        # Suspect: at least one question unanswered, after the idle time.
        (seen(25, probes=1), LIMITS, State.SUSPECT, 10),
        (seen(55, probes=4), LIMITS, State.SUSPECT, 10),
        (seen(25, unacked=1, retransmits=5), LIMITS, State.SUSPECT, 10),
        (seen(55, unacked=1, retransmits=6), LIMITS, State.SUSPECT, 10),
        (seen(65, probes=4), LIMITS, State.SUSPECT, 10),  # idle: the kernel's to end
        (seen(65, unacked=1, retransmits=8), KERNEL, State.SUSPECT, 10),
        # Stalled: one answer may be withheld by the peer's rate limit.
        (seen(0.5, **SHUT), LIMITS, State.STALLED, 24.5),
        (seen(40, **SHUT), LIMITS, State.STALLED, 10),
        (seen(55, probes=1, **SHUT), LIMITS, State.STALLED, 10),
        (seen(40, probes=2, **SHUT), LIMITS, State.SUSPECT, 10),
        (seen(0.5, **SHRUNK), LIMITS, State.STALLED, 24.5),
        # The kernel's own verdict, and a kernel that tells nothing.
        (seen(3, state=TcpState.CLOSE), LIMITS, State.DEAD, 10),
        (TcpInfo(state=UP), LIMITS, State.ALIVE, 25),
        (TcpInfo(state=UP, last_ack_recv=90), LIMITS, State.ALIVE, 25),
    ],
)
def test_the_first_check(sample: TcpInfo, limits: Limits, state: State, look_after: float) -> None:
    """It tells how the peer is, and gives nobody up that has not been asked for long enough."""
    (decision,) = watched(limits, sample)
    assert (decision.state, decision.cause) == (state, None)
    assert decision.look_after == pytest.approx(look_after)


DEATHS: dict[str, tuple[Limits, Cause, list[TcpInfo]]] = {
    "in flight": (
        LIMITS,
        Cause.UNACKNOWLEDGED,
        [seen(25, unacked=1, retransmits=6), seen(60, unacked=1, retransmits=8)],
    ),
    "in flight, and no look before": (
        LIMITS,
        Cause.UNACKNOWLEDGED,
        [seen(60, unacked=1, retransmits=7, rto=25.6, last_data_sent=5.0)],
    ),
    "written after probes were lost": (
        LIMITS,
        Cause.UNACKNOWLEDGED,
        [seen(25, probes=1), seen(45, probes=3), seen(60, probes=3, unacked=1, retransmits=2)],
    ),
    "shut": (LIMITS, Cause.ZERO_WINDOW, [seen(25, **SHUT, probes=1), seen(60, **SHUT, probes=4)]),
    "shrunk under data in flight": (
        LIMITS,
        Cause.ZERO_WINDOW,
        [seen(25, **SHRUNK, total_retrans=7), seen(45, **SHRUNK, total_retrans=8), seen(60, **SHRUNK, total_retrans=9)],
    ),
    "shrunk, by what the doubled timeout tells": (
        QUICK,
        Cause.ZERO_WINDOW,
        [seen(1.5, **SHRUNK, rto=1.6, last_data_sent=0.1, backoff=3, total_retrans=3), seen(3, **SHRUNK, backoff=4)],
    ),
    "shrunk, and nothing leaves this host": (
        LIMITS,
        Cause.ZERO_WINDOW,
        [
            seen(25, **SHRUNK, rto=25.6, backoff=7),
            seen(55, **SHRUNK, rto=30, backoff=8),
            seen(70, **SHRUNK, rto=30, backoff=8),
        ],
    ),
    "never left this host": (LIMITS, Cause.UNREACHABLE, [seen(25, **UNSENT, probes=5), seen(60, **UNSENT, probes=7)]),
    "a FIN": (
        LIMITS,
        Cause.UNACKNOWLEDGED,
        [
            seen(25, unacked=1, retransmits=3, state=TcpState.FIN_WAIT1),
            seen(60, unacked=1, retransmits=5, state=TcpState.FIN_WAIT1),
        ],
    ),
    "an old kernel's shut window": (
        LIMITS,
        Cause.ZERO_WINDOW,
        [seen(25, notsent_bytes=9, snd_wnd=None, probes=1), seen(60, notsent_bytes=9, snd_wnd=None, probes=3)],
    ),
    "one question, where the policy says so": (
        ONE,
        Cause.UNACKNOWLEDGED,
        [seen(1.5, unacked=1, retransmits=1), seen(2, unacked=1, retransmits=1)],
    ),
    "the kernel never asks": (
        LIMITS,
        Cause.UNACKNOWLEDGED,
        [seen(25, unacked=1, rto=0.2), seen(90, unacked=1, rto=0.2), seen(146, unacked=1, rto=0.2)],
    ),
    "counters that wrap": (
        LIMITS,
        Cause.UNREACHABLE,
        [seen(25, **UNSENT, probes=255), seen(60, **UNSENT, probes=4)],
    ),
    "total_retrans that wraps": (
        LIMITS,
        Cause.ZERO_WINDOW,
        [seen(25, **SHRUNK, total_retrans=2**32 - 1), seen(60, **SHRUNK, total_retrans=1)],
    ),
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_silent_peer_is_declared_dead(name: str) -> None:
    """At the last of these looks, and not before."""
    limits, cause, samples = DEATHS[name]
    decisions = watched(limits, *samples)
    assert [decision.cause for decision in decisions] == [None] * (len(samples) - 1) + [cause]
    assert decisions[-1].state is State.DEAD


SPARED: dict[str, tuple[Limits, list[TcpInfo]]] = {
    "the kernel has not asked": (LIMITS, [seen(25, unacked=1), seen(60, unacked=1)]),
    "one question is not enough": (LIMITS, [seen(25, unacked=1), seen(60, unacked=1, retransmits=1)]),
    "all questions in a moment": (LIMITS, [seen(60, unacked=1, retransmits=2, rto=0.8, last_data_sent=0.1)]),
    "no data waits": (LIMITS, [seen(25, probes=1), seen(60, probes=4), seen(70, probes=5)]),
    "heard between two looks": (
        LIMITS,
        [seen(25, unacked=1, retransmits=6), seen(0.5, unacked=1, retransmits=7), seen(10, unacked=1, retransmits=8)],
    ),
    "one window probe may stay unanswered": (LIMITS, [seen(25, **SHUT), seen(60, **SHUT, probes=1)]),
    "a back-off of two minutes": (
        QUICK,
        [seen(2, **SHUT, rto=0.2, backoff=12), seen(30, **SHUT, rto=0.2, backoff=12), seen(110, **SHUT, backoff=12)],
    ),
    "the kernel bounds it": (KERNEL, [seen(25, unacked=1, retransmits=6), seen(90, unacked=1, retransmits=9)]),
    "a user timeout below the idle time, written late": (SHORT, [seen(19, unacked=1, retransmits=1, rto=0.4)]),
    "a kernel without counters": (LIMITS, [TcpInfo(state=UP, unacked=1, last_ack_recv=60)]),
}


@pytest.mark.parametrize("name", SPARED)
def test_a_live_peer_is_not_declared_dead(name: str) -> None:
    """At none of these looks is it given up."""
    limits, samples = SPARED[name]
    assert [decision.cause for decision in watched(limits, *samples)] == [None] * len(samples)


def test_silence_from_before_the_watch_does_not_count() -> None:
    """Keepalive was off, or slower, until then."""
    watch = Watch(QUICK, since=1000.0)
    assert watch.look(seen(7200, unacked=1, retransmits=2), 1000.5).cause is None
    assert watch.look(seen(7202, unacked=1, retransmits=4), 1002.5).cause is None
    assert watch.look(seen(7203, unacked=1, retransmits=5), 1003.5).cause is Cause.UNACKNOWLEDGED


def test_other_limits_start_over() -> None:
    """What was asked by the old ones does not count; a suspicion stays until the peer is heard."""
    watch = Watch(LIMITS)
    watch.look(seen(50, probes=3), 150)
    assert watch.suspect
    watch.begin_anew(QUICK, 150.0)
    assert watch.suspect
    assert not watch.at_rest
    assert watch.look(seen(50.5, unacked=1, retransmits=1, probes=3), 150.5).cause is None
    assert watch.look(seen(52, unacked=1, retransmits=2, probes=3), 152).cause is None
    assert watch.look(seen(53.5, unacked=1, retransmits=3, probes=3), 153.5).cause is Cause.UNACKNOWLEDGED
    watch = Watch(LIMITS)
    watch.begin_anew(QUICK, 200.0)
    watch.look(seen(0.1), 201.0)
    assert watch.at_rest


@pytest.mark.parametrize("jump", [-1e6, -30.0, 30.0, 1e6])
def test_a_clock_that_jumps_can_only_delay_a_verdict(jump: float) -> None:
    """Forwards or backwards, between any two looks."""
    for jumped in range(3):
        watch = Watch(LIMITS)
        causes = []
        for number in range(12):
            silence = 25.0 + 10 * number
            sample = seen(silence, unacked=1, retransmits=6 + number)
            causes.append(watch.look(sample, 100 + silence + (jump if number >= jumped else 0)).cause)
        assert causes[:3] == [None] * 3
        assert causes[-1] is Cause.UNACKNOWLEDGED
        live = Watch(LIMITS)
        for number in range(6):
            at = 100 + 25.0 * number + (jump if number >= jumped else 0)
            assert live.look(seen(0.5, unacked=1, retransmits=1, snd_wnd=9), at).cause is None


def test_suspect_recovered_and_at_rest() -> None:
    """What must be remembered, is; what need not, is not."""
    watch = Watch(LIMITS)
    assert watch.look(seen(25, probes=1), 125).state is State.SUSPECT
    assert not watch.at_rest
    assert watch.look(seen(1), 135).state is State.ALIVE
    assert not watch.suspect
    assert watch.at_rest
    watch.cap = 10.0
    assert not watch.at_rest


@pytest.mark.parametrize(
    ("sample", "cap", "spare"),
    [
        (seen(1), None, False),
        (seen(1, unacked=5), None, False),
        (seen(1, unacked=5, notsent_bytes=7), None, False),
        (seen(1, **SHUT), 10, True),
        (seen(1, **SHRUNK), 30, True),  # there the kernel gives up after two of the longest back-off
        (seen(40, **SHUT, probes=3), 10, True),  # until it is given up
        (seen(1, **UNSENT), 10, False),
        (seen(25, unacked=5, retransmits=5), 10, False),  # suspect
    ],
)
def test_the_kernels_backoff_is_capped_while_data_waits(sample: TcpInfo, cap: float | None, spare: bool) -> None:
    """The back-off is capped where the kernel asks ever more rarely; a user timeout is off where the window is shut."""
    (decision,) = watched(LIMITS, sample)
    assert (decision.cap, decision.spare) == (cap, spare)
    (decision,) = watched(KERNEL, sample)
    assert decision.cap is None


@pytest.mark.parametrize(("silence", "ahead"), [(0.0, 25.0), (20.0, 5.0), (25.0, 3.0), (28.0, 32.0), (900.0, 25.0)])
def test_an_idle_connection_is_checked_when_a_probe_could_be_unanswered(silence: float, ahead: float) -> None:
    """After the first probe and half an interval, be it late or not, and at the bound; as the long way decides."""
    assert look_at_rest(LIMITS, silence) == ahead
    (decision,) = watched(LIMITS, seen(silence, probes=0, retransmits=0, unacked=0, notsent_bytes=0))
    assert decision.look_after == ahead
