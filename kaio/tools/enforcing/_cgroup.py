"""A cgroup below this process's own, in which the kernel enforces a policy: that of a program which it starts.

Rules kept here: the programs are attached without a link, so that they stay as long as the cgroup does: what the
program leaves behind keeps its policy when this process has ended. An empty cgroup that an earlier command has left is
removed by the next one.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Final

from ...policy import Keepalive
from .. import cgroups
from ._enforcement import EnforceError, enforce_for_good

__all__ = ["EnforcedCgroup"]

_PREFIX: Final = "kaio-exec-"
_MOST_NAMES: Final = 100
_PATIENCE: Final = 0.2  # seconds until the kernel has let go of the last process


class EnforcedCgroup:
    """A new cgroup, in which the kernel enforces a policy. Raises `EnforceError` if that is not permitted."""

    def __init__(self, policy: Keepalive) -> None:
        try:
            own = cgroups.of_process()
            _remove_empty(own)
            path, self._lock = _made(os.path.join(own, f"{_PREFIX}{os.getpid()}"))
            self.path: Final = path
        except OSError as exc:
            where = f"{exc.filename}: " if exc.filename else ""
            raise EnforceError(exc.errno, f"{where}{exc.strerror}") from None
        try:
            enforce_for_good(self.path, policy)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove it if no process is left in it; else the next command does it when that has ended."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                os.rmdir(self.path)
                return
            except OSError:
                if time.monotonic() > deadline or _has_processes(self.path):
                    return
                time.sleep(0.005)


def _made(wanted: str) -> tuple[str, int]:
    """Make a cgroup and lock it, again if another command has removed it in between; return its path and the lock.

    A process may be left in the one of an earlier command that had this process's number; then the name is another.
    """
    number = 1
    while True:
        path = wanted if number == 1 else f"{wanted}-{number}"
        number += 1
        try:
            os.mkdir(path)
        except FileExistsError:
            if number > _MOST_NAMES:
                raise
            continue
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            return path, _locked(path)
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _locked(path: str) -> int:
    """Lock a cgroup's directory: as long as its command runs, no other one removes it before it is used."""
    import fcntl  # noqa: PLC0415 - not on Windows

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_empty(own: str) -> None:
    with contextlib.suppress(OSError):
        for name in os.listdir(own):
            if name.startswith(_PREFIX):
                path = os.path.join(own, name)
                with contextlib.suppress(OSError):  # its command runs, or a process is left in it
                    lock = _locked(path)
                    try:
                        os.rmdir(path)
                    finally:
                        os.close(lock)


def _has_processes(path: str) -> bool:
    try:
        return bool(cgroups.processes(path))
    except OSError:
        return False
