"""The pulse of the far application: when to ask it for a sign of life, and when it is given up.

Rules kept here: no I/O and no clock. It is given up only when data could have come and did not: not while nobody reads
on this side, not because this side's loop was blocked when the question was to leave, and not while the question still
waits behind other data that the peer goes on taking.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

__all__ = ["Act", "Pulse", "Signs"]

_JITTER: Final = 0.05  # seconds by which the kernel's clock, in steps of up to 10 ms, and this one may differ
_LATE: Final = 0.3  # seconds after its time at which a look counts as late: a tick of the wheel, and a moment


class Signs(NamedTuple):
    """What is seen of a connection."""

    deaf: bool
    """Whether data could not have been seen: nobody reads, or what has come waits to be read."""
    queued: int
    """Bytes that wait to be sent or acknowledged."""
    acknowledged: int | None
    """A number that grows when some are acknowledged."""
    asking: bool = False
    """Whether the question is still being asked: by an asynchronous function that has not returned."""


class Act(enum.Enum):
    """What is to be done."""

    WAIT = enum.auto()
    ASK = enum.auto()
    GIVE_UP = enum.auto()


class Pulse:
    """What is remembered of one connection from look to look. Times are seconds on one clock."""

    __slots__ = (
        "_acknowledged",
        "_asked_at",
        "_behind",
        "_early",
        "_every",
        "_excused",
        "_expected",
        "_since",
        "_waits_since",
        "_within",
    )

    def __init__(self, every: float, within: float, early: float, now: float) -> None:
        """Ask after `every` seconds, or up to `early` sooner; give up `within` seconds after that."""
        self._every = every
        self._within = within
        self._early = min(early, every / 2)
        self._since = now  # nothing is expected of the time before
        self._asked_at: float | None = None  # when it was asked; None: it has answered, or was not asked yet
        self._waits_since = now  # when the question had left, at the latest
        self._behind = False  # whether it waits behind other data
        self._excused = False  # whether it was given more time because this side was late; once for each question
        self._acknowledged: int | None = None
        self._expected = now  # when the next look is to be

    def begin_anew(self, now: float) -> None:
        """Expect nothing of the time before."""
        self._since = now
        self._asked_at = None

    def rest(self, received_at: float, now: float) -> float:
        """Return the seconds for which nothing need be done, by the time at which data was received last."""
        if self._asked_at is not None and received_at > self._asked_at - _JITTER:
            self._asked_at = None
        if self._asked_at is not None:
            return 0.0
        return self._look_after(max(self._since, received_at) + self._every - self._early - now, now)

    def look(self, signs: Signs, now: float) -> tuple[Act, float]:
        """Return what to do, when there was nothing to `rest` for, and the seconds until the next look."""
        late = now - self._expected > _LATE and not self._excused
        if signs.deaf:
            self.begin_anew(now)
            return Act.WAIT, self._look_after(min(self._every, self._within) / 4, now)
        if self._asked_at is None:
            # An answer may be the last that is heard: then it is to be asked again, in time.
            return Act.ASK, self._look_after(min(self._within, self._every - self._early), now)
        moved = self._behind and signs.acknowledged != self._acknowledged
        if late or moved or signs.asking or (self._behind and not signs.queued):
            self._waits_since = now
        self._excused = self._excused or late
        self._behind = self._behind and bool(signs.queued)
        self._acknowledged = signs.acknowledged
        left = self._waits_since + self._within - now
        if left <= 0:
            return Act.GIVE_UP, 0.0
        ahead = self._within / 4 if self._behind else self._every - self._early
        return Act.WAIT, self._look_after(min(left, ahead), now)

    def asked(self, signs: Signs, now: float) -> None:
        """Note that the question was asked; `signs` are those from before."""
        self._asked_at = self._waits_since = now
        self._behind = signs.queued > 0
        self._excused = False
        self._acknowledged = signs.acknowledged

    def _look_after(self, seconds: float, now: float) -> float:
        self._expected = now + max(0.0, seconds)
        return seconds
