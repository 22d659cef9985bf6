"""Random lives of a connection, watched: `python -m tests.lives --lives 100000 --seed 1`.

A life is a policy, a kernel, a path, and what befalls them; it is lived by the model of the kernel's timers, and looked
at as the monitor looks: at a tick of its wheel, sometimes late, sometimes by a clock that was set. `check` says what
the watch got wrong in it. test_lives has hypothesis look for such lives; this program has it look for longer, and
prints the simplest one that it finds as a timeline.

What the contract asks ("Who ends a connection"), as `check` takes it:

- *Heard* is what TCP_INFO tells. A *question* is what the kernel sent, or tried to send, and the peer must answer.
- The watch gives nobody up who was heard within the bound, nor whom the kernel did not ask at least twice since (once,
  where the policy counts to one and the window is open; packets that never leave the queue are the exception), nor who
  could be reached by the last question. The last question is the last one that was asked a round trip before the
  verdict or earlier: its answer could be here. A peer whose outage ends after that is dead by the contract; one whose
  outage ends before it is alive. An answer that the peer's kernel withholds (it answers twice a second at most) counts
  as given. The kernel may not do it in the watch's stead either, by the back-off that the watch has capped.
- Whoever cannot be reached, and something waits for, is given up when the bound has passed since the last word, since
  the watch began and since something waits for less than that, and enough questions went unanswered for long enough
  (`Limits.least_asking`); at most a second and a tick of the wheel later, and the time by which looks were late.
- A peer is suspect at the last look before that, if enough questions had gone unanswered by then, and never without.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
from collections.abc import Iterator
from typing import Any, Final

import hypothesis
from hypothesis import strategies as st

from kaio.kernel.tcpinfo import TcpInfo, TcpState
from kaio.liveness.health import State
from kaio.liveness.limits import Limits, limits_of
from kaio.liveness.watch import Decision, Watch, look_at_rest
from kaio.policy import Keepalive

from .kernel_model import JIFFY, NEVER, RTO_MAX, SECOND, Connection, Fails, Path, Question, microseconds, seconds

TICK: Final = 0.25  # of the monitor's wheel
SLACK: Final = 1.0  # what the contract allows beside
ROUNDING: Final = 2 * JIFFY / SECOND


@dataclasses.dataclass(frozen=True, slots=True)
class Life:
    """A connection's life. Times in seconds, but for the round trip and the retransmission timeout: milliseconds."""

    idle: int = 1
    interval: int = 1
    count: int = 1
    spare: float | None = 0.0
    """How much longer than AUTO's, or than the least that is valid, the user timeout is; None: there is none."""
    rtt: int = 1
    rto: int = 204
    boot: int = 0
    """The kernel's count of ticks when it begins: where its timer wheel stands."""
    retransmitted: int = 0
    """What total_retrans was before."""
    caps: bool = True
    """Whether the kernel has TCP_RTO_MAX_MS."""
    lacks: tuple[str, ...] = ()
    """What its TCP_INFO lacks."""
    since: float | None = None
    """When the watch begins; None: with the connection, as the monitor begins."""
    late: tuple[float, ...] = ()
    """By how much each look is late."""
    jumps: tuple[float, ...] = ()
    """By how much the clock was set before each look."""
    dice: int = 0
    steps: tuple[tuple[float, str, float], ...] = ()
    """(seconds after the last step, what, how much)."""

    @property
    def policy(self) -> Keepalive:
        """The policy."""
        if self.spare is None:
            return Keepalive(self.idle, self.interval, self.count, user_timeout=None)
        if not self.spare:
            return Keepalive(self.idle, self.interval, self.count)
        least = self.idle + (2 if self.count > 1 else 1) * self.interval
        return Keepalive(self.idle, self.interval, self.count, user_timeout=least - 1 + self.spare)

    @property
    def limits(self) -> Limits:
        """What the watch goes by."""
        limits = limits_of(self.policy)
        assert limits is not None
        return limits


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """A look, and what came of it."""

    at: int
    late: float
    jumped: float
    info: TcpInfo
    decision: Decision


