"""The watch: remembers what earlier samples of a connection said, and judges the next one.

A peer is dead when something waits for it, nothing was heard from it for the bound, and what the kernel asked meanwhile
went unanswered. So questions are counted, and not shapes of TCP_INFO recognised:

- *waits*: data or a FIN that is not acknowledged, or that is not sent, for whatever reason (the peer's window,
  congestion, no way out of this host). An idle connection is the kernel's own to ask and to end (SO_KEEPALIVE).
- *heard*: the younger of the last ACK and the last data.
- *asked*: the growth, since the peer was heard, of the kernel's counters: `probes` (keepalive and window probes),
  `retransmits`; `total_retrans`, which alone counts when a window shrinks under data in flight; and `backoff`, where
  that cannot even leave this host (net/ipv4/tcp_timer.c, tcp_retransmit_timer).

Two unanswered questions are needed, and they must lie far enough apart. A long silence in which the kernel asked
nothing (a virtual machine that stood still, a policy that was set late, keepalive that the application turned off) then
ends nobody.

Rules kept here: no I/O and no clock of its own. Silence is measured by the kernel alone, so that looks may come late
and the caller's clock may jump: either can only put a verdict off (but that a jump forward counts as time watched where
`since` is given). A counter that a kernel lacks counts nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import Cause
from ..kernel.tcpinfo import TcpInfo, TcpState
from .health import State, window_is_shut

if TYPE_CHECKING:
    from .limits import Limits

__all__ = ["Decision", "Watch", "look_at_rest"]

_RTO_MIN: Final = 0.2  # TCP_RTO_MIN
_RETRIES: Final = 15  # net.ipv4.tcp_retries2
_RTO_MAX: Final = 120.0  # seconds between questions, at most (include/net/tcp.h: TCP_RTO_MAX)
_OVERDUE: Final = 0.5  # seconds between looks when only a question is wanting
_LATE: Final = 1.15  # how much longer than it was set for a timer may run (kernel/time/timer.c)
_MOST_DOUBLINGS: Final = 16  # no more change the estimates here
_FIN_SENT: Final = frozenset({TcpState.FIN_WAIT1, TcpState.CLOSING, TcpState.LAST_ACK})


class Decision(NamedTuple):
    """The verdict on a peer, what to do about it, and the delay until the next check."""

    state: State
    cause: Cause | None
    """Set when the peer is to be declared dead now; None for a connection that the kernel has ended."""
    look_after: float
    """Seconds until the next check."""
    waiting: bool = False
    """Whether data or a FIN waits for the peer."""
    cap: float | None = None
    """Seconds at which the kernel's back-off is to be capped, where it asks ever more rarely; None: its own is due.

    Of a peer that is suspect, too: retransmissions that double their timeout ask less often than keepalive would.
    """
    spare: bool = False
    """Whether the peer's window is shut: a user timeout of the kernel's, which does not count answers, is to be off."""


class Watch:
    """The memory of the checks of one connection; `look` is called with each sample.

    `since` is when the watch began, on the clock that `look` is given: silence counts from then at the earliest. None:
    since the connection was made.
    """

    __slots__ = (
        "_asked",
        "_asked_before",
        "_asked_since",
        "_at",
        "_backoff",
        "_clear_at",
        "_longest_gap",
        "_probes",
        "_retransmits",
        "_silence",
        "_since",
        "_suspect",
        "_total_retrans",
        "_waiting_since",
        "backoff",
        "cap",
        "limits",
        "sample",
    )

    def __init__(self, limits: Limits, since: float | None = None) -> None:
        self.limits: Limits = limits
        self._since = since
        self._at: float | None = None  # the last look
        self._silence = 0.0  # the silence of then, and the counters
        self._probes = self._retransmits = self._total_retrans = self._backoff = 0
        self._asked = 0  # questions since the peer was heard
        self._asked_before = 0  # as of the look before
        self._asked_since: float | None = None  # the first look since then that saw a question, or something waiting
        self._longest_gap = 0.0  # between two questions, since the peer was heard
        self._clear_at: float | None = None  # the last look that saw nothing in flight
        self._waiting_since: float | None = None  # the first look since then that saw something waiting
        self._suspect = False
        self.sample: TcpInfo | None = None
        """That of the last look."""
        self.cap: float | None = None
        """The caller's: seconds at which it has capped the kernel's back-off; None: it has not."""
        self.backoff: int | None = None
        """The caller's: what the back-off was capped at before, in ms."""

    def begin_anew(self, limits: Limits, now: float) -> None:
        """Use other limits from now on. Questions asked before do not count."""
        self.limits = limits
        self._since = now
        self._asked = 0
        self._asked_since = self._waiting_since = None

    @property
    def suspect(self) -> bool:
        """Whether the last check found the peer suspect."""
        return self._suspect

    def silence(self, now: float | None = None) -> float:
        """Seconds since the peer was heard, if it was not heard since the last look; None: as of that look."""
        return self._silence + (0.0 if self._at is None or now is None else max(0.0, now - self._at))

    def at_end(self, silence: float) -> TcpInfo | None:
        """Return the last sample as it would be at the end, after so much silence; None: there is no sample.

        For a connection whose socket was closed before it could be asked.
        """
        if self.sample is None:
            return None
        return self.sample._replace(state=TcpState.CLOSE, last_ack_recv=silence, last_data_recv=None)

    @property
    def waiting(self) -> bool:
        """Whether data or a FIN waited for the peer at the last check."""
        return self._waiting_since is not None

    @property
    def at_rest(self) -> bool:
        """Whether the last check found nothing that must be remembered."""
        counted = self._probes or self._retransmits  # in-order data of the peer's leaves both as they were
        remembers = self._asked_since is not None or self._since is not None or self.cap is not None
        return not (counted or remembers or self._suspect)

    def look(self, info: TcpInfo, now: float) -> Decision:
        """Return the verdict on a sample taken `now`."""
        limits, silence = self.limits, info.silence
        if info.state == TcpState.CLOSE:
            return Decision(State.DEAD, None, limits.interval)
        if silence is None:
            return Decision(State.ALIVE, None, limits.first_look)
        # Of a listening socket, unacked is the length of its queue (net/ipv4/tcp.c, tcp_get_info).
        waiting = info.state != TcpState.LISTEN and bool(info.unacked or info.notsent_bytes)
        if not info.unacked:
            self._clear_at = now
        elif self._at is None and self._since is None:
            self._clear_at = now - limits.first_look
        self._count(info, silence, now)
        self.sample = info
        self._date(info, silence, waiting, now)
        if self._since is not None:
            self._since = min(self._since, now)  # a clock that was set back
            watched = now - self._since
            if silence < watched:
                self._since = None  # the peer was heard since
            silence = min(silence, watched)
        shut = window_is_shut(info)
        cause = self._cause(info, silence, now, shut) if waiting else None
        self._suspect = self._asked >= (2 if shut else 1) and silence >= min(limits.idle, limits.first_look)
        cap = self._cap(info, silence, now, shut) if waiting else None
        if cause is not None:
            return Decision(State.DEAD, cause, limits.interval, waiting, cap)
        state = State.SUSPECT if self._suspect else State.STALLED if shut else State.ALIVE
        ahead = self._look_after(info, silence, now, waiting)
        if shut and info.unacked and limits.user_timeout is not None:
            ahead = min(ahead, limits.interval if cap is None else _shrunk_may_be_capped(info, cap))
        return Decision(state, None, ahead, waiting, cap, spare=shut)

    def _count(self, info: TcpInfo, silence: float, now: float) -> None:
        """Count the questions that were asked since the peer was heard.

        `backoff` grows with every one of a timer's, also where none of the others does: a retransmission for which
        there is no route, into a window that shrank.
        """
        probes, retransmits, total = info.probes or 0, info.retransmits or 0, info.total_retrans or 0
        backoff = info.backoff or 0
        grown = _growth(self._probes, probes)
        gap = _gap(info)
        if self._at is None or now < self._at or silence < max(now - self._at, self._silence):  # heard, or unknown
            self._asked_before = 0
            # The timer that ran when it was heard may have been set before.
            self._longest_gap = gap if self.sample is None else max(gap, _gap(self.sample))
            if info.last_ack_recv == silence:
                grown = probes  # an ACK sets them to 0
            elif silence < self.limits.idle:
                grown = 0  # data does not, and they may be from before it
            # An answer that acknowledges nothing new leaves all other counters as they were.
            self._asked = grown + _resent_since(
                info, silence, capped=self.cap is not None, from_the_start=self._since is None
            )
            self._asked_since = self._waiting_since = None
        else:
            self._asked_before = self._asked
            resent = max(_growth(self._retransmits, retransmits), (total - self._total_retrans) & 0xFFFFFFFF)
            self._asked += max(grown + resent, backoff - self._backoff)
            self._longest_gap = max(self._longest_gap, gap)
        self._asked = max(self._asked, _timeouts(info, silence, self._longest_gap))
        self._probes, self._retransmits, self._total_retrans, self._backoff = probes, retransmits, total, backoff
        self._at, self._silence = now, silence

    def _date(self, info: TcpInfo, silence: float, waiting: bool, now: float) -> None:
        """Note since when something is asked and something waits; a clock that was set back starts them anew."""
        since = self._asked_since
        if self._asked or waiting:
            began = now - min(_retransmitting(info), silence)
            self._asked_since = began if since is None else min(since, began)
        else:
            self._asked_since = None
        since = self._waiting_since
        self._waiting_since = None if not waiting else now if since is None else min(since, now)

    def _cause(self, info: TcpInfo, silence: float, now: float, shut: bool) -> Cause | None:
        """Return the cause of death of a peer for which something waits; None: it is not dead."""
        limits = self.limits
        bound = limits.user_timeout
        if bound is None or silence < bound:
            return None
        # A kernel answers window probes at most twice a second (tcp_invalid_ratelimit): one may stay unanswered.
        # Where one is enough, it must have had time for an answer.
        enough = self._asked >= 2 if shut or limits.count > 1 else self._asked >= 2 or self._asked_before >= 1
        if not (enough and self._asking(now) >= limits.least_asking) and not self._cannot_ask(silence, now):
            return None
        if shut:
            return Cause.ZERO_WINDOW
        return Cause.UNACKNOWLEDGED if info.unacked else Cause.UNREACHABLE  # what is not sent never left this host

    def _asking(self, now: float) -> float:
        """Return for how many seconds, at least, the peer has been asked: by checks or by its retransmissions."""
        return 0.0 if self._asked_since is None else now - self._asked_since

    def _cannot_ask(self, silence: float, now: float) -> bool:
        """Whether the kernel had twice the bound, and twice the time of its own timer, to ask, and something waited."""
        bound = self.limits.user_timeout
        assert bound is not None
        if self._waiting_since is None or self._asked:
            return False
        long = 2 * max(bound, _LATE * self._longest_gap)
        return silence >= long and now - self._waiting_since >= long

    def _cap(self, info: TcpInfo, silence: float, now: float, shut: bool) -> float | None:
        """Return the cap of the kernel's back-off while something waits; None: no cap.

        A capped kernel gives up sooner, which must not be before the bound. In flight it counts from the first
        retransmission of a row in which the peer may have been heard again and again (retransmits_timed_out). Where the
        window shrank, it gives up a peer that was silent for twice the cap when a question is due
        (tcp_rtx_probe0_timed_out): so the cap is not less than half of the timeout that runs, and goes when a question
        went unanswered.
        """
        bound, shrunk = self.limits.user_timeout, bool(shut and info.unacked)
        cap = self.limits.longest_backoff(under_shrunk_window=shrunk)
        if bound is None or cap is None or not info.unacked:
            return cap
        if shrunk:
            cap = max(cap, (info.rto or 0.0) / 2)
            return cap if _shrunk_may_be_capped(info, cap) > 0 else None
        safe = self._clear_at is not None and now - self._clear_at + bound - silence < _gives_up_after(cap)
        return cap if self._suspect and safe else None

    def _look_after(self, info: TcpInfo, silence: float, now: float, waiting: bool) -> float:
        limits = self.limits
        if not (waiting or self._suspect):
            return look_at_rest(limits, silence)
        ahead = limits.interval if silence >= limits.first_look else limits.first_look - silence
        if limits.user_timeout is not None:
            due = max(limits.user_timeout - silence, limits.least_asking - self._asking(now))
            ahead = min(ahead, due if due > 0 else _OVERDUE)
        return ahead


