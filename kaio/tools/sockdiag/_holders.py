"""Which process holds which socket, by /proc/PID/fd.

Rules kept here: searching all processes costs a few microseconds a descriptor, so it is done only for a socket without
a known holder, and takes a tenth of the time at most. Descriptors can be passed to other processes, so results expire.
A socket that was searched for in vain, such as another user's, does not cause another search before that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

from ..procfs import all_pids, process_name, socket_inodes

__all__ = ["Holder", "Holders"]

_EXPIRES: Final = 10.0  # seconds until results expire
_SHARE: Final = 10  # searching takes this part of the time at most


class Holder(NamedTuple):
    """A process that holds a socket."""

    pid: int
    name: str
    """The kernel's name: usually the first fifteen bytes of the program's."""


class Holders:
    """The holders of sockets, among all processes or some."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._pids = pids
        self.held: dict[int, tuple[Holder, ...]] = {}
        """The holders of each socket by inode, in the order of their pids."""
        self._unheld: frozenset[int] = frozenset()  # searched for and not found
        self._looked = -float("inf")
        self._took = 0.0

    @property
    def unheld(self) -> frozenset[int]:
        """Sockets that none of the processes holds, by an unexpired search."""
        return self._unheld if self._age < _EXPIRES else frozenset()

    @property
    def _age(self) -> float:
        return time.monotonic() - self._looked

    def look_for(self, inodes: AbstractSet[int]) -> None:
        """Search the processes for these sockets, if that is due."""
        age = self._age
        unknown = inodes - self.held.keys() - self._unheld - {0}
        if age >= _EXPIRES:
            self._unheld = frozenset()
        if age >= _EXPIRES or (unknown and age >= _SHARE * self._took):
            self._look()
            self._unheld = (self._unheld | inodes) - self.held.keys()

    def _look(self) -> None:
        self._looked = time.monotonic()
        held: dict[int, list[Holder]] = {}
        for pid in self._pids or all_pids():
            inodes = _sockets(pid)
            if inodes:
                holder = Holder(pid, process_name(pid))
                for inode in inodes:
                    held.setdefault(inode, []).append(holder)
        self.held = {inode: tuple(holders) for inode, holders in held.items()}
        self._took = time.monotonic() - self._looked


def _sockets(pid: int) -> set[int]:
    """The inodes of a process's sockets, of any kind; empty if it has exited or cannot be inspected."""
    try:
        return {inode for _, inode in socket_inodes(pid)}
    except OSError:
        return set()
