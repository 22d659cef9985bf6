"""When the far application is asked, and given up: tables and random lives, without a clock or a connection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaio.liveness.pulse import Act, Pulse, Signs

QUIET = Signs(deaf=False, queued=0, acknowledged=0)
EVERY, WITHIN, EARLY = 10.0, 4.0, 0.25


def asked(at: float = 10.0, signs: Signs = QUIET) -> Pulse:
    """A pulse that began at 0 and was asked."""
    pulse = Pulse(EVERY, WITHIN, EARLY, 0.0)
    pulse.rest(0.0, at)
    assert pulse.look(signs, at) == (Act.ASK, WITHIN)
    pulse.asked(signs, at)
    return pulse


def test_it_is_asked_after_a_silence_and_a_moment_early() -> None:
    """Counted from the last data, and not before it began."""
    pulse = Pulse(EVERY, WITHIN, EARLY, 100.0)
    assert pulse.rest(50.0, 100.0) == EVERY - EARLY
    assert pulse.rest(105.0, 109.75) == 5.0
    assert pulse.rest(105.0, 114.75) == 0.0
    assert pulse.look(QUIET, 114.75)[0] is Act.ASK


def test_small_times_are_asked_less_early() -> None:
    """At most half of them."""
    assert Pulse(0.4, 1.0, EARLY, 0.0).rest(0.0, 0.0) == pytest.approx(0.2)


def test_no_answer_is_a_death() -> None:
    """Not before its time."""
    pulse = asked()
    assert pulse.rest(0.0, 13.9) == 0.0
    act, left = pulse.look(QUIET, 13.9)
    assert act is Act.WAIT
    assert left == pytest.approx(0.1)
    assert pulse.look(QUIET, 14.0) == (Act.GIVE_UP, 0.0)


@pytest.mark.parametrize("at", [10.001, 9.96, 13.9])
def test_any_data_is_an_answer(at: float) -> None:
    """Also what came in the moment of asking: the kernel's clock is coarse."""
    pulse = asked()
    assert pulse.rest(at, 14.0) == pytest.approx(at + EVERY - EARLY - 14.0)


def test_what_is_not_read_is_no_silence() -> None:
    """And what was asked before is forgotten."""
    pulse = asked()
    deaf = QUIET._replace(deaf=True)
    assert pulse.look(deaf, 14.5)[0] is Act.WAIT
    assert pulse.rest(0.0, 14.5) == EVERY - EARLY


def test_a_loop_that_was_blocked_gives_the_peer_its_time() -> None:
    """The question may have left only now."""
    pulse = asked()
    act, left = pulse.look(QUIET, 30.0)
    assert (act, left) == (Act.WAIT, WITHIN)
    assert pulse.look(QUIET, 34.0)[0] is Act.GIVE_UP


def test_a_loop_that_is_blocked_all_the_time_gives_it_once() -> None:
    """When the answer came, the kernel tells, however late it is asked."""
    pulse = asked()
    assert pulse.look(QUIET, 15.0)[0] is Act.WAIT
    assert pulse.look(QUIET, 20.0)[0] is Act.GIVE_UP


def test_a_question_behind_other_data_waits_while_that_moves() -> None:
    """A slow peer that takes what is sent has not been silent; one that takes nothing has."""
    behind = Signs(deaf=False, queued=1000, acknowledged=7)
    pulse = asked(signs=behind)
    now, acknowledged = 10.0, 7
    for _ in range(40):
        now += 1.0
        acknowledged += 100
        assert pulse.look(behind._replace(acknowledged=acknowledged), now)[0] is Act.WAIT
    for _ in range(3):
        now += 1.0
        assert pulse.look(behind._replace(acknowledged=acknowledged), now)[0] is Act.WAIT
    assert pulse.look(behind._replace(acknowledged=acknowledged), now + 1.0)[0] is Act.GIVE_UP


def test_a_question_that_has_left_at_last_has_its_time() -> None:
    """From when the queue was seen empty; what is sent afterwards does not count."""
    behind = Signs(deaf=False, queued=1000, acknowledged=7)
    pulse = asked(signs=behind)
    assert pulse.look(behind._replace(queued=0, acknowledged=1007), 13.0) == (Act.WAIT, WITHIN)
    assert pulse.look(behind._replace(acknowledged=2000), 16.9)[0] is Act.WAIT
    assert pulse.look(behind._replace(acknowledged=3000), 17.0)[0] is Act.GIVE_UP


def test_a_question_that_is_still_being_asked_is_not_unanswered() -> None:
    """By an asynchronous function that waits for something of this side's."""
    pulse = asked()
    for now in (14.0, 18.0, 22.0):
        assert pulse.look(QUIET._replace(asking=True), now) == (Act.WAIT, WITHIN)
    assert pulse.look(QUIET, 26.0)[0] is Act.GIVE_UP


@given(
    every=st.floats(0.5, 60),
    within=st.floats(0.2, 30),
    answer_after=st.one_of(st.none(), st.floats(0.0, 100)),
    tick=st.floats(0.0, 0.25),
    stops_at=st.floats(0, 200),
)
def test_every_life(every: float, within: float, answer_after: float | None, tick: float, stops_at: float) -> None:
    """Who answers in time lives; who does not is given up within the sum of both times, if looks come in time."""
    pulse = Pulse(every, within, 0.5, 0.0)
    now = received_at = 0.0
    answers: list[float] = []
    for _ in range(2000):
        while answers and answers[0] <= now:
            received_at = answers.pop(0)
        ahead = pulse.rest(received_at, now)
        if ahead <= 0:
            act, ahead = pulse.look(QUIET, now)
            if act is Act.ASK:
                pulse.asked(QUIET, now)
                if answer_after is not None and now < stops_at:
                    answers.append(now + answer_after)
            elif act is Act.GIVE_UP:
                break
        now += max(ahead, 0.0) + tick * 0.9
        if now > 1000:
            break
    else:
        raise AssertionError("it spins")
    if act is Act.GIVE_UP:
        silent = now - received_at
        assert silent >= every + within - 0.5 - 1e-6
        assert silent <= every + within + max(0.0, 2 * tick - min(0.5, every / 2)) + 1e-6
        assert answer_after is None or answer_after > within - 1e-6 or now >= stops_at
    else:
        assert answer_after is not None
