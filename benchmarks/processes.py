"""A server's process: started, pinned to its core, and what the system says of it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Final

from .contenders import NATIVE
from .native_programs import program

__all__ = ["ROOT", "Server"]

ROOT: Final = pathlib.Path(__file__).parent.parent
"""Where `python -m benchmarks` works."""
_CPUCLOCK_SCHED: Final = 2  # clock_getcpuclockid(3), which Python does not offer: the clock of all threads of a process


class Server:
    """A running server. Its standard input ends it; its port is the first line that it prints."""

    def __init__(self, contender: str, loop: str, application: str, *, policy: str, core: int) -> None:
        python = [sys.executable, "-m", "benchmarks.servers", contender, loop, application, policy]
        self._process = subprocess.Popen(
            [program("server"), application] if contender == NATIVE else python,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        os.sched_setaffinity(self._process.pid, {core})  # it has one thread as yet: later ones inherit this
        self._what = f"{application} by {contender} on {loop}"
        self._port = 0

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid

    @property
    def port(self) -> int:
        """The port it listens on; waits until it does."""
        self.wait()
        return self._port

    def wait(self) -> None:
        """Wait until it listens."""
        if not self._port:
            line = self.line()
            if not line:
                raise SystemExit(f"benchmarks: {self._what} did not start")
            self._port = int(line)

    def line(self) -> str:
        """Return the next line that it prints; an empty string when it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode()

    def says(self, within: float) -> bool:
        """Whether it prints another line within so many seconds. All before that must have been read."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout.fileno()], (), (), within)[0])

    # -- what the system says

    def cpu(self) -> float:
        """Seconds of CPU time that it has used, as the scheduler counts them in nanoseconds."""
        return time.clock_gettime_ns((~self.pid << 3) | _CPUCLOCK_SCHED) / 1e9

    def memory(self) -> float:
        """Its proportional set size in bytes: smaps_rollup in proc(5)."""
        return self._number("smaps_rollup", r"^Pss:\s+(\d+) kB") * 1024

    def switches(self) -> float:
        """How often it was woken: its voluntary context switches."""
        return self._number("status", r"^voluntary_ctxt_switches:\s+(\d+)")

    def packets(self) -> float:
        """Packets that were received on the loopback interface of its network namespace."""
        return self._number("net/dev", r"^\s*lo:\s*\d+\s+(\d+)")

    def _number(self, file: str, wanted: str) -> float:
        found = re.search(wanted, pathlib.Path(f"/proc/{self.pid}/{file}").read_text(), re.MULTILINE)
        assert found is not None, f"/proc/PID/{file} has no {wanted}"
        return float(found[1])

    # -- the end

    def finish(self) -> list[str]:
        """End it, and return the lines that it still prints."""
        with contextlib.suppress(BrokenPipeError):
            return self._process.communicate()[0].decode().splitlines()
        return []

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.finish()