def look_at_rest(limits: Limits, silence: float) -> float:
    """Return the seconds until the next check of an idle peer that is not suspect.

    The kernel's next probe may come after an interval that is longer than the idle time, and an eighth late
    (kernel/time/timer.c); and the bound may end before the next regular look.
    """
    first = limits.first_look
    if silence < first:  # the earliest of them, and what most looks find
        return first - silence
    latest = _LATE * max(limits.idle, limits.interval) + limits.interval / 2
    for at in sorted((latest, limits.user_timeout or 0.0)):
        if silence < at:
            return at - silence
    return max(limits.interval, first)


def _growth(before: int, now: int) -> int:
    """Return the growth of a counter that the kernel resets when it hears the peer, or that wraps at 256."""
    return now - before if now >= before else now


def _retransmitting(info: TcpInfo) -> float:
    """For how many seconds the oldest segment was sent again and again, at least: the timeout doubles each time."""
    if not info.unacked or not info.retransmits or info.rto is None:
        return 0.0
    doublings = min(info.retransmits, _MOST_DOUBLINGS)
    return info.rto * (1 - 0.5**doublings) + min(info.last_data_sent or 0.0, info.rto)


def _timeouts(info: TcpInfo, silence: float, gap: float) -> int:
    """How often the retransmission timer has fired since the peer was heard, at least, if it ran for `gap` at most.

    A segment that could not leave this host is counted nowhere else when the window has shrunk over it.
    """
    if not info.unacked:
        return 0
    return min(info.backoff or 0, int(silence / (_LATE * gap)))


