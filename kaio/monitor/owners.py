"""The registry of the sockets that monitors of this process watch, readable by other processes.

A table of inodes, each with its bound: seconds that sent data may wait unanswered before the monitor ends the
connection. A sweep asks it which sockets have an owner; `kaio audit` reads it from outside, from a memfd:

    word 0          magic
    word 1          version, and in the upper half the writer's pid
    words 2n, 2n+1  a record: the inode, 0 where the record is free; the bound in milliseconds, 0 where there is none,
                    and in the upper half a number that no other state of the table's records has

Words are of 64 bits in the machine's byte order.

Rules kept here:
- Where no memfd can be had (no descriptor left, another platform) the table is in plain memory, and only other
  processes notice; another is tried later.
- A record's inode is cleared before its other word changes and written after it. Each word is stored at once, so that
  a reader who finds the same record twice has found one that was true.
- A garbage collection or a signal handler may call in the middle of a call: it leaves its change to the call that it
  has interrupted. A change can be made twice, so that one that an exception has interrupted (Ctrl-C) is made again.
- A forked process has an empty table of its own; what it inherits of its parent's is closed before anything runs.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import stat
import sys
import threading
import time
from collections import deque
from typing import Final

__all__ = ["LARGEST", "MEMFD", "claim", "is_owned", "owned", "parse", "release"]

MEMFD: Final = "kaio"
"""The memfd's name: the link in /proc/PID/fd reads "/memfd:kaio (deleted)"."""
LARGEST: Final = 1 << 24
"""Bytes of a table that are read: a million connections."""

_MAGIC: Final = int.from_bytes(b"kaio own", sys.byteorder)
_VERSION: Final = 1
_HEADER: Final = 2  # words
_SMALLEST: Final = 4096  # bytes: 255 records
_LOW: Final = 0xFFFFFFFF
_RELEASED: Final = -1
_PATIENCE: Final = 1.0 if sys.platform.startswith("linux") else math.inf  # seconds before a memfd is tried again
_MFD_NOEXEC_SEAL: Final = 0x8  # Linux 6.3; without it the kernel's log names the program once


def claim(fd: int, bound: float | None) -> int:
    """Register the socket of a descriptor as watched, and return its inode; 0 when it is no open socket.

    `bound` is how many seconds sent data may wait unanswered before the monitor ends the connection; None where the
    kernel's own TCP_USER_TIMEOUT rules, or nothing does. Claiming a socket again changes its bound.
    """
    try:
        found = os.fstat(fd)
    except OSError:
        return 0
    if not stat.S_ISSOCK(found.st_mode):
        return 0
    _table.change(found.st_ino, 0 if bound is None else _milliseconds(bound))
    return found.st_ino


def release(inode: int) -> None:
    """Remove a socket that is no longer watched. Does nothing for 0 and for unknown inodes."""
    _table.change(inode, _RELEASED)


def is_owned(inode: int) -> bool:
    """Return whether a monitor of this process watches the socket."""
    return inode in _table.places


def owned() -> dict[int, float | None]:
    """Return all watched sockets: inode to bound in seconds."""
    return _table.bounds()


def parse(first: bytes, second: bytes) -> tuple[int, dict[int, float | None]]:
    """The pid that wrote a table, and its sockets with their bounds, from two readings: what both have is true.

    (0, nothing) for anything else than a table.
    """
    one, two = _words(first), _words(second)
    if one is None or two is None or one[1] != two[1]:
        return 0, {}
    columns = [words[start::2].tolist() for words in (one, two) for start in (_HEADER, _HEADER + 1)]
    return one[1] >> 32, {
        inode: (word & _LOW) / 1000 or None
        for inode, word, again, same in zip(*columns, strict=False)  # it may have grown
        if inode and inode == again and word == same
    }


