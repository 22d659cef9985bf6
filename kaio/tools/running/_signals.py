"""Passing signals on to a program, each exactly once.

The program is in this process's process group, as it would be without it, so that pipelines and job control work. A
signal that is sent to the group reaches both by itself: those of the terminal, which the kernel marks as its own, and
those of kill(2) with the group's number, which look like signals to this process alone. A *witness* tells them apart: a
child in the same group that blocks all signals and receives what the group receives, which then is pending.

Rules kept here: all signals are blocked, and taken one by one; none of them interrupts anything.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from typing import Final

from ._start import Inherited

__all__ = ["Signals"]

_OWN: Final = frozenset({signal.SIGCHLD, signal.SIGTTIN, signal.SIGTTOU})
"""Not passed on: they tell of a child, or stop a process that uses its terminal in the background."""
_FROM_KERNEL: Final = 0x80  # SI_KERNEL
_MOST_DESCRIPTORS: Final = 1 << 16
_PATIENCE: Final = 2000  # milliseconds until the witness must have answered


class Signals:
    """The signals of this process from now on. Make it once; there is no way back."""

    def __init__(self) -> None:
        # A process that ignores SIGCHLD is not told of its children's ends, and its caller may have ignored it.
        ignores = signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        blocked = signal.valid_signals() - {signal.SIGTTIN, signal.SIGTTOU}
        self.inherited: Final = Inherited(signal.pthread_sigmask(signal.SIG_BLOCK, blocked), ignores)
        self._taken: Final = blocked - {signal.SIGKILL, signal.SIGSTOP}
        self._witness: _Witness | None = None

    def watch(self) -> None:
        """Tell signals to the group apart from now on. Call it when the program has been started."""
        self._witness = _Witness()

    def so_far(self) -> list[int]:
        """Take the signals that came before the program was started, to be passed on to it."""
        found = []
        while (received := signal.sigtimedwait(self._taken, 0)) is not None:
            found.append(int(received.si_signo))
        return found

    @property
    def witness(self) -> int | None:
        """The number of the child that is no process of the program's."""
        return None if self._witness is None else self._witness.pid

    def take(self, seconds: float, program: int) -> int | None:
        """Wait for a signal, or for a child's end; return the signal if it is to be passed on.

        Those are not that the program has received by itself, or sent.
        """
        received = signal.sigtimedwait(self._taken, seconds)
        if received is None or received.si_signo in _OWN:
            return None
        number = int(received.si_signo)
        if received.si_code == _FROM_KERNEL or self._reached_group(number, program):
            self._stop_as_the_terminal_says(number)
            return None
        by_process = received.si_code <= 0  # SI_USER, SI_QUEUE, SI_TKILL
        return None if by_process and received.si_pid == program else number

    def send(self, number: int, pids: list[int]) -> None:
        """Send a signal to processes, and stop as they do if it is the one of ^Z."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or has become another user
                os.kill(pid, number)
        self._stop_as_the_terminal_says(number)

    def close(self) -> None:
        """End the witness. Signals to the group are passed on from then on, so that the program has them twice."""
        if self._witness is not None:
            self._witness.end()
            self._witness = None

    def _reached_group(self, number: int, program: int) -> bool:
        """Whether the whole process group was sent this signal, and the program with it."""
        if self._witness is None or not self._witness.has(number):
            return False
        if not self._witness.take(number):
            self.close()
        try:
            return os.getpgid(program) == os.getpgrp()
        except ProcessLookupError:
            return True

    @staticmethod
    def _stop_as_the_terminal_says(number: int) -> None:
        """Stop this process too, so that the shell sees its job stopped; SIGCONT lets both go on."""
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)


class _Witness:
    """A child in this process's group to which signals of the group become pending. It ends with this process."""

    def __init__(self) -> None:
        theirs, self._writer = os.pipe()
        self._reader, answers = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid: Final = os.fork()
        if self.pid == 0:
            try:
                _testify(theirs, answers)
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(answers)

    def has(self, number: int) -> bool:
        """Whether a signal is pending for it."""
        try:
            with open(f"/proc/{self.pid}/status", encoding="ascii", errors="replace") as file:
                masks = [line.split()[1] for line in file if line.startswith(("ShdPnd", "SigPnd"))]
        except OSError:
            return False
        return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)

    def take(self, number: int) -> bool:
        """Have it take a pending signal. Returns whether it did: somebody may have killed or stopped it."""
        try:
            os.write(self._writer, bytes([number]))
        except OSError:
            return False
        answer = select.poll()
        answer.register(self._reader, select.POLLIN)
        return bool(answer.poll(_PATIENCE) and os.read(self._reader, 1))

    def end(self) -> None:
        """End it."""
        os.close(self._writer)
        os.close(self._reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _testify(questions: int, answers: int) -> None:
    """In the witness: take the signals that are asked for, until nobody is left to ask."""
    # It keeps no descriptor of others open: a pipe's reader would wait for it.
    os.dup2(questions, 0)
    os.dup2(answers, 1)
    most = os.sysconf("SC_OPEN_MAX")
    os.closerange(2, most if 0 < most < _MOST_DESCRIPTORS else _MOST_DESCRIPTORS)
    while question := os.read(0, 1):
        signal.sigtimedwait({question[0]}, 0)
        os.write(1, b".")
