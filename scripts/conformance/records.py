"""What a run writes down: a line of JSON when a test begins, and one when it has ended.

Rules kept here: each line is on its way to the file before the test goes on, so that of a process that hangs or dies
the file tells in which test. A test that takes longer than its limit ends the whole process, after the stacks of all
threads were written beside the records: nothing less stops every hang (a blocked system call, a loop that spins in C).
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["Job", "Recorder", "Records", "Result", "read"]

_DETAIL_LIMIT: Final = 6000


@dataclasses.dataclass(frozen=True)
class Job:
    """What a test program is told: one module, and which of its tests."""

    module: str
    pattern: str  # only tests whose name contains it
    only: tuple[str, ...] | None  # these tests, or all
    without: tuple[str, ...]  # not these: they have run
    limit: float  # seconds that one test may take
    records: str  # path of the file of records

    @property
    def stacks(self) -> str:
        """Path of the file that says where everything stood when a test took too long."""
        return f"{self.records}.stacks"

    def wants(self, test: str) -> bool:
        return self.pattern in test and test not in self.without and (self.only is None or test in self.only)

    def dump(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file)

    @classmethod
    def load(cls, path: str) -> Job:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
        only = fields.pop("only")
        return cls(only=None if only is None else tuple(only), without=tuple(fields.pop("without")), **fields)


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a test."""

    outcome: str  # passed, failed, skipped; hung, crashed: its process ended in it; lost: it was never run
    detail: str = ""  # the traceback, or why it was skipped
    loops: int = 0  # how many loops of kaio's it made in its own process

    @property
    def failed(self) -> bool:
        return self.outcome not in ("passed", "skipped")


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of one process."""

    results: dict[str, Result]
    running: str | None  # the test that has begun and not ended
    complete: bool  # the process has run all that it was to run


class Recorder:
    """Writes the records of one process, and watches the clock of each test."""

    def __init__(self, job: Job) -> None:
        self._limit = job.limit
        self._records = open(job.records, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 - as long as the process
        self._stacks = open(job.stacks, "w", encoding="utf-8")  # noqa: SIM115

    def begin(self, test: str) -> None:
        faulthandler.dump_traceback_later(self._limit, exit=True, file=self._stacks)
        self._write({"test": test})

    def end(self, test: str, result: Result) -> None:
        faulthandler.cancel_dump_traceback_later()
        detail = result.detail[-_DETAIL_LIMIT:]  # the end of a traceback says what happened
        self._write({"test": test, "outcome": result.outcome, "detail": detail, "loops": result.loops})

    def complete(self) -> None:
        self._write({"complete": True})

    def _write(self, record: dict[str, Any]) -> None:
        self._records.write(json.dumps(record) + "\n")


def read(path: str) -> Records:
    """What the process has written that was told to write to `path`; nothing when it died before that."""
    results: dict[str, Result] = {}
    running: str | None = None
    complete = False
    for record in _lines(path):
        if "complete" in record:
            complete = True
            continue
        test = record.pop("test")
        if record:
            results[test] = Result(**record)
        running = None if record else test
    return Records(results, running, complete)


def _lines(path: str) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):  # the last one may be cut short
                yield json.loads(line)
