"""How a connection ends: the stages that it goes through, and what moves it from one to the next.

    stage         what holds in it
    OPEN          the loop reads, unless the application has paused reading
    HALF_CLOSED   the peer sends no more and the protocol keeps the connection: the loop no longer listens
    CLOSING       this side has closed it: what was written may still leave, and nothing is read
    VERDICT       the end is known and told, connection_lost is not: what had arrived before is still to be read
    ENDING        the loop's transport was told to end: connection_lost is due
    LOST          connection_lost has come, and whatever is left is the protocol's affair
    LOST_BY_KAIO       connection_lost never came, and kaio has called it instead: a late one is not passed on
    RELEASED      a protocol of another kind has the connection: it is no longer kaio's

Rules kept here: no I/O; a connection has one stage; what a stage does not name changes nothing in it. A verdict in OPEN
waits until all is read; in HALF_CLOSED and CLOSING there is nothing to wait for. Only OPEN, HALF_CLOSED and CLOSING can
get a verdict, so `peer_dead` is told once; only what is not over can be lost, so `connection_lost` is, too.
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["BEFORE_VERDICT", "ENDED", "TABLE", "Stage", "Trigger", "next_stage"]


# Integers, because Enum's own hash is a function in Python, and a connection's end looks up a dozen of them.


class Stage(enum.IntEnum):
    """How far a connection is on the way to its end; the module says what holds in each."""

    OPEN = enum.auto()
    HALF_CLOSED = enum.auto()
    CLOSING = enum.auto()
    VERDICT = enum.auto()
    ENDING = enum.auto()
    LOST = enum.auto()
    LOST_BY_KAIO = enum.auto()
    RELEASED = enum.auto()


class Trigger(enum.IntEnum):
    """What may happen to it."""

    EOF = enum.auto()
    """The peer sends no more, and the protocol keeps the connection."""
    CLOSE = enum.auto()
    """This side closes or aborts it."""
    VERDICT = enum.auto()
    """The peer is dead or the connection reset, and the loop has not heard, or would not hear."""
    READ_ALL = enum.auto()
    """All that had arrived was read, or nobody will read it."""
    LOST = enum.auto()
    """connection_lost is called, by the loop or by kaio."""
    SUPPLIED = enum.auto()
    """It was kaio that has called it."""
    RELEASED = enum.auto()
    """A protocol of another kind takes the connection over."""


TABLE: Final[dict[Stage, dict[Trigger, Stage]]] = {
    Stage.OPEN: {
        Trigger.EOF: Stage.HALF_CLOSED,
        Trigger.CLOSE: Stage.CLOSING,
        Trigger.VERDICT: Stage.VERDICT,
        Trigger.LOST: Stage.LOST,
        Trigger.RELEASED: Stage.RELEASED,
    },
    Stage.HALF_CLOSED: {
        Trigger.CLOSE: Stage.CLOSING,
        Trigger.VERDICT: Stage.ENDING,
        Trigger.LOST: Stage.LOST,
        Trigger.RELEASED: Stage.RELEASED,
    },
    Stage.CLOSING: {
        Trigger.VERDICT: Stage.ENDING,
        Trigger.LOST: Stage.LOST,
        Trigger.RELEASED: Stage.RELEASED,
    },
    Stage.VERDICT: {
        Trigger.CLOSE: Stage.ENDING,
        Trigger.READ_ALL: Stage.ENDING,
        Trigger.LOST: Stage.LOST,
        Trigger.RELEASED: Stage.RELEASED,
    },
    Stage.ENDING: {
        Trigger.LOST: Stage.LOST,
        Trigger.RELEASED: Stage.RELEASED,
    },
    Stage.LOST: {Trigger.SUPPLIED: Stage.LOST_BY_KAIO},
    Stage.LOST_BY_KAIO: {},
    Stage.RELEASED: {},
}

BEFORE_VERDICT: Final = frozenset({Stage.OPEN, Stage.HALF_CLOSED, Stage.CLOSING})
"""The stages in which a verdict can come."""
ENDED: Final = frozenset({Stage.LOST, Stage.LOST_BY_KAIO, Stage.RELEASED})
"""The stages in which nothing of the connection is kaio's any more."""


def next_stage(stage: Stage, trigger: Trigger) -> Stage:
    """The stage that follows when something happens in one."""
    return TABLE[stage].get(trigger, stage)
