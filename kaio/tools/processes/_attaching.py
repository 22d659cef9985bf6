"""Setting a policy on the sockets of running processes, once or repeatedly.

Rules kept here: a process that cannot be inspected is an error or is listed in `refused`; a process is followed until
it exits, even if its parent exits first. `_setting` sets the options of each socket. A program's own environment is
heeded: KEEPALIVE=off opts out.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from ...errors import PolicyError
from ...policy import Keepalive, KeepaliveArg, as_policy
from ..kernel_policy import in_kernel
from ._access import Process, ProcessError, wait_for_end
from ._environment import choice, image
from ._naming import descendants
from ._records import Records
from ._setting import Change, Memory, Outcome, Setter
from ._sockets import ProcessSocket, read
from ._system import Systems

logger: Final = logging.getLogger("kaio")

__all__ = ["Attachment", "attach"]


def attach(
    pid: int | Iterable[int],
    keepalive: KeepaliveArg = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    children: bool = False,
) -> list[Change]:
    """Set a policy on the TCP sockets of running processes, and return the change to each.

    Listening sockets get the policy too, and the connections they accept later inherit it, but for the user timeout,
    unless connections that are accepted already show that the program sets no times on them: with times of the
    program's own, kaio's user timeout could let one lost probe end the connection. Sockets on which the program itself
    has set times are left alone, unless `force`; so are listening sockets on whose accepted connections it sets times.
    SO_KEEPALIVE alone does not count as a choice, and what kaio has set before from outside is replaced. Connections in
    the accept queue keep their options: see `Attachment`.

    The variables of `Keepalive.from_env` in a program's own environment replace the policy for its sockets, and
    KEEPALIVE=off leaves them alone, unless `force`.

    The kernel enforces the policy's user timeout, even with stalled="keep", because no monitor runs in the process.
    With "keep", the sockets of peers that are stalled at the moment do not get it; a peer that stalls later is dropped
    after that time, alive or not, unless an `Attachment` looks repeatedly.

    `dry_run` returns the changes without making them; `children` includes the processes' descendants that can be
    inspected. Raises `PolicyError` before anything was changed, and `ProcessError` if a process itself cannot be
    inspected.
    """
    pids = [pid] if isinstance(pid, int) else list(pid)
    with Attachment(pids, keepalive, force=force, dry_run=dry_run, children=children) as attachment:
        changes = attachment.look()
        for refused, error in attachment.refused.items():
            if refused in pids:
                raise error
            logger.warning("%s", error)
        return changes


class Attachment:
    """A policy for the sockets of processes, also for those they open later: each `look` sets the policy on new ones.

    A socket is set once; what the program changes on it afterwards is kept. With stalled="keep", `look` also removes
    the user timeout while a peer is stalled and answers window probes, and restores it when the peer stops answering.
    A listening socket gets the user timeout when a connection that it has accepted shows that the program sets no times
    of its own.

    `by_kernel` says that the kernel gives the policy to the processes' connections (`kaio.tools.enforcing`), or which
    other one it gave them: what has exactly its options is then no choice of the program's. Sockets for which
    `excepted` returns True are left alone.

    Raises `PolicyError`, and `ProcessError` if a process does not exist. Close it, or use it as a context manager;
    the sockets then keep their options, without the user timeout where it is removed at that moment.
    """

    def __init__(
        self,
        pid: int | Iterable[int],
        keepalive: KeepaliveArg = None,
        *,
        force: bool = False,
        dry_run: bool = False,
        children: bool = False,
        by_kernel: bool | Keepalive = False,
        excepted: Callable[[ProcessSocket], bool] | None = None,
    ) -> None:
        self.policy: Final = as_policy(keepalive)
        in_kernel(self.policy)  # raises PolicyError before anything is changed
        self.refused: Final[dict[int, ProcessError]] = {}
        """The processes that cannot be inspected, with the errors; `look` tries them again each time."""
        self.unreadable: Final[list[str]] = []
        """The sockets that could not be read at the last look, each with the reason."""
        self.misread: Final[dict[int, str]] = {}
        """The processes whose environment asks for an invalid policy, with what is wrong."""
        self._records = Records()
        self._memory = Memory()
        self._force = force
        self._dry_run = dry_run
        self._children = children
        self._by_kernel = self.policy if by_kernel is True else by_kernel or None
        self._excepted = excepted
        self._setters: dict[Keepalive, Setter] = {}
        self._policies: dict[int, tuple[Keepalive, str]] = {}
        self._images: dict[int, object] = {}
        self._processes: dict[int, Process] = {}
        self._took = 0.0  # seconds that the last look took
        try:
            for each in [pid] if isinstance(pid, int) else pid:
                self.add(each)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Attachment of {self.policy} to processes {sorted(self._processes)}, {len(self._memory)} sockets>"

    def add(self, pid: int) -> None:
        """Follow another process, too. Raises `ProcessError` if it does not exist."""
        if pid not in self._processes or self._processes[pid].ended:
            self._drop(pid)
            self._processes[pid] = Process(pid)

    @property
    def alive(self) -> bool:
        """Whether any of the processes is still running."""
        return any(not process.ended for process in self._processes.values())

    def pace(self, every: float) -> float:
        """Seconds until the next look: `every`, or more if looking would otherwise take over a tenth of the time.

        With stalled="keep" at most a third of the user timeout, so that a stalled peer is noticed before it expires.
        """
        every = max(every, 9 * self._took)
        policies = {self.policy, *self._setters}  # some are from the environment of a program
        bounds = [policy.effective_user_timeout for policy in policies if policy.stalled == "keep"]
        return min(every, *(bound / 3 for bound in bounds if bound is not None), math.inf)

    def wait(self, seconds: float) -> None:
        """Wait that many seconds, or until a process exits."""
        wait_for_end(self._processes.values(), seconds)

    def look(self) -> list[Change]:
        """Set the policy on new sockets and check the others; return the changes, listening sockets first.

        Processes that cannot be inspected are added to `refused`. On a socket in whose network namespace the policy is
        invalid, because of the defaults there, it fails.
        """
        began = time.monotonic()
        self._forget_exited()
        if self._children:
            self._add_children()
        changes: list[Change] = []
        seen: dict[int, int] = {}
        self.unreadable.clear()
        for process in list(self._processes.values()):
            with self._refusing(process):
                changes += self._look_at(process, seen)
                self.unreadable.extend(process.unreadable)
                self.refused.pop(process.pid, None)
        if not self.refused:  # otherwise their sockets would count as new the next time
            self._memory.forget_others(seen)
            if not self.unreadable and not self._dry_run:
                self._records.keep(set(seen.values()), self._processes.keys())
        with contextlib.suppress(OSError):  # then the next command takes kaio's times for the program's
            self._records.save()
        self._took = time.monotonic() - began
        return changes

    def undo(self) -> list[Change]:
        """Give the sockets back the options they had before kaio set any from outside, in this or earlier commands.

        Sockets whose options were changed since are left alone.
        """
        changes: list[Change] = []
        self._forget_exited()
        if self._children:
            self._add_children()
        self.unreadable.clear()
        for process in self._processes.values():
            with self._refusing(process):
                changes += self._setter(self.policy).undo(process)
                self.unreadable.extend(process.unreadable)
                self.refused.pop(process.pid, None)
        with contextlib.suppress(OSError):
            self._records.save()
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

    @contextlib.contextmanager
    def _refusing(self, process: Process) -> Iterator[None]:
        """Add a process to `refused` if it cannot be inspected, such as for want of descriptors."""
        try:
            yield
        except OSError as exc:
            if exc.errno != errno.ESRCH and not process.ended:  # a process loses its files first, then it has ended
                self.refused[process.pid] = _as_process_error(process.pid, exc)

    def _look_at(self, process: Process, seen: dict[int, int]) -> list[Change]:
        executed = image(process.pid)
        if process.pid not in self._policies or self._images[process.pid] != executed:
            self.misread.pop(process.pid, None)
            self._images[process.pid] = executed
            self._policies[process.pid] = self._choose(process.pid)
        policy, why = self._policies[process.pid]
        if policy.enabled or not why:
            changes = self._setter(policy).look_at(process, seen)
            return [change.because(why) for change in changes] if why else changes
        if self._by_kernel is not None:
            undone = self._setter(self.policy).undo(process)
            return [change.because(why) for change in undone if change.outcome is Outcome.UNDONE]
        found = read(process, Systems())
        fresh = [one for one in found if self._memory.add_unwanted(one.inode)]
        seen.update((one.inode, one.cookie) for one in found)
        return [Change(socket=one, outcome=Outcome.KEPT, after=one.state, why=why) for one in fresh]

    def _choose(self, pid: int) -> tuple[Keepalive, str]:
        """The policy for a process, and why it is not this attachment's; "" if it is."""
        found = None if self._force else choice(pid)
        if found is None:
            return self.policy, ""
        if found.policy is None:
            self.misread[pid] = f"process {pid}: {found.why}; {self.policy} is used"
            return self.policy, ""
        try:
            in_kernel(found.policy)
        except PolicyError as exc:
            self.misread[pid] = f"process {pid}: {found.why}: {exc.limit}; {self.policy} is used"
            return self.policy, ""
        return found.policy, found.why

    def _setter(self, policy: Keepalive) -> Setter:
        if policy not in self._setters:
            self._setters[policy] = Setter(
                policy,
                self._memory,
                self._records,
                force=self._force,
                dry_run=self._dry_run,
                by_kernel=self._by_kernel,
                excepted=self._excepted,
            )
        return self._setters[policy]

    def _forget_exited(self) -> None:
        """Close the pidfds of processes that have exited, before their pids are used again."""
        for pid in [pid for pid, process in self._processes.items() if process.ended]:
            self._drop(pid)

    def _drop(self, pid: int) -> None:
        process = self._processes.pop(pid, None)
        if process is not None:
            process.close()
        self.refused.pop(pid, None)
        self._policies.pop(pid, None)
        self._images.pop(pid, None)
        self.misread.pop(pid, None)

    def _add_children(self) -> None:
        """Add the descendants of the known processes; they are followed even after their parents exit."""
        for pid in self.refused.keys() - self._processes.keys():  # they are tried again, if they still are descendants
            del self.refused[pid]
        for pid in descendants(self._processes):
            if pid not in self._processes and pid != os.getpid():
                try:
                    self._processes[pid] = Process(pid)
                except ProcessError as exc:
                    if exc.errno != errno.ESRCH:  # it has exited
                        self.refused[pid] = exc


def _as_process_error(pid: int, error: OSError) -> ProcessError:
    if isinstance(error, ProcessError):
        return error
    return ProcessError(pid, error.errno or errno.EIO, error.strerror or str(error))
