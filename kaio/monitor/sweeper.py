"""The periodic sweep of `kaio run`: the policy, and a bound on data in flight, for sockets that no monitor watches.

Rules kept here: a socket that a monitor of this process watches (`owners`) is not touched; one that the sweep has set
before is restored for the monitor. A socket with the policy's times and no user timeout may be a new one of a loop,
which the monitor registers later: it is not touched for that time. There is no thread during a fork, nor when Python
counts the threads after it.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import os
import time
from typing import Any, Final

from ..errors import KaioError
from ..kernel.descriptors import Descriptor, descriptors
from ..kernel.options import platform
from ..liveness.limits import limits_of_state
from ..liveness.standing import Standing, adopt, standing
from ..policy import Keepalive, SocketState
from . import owners
from .deadline import Deadline
from .survey import is_open

__all__ = ["GRACE", "Sweeper"]

GRACE: Final = 6.0
"""Seconds within which a monitor registers a connection: kaio's own after one, another library's after five."""

_THREAD_END: Final = 1.0  # seconds, at most, that a fork waits for the sweep's thread to have left the kernel's count


class Sweeper:
    """Gives the policy, every few seconds, to sockets that no loop of this process handles.

    With stalled="keep" no monitor enforces the user timeout for them: the kernel does, and a peer whose window is zero
    and that answers window probes is kept by taking the user timeout off meanwhile.
    """

    def __init__(self, policy: Keepalive, interval: float) -> None:
        self._policy = policy
        self._bound = policy.effective_user_timeout if policy.stalled == "keep" else None
        # A window that shuts is seen before its peer would be given up for it.
        self._interval = interval if self._bound is None else min(interval, self._bound / 4)
        # Of sockets, by inode:
        self._settled: set[int] = set()  # none of the sweep's business
        self._newcomers: dict[int, float] = {}  # a loop's, perhaps, and when they were first seen
        self._handed_over: set[int] = set()  # a monitor's
        self._minded: dict[int, Deadline] = {}  # those covered here
        self._ports: set[int] = set()  # of listening sockets among them: what is accepted there has the same
        self._parents: set[int] = set()  # what a forked process leaves to its parent
        self._asked: list[None] = []  # one element when a pending call is to start the thread
        self._make_locks()

    def _make_locks(self) -> None:
        self._stop = _thread.allocate_lock()  # held while it runs
        self._stopped = _thread.allocate_lock()  # held by the thread
        self._forking = _thread.allocate_lock()  # held while a fork goes on: threads may fork at the same time
        self._running = False
        self._task = ""  # the thread's folder in /proc
        self._main = _thread.get_ident()  # the thread that pending calls run in

    def start(self) -> None:
        """Start sweeping, in this process and in those that it forks.

        Call it in the main thread.
        """
        self._run_thread()
        # Forking with a second thread is deprecated since Python 3.12, which reads the number of threads from
        # /proc/self/stat when the fork is made: some versions before the after_in_parent functions, some after them
        # (Modules/posixmodule.c, warn_about_fork_with_threads; 3.13.0 is one of the latter). The thread must come
        # later, and a pending call does: the interpreter makes it when os.fork has returned. Of after_in_parent
        # functions only C code may ask for it: within one of Python's, the interpreter would make the call at once.
        # So reduce() is the function, and calls Py_AddPendingCall(resume, None) for each None of the list.
        resume = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._resume)
        ask: Any = functools.partial(functools.reduce, ctypes.pythonapi.Py_AddPendingCall, self._asked, resume)
        os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._in_child)
        os.register_at_fork(after_in_parent=ask)

    def _run_thread(self) -> None:
        self._stop.acquire()
        self._stopped.acquire()
        try:
            # Not a threading.Thread: the program counts those.
            _thread.start_new_thread(self._run, ())
            self._running = True
        except BaseException:
            self._stop.release()
            self._stopped.release()
            raise

    def _run(self) -> None:
        self._task = f"/proc/self/task/{_thread.get_native_id()}"
        while not self._stop.acquire(timeout=self._interval):
            with contextlib.suppress(OSError):  # out of descriptors: the next one may find some
                self.sweep()
        self._stop.release()
        self._stopped.release()

    def _before_fork(self) -> None:
        self._forking.acquire()
        if self._running:
            self._end_thread()
        self._parents = {*owners.owned(), *self._newcomers}

    def _end_thread(self) -> None:
        """End the thread, and wait until it has left the kernel's count, a moment after its last statement."""
        self._running = False
        self._stop.release()
        with self._stopped:
            pass
        until = time.monotonic() + _THREAD_END
        while os.path.exists(self._task) and time.monotonic() < until:
            time.sleep(0.00005)

    def _after_fork(self) -> None:
        """Start the thread again: later, if this is the main thread; Python warns of forks in other threads anyway."""
        try:
            self._asked[:] = [None] if _thread.get_ident() == self._main else []
            if not self._asked:
                self._run_thread()
        finally:
            self._forking.release()

    def _resume(self, _: object) -> int:
        """Start the thread after a fork in the main thread, unless another fork is in progress, whose end does it."""
        if self._forking.acquire(blocking=False):
            try:
                if not self._running:
                    self._run_thread()
            finally:
                self._forking.release()
        return 0

    def _in_child(self) -> None:
        self._settled |= self._parents
        self._make_locks()
        self._run_thread()

    def sweep(self) -> None:
        """Check every TCP socket of this process once."""
        there: set[int] = set()
        bounds: dict[int, float | None] = {}  # of those that are owned, asked for when one is new
        for found in descriptors():
            there.add(found.inode)
            with contextlib.suppress(OSError, KaioError):  # closed meanwhile
                if owners.is_owned(found.inode):
                    if found.inode not in self._handed_over:
                        bounds = bounds or owners.owned()
                        self._hand_over(found, bounds)
                elif found.inode not in self._settled:
                    self._look(found)
        self._settled &= there
        self._handed_over = set(filter(owners.is_owned, self._handed_over))
        self._newcomers = {inode: since for inode, since in self._newcomers.items() if inode in there}
        self._minded = {inode: deadline for inode, deadline in self._minded.items() if inode in there}

    def _hand_over(self, found: Descriptor, bounds: dict[int, float | None]) -> None:
        """Restore a socket for the monitor, which bounds data in flight itself, or leaves it to the kernel (None)."""
        inode = found.inode
        if inode not in bounds:  # since a moment ago: next time
            return
        self._handed_over.add(inode)
        self._settled.discard(inode)
        self._newcomers.pop(inode, None)
        minded = self._minded.pop(inode, None)
        given = self._bound if minded is None else minded.user_timeout
        if self._bound is None or (minded is None and not self._ports):
            return
        stands = platform.read(found).user_timeout
        if bounds[inode] is None:
            if given is None and stands is None:
                platform.set_user_timeout(found, self._bound)
        elif stands == self._bound and (minded is not None or found.getsockname()[1] in self._ports):
            platform.set_user_timeout(found, None)

    def _look(self, found: Descriptor) -> None:
        if found.inode in self._minded:
            self._mind(found)
            return
        if not is_open(found):
            return
        whose, state = standing(found, self._policy)
        if self._is_chosen(found, whose, state):
            self._settled.add(found.inode)
            return
        if whose is Standing.POLICY and state.user_timeout != self._bound and self._is_new(found):
            return
        adopt(found, self._policy)
        if self._bound is None:
            self._settled.add(found.inode)
            return
        if found.is_listening:
            self._ports.add(found.getsockname()[1])
        self._newcomers.pop(found.inode, None)
        self._mind(found)

    def _is_chosen(self, found: Descriptor, whose: Standing, state: SocketState) -> bool:
        """Return whether the application has set the options, or a loop has for a listening socket."""
        if whose is not Standing.POLICY:
            return whose is Standing.OWN
        if state.user_timeout is None:
            return self._bound is not None and found.is_listening
        return state.user_timeout != self._bound

    def _is_new(self, found: Descriptor) -> bool:
        """Return whether a monitor may still register it."""
        now = time.monotonic()
        return now - self._newcomers.setdefault(found.inode, now) < GRACE

    def _mind(self, found: Descriptor) -> None:
        now, deadline = time.monotonic(), self._minded.get(found.inode)
        if deadline is None:
            state = platform.read(found)
            limits = limits_of_state(self._policy, state)
            if limits is None:  # keepalive is off again
                return
            deadline = self._minded[found.inode] = Deadline(limits, state.user_timeout, now)
        deadline.look(found, now)
