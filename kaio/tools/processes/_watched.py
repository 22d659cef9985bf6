"""What a process's own monitor bounds: the table that `kaio.monitor.owners` keeps in a memfd, read from outside.

Rules kept here: any process can make a memfd of that name and write into it what it likes. So nothing in it is trusted:
it is read up to a limit, what makes no sense is left out, and what is left is only ever shown.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Final

from ...monitor import owners

__all__ = ["watched"]

_LINK: Final = f"/memfd:{owners.MEMFD} (deleted)"


def watched(pid: int) -> dict[int, float | None]:
    """The sockets that the monitors of a process watch: inode to the seconds that data may wait unanswered.

    None: the monitor leaves that to the kernel. Empty for a process without kaio, and for one that may not be read.
    """
    directory = f"/proc/{pid}/fd"
    writer = _own_pid(pid)
    try:
        names = os.listdir(directory)
    except OSError:
        return {}
    for fd in sorted(map(int, names)):
        try:
            if os.readlink(f"{directory}/{fd}") == _LINK:
                found = _read(f"{directory}/{fd}", writer)
                if found is not None:
                    return found
        except OSError:  # closed meanwhile
            continue
    return {}


def _read(path: str, writer: int) -> dict[int, float | None] | None:
    """What a table says; None where it is none, or another process's, as a forked one has its parent's descriptor."""
    # Non-blocking: what is opened may be another file by now.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        pid, found = owners.parse(*(os.pread(fd, owners.LARGEST, 0) for _ in range(2)))
    finally:
        os.close(fd)
    return found if pid == writer else None


def _own_pid(pid: int) -> int:
    """What the process itself takes for its pid: the innermost of its namespaces' (proc(5): NSpid)."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            found = re.search(r"^NSpid:.*?(\d+)$", file.read(), re.MULTILINE)
    except OSError:
        return -1
    return int(found[1]) if found else pid
