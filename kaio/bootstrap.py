"""What `kaio run` does inside the program that it runs: every loop covered, and a sweep now and then for the rest.

Rules kept here: the program starts as Python starts it, with nothing of kaio's between: no frame in its tracebacks, no
thread that a fork would warn of, nothing in its arguments. A child process begins by itself: settings are in the
environment.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import contextlib
import dataclasses
import json
import os
import signal
from typing import Any, Final

from ._sockopt import platform
from .covering import Standing, adopt, standing, tally
from .descriptors import Descriptor, descriptors
from .errors import KaioError
from .loops import EventLoopPolicy, best_base, cover_loops
from .policy import Keepalive
from .sweeping import is_open, survey
from .verdict import window_is_shut

__all__ = ["VARIABLE", "Settings", "Sweeper", "begin"]

VARIABLE: Final = "KAIO_RUN"
"""The environment variable that holds the settings, after the environment's prefix and a line feed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What `kaio run` was told."""

    keepalive: str
    loop: str | None = None
    """What `asyncio.run` makes: "uvloop", "asyncio"; None: what it would have made."""
    sweep: float | None = 5.0
    """Seconds between sweeps; None: none."""
    report: bool = False
    """Whether a report is printed at exit and on SIGUSR1."""

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def begin(told: str) -> None:
    """Cover this process, by what `kaio run` has put into the environment."""
    settings = Settings(**json.loads(told))
    policy = Keepalive.parse(settings.keepalive)
    if policy.enabled:
        if settings.loop is not None:
            _choose_loop(policy, settings.loop)
        cover_loops(policy)
        if settings.sweep is not None:
            Sweeper(policy, settings.sweep).start()
    if settings.report:
        signal.signal(signal.SIGUSR1, lambda *_: _print_report(policy))
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)  # Python would let it kill, from then on
        atexit.register(_print_report, policy)


def _choose_loop(policy: Keepalive, name: str) -> None:
    base: Any = asyncio.SelectorEventLoop if name == "asyncio" else best_base()
    asyncio.set_event_loop_policy(EventLoopPolicy(policy, base=base))


def _print_report(policy: Keepalive) -> None:
    """On the process's own standard error: it may be closed by now, and the program may be writing to Python's."""
    with contextlib.suppress(KaioError, OSError):
        counted = ", ".join(f"{number} {whose.value}" for whose, number in sorted(tally.items())) or "none"
        text = f"{survey(policy)}\nsockets judged since the start of process {os.getpid()}: {counted}\n"
        os.write(2, text.encode(errors="replace"))


class Sweeper:
    """Gives the policy, every few seconds, to sockets that no loop of this process has seen.

    With stalled="keep" no monitor enforces the user timeout for them: the kernel does it, and a peer whose window is
    shut and that answers window probes is spared by taking the user timeout off while it is seen so.
    """

    def __init__(self, policy: Keepalive, interval: float) -> None:
        self._policy = policy
        self._bound = policy.effective_user_timeout if policy.stalled == "keep" else None
        # A window that shuts is seen before its peer would be given up for it.
        self._interval = interval if self._bound is None else min(interval, self._bound / 4)
        self._settled: set[int] = set()  # inodes of sockets that are somebody else's affair
        self._minded: dict[int, float | None] = {}  # inodes of those covered here, and their user timeout
        self._make_locks()

    def _make_locks(self) -> None:
        self._stop = _thread.allocate_lock()  # held while it runs
        self._stopped = _thread.allocate_lock()  # held by the thread
        self._forking = _thread.allocate_lock()  # held while a fork goes on: threads may fork at the same time

    def start(self) -> None:
        """Sweep from now on, in this process and in those that are forked off it."""
        self._run_thread()
        # Forking with a second thread is deprecated since Python 3.12: there is none while a fork goes on.
        os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._in_child)

    def _run_thread(self) -> None:
        self._stop.acquire()
        self._stopped.acquire()
        # Not a threading.Thread: the program counts those.
        _thread.start_new_thread(self._run, ())

    def _run(self) -> None:
        while not self._stop.acquire(timeout=self._interval):
            with contextlib.suppress(OSError):  # out of descriptors: the next one may find some
                self.sweep()
        self._stop.release()
        self._stopped.release()

    def _before_fork(self) -> None:
        self._forking.acquire()
        self._stop.release()
        with self._stopped:
            pass

    def _after_fork(self) -> None:
        try:
            self._run_thread()
        finally:
            self._forking.release()

    def _in_child(self) -> None:
        self._make_locks()
        self._run_thread()

    def sweep(self) -> None:
        """Look at every TCP socket of this process once."""
        there: set[int] = set()
        for found in descriptors():
            there.add(found.inode)
            if found.inode not in self._settled:
                try:
                    self._look(found)
                except (OSError, KaioError):  # closed meanwhile
                    continue
        self._settled &= there
        self._minded = {inode: bound for inode, bound in self._minded.items() if inode in there}

    def _look(self, found: Descriptor) -> None:
        if found.inode in self._minded:
            self._mind(found)
            return
        if not is_open(found):
            return
        whose, state = standing(found, self._policy)
        if whose is Standing.OWN or (whose is Standing.POLICY and state.user_timeout != self._bound):
            self._settled.add(found.inode)  # chosen by the application; or a loop's, whose monitor watches it
            return
        adopt(found, self._policy)
        if self._bound is None:
            self._settled.add(found.inode)
        else:
            self._mind(found)

    def _mind(self, found: Descriptor) -> None:
        info = platform.tcp_info(found)
        spared = window_is_shut(info) and (info.probes or 0) < 2
        bound = None if spared else self._bound
        if self._minded.get(found.inode, -1) != bound:
            platform.bound_connect(found, bound)
            self._minded[found.inode] = bound
