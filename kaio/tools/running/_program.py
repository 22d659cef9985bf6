"""The program, and the processes that it leaves behind.

States: it runs; it has ended and processes of its that it left behind run; all have ended. This process reaps them all,
since it is the parent of those whose parents have ended (PR_SET_CHILD_SUBREAPER, prctl(2)).

Rules kept here: a child's end is never missed, and the program's exit code is kept whatever happens to the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from typing import Final

from ...kernel.descriptors import libc
from ._signals import Signals
from ._start import start

__all__ = ["Program"]

_PR_SET_CHILD_SUBREAPER: Final = 36


class Program:
    """A program that was started, and its descendants."""

    def __init__(self, command: Sequence[str], signals: Signals, cgroup: str | None = None) -> None:
        libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._signals = signals
        early = signals.so_far()
        self.pid: Final = start(command, signals.inherited, cgroup)
        self.code: int | None = None
        """Its exit code, or minus the signal that ended it; None while it runs."""
        signals.watch()
        for number in early:
            if number != signal.SIGCHLD:
                signals.send(number, [self.pid])

    def wait(self, seconds: float) -> None:
        """Pass signals on for that long, or until a child ends."""
        deadline = time.monotonic() + seconds
        while True:
            number = self._signals.take(max(0.0, deadline - time.monotonic()), self.pid)
            if number is not None:
                self._signals.send(number, self._targets())
            if self._reap() or time.monotonic() >= deadline:
                return

    @property
    def left_behind(self) -> list[int]:
        """The children of this process, but the program itself: those whose parents have ended."""
        try:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
                children = list(map(int, file.read().split()))
        except OSError:  # a kernel without CONFIG_PROC_CHILDREN
            return []
        return [pid for pid in children if pid not in (self.pid, self._signals.witness)]

    def _targets(self) -> list[int]:
        """Who gets a signal: the program; when it has ended, those it left behind."""
        return [self.pid] if self.code is None else self.left_behind

    def _reap(self) -> bool:
        """Reap all children that have ended. Returns whether there are any, or no child is left."""
        reaped = False
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return True
            if found is None:
                return reaped
            if found.si_pid == self._signals.witness:  # somebody has killed it; it would be found again and again
                self._signals.close()
                continue
            reaped = True
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(found.si_pid, 0)
                if pid == self.pid:
                    self.code = os.waitstatus_to_exitcode(status)
