"""The sockets that a process's own monitor watches: the memfd of `kaio.monitor.owners`, read from outside.

Rules kept here: any process can create a memfd of that name, so its content is not trusted: it is read up to a limit,
invalid records are skipped, and the rest is for display only.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import Final

from ...monitor import owners
from ..procfs import open_files

__all__ = ["watched"]

_LINK: Final = f"/memfd:{owners.MEMFD} (deleted)"


def watched(pid: int) -> dict[int, float | None]:
    """Map the inodes of the sockets that a process's monitors watch to their bounds on unacknowledged data, in seconds.

    None: the monitor leaves the bound to the kernel. Empty for a process without kaio, and for one that cannot be read.
    """
    writer = _own_pid(pid)
    with contextlib.suppress(OSError):
        for fd, target in open_files(pid):
            if target == _LINK:
                with contextlib.suppress(OSError):  # closed in the meantime
                    found = _read(f"/proc/{pid}/fd/{fd}", writer)
                    if found is not None:
                        return found
    return {}


def _read(path: str, writer: int) -> dict[int, float | None] | None:
    """Read a table; None if it is invalid, or another process's: a forked child has its parent's descriptor."""
    # Non-blocking, because the descriptor may refer to another file by now.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        pid, found = owners.parse(*(os.pread(fd, owners.LARGEST, 0) for _ in range(2)))
    finally:
        os.close(fd)
    return found if pid == writer else None


def _own_pid(pid: int) -> int:
    """The pid that the process itself sees: that of its innermost pid namespace (proc(5): NSpid)."""
    try:
        # A carriage return in the process's name, which is in the first line, must not begin another.
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace", newline="\n") as file:
            found = re.search(r"^NSpid:[0-9\t]*\t([0-9]{1,10})$", file.read(), re.MULTILINE)
    except OSError:
        return -1
    return int(found[1]) if found else pid