@dataclasses.dataclass(slots=True)
class Story:
    """What happened in a life."""

    life: Life
    connection: Connection
    looks: list[Look] = dataclasses.field(default_factory=list)
    steps: list[tuple[int, str, float]] = dataclasses.field(default_factory=list)
    caps: list[tuple[int, float | None]] = dataclasses.field(default_factory=list)
    verdict: Look | None = None
    ended: int = 0
    reachable: bool = True
    """Whether the peer could be reached at the end."""
    waiting: bool = False
    """Whether something waited for it then."""
    waiting_since: int = 0

    def timeline(self) -> Iterator[str]:
        """All of it, in order."""
        lines: list[tuple[int, int, str]] = [(at, 1, f"{what} {how_much:g}") for at, what, how_much in self.steps]
        for question in self.connection.questions:
            fate = (
                "does not leave this host"
                if question.failed
                else "is not answered"
                if question.answered == NEVER
                else f"is answered at {seconds(question.answered):.3f}"
            )
            lines.append((question.at, 2, f"  kernel: {question.kind} {fate}{' (limited)' * question.limited}"))
        lines += [(at, 3, "  heard") for at in self.connection.heard]
        if self.connection.died is not None:
            lines.append((self.connection.died, 4, "  kernel: the connection is dead"))
        for at, cap in self.caps:
            lines.append((at, 6, "  back-off as it was" if cap is None else f"  back-off capped at {cap:g}"))
        for look in self.looks:
            lines.append((look.at, 5, _describe(look)))
        for at, _, text in sorted(lines):
            yield f"{seconds(at):9.3f}  {text}"


def _describe(look: Look) -> str:
    info, decision = look.info, look.decision
    said = {
        "silence": info.silence,
        "probes": info.probes,
        "retransmits": info.retransmits,
        "total": info.total_retrans,
        "unacked": info.unacked,
        "unsent": info.notsent_bytes,
        "window": info.snd_wnd,
        "rto": info.rto,
        "backoff": info.backoff,
        "sent": info.last_data_sent,
    }
    sample = " ".join(f"{name}={value:g}" for name, value in said.items() if value or (name == "window" and value == 0))
    odd = f" late {look.late:g}" * (look.late > 0.02) + f" clock set {look.jumped:+g}" * bool(look.jumped)
    cause = "" if decision.cause is None else f" ({decision.cause.value})"
    return f"look{odd}: {sample} -> {decision.state.value}{cause}, again after {decision.look_after:.3f}"


# -- living


def live(life: Life) -> Story:
    """Live it."""
    limits = life.limits
    bound = limits.user_timeout or 0.0
    path = Path(rtt=life.rtt * 1000, dice=random.Random(life.dice))
    connection = Connection(
        idle=life.idle,
        interval=life.interval,
        count=life.count,
        rto=life.rto / 1000,
        retransmitted_before=life.retransmitted,
        boot=life.boot,
        path=path,
    )
    story = Story(life, connection)
    at = 0
    for gap, what, how_much in life.steps:
        at += microseconds(gap)
        story.steps.append((at, what, how_much))
    horizon = at + microseconds(4 * bound + 60 + life.idle + life.interval * life.count + sum(life.late))
    watcher = _Watcher(story)
    pending = iter(story.steps)
    step = next(pending, None)
    while connection.now < horizon:
        if step is not None and step[0] <= watcher.due:
            connection.advance(step[0])
            _do(connection, *step[1:])
            step = next(pending, None)
            continue
        if watcher.due > horizon:
            connection.advance(horizon)
            break
        connection.advance(watcher.due)
        watcher.look()
        if story.verdict is not None or connection.state == TcpState.CLOSE:
            break
    story.ended, story.waiting = connection.now, connection.waiting
    story.waiting_since = connection.waiting_since or 0
    peer = connection.peer
    story.reachable = peer.alive and not (path.cut_out or path.cut_in or path.fails)
    connection.advance(connection.now + 2 * path.rtt)  # answers that are on their way
    return story


