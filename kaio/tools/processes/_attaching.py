"""Setting a policy on the sockets of running processes, once or repeatedly.

Rules kept here: a process that cannot be inspected is an error or is listed in `refused`; a process is followed until
it exits, even if its parent exits first. `_setting` sets the options of each socket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import Final

from ...policy import KeepaliveArg, as_policy
from ..procfs import all_pids
from ._access import Process, ProcessError, wait_for_end
from ._setting import Change, Setter

logger: Final = logging.getLogger("kaio")

__all__ = ["Attachment", "attach"]


def attach(
    pid: int, keepalive: KeepaliveArg = None, *, force: bool = False, dry_run: bool = False, children: bool = False
) -> list[Change]:
    """Set a policy on the TCP sockets of a running process, and return the change to each.

    Listening sockets get the policy too, and the connections they accept later inherit it. Sockets on which the program
    itself has set times are left alone, unless `force`; so are listening sockets on whose accepted connections it sets
    times. SO_KEEPALIVE alone does not count as a choice. Connections in the accept queue keep their options: see
    `Attachment`.

    The kernel enforces the policy's user timeout, even with stalled="keep", because no monitor runs in the process.
    With "keep", the sockets of peers that are stalled at the moment do not get it; a peer that stalls later is dropped
    after that time, alive or not, unless an `Attachment` looks repeatedly.

    `dry_run` returns the changes without making them; `children` includes the process's descendants that can be
    inspected. Raises `PolicyError` before anything was changed, and `ProcessError` if the process itself cannot be
    inspected.
    """
    with Attachment(pid, keepalive, force=force, dry_run=dry_run, children=children) as attachment:
        changes = attachment.look()
        for refused, error in attachment.refused.items():
            if refused == pid:
                raise error
            logger.warning("%s", error)
        return changes


class Attachment:
    """A policy for a process's sockets, also for those it opens later: each `look` sets the policy on new ones.

    A socket is set once; what the program changes on it afterwards is kept. With stalled="keep", `look` also removes
    the user timeout while a peer is stalled and answers window probes, and restores it when the peer stops answering.

    Raises `PolicyError`, and `ProcessError` if the process does not exist. Close it, or use it as a context manager;
    the sockets then keep their options, without the user timeout where it is removed at that moment.
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
        """The processes that cannot be inspected, with the errors; `look` tries them again each time."""
        self._setter = Setter(self.policy, force=force, dry_run=dry_run)
        self._children = children
        self._processes = {pid: Process(pid)}
        self._took = 0.0  # seconds that the last look took

    def __repr__(self) -> str:
        return f"<Attachment of {self.policy} to processes {sorted(self._processes)}, {len(self._setter)} sockets>"

    @property
    def alive(self) -> bool:
        """Whether any of the processes is still running."""
        return any(not process.ended for process in self._processes.values())

    def pace(self, every: float) -> float:
        """Seconds until the next look: `every`, or more if looking would otherwise take over a tenth of the time.

        With stalled="keep" at most a third of the user timeout, so that a stalled peer is noticed before it expires.
        """
        every = max(every, 9 * self._took)
        bound = self.policy.effective_user_timeout
        return every if bound is None or self.policy.stalled == "drop" else min(every, bound / 3)

    def wait(self, seconds: float) -> None:
        """Wait that many seconds, or until a process exits."""
        wait_for_end(self._processes.values(), seconds)

    def look(self) -> list[Change]:
        """Set the policy on new sockets and check the others; return the changes, listening sockets first.

        Processes that cannot be inspected are added to `refused`. Raises `PolicyError` if the policy is invalid with
        the defaults of a socket's network namespace.
        """
        began = time.monotonic()
        self._forget_exited()
        if self._children:
            self._add_children()
        changes: list[Change] = []
        seen: set[int] = set()
        for process in self._processes.values():
            try:
                changes += self._setter.look_at(process, seen)
                self.refused.pop(process.pid, None)
            except ProcessError as exc:
                if not process.ended:
                    self.refused[process.pid] = exc
        if not self.refused:  # otherwise their sockets would count as new the next time
            self._setter.forget_others(seen)
        self._took = time.monotonic() - began
        return changes

    def close(self) -> None:
        """Close the pidfds. Does nothing if it is closed."""
        while self._processes:
            self._processes.popitem()[1].close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- processes

    def _forget_exited(self) -> None:
        """Close the pidfds of processes that have exited, before their pids are used again."""
        for pid in [pid for pid, process in self._processes.items() if process.ended]:
            self._processes.pop(pid).close()
            self.refused.pop(pid, None)

    def _add_children(self) -> None:
        """Add the descendants of the known processes; they are followed even after their parents exit."""
        parents = _parents()
        parents.pop(os.getpid(), None)
        while True:
            fresh = [pid for pid, parent in parents.items() if parent in self._processes]
            if not fresh:
                return
            for pid in fresh:
                del parents[pid]
                if pid not in self._processes:
                    with contextlib.suppress(ProcessError):  # it has exited
                        self._processes[pid] = Process(pid)


def _parents() -> dict[int, int]:
    """Map every process to its parent."""
    parents: dict[int, int] = {}
    for pid in all_pids():
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                # The command's name, in parentheses, may contain parentheses and spaces itself (proc(5)).
                parents[pid] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return parents