def _words(content: bytes) -> memoryview | None:
    words = memoryview(content)[: len(content) // 16 * 16].cast("Q")
    return words if len(words) >= _HEADER and words[0] == _MAGIC and words[1] & _LOW == _VERSION else None


class _Table:
    """The records, and where they are."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}  # inode -> the first word of its record
        self._changes: deque[tuple[int, int]] = deque()  # to be made: inode, milliseconds
        self._lock = threading.RLock()  # of all below
        self._busy = False  # a call that has the lock is at it
        self._memory: mmap.mmap | bytearray = bytearray()
        self._words = memoryview(self._memory).cast("Q")
        self._free: list[int] = []  # records that were in use
        self._unused = _HEADER  # the first word of those that were not
        self._number = 0  # of the latest state of a record
        self._retry = -math.inf  # when a memfd may be tried

    def change(self, inode: int, milliseconds: int) -> None:
        """Write the record of a socket, or erase it."""
        self._changes.append((inode, milliseconds))
        with self._lock:
            while self._changes and not self._busy:
                self._busy = True
                try:
                    self._make_changes()
                finally:
                    self._busy = False

    def bounds(self) -> dict[int, float | None]:
        """Of all records, in seconds."""
        with self._lock:
            words = self._words
            return {inode: (words[place + 1] & _LOW) / 1000 or None for inode, place in self.places.copy().items()}

    def _make_changes(self) -> None:
        changes = self._changes
        while changes:
            inode, milliseconds = changes[0]
            if milliseconds == _RELEASED:
                self._erase(inode)
            else:
                self._write(inode, milliseconds)
            changes.popleft()

    def _write(self, inode: int, milliseconds: int) -> None:
        if type(self._memory) is bytearray and time.monotonic() >= self._retry:
            self._move(max(_SMALLEST, len(self._memory)))
        place = self.places.get(inode)
        if place is None:
            place = self._free.pop() if self._free else self._new_place()
        words = self._words
        self._number = number = (self._number + 1) & _LOW
        words[place + 1] = milliseconds | number << 32
        words[place] = inode
        self.places[inode] = place

    def _erase(self, inode: int) -> None:
        place = self.places.get(inode)
        if place is None:
            return
        self._words[place] = 0
        del self.places[inode]
        self._free.append(place)
        if not self.places:
            self.close()

    def _new_place(self) -> int:
        place = self._unused
        if place >= len(self._words):
            self._move(max(_SMALLEST, 2 * len(self._memory)))
        self._unused = place + 2
        return place

    def _move(self, size: int) -> None:
        """Go on in a new memory, with the records as they are."""
        try:
            memory: mmap.mmap | bytearray = _shared(size)
        except (OSError, ValueError):  # no descriptor, no memory to be mapped
            memory = bytearray(size)
            self._retry = time.monotonic() + _PATIENCE
        words = memoryview(memory).cast("Q")
        words[: len(self._words)] = self._words
        words[1] = _VERSION | os.getpid() << 32
        words[0] = _MAGIC
        self._replace(memory, words)

    def _replace(self, memory: mmap.mmap | bytearray, words: memoryview) -> None:
        before, seen = self._memory, self._words
        self._memory, self._words = memory, words
        seen.release()
        if isinstance(before, mmap.mmap):
            before.close()

    def close(self) -> None:
        """Close the memfd: there are no records."""
        self._free.clear()
        self._unused = _HEADER
        memory = bytearray()
        self._replace(memory, memoryview(memory).cast("Q"))


def _milliseconds(bound: float) -> int:
    """Rounded up, as what the kernel gets is; 0: none."""
    return 0 if bound == math.inf else max(0, min(math.ceil(bound * 1000), _LOW))


def _shared(size: int) -> mmap.mmap:
    """A new memfd, mapped: the mapping keeps a descriptor of its own. Raises OSError."""
    fd = _memfd()
    try:
        os.ftruncate(fd, size)
        _forbid_shrinking(fd)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


def _memfd() -> int:
    """Raises OSError."""
    if not sys.platform.startswith("linux"):
        raise OSError("no memfd")
    try:
        return os.memfd_create(MEMFD, os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError:
        return os.memfd_create(MEMFD, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def _forbid_shrinking(fd: int) -> None:
    """Whoever may open /proc/PID/fd could cut it short under our feet, and we would die of SIGBUS."""
    import fcntl  # noqa: PLC0415 - not on Windows

    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)


_table = _Table()


def _in_child() -> None:
    """After a fork: threads that were at it are not here, and the memory is our parent's."""
    global _table
    parents, _table = _table, _Table()
    with contextlib.suppress(BufferError, ValueError):
        parents.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
