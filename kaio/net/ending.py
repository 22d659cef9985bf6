"""How a connection ends: the stages that it goes through, and what moves it from one to the next.

    stage         what holds in it
    OPEN          the loop reads, unless the application has paused reading
    HALF_CLOSED   the peer sends no more and the protocol keeps the connection: the loop no longer listens
    CLOSING       this side has closed it: what was written may still leave, and nothing is read
    VERDICT       the end is known and told, connection_lost is not: what had arrived before is still to be read
    ENDING        the loop's transport was told to end: connection_lost is due
    LOST          connection_lost has come, and whatever is left is the protocol's affair
    UNHEARD       connection_lost never came, and kaio has called it instead: a late one is not passed on
    RELEASED      a protocol of another kind has the connection: it is no longer kaio's

Rules kept here: no I/O; a connection has one stage; what a stage does not name changes nothing in it. A verdict in OPEN
waits until all is read; in HALF_CLOSED and CLOSING there is nothing to wait for. Only OPEN, HALF_CLOSED and CLOSING can
get a verdict, so `peer_dead` is told once; only what is not over can be lost, so `connection_lost` is, too.
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["OVER", "TABLE", "UNDECIDED", "Happening", "Stage", "after"]


# Integers, because Enum's own hash is a function in Python, and a connection's end looks up a dozen of them.


class Stage(enum.IntEnum):
    """How far a connection is on the way to its end; the module says what holds in each."""

    OPEN = enum.auto()
    HALF_CLOSED = enum.auto()
    CLOSING = enum.auto()
    VERDICT = enum.auto()
    ENDING = enum.auto()
    LOST = enum.auto()
    UNHEARD = enum.auto()
    RELEASED = enum.auto()


class Happening(enum.IntEnum):
    """What may happen to it."""

    EOF = enum.auto()
    """The peer sends no more, and the protocol keeps the connection."""
    CLOSE = enum.auto()
    """This side closes or aborts it."""
    JUDGED = enum.auto()
    """The peer is dead or the connection reset, and the loop has not heard, or would not hear."""
    READ = enum.auto()
    """All that had arrived was read, or nobody will read it."""
    LOST = enum.auto()
    """connection_lost is called, by the loop or by kaio."""
    TOLD = enum.auto()
    """It was kaio that has called it."""
    RELEASED = enum.auto()
    """A protocol of another kind takes the connection over."""


TABLE: Final[dict[Stage, dict[Happening, Stage]]] = {
    Stage.OPEN: {
        Happening.EOF: Stage.HALF_CLOSED,
        Happening.CLOSE: Stage.CLOSING,
        Happening.JUDGED: Stage.VERDICT,
        Happening.LOST: Stage.LOST,
        Happening.RELEASED: Stage.RELEASED,
    },
    Stage.HALF_CLOSED: {
        Happening.CLOSE: Stage.CLOSING,
        Happening.JUDGED: Stage.ENDING,
        Happening.LOST: Stage.LOST,
        Happening.RELEASED: Stage.RELEASED,
    },
    Stage.CLOSING: {
        Happening.JUDGED: Stage.ENDING,
        Happening.LOST: Stage.LOST,
        Happening.RELEASED: Stage.RELEASED,
    },
    Stage.VERDICT: {
        Happening.CLOSE: Stage.ENDING,
        Happening.READ: Stage.ENDING,
        Happening.LOST: Stage.LOST,
        Happening.RELEASED: Stage.RELEASED,
    },
    Stage.ENDING: {
        Happening.LOST: Stage.LOST,
        Happening.RELEASED: Stage.RELEASED,
    },
    Stage.LOST: {Happening.TOLD: Stage.UNHEARD},
    Stage.UNHEARD: {},
    Stage.RELEASED: {},
}

UNDECIDED: Final = frozenset({Stage.OPEN, Stage.HALF_CLOSED, Stage.CLOSING})
"""The stages in which a verdict can come."""
OVER: Final = frozenset({Stage.LOST, Stage.UNHEARD, Stage.RELEASED})
"""The stages in which nothing of the connection is kaio's any more."""


def after(stage: Stage, happening: Happening) -> Stage:
    """The stage that follows when something happens in one."""
    return TABLE[stage].get(happening, stage)
