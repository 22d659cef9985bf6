"""Runs the tests of one pytest module: `python -m pytest -p scripts.conformance.plugin --job JOB`.

A plugin and no program, because pytest must be what was called: workers that a test starts import the main module.
"""

from __future__ import annotations

from typing import Any

import pytest

from . import substitute
from .records import Job, Recorder, Result

__all__: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--job", required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recording(Job.load(config.getoption("job"))))


class _Recording:
    """Picks the tests of the job, and tells the recorder how each went: setup, call and teardown together."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._recorder = Recorder(job)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanted = [item for item in items if self._job.wants(item.nodeid) and not _foreign(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._recorder.end(report.nodeid, Result(report.outcome, report.longreprtext))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._went = Result("passed")
        self._made_before = substitute.made()
        self._recorder.begin(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self._went.outcome != "failed":
            self._went = Result("failed", report.longreprtext)
        elif report.skipped and not hasattr(report, "wasxfail") and self._went.outcome == "passed":
            self._went = Result("skipped", _reason(report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        loops = substitute.made() - self._made_before
        self._recorder.end(nodeid, Result(self._went.outcome, self._went.detail, loops))

    def pytest_sessionfinish(self) -> None:
        self._recorder.complete()


def _foreign(item: pytest.Item) -> bool:
    """Whether a test is not about asyncio, or wants the Internet."""
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("anyio_backend") == "trio" or item.get_closest_marker("network") is not None


def _reason(report: pytest.TestReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