def _do(connection: Connection, what: str, how_much: float) -> None:
    path, peer = connection.path, connection.peer
    if what == "send":
        connection.send(int(how_much))
    elif what == "finish":
        connection.finish()
    elif what == "peer sends":
        connection.peer_sends()
    elif what == "peer stops reading":
        connection.peer_stops_reading(int(how_much))
    elif what == "peer reads":
        connection.peer_reads()
    elif what == "peer dies":
        peer.alive = False
    elif what == "cut":
        path.cut_out = path.cut_in = True
    elif what == "cut outward":
        path.cut_out = True
    elif what == "cut inward":
        path.cut_in = True
    elif what == "loses":
        path.loss_out = path.loss_in = how_much
    elif what == "fails":
        path.fails = tuple(Fails)[int(how_much)]
    elif what == "heal":
        path.cut_out = path.cut_in = False
        path.loss_out = path.loss_in = 0.0
        path.fails = None
    else:
        raise ValueError(what)


class _Watcher:
    """Looks as the monitor looks: no watch while a connection is at rest, and ticks of a wheel."""

    def __init__(self, story: Story) -> None:
        self.story = story
        life = story.life
        self.limits = life.limits
        self.watch: Watch | None = None
        self.lazy = life.since is None
        self.clock = 0.0  # how far it was set
        self._late = iter(life.late)
        self._jumps = iter(life.jumps)
        self.late = 0.0
        begins = 0.0
        if life.since is not None:
            begins = life.since
            self.watch = Watch(self.limits, since=begins)
        self._again(begins + self.limits.first_look)

    def _again(self, at: float) -> None:
        self.late = next(self._late, 0.0)
        self.due = microseconds((int(at / TICK) + 1) * TICK + self.late)

    def look(self) -> None:
        """Look now, do what is said, and note when to look again."""
        connection, life = self.story.connection, self.story.life
        jumped = next(self._jumps, 0.0)
        self.clock += jumped
        now = seconds(connection.now)
        info = connection.info()
        sample = TcpInfo(**{**info._asdict(), **dict.fromkeys(life.lacks)}) if life.lacks else info
        if self.watch is None and _rests(sample):
            silence = sample.silence
            assert silence is not None
            decision = Decision(State.ALIVE, None, look_at_rest(self.limits, silence))
        else:
            watch = self.watch = self.watch or Watch(self.limits)
            decision = watch.look(sample, now + self.clock)
            self._cap(watch, decision)
            if self.lazy and watch.at_rest:
                self.watch = None
        look = Look(connection.now, self.late, jumped, info, decision)
        self.story.looks.append(look)
        if decision.cause is not None:
            self.story.verdict = look
        self._again(now + decision.look_after)

    def _cap(self, watch: Watch, decision: Decision) -> None:
        connection, story = self.story.connection, self.story
        if decision.state is State.DEAD or not story.life.caps or decision.cap == watch.cap:
            return
        watch.cap = cap = decision.cap
        connection.rto_max = RTO_MAX
        if cap is not None:
            cap = min(120.0, max(1.0, math.ceil(cap * 1000) / 1000))
            connection.rto_max = microseconds(cap)
        story.caps.append((connection.now, cap))


def _rests(info: TcpInfo) -> bool:
    """kaio.kernel.tcpinfo.idle_time_from_bytes, of a sample."""
    waits = info.retransmits or info.probes or info.unacked or info.notsent_bytes
    return info.state == TcpState.ESTABLISHED and not waits


# -- judging


def check(story: Story) -> list[str]:
    """What the watch got wrong in this life."""
    return [*_false_deaths(story), *_late_deaths(story), *_wrong_states(story), *_idle_looks(story)]


def _last_heard(story: Story, until: int) -> int:
    return max(at for at in story.connection.heard if at <= until)


def _asked(story: Story, after: int, until: int) -> list[Question]:
    """What the kernel counts among its questions, after the last word and until then, unanswered until then."""
    return [
        question
        for question in story.connection.questions
        if after < question.at <= until and question.counted and question.answered > until
    ]


