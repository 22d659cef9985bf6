"""Which process holds which socket, by /proc/PID/fd.

Rules kept here: looking through all processes costs a few microseconds a descriptor, so it is done when there is a
socket whose holder is not known, and takes a tenth of the time at most; descriptors are passed on, so nothing is
believed for long. What is held by others' processes is not seen, and no reason to look again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

__all__ = ["Holder", "Holders"]

_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")
_BELIEVED: Final = 10.0  # seconds
_SHARE: Final = 10  # looking takes this part of the time at most


class Holder(NamedTuple):
    """A process that holds a socket."""

    pid: int
    name: str
    """As the kernel has it: fifteen bytes, of the program's name mostly."""


class Holders:
    """The holders of sockets, of all processes or of some."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._pids = pids
        self.held: dict[int, tuple[Holder, ...]] = {}
        """Who holds a socket, by its inode; the process with the lowest number first."""
        self._nobodys: frozenset[int] = frozenset()  # looked for and not found
        self._looked = -float("inf")
        self._took = 0.0

    @property
    def nobodys(self) -> frozenset[int]:
        """Sockets that none of the processes holds, as far as is believed."""
        return self._nobodys if self._age < _BELIEVED else frozenset()

    @property
    def _age(self) -> float:
        return time.monotonic() - self._looked

    def look_for(self, inodes: AbstractSet[int]) -> None:
        """Look through the processes, if that is due for these sockets."""
        age = self._age
        strangers = inodes - self.held.keys() - self._nobodys - {0}
        if age >= _BELIEVED:
            self._nobodys = frozenset()
        if age >= _BELIEVED or (strangers and age >= _SHARE * self._took):
            self._look()
            self._nobodys = (self._nobodys | inodes) - self.held.keys()

    def _look(self) -> None:
        self._looked = time.monotonic()
        held: dict[int, list[Holder]] = {}
        for pid in self._pids or _all_pids():
            inodes = _sockets(pid)
            if inodes:
                holder = Holder(pid, _name(pid))
                for inode in inodes:
                    held.setdefault(inode, []).append(holder)
        self.held = {inode: tuple(holders) for inode, holders in held.items()}
        self._took = time.monotonic() - self._looked


def _all_pids() -> Iterable[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _sockets(pid: int) -> set[int]:
    """The sockets of a process, of any kind; none when it has ended or is not ours to look into."""
    directory = f"/proc/{pid}/fd"
    found: set[int] = set()
    try:
        names = os.listdir(directory)
    except OSError:
        return found
    for name in names:
        try:
            target = _SOCKET.fullmatch(os.readlink(f"{directory}/{name}"))
        except OSError:  # closed meanwhile
            continue
        if target is not None:
            found.add(int(target[1]))
    return found


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""
