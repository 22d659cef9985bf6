"""What a property is, and the search for an example that breaks it."""

from __future__ import annotations

import dataclasses
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any, Final, TypeVar

import hypothesis
from hypothesis import strategies as st

__all__ = ["Outcome", "Property", "search", "tells_why"]

T = TypeVar("T")

_ROUND: Final = 300  # examples; hypothesis makes them more complicated as a round goes on


@dataclasses.dataclass(frozen=True, slots=True)
class Property:
    """Something that holds for every example."""

    name: str
    """The parser, a colon, and what is asked of it."""
    examples: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    """Raises an exception, of whatever kind, for an example that breaks the property."""
    shrinks: bool = True
    """Whether an example is made as simple as possible; a measurement of time cannot be."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a search has found."""

    examples: int
    seconds: float
    failure: str | None
    """The traceback and the simplest example; None if the property held."""


def search(sought: Property, *, seed: int, seconds: float = 0.0, examples: int = 0) -> Outcome:
    """Search for that many seconds and at least so many examples, or until one breaks the property."""
    began = time.monotonic()
    tried = 0
    while tried < examples or time.monotonic() - began < seconds:
        most = min(_ROUND, examples - tried) if tried < examples else _ROUND
        number, failure = _round(sought, most, seed)
        tried += number
        seed += 1
        if failure is not None:
            return Outcome(tried, time.monotonic() - began, failure)
    return Outcome(tried, time.monotonic() - began, None)


def _round(sought: Property, most: int, seed: int) -> tuple[int, str | None]:
    tried = 0

    def holds(example: Any) -> None:
        nonlocal tried
        tried += 1
        sought.check(example)

    phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if sought.shrinks else [])]
    settings = hypothesis.settings(
        max_examples=most,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=phases,
        report_multiple_bugs=False,
        print_blob=False,
    )
    run: Any = hypothesis.seed(seed)(settings(hypothesis.given(sought.examples)(holds)))
    try:
        run()
    except Exception:  # whatever a parser raises is what is looked for
        return tried, traceback.format_exc()
    return tried, None


def tells_why(error: Exception) -> None:
    """Check an error that a parser documents: it has a message, and can be sent to another process."""
    assert str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))
