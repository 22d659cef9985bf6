"""How long a slot waits before its next worker is started: pure arithmetic."""

from __future__ import annotations

from typing import Final

__all__ = ["FIRST", "LONGEST", "STEADY", "Backoff"]

FIRST: Final = 0.1
"""Seconds before the second replacement; the first is started at once. Each further one waits twice as long."""
LONGEST: Final = 30.0
"""Seconds that a replacement waits at most."""
STEADY: Final = 30.0
"""Seconds that a worker lives until its death counts as the first again."""


class Backoff:
    """The delays of one slot's replacements."""

    def __init__(self) -> None:
        self._deaths = 0  # one soon after the other

    def delay(self, lived: float) -> float:
        """Return the delay in seconds after a worker died that had lived for so long."""
        if lived >= STEADY:
            self._deaths = 0
        self._deaths += 1
        # The exponent is bounded: 2.0**1100 is an OverflowError.
        return 0.0 if self._deaths == 1 else min(LONGEST, FIRST * 2.0 ** min(self._deaths - 2, 60))
