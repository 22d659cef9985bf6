"""What a process's own monitor bounds: the table that `kaio.owners` keeps in a memfd, read from outside.

Rules kept here: any process can make a memfd of that name and write into it what it likes. So nothing in it is trusted:
it is read up to a limit, what makes no sense is left out, and what is left is only ever shown.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Final

from .. import owners

__all__ = ["watched"]

_LINK: Final = f"/memfd:{owners.MEMFD} (deleted)"
_LOW: Final = 0xFFFFFFFF


def watched(pid: int) -> dict[int, float | None]:
    """The sockets that the monitors of a process watch: inode to the seconds that data may wait unanswered.

    None: the monitor leaves that to the kernel. Empty for a process without kaio, and for one that may not be read.
    """
    directory = f"/proc/{pid}/fd"
    found: dict[int, float | None] = {}
    try:
        names = os.listdir(directory)
    except OSError:
        return found
    for name in names:
        try:
            if os.readlink(f"{directory}/{name}") == _LINK:
                found |= _bounds(f"{directory}/{name}", pid)
        except OSError:  # closed meanwhile
            continue
    return found


def _bounds(path: str, pid: int) -> dict[int, float | None]:
    # Non-blocking: what is opened may be another file by now.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return {}
        first, second = (os.pread(fd, owners.LARGEST, 0) for _ in range(2))
    finally:
        os.close(fd)
    writer, before = owners.records(first)
    again, after = owners.records(second)
    if writer != again or writer != _own_pid(pid):  # a forked child has its parent's descriptor
        return {}
    return {inode: (word & _LOW) / 1000 or None for _, inode, word in before & after}


def _own_pid(pid: int) -> int:
    """What the process itself takes for its pid: the innermost of its namespaces' (proc(5): NSpid)."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            found = re.search(r"^NSpid:.*?(\d+)$", file.read(), re.MULTILINE)
    except OSError:
        return -1
    return int(found[1]) if found else pid
