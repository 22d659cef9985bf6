"""Finding processes by their numbers, their names and their systemd units; and those below them.

Rules kept here: a name is what pgrep(1) -x takes: the kernel's name of the process, which is the first fifteen bytes of
its program's; or the whole name of its program, also where that is known to rename itself. A unit's processes are those
in its cgroup, of version 1 or 2, so that neither systemd nor its rights are needed. Found by a name are neither this
process itself nor those that have exited and whose parents have not waited for them yet.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Final

from ..procfs import all_pids, process_name, stat_field
from ._access import NO_PID, ProcessError, has_exited
from ._programs import RENAMED

__all__ = ["descendants", "find", "parents", "program_name"]

_COMM: Final = 15  # bytes
_UNITS: Final = (".service", ".scope", ".slice", ".socket")
_LONGEST_PID: Final = 10  # digits
_PARENT: Final = 4  # proc(5), stat: ppid


def find(word: str) -> list[int]:
    """Find the processes that a number, a name or a unit's name stands for, in numerical order.

    Raises `ProcessError` if there is none.
    """
    if word.isascii() and word.isdigit():
        if len(word) > _LONGEST_PID:
            raise ProcessError(NO_PID, errno.ESRCH, f"process {word}: there is no such process")
        return [int(word)]
    is_unit = word.endswith(_UNITS)
    matches = _in_unit if is_unit else _is_called
    found = [pid for pid in all_pids() if pid != os.getpid() and matches(pid, word) and not has_exited(pid)]
    if not found:
        what = "in a unit of that name" if is_unit else "of that name"
        raise ProcessError(NO_PID, errno.ESRCH, f"{word or repr(word)}: there is no process {what}")
    return found


def parents() -> dict[int, int]:
    """Map every process to its parent."""
    found: dict[int, int] = {}
    for pid in all_pids():
        parent = stat_field(pid, _PARENT)
        if parent is not None:
            found[pid] = parent
    return found


def descendants(pids: Iterable[int]) -> list[int]:
    """List the processes below these, in numerical order."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    named = set(pids)
    known = set(named)
    fresh = list(named)
    while fresh:  # each process once: a chain of processes may be as long as a user likes
        for pid in children.get(fresh.pop(), ()):
            if pid not in known:
                known.add(pid)
                fresh.append(pid)
    return sorted(known - named)


def program_name(pid: int) -> str:
    """The name of a process, or of its program where that is known to rename itself; "" if there is none."""
    name = process_name(pid)
    program = RENAMED.get(name)
    return program if program is not None and os.path.basename(_program(pid)) == program else name


def _is_called(pid: int, name: str) -> bool:
    called = process_name(pid, "surrogateescape")
    comm, whole = os.fsencode(called), os.fsencode(name)  # the first of which may end within a character
    if comm == whole:
        return True
    cut = len(whole) > _COMM and comm == whole[:_COMM]
    return (cut or RENAMED.get(called) == name) and os.path.basename(_program(pid)) == name


def _program(pid: int) -> str:
    """The file that a process executes, else its first argument."""
    try:
        return os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        pass
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsdecode(file.read(4096).split(b"\0")[0])
    except OSError:
        return ""


def _in_unit(pid: int, unit: str) -> bool:
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            # Lines are hierarchy:controllers:path, and the path may contain colons (cgroups(7)).
            return any(unit in line.rstrip("\n").split(":", 2)[-1].split("/") for line in file)
    except OSError:
        return False
