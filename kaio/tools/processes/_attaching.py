"""A policy for the sockets of a process that is running already, whatever it is written in.

Rules kept here: a process that may not be looked at is an error or is in `refused`, never silence; a process stays with
us until it ends, also when its parent ends before it. What is done to a socket is in `_setting`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import Final

from ...policy import KeepaliveArg, as_policy
from ._access import Process, ProcessError, wait_for_end
from ._setting import Change, Setter

logger: Final = logging.getLogger("kaio")

__all__ = ["Attachment", "attach"]


def attach(
    pid: int, keepalive: KeepaliveArg = None, *, force: bool = False, dry_run: bool = False, children: bool = False
) -> list[Change]:
    """Give the TCP sockets of a running process a policy, and say what became of each.

    Its listeners get it too, and with them all that they accept later. A socket on which the program itself has set
    times stays as it is, unless `force`; so does a listener whose connections the program gives times of their own.
    SO_KEEPALIVE alone gets the policy. Connections that wait to be accepted keep what they have: see `Attachment`.

    The policy's user timeout is enforced by the kernel, also with stalled="keep": nobody else is there to bound data in
    flight. With "keep" a peer that is stalled now does not get it; one that stalls later and takes nothing for that
    long is dropped, alive or not, unless an `Attachment` goes on looking.

    `dry_run` changes nothing, and says what would be done; `children` takes the processes below it, too, as far as they
    may be looked at. Raises `PolicyError` before anything was changed, and `ProcessError` where the process itself may
    not be looked at.
    """
    with Attachment(pid, keepalive, force=force, dry_run=dry_run, children=children) as attachment:
        changes = attachment.look()
        for refused, error in attachment.refused.items():
            if refused == pid:
                raise error
            logger.warning("%s", error)
        return changes


class Attachment:
    """A policy that goes on being given to a process: every `look` is for the sockets that have come since the last.

    A socket is set once; what the program changes on it afterwards stands. With stalled="keep", looks also spare peers
    that are stalled and answer window probes, and end connections whose stalled peers do not.

    Raises `PolicyError`, and `ProcessError` where there is no such process. Close it, or use it as a context manager:
    the sockets keep what they have then, a peer that is spared stays so.
    """

    def __init__(
        self,
        pid: int,
        keepalive: KeepaliveArg = None,
        *,
        force: bool = False,
        dry_run: bool = False,
        children: bool = False,
    ) -> None:
        self.policy: Final = as_policy(keepalive)
        self.refused: Final[dict[int, ProcessError]] = {}
        """The processes that may not be looked at, and why; they are tried again at each look."""
        self._setter = Setter(self.policy, force=force, dry_run=dry_run)
        self._children = children
        self._processes = {pid: Process(pid)}
        self._took = 0.0  # seconds, for the last look

    def __repr__(self) -> str:
        return f"<Attachment of {self.policy} to processes {sorted(self._processes)}, {len(self._setter)} sockets>"

    @property
    def alive(self) -> bool:
        """Whether any of the processes still runs."""
        return any(not process.ended for process in self._processes.values())

    def pace(self, every: float) -> float:
        """Seconds until the next look: `every`, and more where looking would take over a tenth of the time.

        But so often that a stalled peer is spared before the user timeout: three times in it.
        """
        every = max(every, 9 * self._took)
        bound = self.policy.effective_user_timeout
        return every if bound is None or self.policy.stalled == "drop" else min(every, bound / 3)

    def wait(self, seconds: float) -> None:
        """Until the next look; ends early when a process does."""
        wait_for_end(self._processes.values(), seconds)

    def look(self) -> list[Change]:
        """Give the policy to the sockets that are new, and look after the others; what was done, listeners first.

        Processes that may not be looked at are in `refused`. Raises `PolicyError` where the system's values in a
        socket's network namespace do not go with the policy.
        """
        began = time.monotonic()
        self._bury()
        if self._children:
            self._adopt()
        changes: list[Change] = []
        seen: set[int] = set()
        for process in self._processes.values():
            try:
                changes += self._setter.look_at(process, seen)
                self.refused.pop(process.pid, None)
            except ProcessError as exc:
                if not process.ended:
                    self.refused[process.pid] = exc
        if not self.refused:  # a socket of theirs would be taken for a new one
            self._setter.forget_others(seen)
        self._took = time.monotonic() - began
        return changes

    def close(self) -> None:
        """Let go of the processes. Harmless when it is closed."""
        while self._processes:
            self._processes.popitem()[1].close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- processes

    def _bury(self) -> None:
        """Let go of processes that have ended, before their numbers are another's."""
        for pid in [pid for pid, process in self._processes.items() if process.ended]:
            self._processes.pop(pid).close()
            self.refused.pop(pid, None)

    def _adopt(self) -> None:
        """Take in the children of those that we have; they stay when their parents end."""
        parents = _parents()
        parents.pop(os.getpid(), None)
        while True:
            fresh = [pid for pid, parent in parents.items() if parent in self._processes]
            if not fresh:
                return
            for pid in fresh:
                del parents[pid]
                if pid not in self._processes:
                    with contextlib.suppress(ProcessError):  # it has ended
                        self._processes[pid] = Process(pid)


def _parents() -> dict[int, int]:
    """Every process's parent."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    # The command's name, in brackets, may have brackets and blanks of its own (proc(5)).
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return parents
