"""The program that runs the tests of one unittest module: `python -m scripts.conformance.run_unittest JOB`."""

# ruff: noqa: N802 - unittest names its methods

from __future__ import annotations

import sys
import unittest
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TypeAlias

from . import substitute
from .records import Job, Recorder, Result

__all__: list[str] = []

_ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]


class _Recorded(unittest.TextTestResult):
    """Tells the recorder how each test went: what goes wrong first counts."""

    recorder: Recorder

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._went = Result("passed")
        self._made_before = substitute.made()
        self.recorder.begin(test.id())

    def stopTest(self, test: unittest.TestCase) -> None:
        result = Result(self._went.outcome, self._went.detail, substitute.made() - self._made_before)
        self.recorder.end(test.id(), result)
        super().stopTest(test)

    def addError(self, test: unittest.TestCase, err: _ExcInfo) -> None:
        super().addError(test, err)
        self._failed(test, self.errors[-1][1])

    def addFailure(self, test: unittest.TestCase, err: _ExcInfo) -> None:
        super().addFailure(test, err)
        self._failed(test, self.failures[-1][1])

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: _ExcInfo | None) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._failed(test, f"{subtest}\n{(self.errors + self.failures)[-1][1]}")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        super().addUnexpectedSuccess(test)
        self._failed(test, "it passed, and was expected to fail")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        if not isinstance(test, unittest.TestCase):  # a whole class or module, told by an object of unittest's own
            self.recorder.end(test.id(), Result("skipped", reason))
        elif self._went.outcome == "passed":
            self._went = Result("skipped", reason)

    def _failed(self, test: unittest.TestCase, detail: str) -> None:
        if not isinstance(test, unittest.TestCase):
            self.recorder.end(test.id(), Result("failed", detail))
        elif self._went.outcome != "failed":
            self._went = Result("failed", detail)


def _wanted(suite: unittest.TestSuite, job: Job) -> unittest.TestSuite:
    return unittest.TestSuite(test for test in _tests(suite) if job.wants(test.id()))


def _tests(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from _tests(part)
        else:
            yield part


def _main() -> None:
    job = Job.load(sys.argv[1])
    recorder = Recorder(job)

    def result(*args: Any, **kwargs: Any) -> _Recorded:
        made = _Recorded(*args, **kwargs)
        made.recorder = recorder
        return made

    suite = _wanted(unittest.defaultTestLoader.loadTestsFromName(job.module), job)
    unittest.TextTestRunner(resultclass=result, verbosity=2, warnings="default").run(suite)
    recorder.complete()


if __name__ == "__main__":
    _main()
