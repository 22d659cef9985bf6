"""The sockets that a monitor of this process watches, as the rest of the process and other processes see it.

A table of inodes, each with its bound: seconds that sent data may wait unanswered before the monitor ends the
connection. A sweep asks it which sockets have an owner; `kaio audit` reads it from outside, from a memfd:

    word 0          magic
    word 1          version, and in the upper half the writer's pid
    words 2n, 2n+1  a record: the inode, 0 where the record is free; the bound in milliseconds, 0 where there is none,
                    and in the upper half a number that no other state of the table's records has

Words are of 64 bits in the machine's byte order.

Rules kept here:
- A dict is what counts; the memfd follows it, and where there can be none (no descriptor left, another platform) only
  other processes notice.
- A record's inode is cleared before its other word changes and written after it. Each word is stored at once, so that
  a reader who finds the same record twice has found one that was true.
- A garbage collection or a signal handler may call in the middle of a call: it leaves its change to the call that it
  has interrupted. An exception out of it (Ctrl-C) closes the memfd, and the next change writes another.
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

__all__ = ["LARGEST", "MEMFD", "claim", "is_owned", "owned", "records", "release"]

MEMFD: Final = "kaio"
"""The memfd's name: the link in /proc/PID/fd reads "/memfd:kaio (deleted)"."""
LARGEST: Final = 1 << 24
"""Bytes of a table that are read: a million connections."""

_MAGIC: Final = int.from_bytes(b"kaio own", sys.byteorder)
_VERSION: Final = 1
_HEADER: Final = 2  # words
_SMALLEST: Final = 4096  # bytes: 255 records
_LOW: Final = 0xFFFFFFFF
_NONE: Final = -1  # no such inode
_PATIENCE: Final = 1.0  # seconds before another memfd is tried after one could not be had
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
    inode = found.st_ino
    _table.put(inode, bound)
    return inode


def release(inode: int) -> None:
    """The socket is watched no more. Harmless for 0, and for inodes that nobody claimed."""
    _table.remove(inode)


def is_owned(inode: int) -> bool:
    """Whether a monitor of this process watches the socket."""
    return inode in _table.bounds


def owned() -> dict[int, float | None]:
    """All that are watched now: inode to bound in seconds."""
    return _table.bounds.copy()


def records(content: bytes) -> tuple[int, set[tuple[int, int, int]]]:
    """The pid that wrote a table, and its records: (position, inode, other word). (0, nothing) for anything else.

    Of a table that is in use, only what two readings have in common is true. The bound is the lower half of the other
    word, in milliseconds.
    """
    words = memoryview(content)[: len(content) // 16 * 16].cast("Q")
    if len(words) < _HEADER or words[0] != _MAGIC or words[1] & _LOW != _VERSION:
        return 0, set()
    inodes, others = words[_HEADER::2].tolist(), words[_HEADER + 1 :: 2].tolist()
    return words[1] >> 32, {
        (number, inode, other) for number, (inode, other) in enumerate(zip(inodes, others, strict=True)) if inode
    }


class _Table:
    """The sockets of this process and their bounds, and the memfd that shows them."""

    def __init__(self) -> None:
        self.bounds: dict[int, float | None] = {}
        self._changed: deque[int] = deque()  # inodes whose records do not say yet what `bounds` says
        self._lock = threading.RLock()  # of all below
        self._busy = False  # a call that has the lock is at it
        self._memory: mmap.mmap | None = None
        self._words: memoryview | None = None
        self._places: dict[int, int] = {}  # inode -> the first word of its record
        self._free: list[int] = []
        self._number = 0  # of the latest state of a record
        self._retry = -math.inf  # when another memfd may be tried

    def put(self, inode: int, bound: float | None) -> None:
        self.bounds[inode] = bound
        self._changed.append(inode)
        self._follow()

    def remove(self, inode: int) -> None:
        try:
            del self.bounds[inode]  # not pop(): after a call there may be an interrupt, and nobody would know
        except KeyError:
            return
        self._changed.append(inode)
        self._follow()

    def _follow(self) -> None:
        """Bring the records up to date."""
        with self._lock:
            while self._changed and not self._busy:
                self._busy = True
                try:
                    self._write_changes()
                except (OSError, ValueError):  # no descriptor, no memory
                    self._retry = time.monotonic() + _PATIENCE
                    self.close()
                except BaseException:
                    self.close()
                    raise
                finally:
                    self._busy = False

    def _write_changes(self) -> None:
        if self._words is None:
            if not self.bounds or time.monotonic() < self._retry:
                self._changed.clear()  # all are written when there is a memfd
                return
            self._open()
            self._changed.extend(self.bounds.copy())
        changed, bounds = self._changed, self.bounds
        while changed:
            inode = changed.popleft()
            bound = bounds.get(inode, _NONE)
            if bound == _NONE:
                self._erase(inode)
            else:
                self._write(inode, bound)
        if not self.bounds:
            self.close()

    def _write(self, inode: int, bound: float | None) -> None:
        place = self._places.get(inode)
        if place is None:
            if not self._free:
                self._grow()
            place = self._places[inode] = self._free.pop()
        words = self._words
        assert words is not None
        self._number = number = (self._number + 1) & _LOW
        words[place + 1] = (_milliseconds(bound) if bound else 0) | number << 32
        words[place] = inode

    def _erase(self, inode: int) -> None:
        place = self._places.pop(inode, None)
        if place is not None:
            assert self._words is not None
            self._words[place] = 0
            self._free.append(place)

    # -- the memfd

    def _open(self) -> None:
        fd = _memfd()
        try:
            os.ftruncate(fd, _SMALLEST)
            _forbid_shrinking(fd)
            self._memory = mmap.mmap(fd, _SMALLEST)  # which keeps a descriptor of its own
        finally:
            os.close(fd)
        self._words = memoryview(self._memory).cast("Q")
        self._add_places(_HEADER)
        self._words[1] = _VERSION | os.getpid() << 32
        self._words[0] = _MAGIC

    def _grow(self) -> None:
        assert self._memory is not None
        assert self._words is not None
        before = len(self._words)
        self._words.release()
        self._memory.resize(len(self._memory) * 2)
        self._words = memoryview(self._memory).cast("Q")
        self._add_places(before)

    def _add_places(self, first: int) -> None:
        assert self._words is not None
        self._free += range(len(self._words) - 2, first - 1, -2)  # the lowest is taken first

    def close(self) -> None:
        """Close the memfd. The table goes on without, and makes another when it may."""
        words, memory, self._words, self._memory = self._words, self._memory, None, None
        self._places.clear()
        self._free.clear()
        if words is not None:
            words.release()
        if memory is not None:
            memory.close()


def _milliseconds(bound: float) -> int:
    """Rounded up, as what the kernel gets is; 0: none."""
    return 0 if bound == math.inf else min(math.ceil(bound * 1000), _LOW)


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
