"""The log record of each death.

Rules kept here: one record a death; thousands that come at once are written a few milliseconds' worth in a turn.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import deque
from typing import Final

from ..errors import DeadPeerError, format_address
from .wheel import TURN

__all__ = ["DeathLog"]

logger: Final = logging.getLogger("kaio")


class DeathLog:
    """Writes the deaths of one loop to the log."""

    def __init__(self, loop: weakref.ref[asyncio.AbstractEventLoop]) -> None:
        self._loop = loop
        self._unlogged: deque[DeadPeerError] = deque()

    def add(self, error: DeadPeerError) -> None:
        """Log a death in the loop's next turn."""
        self._unlogged.append(error)
        loop = self._loop()
        if len(self._unlogged) == 1 and loop is not None and not loop.is_closed():
            loop.call_soon(self._write)

    def _write(self) -> None:
        loop = self._loop()
        if loop is None:
            return
        until = loop.time() + TURN
        while self._unlogged:
            error = self._unlogged.popleft()
            logger.warning(
                "%s",
                error,
                extra={
                    "event": "peer_dead",
                    "cause": error.cause.value,
                    "silence": error.silence,
                    "peer": format_address(error.peername),
                    "policy": str(error.policy),
                    "errno": error.errno,
                },
            )
            if loop.time() > until and self._unlogged:
                loop.call_soon(self._write)
                return
