"""Locks of files and directories between commands. Not on Windows.

Rules kept here: nobody is waited for without a limit, because whoever may read a file can lock it for ever.
"""

from __future__ import annotations

import time
from typing import Final

__all__ = ["lock"]

_PAUSE: Final = 0.02  # seconds between attempts


def lock(descriptor: int, deadline: float) -> bool:
    """Lock an open file or directory with flock(2), until it is closed.

    Waits until `deadline`, a time of `time.monotonic`. Returns whether it is locked; False: another process has it.
    """
    import fcntl  # noqa: PLC0415 - not on Windows

    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        time.sleep(_PAUSE)
