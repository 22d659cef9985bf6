"""What is printed: a table of the modules, and every test that differed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from .compare import Comparison, Counts
from .records import Result

__all__ = ["as_json", "as_text"]

_ROW = "{:<9}{:<26}{:>8}{:>7}{:>8} {:>8}{:>7}{:>8} {:>8}{:>8}{:>7}"


def as_text(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Return the lines of the report."""
    yield _ROW.format("", "", "base", "", "", "kaio", "", "", "", "", "")
    yield _ROW.format(
        "suite", "module", "passed", "failed", "skipped", "passed", "failed", "skipped", "loops", "worse", "flaky"
    )
    for suite, group in itertools.groupby(comparisons, lambda comparison: comparison.suite):
        modules = list(group)
        for comparison in modules:
            yield _row(suite, _short(comparison.module), [comparison])
        yield _row(suite, "all", modules)
        yield ""
    yield from _listed(comparisons, "regressions", "passes over the base, not over kaio's loop")
    yield from _listed(comparisons, "unskipped", "skipped over the base, fails over kaio's loop; no regression")
    yield from _listed(comparisons, "flaky", "differed once, and not each time it was run again")


def as_json(python: str, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return the report as JSON."""
    return {"python": python, "modules": [_as_json(comparison) for comparison in comparisons]}


def _as_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "suite": comparison.suite,
        "module": _short(comparison.module),
        "base": Counts.of(comparison.base)._asdict(),
        "kaio": Counts.of(comparison.kaio)._asdict(),
        "loops": comparison.loops,
        "regressions": {test: dataclasses.asdict(result) for test, result in comparison.regressions.items()},
        "flaky": {test: dataclasses.asdict(result) for test, result in comparison.flaky.items()},
    }


def _row(suite: str, module: str, comparisons: Sequence[Comparison]) -> str:
    base = _sum(Counts.of(comparison.base) for comparison in comparisons)
    kaio = _sum(Counts.of(comparison.kaio) for comparison in comparisons)
    loops = sum(comparison.loops for comparison in comparisons)
    worse = sum(len(comparison.regressions) for comparison in comparisons)
    flaky = sum(len(comparison.flaky) for comparison in comparisons)
    return _ROW.format(suite, module, *base, *kaio, loops, worse or "", flaky or "").rstrip()


def _sum(counts: Iterator[Counts]) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))


def _listed(comparisons: Sequence[Comparison], field: str, meaning: str) -> Iterator[str]:
    found = [(comparison, getattr(comparison, field)) for comparison in comparisons]
    number = sum(len(tests) for _, tests in found)
    if number:
        yield f"{field}: {number} ({meaning})"
        for comparison, tests in found:
            for test, result in tests.items():
                if result.outcome != "lost":
                    yield f"\n{comparison.suite} {test}: {result.outcome}"
                    yield from _core(result)
            lost = [test for test, result in tests.items() if result.outcome == "lost"]
            if lost:
                yield f"\n{comparison.suite} {comparison.module}: {len(lost)} tests were not run, {lost[0]} among them"
        yield ""


def _core(result: Result) -> list[str]:
    """Of a traceback the end, where it says what went wrong; of stacks the beginning, with the youngest frames."""
    lines = result.detail.strip().splitlines()
    return [f"    {line}" for line in (lines[:25] if result.outcome in ("hung", "crashed") else lines[-25:])]


def _short(module: str) -> str:
    return module.removesuffix(".py").replace("/", ".").rpartition(".")[2]
