"""Random lives of a connection in the model of the kernel's timers: the watch is right in all of them (lives.py)."""

from __future__ import annotations

import hypothesis
import pytest

from .lives import Life, check, examine, live, lives, main


@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(lives)
def test_the_watch_is_right_in_every_life(life: Life) -> None:
    """Nobody is given up who could be reached, and everybody in time who could not; suspect first."""
    examine(life)


FOUND = {
    "a shrunk window whose owner answers, and a cap that is less than half of the timeout": Life(
        idle=19, steps=((7.2, "peer stops reading", 0), (1.76, "send", 1))
    ),
    "retransmissions that were answered without progress": Life(
        steps=((0.0, "send", 100), (0.0, "peer stops reading", 1))
    ),
    "a clock that was set back by an hour": Life(
        since=0.0, jumps=(-3600.0,), steps=((29.0, "send", 1), (0.0, "cut inward", 0))
    ),
    "data just after a look, behind a probe that is late": Life(
        idle=17, steps=((16.0, "peer dies", 0), (2.88, "send", 5_000))
    ),
    "probes that were counted before the peer sent data": Life(
        idle=5, interval=10, count=5, rtt=250, rto=453, boot=13, dice=99, steps=((5.2, "loses", 0.1),)
    ),
    "retransmissions for which there is no route, into a window that shrank": Life(
        caps=False, steps=((0.0, "send", 1), (0.0, "peer stops reading", 0), (0.0, "fails", 0))
    ),
    "an interval that is longer than a third of the bound": Life(
        idle=7, interval=9, steps=((1.8, "peer stops reading", 100), (64.0, "send", 20_000), (22.74, "fails", 0))
    ),
    "an outage in a row of losses, which the kernel counts from its beginning": Life(
        idle=11, interval=2, count=5, dice=40, steps=((9.0, "loses", 0.6), (12.0, "send", 20_000))
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_lives_that_were_once_judged_wrongly(name: str) -> None:
    """Each was found at random, and made as simple as it can be."""
    examine(FOUND[name])


@pytest.mark.heavy
def test_a_wrong_verdict_would_be_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A watch that gives up by silence alone fails, and the program says where."""
    monkeypatch.setattr("kaio.liveness.watch.Watch._cannot_ask", lambda *_: True)
    assert main(["--lives", "2000", "--seed", "1"]) == 1
    assert "given up after" in capsys.readouterr().out


def test_the_model_itself_gives_a_dead_peer_up() -> None:
    """The checks hold for something: a death is one, at the bound."""
    story = live(Life(idle=2, interval=1, count=2, steps=((1.0, "peer dies", 0), (0.5, "send", 1))))
    assert story.verdict is not None
    assert 4.0 <= story.ended / 1e6 <= 4.25
    assert not check(story)
