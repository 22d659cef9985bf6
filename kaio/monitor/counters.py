"""What has happened to connections, as plain data: counters, and the events that a metrics hook is called with."""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import Any, Final, Literal, NamedTuple

from ..errors import Cause, DeadPeerError
from ..liveness.health import Health

__all__ = ["SILENCE_BOUNDS", "Counters", "Event"]

SILENCE_BOUNDS: Final = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, math.inf)
"""Upper bounds of the histogram of silence at death, in seconds."""


@dataclasses.dataclass(slots=True)
class Counters:
    """What has happened to the connections of a loop or a server since its start."""

    watched: int = 0
    """Connections that are watched now."""
    suspects: int = 0
    recoveries: int = 0
    deaths: dict[Cause, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(Cause, 0))
    silence: dict[float, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SILENCE_BOUNDS, 0))
    """Deaths by the silence before them: upper bound in seconds to number."""
    looks: int = 0
    """How often the kernel was asked about a connection; a loop's counters only."""
    wakeups: int = 0
    """How often the wheel's timer fired; a loop's counters only."""

    def count(self, event: Event) -> None:
        """Count a suspicion, a recovery or a death."""
        if event.kind == "suspect":
            self.suspects += 1
        elif event.kind == "recovered":
            self.recoveries += 1
        elif event.error is not None:
            self.deaths[event.error.cause] += 1
            silence = event.error.silence
            if not math.isnan(silence):
                self.silence[SILENCE_BOUNDS[bisect.bisect_left(SILENCE_BOUNDS, silence)]] += 1


class Event(NamedTuple):
    """What the metrics hook is called with."""

    kind: Literal["suspect", "recovered", "dead"]
    transport: Any
    """The connection's transport; None where it died while connecting."""
    health: Health | None
    """The sample, with "suspect" and "recovered"."""
    error: DeadPeerError | None
    """With "dead"."""