def _resent_since(info: TcpInfo, silence: float, *, capped: bool, from_the_start: bool) -> int:
    """How often the oldest segment was sent again since the peer was heard: each timeout was half of the next.

    At least that often: timers fire late. A FIN alone is no data, and the kernel does not tell when it was sent: all of
    its retransmissions count, but not under a shut window, nor where the watch began late: those may be from before.
    """
    if not info.unacked:
        return 0
    only_fin = info.state in _FIN_SENT and info.unacked == 1 and not info.notsent_bytes
    if info.rto is None or info.last_data_sent is None or only_fin:
        return info.retransmits or 0 if info.snd_wnd and from_the_start else 0
    capped = capped or info.rto >= _RTO_MAX  # then the one before is not half of it
    resent = min(info.retransmits or 0, _MOST_DOUBLINGS)
    if (info.total_retrans or 0) < resent and info.rto * (1 - 0.5**resent) <= info.last_data_sent < silence:
        return resent  # none of them has left this host, and all came after what was sent last
    ago, gap, times = info.last_data_sent, info.rto if capped else info.rto / 2, 0
    while ago < silence and times < min(max(info.backoff or 0, info.retransmits or 0), _MOST_DOUBLINGS):
        times += 1
        ago += _LATE * gap  # what was sent before may be what the peer answered
        gap = gap if capped else gap / 2
    return times


def _shrunk_may_be_capped(info: TcpInfo, cap: float) -> float:
    """For how many seconds more: until the question that is due next should have been answered, by an ACK."""
    return max(1.25 * (info.rto or 0.0), cap) - (info.last_ack_recv or 0.0)


def _gives_up_after(cap: float) -> float:
    """For how many seconds the kernel retransmits when its timeout is capped (tcp_model_timeout)."""
    doublings = int(math.log2(max(cap, _RTO_MIN) / _RTO_MIN))
    return (2.0 ** (doublings + 1) - 1) * _RTO_MIN + (_RETRIES - doublings) * cap


def _gap(info: TcpInfo) -> float:
    """Seconds between two questions of the kernel's now, at most."""
    if not info.rto:
        return _RTO_MAX
    doublings = 0 if info.unacked else min(info.backoff or 0, _MOST_DOUBLINGS)  # in flight, rto has them already
    return min(info.rto * 2.0**doublings, _RTO_MAX)
