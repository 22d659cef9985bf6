"""Run the tests of a module on a side, in processes of their own.

Rules kept here: whatever a test does, the run ends: a test that hangs or kills its process is recorded as such, and
the tests after it run in another process. Nothing that a run started is left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
from typing import Final

from .places import Place
from .records import Job, Result, read
from .suites import Suite

__all__ = ["Runner"]

_TEST_LIMIT: Final = 60.0  # seconds; the slowest takes about 5 on an idle machine
_MODULE_LIMIT: Final = 400.0
_DEATHS: Final = 8  # processes that a module may lose before the rest of it is given up


class Runner:
    """Runs modules, over the base loop or over what is put in its place."""

    def __init__(self, place: Place, *, pattern: str, control: bool) -> None:
        self._place = place
        self._pattern = pattern
        self._control = control
        self._numbers = itertools.count()

    def run(self, suite: Suite, module: str, *, kaio: bool, only: tuple[str, ...] | None = None) -> dict[str, Result]:
        """The results of a module's tests, or of `only` some, by their names."""
        loop = ("control" if self._control else suite.loop) if kaio else None
        results: dict[str, Result] = {}
        for _ in range(_DEATHS):
            path = os.path.join(self._place.scratch, str(next(self._numbers)))
            job = Job(module, self._pattern, only, tuple(results), _TEST_LIMIT, f"{path}.records")
            job.dump(f"{path}.job")
            ending = self._process(suite, module, path, loop)
            records = read(job.records)
            results.update(records.results)
            if records.complete:
                break
            if records.running is None:  # not in a test: while a module is imported, say
                results[f"{module}: outside its tests"] = Result("crashed", f"{ending}\n{_last_words(path)}")
                break
            results[records.running] = _died(job, path, ending)
        return results

    def _process(self, suite: Suite, module: str, path: str, loop: str | None) -> str:
        """Run a test program to its end, and say how it ended."""
        command = self._place.command("-X", "faulthandler", *suite.arguments(module, f"{path}.job"))
        with open(f"{path}.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=suite.directory,
                env=self._place.variables(loop),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            return f"exit status {process.wait(_MODULE_LIMIT)}"
        except subprocess.TimeoutExpired:
            return f"not done after {_MODULE_LIMIT:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what its tests left running
            process.wait()


def _died(job: Job, path: str, ending: str) -> Result:
    stacks = _text(job.stacks)
    if stacks or ending.startswith("not done"):
        return Result("hung", stacks or ending)
    return Result("crashed", f"{ending}\n{_last_words(path)}")


def _last_words(path: str) -> str:
    log = _text(f"{path}.log")
    _, fatal, stacks = log.rpartition("Fatal Python error")
    return fatal + stacks if fatal else "\n".join(log.splitlines()[-20:])


def _text(path: str) -> str:
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""
