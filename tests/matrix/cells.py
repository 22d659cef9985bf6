"""What a cell of the matrix is, and what was seen in it. Plain data, which processes pass on as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

import kaio

__all__ = ["BOUND", "KINDS", "LOOPS", "MODES", "Cell", "Seen", "policy"]

LOOPS: Final = ("asyncio", "uvloop")
MODES: Final = ("keep", "drop")
KINDS: Final = ("own", "connection", "streams", "others", "descriptor", "sweep", "attach")

BOUND: Final = 3.0
"""Seconds: the detection time of `policy`."""


def policy(mode: str) -> kaio.Keepalive:
    """The policy of every connection of the matrix."""
    made = kaio.Keepalive(1, 1, 2, stalled="keep" if mode == "keep" else "drop")
    assert made.detection_time == BOUND
    return made


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One connection: where its path breaks, what it was doing then, and what watches it."""

    place: str
    state: str
    kind: str
    loop: str
    """Empty where there is none: blocking sockets."""
    mode: str

    def __str__(self) -> str:
        where = f"{self.kind} on {self.loop}" if self.loop else self.kind
        return f"{self.place} / {self.state} / {where} / {self.mode}"


@dataclasses.dataclass(slots=True)
class Seen:
    """What was seen of one connection. Times are seconds since the break."""

    cell: Cell
    events: list[str] = dataclasses.field(default_factory=list)
    """What its owner was told, in order: "dead" and "lost" of protocols and streams, "lost" of others, "error"."""
    told_at: float | None = None
    """When its owner was told first."""
    ended_at: float | None = None
    """When it was told last."""
    error: str = ""
    """What it was told: the type and the text."""
    error_number: int | None = None
    is_dead_peer: bool = False
    same_error: bool = True
    """Whether all that its owner was told came with the same object."""
    cause: str | None = None
    """As the error says it; where the error is no DeadPeerError, as the monitor's event says it."""
    logged: int = 0
    counted: int = 0
    left: list[str] = dataclasses.field(default_factory=list)
    """What still waited at the end, such as a sendfile; or came to an end without an error."""
    lost_bytes: int = 0
    """How much of what had arrived was never delivered."""
    unready: str = ""
    """Why the state could not be had, so that nothing is proved; or what the harness itself stumbled on."""
    quiet_before: float = 0.0
    """For how long the peer may have been silent when the path broke, in seconds: by what its state needs."""
    before: str = ""
    """What the kernel said of it when the path broke."""

    def to_json(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Seen:
        """Make a result from a line of `to_json`."""
        fields: dict[str, Any] = json.loads(line)
        return cls(**{**fields, "cell": Cell(**fields["cell"])})