def _false_deaths(story: Story) -> Iterator[str]:
    life, limits, connection = story.life, story.life.limits, story.connection
    bound = limits.user_timeout
    if story.verdict is None:
        died = connection.died
        if died is None or bound is None or not story.caps or connection.una == connection.written:
            return
        heard = _last_heard(story, died)
        silence = seconds(died - heard)
        dropped = any(what == "fails" and Fails.QUEUE is tuple(Fails)[int(kind)] for _, what, kind in story.steps)
        # A cap stays as it is while no look comes; and our own queue is tried twice a second, whatever the back-off.
        blocked = any(look.late >= bound / 2 for look in story.looks)
        if silence < bound - ROUNDING and not dropped and not blocked:
            yield f"the kernel gave up after {silence:.3f} s of {bound:g} s, by a back-off that was capped"
        return
    at = story.verdict.at
    heard = _last_heard(story, at)
    silence = seconds(at - heard)
    if bound is None:
        yield "given up, although the policy has no bound"
        return
    if silence < bound - ROUNDING:
        yield f"given up after {silence:.3f} s of {bound:g} s"
    if life.since is not None and not life.jumps and seconds(at) - life.since < bound - ROUNDING:
        yield f"given up {seconds(at) - life.since:.3f} s after the watch began, of {bound:g} s"
    if not story.waiting:
        yield "given up, although nothing waits"
    asked = _asked(story, heard, at)
    least = min(2, limits.count)
    by_data = connection.heard_data > connection.heard_ack  # then probes may be from before it
    trusted = not any(life.jumps) and not by_data  # else it cannot be told what was asked since
    if (
        trusted
        and len(asked) < least
        and not (silence >= 2 * bound - ROUNDING and any(q.failed for q in connection.questions))
    ):
        yield f"given up after {len(asked)} questions"
    last = max((q for q in connection.questions if q.at <= at - connection.path.rtt), key=_at, default=None)
    if last is not None and last.limited and story.reachable and sum(not each.limited for each in asked) < 2:
        yield "given up by a question that the peer would have answered"


def _at(question: Question) -> int:
    return question.at


def _late_deaths(story: Story) -> Iterator[str]:
    limits = story.life.limits
    if limits.user_timeout is None or not story.waiting:
        return
    if "notsent_bytes" in story.life.lacks:
        return  # that something waits may not be known
    if _fin_alone(story) and story.connection.snd_wnd == 0:
        return  # nothing tells when it was sent, before the first look
    if story.connection.snd_wnd == 0 and any(question.failed for question in story.connection.questions):
        return  # what does not leave is counted by the back-off alone, from an unknown start
    if story.verdict is None and story.reachable:
        return
    allowed = _allowed(story)
    if story.looks and story.connection.snd_wnd == 0 and _heard_by_data(story.looks[-1].info):
        allowed += 2 * max(1.0, limits.longest_backoff() or 0.0)  # probes may be from before the data
    if any(question.failed for question in story.connection.questions):
        allowed += limits.user_timeout  # what does not leave has no time of its own: one more question tells
    end = seconds(story.ended)
    if end > allowed + SLACK + TICK:
        said = "not given up" if story.verdict is None else "given up"
        yield f"{said} at {end:.3f}, {end - allowed:.3f} s after it was due"


def _fin_alone(story: Story) -> bool:
    """Whether nothing but a FIN was sent and is not acknowledged."""
    connection = story.connection
    return connection.fin_sent and connection.una >= connection.written - 1


