"""Running out of file descriptors while accepting: one log record when it begins, one when it ends."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Final

from ..addresses import Address

__all__ = ["Exhaustion", "free_descriptors"]

logger: Final = logging.getLogger("kaio")

_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Exhaustion:
    """Whether accept() fails for want of descriptors or memory."""

    __slots__ = ("_address", "is_active")

    def __init__(self, address: Address) -> None:
        self._address = address
        self.is_active: bool = False  # it was logged, and has not ended

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


def free_descriptors() -> int:
    """Return how many more descriptors this process may open; a large number where that cannot be told."""
    try:
        import resource  # noqa: PLC0415 - not on Windows

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit == resource.RLIM_INFINITY:
            return sys.maxsize
        # From Linux 6.2 on the directory's size is their number (fs/proc/fd.c, proc_fd_getattr); before, it is 0.
        is_open = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
        return max(0, limit - is_open)
    except (ImportError, OSError):
        return sys.maxsize
