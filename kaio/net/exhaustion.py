"""Running out of file descriptors while accepting: one log record when it begins, one when it ends."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Final

from ..addresses import Address

__all__ = ["Exhaustion"]

logger: Final = logging.getLogger("kaio")

_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_FEW: Final = 4  # free descriptors at which a warning is logged, where the loop accepts
_PAUSE: Final = 1.0  # seconds between two counts while there are few


class Exhaustion:
    """Whether a listener can accept, or has run out of descriptors.

    Where kaio accepts, accept() says so. Where the loop does, free descriptors are counted when many connections have
    been added since the last count: a count lists /proc/self/fd, which is not to be done for each connection.
    """

    __slots__ = ("_address", "_count_after", "count_at", "is_active")

    def __init__(self, address: Address) -> None:
        self._address = address
        self.is_active: bool = False  # it was logged, and has not ended
        self.count_at: int = 0  # connections from which on free descriptors are to be counted
        self._count_after = 0.0  # and the loop's time before which they are not

    # -- where kaio accepts

    def begin(self, exc: OSError) -> None:
        """Note that accept() failed."""
        if not self.is_active:
            self.is_active = True
            until = "descriptors are free" if exc.errno in _OUT_OF_DESCRIPTORS else "accept() works again"
            logger.warning("%s: accept() fails, new connections wait until %s: %s", self._address, until, exc)

    def end(self) -> None:
        """Note that accept() has emptied the queue."""
        if self.is_active:
            self.is_active = False
            logger.info("%s: accepting again", self._address)

    # -- where the loop accepts

    def start_counting(self) -> None:
        """Count for the first time when half of the descriptors that are free now may be used up."""
        self.count_at = _free_descriptors() // 2

    def count(self, connections: int, now: float) -> None:
        """Count free descriptors, and count again when half of them may be used up."""
        if now < self._count_after:
            return
        free = _free_descriptors()
        self.count_at = connections + free // 2
        if free < _FEW:
            self._count_after = now + _PAUSE
            if not self.is_active:
                self.is_active = True
                logger.warning(
                    "%s: file descriptors are used up; until some are free, this event loop closes new connections"
                    " without logging it",
                    self._address,
                )
        elif self.is_active:
            self.is_active = False
            logger.info("%s: file descriptors are free again", self._address)


def _free_descriptors() -> int:
    """How many more descriptors this process may open; a large number where that cannot be told."""
    try:
        import resource  # noqa: PLC0415 - not on Windows

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit == resource.RLIM_INFINITY:
            return sys.maxsize
        return max(0, limit - len(os.listdir("/proc/self/fd")))
    except (ImportError, OSError):
        return sys.maxsize
