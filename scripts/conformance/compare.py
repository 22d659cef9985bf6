"""Judge a module's two runs, test by test.

The rule: what passes over the base must pass over kaio's loop. Skipped, or not there at all, is not passed. A test that
differs is run again on both sides, first with all that differ and then by itself, and is a regression when it differs
each time; one that does not is flaky, and told. When very many differ, that is no chance, and none is run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, NamedTuple, Protocol

from .records import Result

__all__ = ["Comparison", "Counts", "RunAgain", "compare"]

_TOO_MANY_FOR_CHANCE: Final = 25
_LOST: Final = Result("lost")


class RunAgain(Protocol):
    """Runs some tests of the module once more, on a side."""

    def __call__(self, *, kaio: bool, only: tuple[str, ...]) -> Mapping[str, Result]: ...


class Counts(NamedTuple):
    """The number of tests by outcome."""

    passed: int
    failed: int  # also those that hung, crashed or were lost
    skipped: int

    @classmethod
    def of(cls, results: Mapping[str, Result]) -> Counts:
        outcomes = [result.outcome for result in results.values()]
        passed, skipped = outcomes.count("passed"), outcomes.count("skipped")
        return cls(passed, len(outcomes) - passed - skipped, skipped)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A module's two runs, and what is to be said of them."""

    suite: str
    module: str
    base: Mapping[str, Result]
    kaio: Mapping[str, Result]
    regressions: Mapping[str, Result]  # how they went over kaio's loop
    flaky: Mapping[str, Result]  # how they went over kaio's loop when they differed

    @property
    def unskipped(self) -> dict[str, Result]:
        """What the suite leaves out over the base, and then fails: it knows the base by something kaio's loop lacks."""
        left_out = [test for test, result in self.base.items() if result.outcome == "skipped"]
        return {test: self.kaio[test] for test in left_out if test in self.kaio and self.kaio[test].failed}

    @property
    def loops(self) -> int:
        """How many of kaio's loops the tests made in their own processes."""
        return sum(result.loops for result in self.kaio.values())


def compare(
    suite: str, module: str, base: Mapping[str, Result], kaio: Mapping[str, Result], run_again: RunAgain
) -> Comparison:
    """Judge; `run_again` is asked for the tests that differ."""
    found = _differing(base, kaio)
    standing = found
    if len(found) <= _TOO_MANY_FOR_CHANCE:
        if standing:
            standing = _still_differing(tuple(standing), run_again)
        standing = {test: result for test in standing for result in _still_differing((test,), run_again).values()}
    flaky = {test: result for test, result in found.items() if test not in standing}
    return Comparison(suite, module, base, kaio, standing, flaky)


def _still_differing(tests: tuple[str, ...], run_again: RunAgain) -> dict[str, Result]:
    return _differing(run_again(kaio=False, only=tests), run_again(kaio=True, only=tests))


def _differing(base: Mapping[str, Result], kaio: Mapping[str, Result]) -> dict[str, Result]:
    passed = [test for test, result in base.items() if result.outcome == "passed"]
    return {test: kaio.get(test, _LOST) for test in passed if kaio.get(test, _LOST).outcome != "passed"}