def _allowed(story: Story) -> float:
    """When the contract lets a peer be given up for which something waits; infinity: not in this life."""
    life, limits, connection = story.life, story.life.limits, story.connection
    bound = limits.user_timeout
    assert bound is not None
    heard = _last_heard(story, story.ended)
    jumped = max((look.at for look in story.looks if look.jumped), default=0)
    since = microseconds(life.since or 0.0)
    begins = max(heard, since)
    seen = min((look.at for look in story.looks if look.at > begins), default=0)
    asked = [  # as far as a look can tell: neither a tail loss probe nor a failure from before the first look
        question
        for question in _asked(story, max(begins, jumped), story.ended)
        if question.kind != "tail loss probe" and not (question.failed and question.at < seen)
    ]
    least = max(2 if connection.snd_wnd == 0 else 1, min(2, limits.count))
    late = sum(look.late for look in story.looks if look.at > begins) + sum(
        abs(look.jumped) for look in story.looks if look.at > begins
    )
    waiting = seconds(story.waiting_since)
    asked_enough = math.inf
    if len(asked) >= least:
        first = asked[0].at
        if connection.una == connection.nxt or asked[0].kind == "keepalive":  # only looks tell since when it is asked
            first = min((look.at for look in story.looks if look.at >= first), default=story.ended)
        asked_enough = max(seconds(asked[least - 1].at), seconds(first) + limits.least_asking)
    rarely = 0.0 if life.caps else 120.0  # between two questions
    if connection.una < connection.nxt:
        rarely = max(rarely, seconds(connection.rto))
    unasked = max(seconds(begins), waiting, seconds(jumped)) + 2 * max(bound, rarely) + limits.interval
    if waiting > seconds(begins) + bound:  # nothing waited when the time was up: until a look sees that something does
        late += max(limits.first_look, limits.interval)
    return max(seconds(begins) + bound, waiting, min(asked_enough, unasked)) + late


def _heard_by_data(info: TcpInfo) -> bool:
    """Whether the peer was heard by data last, which leaves probes as they were."""
    return info.last_ack_recv != info.silence


def _wrong_states(story: Story) -> Iterator[str]:
    limits = story.life.limits
    threshold = min(limits.idle, limits.first_look)
    known = not story.life.lacks
    for look in story.looks:
        heard = _last_heard(story, look.at)
        silence = seconds(look.at - heard)
        state = look.decision.state
        if state is State.SUSPECT:
            if silence < threshold - ROUNDING:
                yield f"suspect at {seconds(look.at):.3f}, although heard {silence:.3f} s ago"
            # After data of the peer's, probes may be from before it.
            by_data = bool(look.info.probes) and _heard_by_data(look.info)
            trusted = min(story.life.jumps, default=0.0) >= 0 and not by_data
            if trusted and not _asked(story, heard - story.connection.path.rtt, look.at):
                yield f"suspect at {seconds(look.at):.3f}, although nothing was asked"
        elif state is not State.DEAD and known and not story.life.jumps and not _fin_alone(story):
            begins = max(heard, microseconds(story.life.since or 0.0))
            shut = look.info.snd_wnd == 0
            asked = [
                question
                for question in _asked(story, begins, look.at)
                if question.kind != "tail loss probe"
                and not question.failed
                and question.at < look.at - story.connection.path.rtt
            ]
            unknown = (look.info.probes or 0) if _heard_by_data(look.info) else 0
            if shut and any(question.failed for question in story.connection.questions):
                continue  # what does not leave is counted by the back-off alone, from an unknown start
            if len(asked) >= (3 if shut else 2) + unknown and silence >= threshold + ROUNDING:
                yield f"{state.value} at {seconds(look.at):.3f}, although {len(asked)} questions went unanswered"
        if look.decision.spare and look.info.snd_wnd != 0 and known:
            yield f"a user timeout is off at {seconds(look.at):.3f}, although the window is open"


def _idle_looks(story: Story) -> Iterator[str]:
    limits = story.life.limits
    for look in story.looks:
        after = look.decision.look_after
        if not (math.isfinite(after) and after > 0) and look.decision.state is not State.DEAD:
            yield f"the next look at {seconds(look.at):.3f} is after {after}"
    long = seconds(story.ended) - (story.life.since or 0.0)
    healthy = all(look.decision.state is State.ALIVE and not look.decision.waiting for look in story.looks)
    most = 3 * long / (limits.first_look if healthy else min(limits.first_look, limits.interval)) + 3
    bound = limits.user_timeout or math.inf
    regular = [look for look in story.looks if (look.info.silence or 0.0) < bound]
    if len(regular) > most:
        yield f"{len(story.looks)} looks in {long:.0f} s, of {most:.0f}"


# -- lives by hypothesis

