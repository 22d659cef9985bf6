"""What /proc and the user database say about any process. Linux only.

Rules kept here: a process may end at any moment, which is not an error but an empty answer, unless said otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

__all__ = ["all_pids", "open_files", "process_name", "socket_inodes", "stat_field", "threads", "user_name"]

_SOCKET: Final = re.compile(r"socket:\[([0-9]+)\]")


def all_pids() -> list[int]:
    """List all processes, in numerical order."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def process_name(pid: int, errors: str = "replace") -> str:
    """Return the kernel's name of a process, usually the first fifteen bytes of its program's; "" if there is none.

    `errors` says what becomes of bytes that are not UTF-8.
    """
    try:
        # A name may have any bytes (prctl(2), PR_SET_NAME), a carriage return too, and end with a newline of its own.
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors=errors, newline="\n") as file:
            return file.read().removesuffix("\n")
    except OSError:
        return ""


def stat_field(pid: int, number: int) -> int | None:
    """Return a field of /proc/PID/stat, an integer, by its number in proc(5), from 4 on; None if there is none."""
    try:
        # The name before them, in parentheses, may contain parentheses and spaces itself.
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[number - 3])
    except (OSError, IndexError, ValueError):
        return None


def threads(pid: int) -> list[int]:
    """List a process's threads that have not ended, in numerical order. Raises OSError."""
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))


def open_files(pid: int, thread: int | None = None) -> Iterator[tuple[int, str]]:
    """Iterate over a process's descriptors, in order, and what their links say. Raises OSError.

    A process has none any more when its first thread has ended; they are found by way of another `thread` then.
    """
    directory = f"/proc/{pid}/fd" if thread is None else f"/proc/{pid}/task/{thread}/fd"
    for fd in sorted(map(int, os.listdir(directory))):
        try:
            yield fd, os.readlink(f"{directory}/{fd}")
        except OSError:  # closed in the meantime
            continue


def socket_inodes(pid: int, thread: int | None = None) -> Iterator[tuple[int, int]]:
    """Iterate over a process's sockets of any kind: descriptor and inode, in the order of descriptors. Raises OSError.

    A socket with several descriptors is repeated. `thread` is as in `open_files`.
    """
    for fd, target in open_files(pid, thread):
        found = _SOCKET.fullmatch(target)
        if found is not None:
            yield fd, int(found[1])


def user_name(uid: int) -> str:
    """Return the name of a user, or the number of one without a name."""
    import pwd  # noqa: PLC0415 - not on Windows

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
