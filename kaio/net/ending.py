"""The state machine of a connection's end: its stages, and what leads from one to the next.

    stage         meaning
    OPEN          the loop reads, unless the application has paused reading
    HALF_CLOSED   the peer has sent EOF and the protocol keeps the connection open: the loop no longer reads
    CLOSING       this side has closed it: what was written may still be sent, and nothing is read
    VERDICT       its error is known and reported; data that was received before is still to be read
    ENDING        the loop's transport has been closed: connection_lost follows
    LOST          connection_lost was called, by the loop
    LOST_BY_KAIO  connection_lost was called by kaio because the loop did not; a later call is ignored
    RELEASED      a protocol of another kind has taken the connection over

Rules kept here: no I/O; a trigger that a stage does not name changes nothing. A verdict in OPEN waits until everything
is read; in HALF_CLOSED and CLOSING nothing is left to read. A verdict is possible in OPEN, HALF_CLOSED and CLOSING, so
`peer_dead` is called once; every stage that is not final leads to LOST once, so `connection_lost` is, too.
"""

from __future__ import annotations

import enum
from typing import Final

__all__ = ["BEFORE_VERDICT", "ENDED", "TABLE", "Stage", "Trigger", "next_stage"]


# IntEnum, because the hash of Enum is a function in Python, and the end of a connection looks up a dozen of them.


class Stage(enum.IntEnum):
    """The state of a connection; the module's docstring has the meaning of each."""

    OPEN = enum.auto()
    HALF_CLOSED = enum.auto()
    CLOSING = enum.auto()
    VERDICT = enum.auto()
    ENDING = enum.auto()
    LOST = enum.auto()
    LOST_BY_KAIO = enum.auto()
    RELEASED = enum.auto()


class Trigger(enum.IntEnum):
    """What changes the stage."""

    EOF = enum.auto()
    """The peer has sent EOF, and the protocol keeps the connection open."""
    CLOSE = enum.auto()
    """This side closes or aborts it."""
    VERDICT = enum.auto()
    """The peer is dead or the connection was reset, and the loop does not know it, or would not report it."""
    READ_ALL = enum.auto()
    """Everything received before the verdict was read, or will not be read any more."""
    LOST = enum.auto()
    """connection_lost is called, by the loop or by kaio."""
    SUPPLIED = enum.auto()
    """The call of connection_lost was kaio's own."""
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
"""The stages in which a verdict is possible."""
ENDED: Final = frozenset({Stage.LOST, Stage.LOST_BY_KAIO, Stage.RELEASED})
"""The final stages."""


def next_stage(stage: Stage, trigger: Trigger) -> Stage:
    """Return the stage that follows a trigger."""
    return TABLE[stage].get(trigger, stage)