_GAPS: Final = st.one_of(
    st.integers(0, 100).map(lambda n: n / 50), st.integers(0, 100).map(lambda n: n / 5), st.integers(0, 90).map(float)
)
_STEPS: Final = st.one_of(
    st.tuples(_GAPS, st.just("send"), st.sampled_from([1, 100, 1_460, 5_000, 20_000])),
    st.tuples(
        _GAPS,
        st.sampled_from(
            ["peer sends", "peer reads", "cut", "cut outward", "cut inward", "heal", "heal", "peer dies", "finish"]
        ),
        st.just(0),
    ),
    st.tuples(_GAPS, st.just("peer stops reading"), st.sampled_from([0, 0, 1, 100, 3_000])),
    st.tuples(_GAPS, st.just("loses"), st.sampled_from([0.1, 0.3, 0.6])),
    st.tuples(_GAPS, st.just("fails"), st.integers(0, 2)),
)
_LATE: Final = st.one_of(st.just(0.0), st.sampled_from([0.01, 0.3, 1.0, 3.0, 10.0, 30.0, 120.0, 300.0]))
_JUMPS: Final = st.one_of(st.just(0.0), st.sampled_from([-3600.0, -30.0, -5.0, -1.0, 1.0, 5.0, 30.0, 3600.0]))
_LACKING: Final = st.sampled_from(
    [
        (),
        (),
        (),
        (),
        ("snd_wnd",),
        ("snd_wnd", "notsent_bytes"),
        ("snd_wnd", "notsent_bytes", "total_retrans"),
    ]
)


@st.composite
def _lives(draw: st.DrawFn) -> Life:
    count = draw(st.integers(1, 6))
    spare = draw(st.sampled_from([0.0, 0.0, 0.0, 0.0, 1.0, 1.5, 5.0, 30.0, None]))
    rtt = draw(st.sampled_from([1, 1, 1, 30, 250, 900]))
    odd = draw(st.integers(0, 3))
    lacks = draw(_LACKING)
    return Life(
        idle=draw(st.integers(1, 20)),
        interval=draw(st.integers(1, 10)),
        count=count,
        spare=spare,
        rtt=rtt,
        rto=rtt + draw(st.sampled_from([203, 203, 203, 400, 1000])),
        boot=draw(st.integers(0, 4095)),
        retransmitted=draw(st.sampled_from([0, 0, 250, 2**32 - 3])),
        caps=draw(st.sampled_from([True, True, True, False])) and not lacks,
        lacks=lacks,
        since=draw(st.sampled_from([None, None, None, 0.0, 7.3, 40.0])),
        late=tuple(draw(st.lists(_LATE, max_size=8))) if odd & 1 else (),
        jumps=tuple(draw(st.lists(_JUMPS, max_size=6))) if odd & 2 else (),
        dice=draw(st.integers(0, 100)),
        steps=tuple(draw(st.lists(_STEPS, max_size=9))),
    )


lives: Final[st.SearchStrategy[Life]] = _lives()


class WrongError(AssertionError):
    """A life in which the watch is wrong, as a timeline."""

    def __init__(self, story: Story, wrong: list[str]) -> None:
        super().__init__("\n".join([*wrong, repr(story.life), *story.timeline()]))


def examine(life: Life) -> None:
    """Live a life. Raises WrongError if the watch was wrong in it."""
    story = live(life)
    wrong = check(story)
    if wrong:
        raise WrongError(story, wrong)


def main(arguments: list[str] | None = None) -> int:
    """Look for lives in which the watch is wrong; the exit status is 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m tests.lives", description="Random lives, watched.")
    parser.add_argument("--lives", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=None, help="printed, so that a run can be had again")
    chosen = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**32) if chosen.seed is None else chosen.seed
    print(f"{chosen.lives} lives, seed {seed}")
    settings = hypothesis.settings(
        max_examples=chosen.lives,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        report_multiple_bugs=False,
        print_blob=False,
    )
    search: Any = hypothesis.seed(seed)(settings(hypothesis.given(lives)(examine)))
    try:
        search()
    except WrongError as wrong:
        print(wrong)
        return 1
    print("the watch was right in all of them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
