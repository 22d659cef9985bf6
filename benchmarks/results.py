"""What was measured: medians, spread, ratios within a round, targets; as a table, as JSON, as pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

from kaio.cli._output import print_table

from . import plots
from .contenders import CONTENDERS, LOOPS

__all__ = ["Metric", "Results", "Target", "quantile"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One of the figures of each turn."""

    key: str
    heading: str
    """What it is, with its unit."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A target for a figure, and the figure in each round."""

    text: str
    values: Sequence[float]
    bound: float
    at_most: bool = True

    @property
    def wanted(self) -> str:
        """The bound as text."""
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"

    @property
    def verdict(self) -> str:
        """pass or MISS, by the median."""
        median = statistics.median(self.values)
        return "pass" if (median <= self.bound if self.at_most else median >= self.bound) else "MISS"


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so great a share of them does not exceed."""
    ranked = sorted(values)
    return ranked[math.ceil(share * len(ranked)) - 1]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def short(value: float) -> str:
    """Format a number with about three digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


_Row = tuple[str, str, str]  # case, loop, contender


class Results:
    """The figures of one question. The first metric is the one that is compared with the baseline's."""

    def __init__(self, question: str, title: str, metrics: Sequence[Metric], baseline: str = "bare") -> None:
        self.question = question
        self.title = title
        self.metrics = tuple(metrics)
        self.baseline = baseline
        self.rows: dict[_Row, dict[str, list[float]]] = {}
        self.targets: list[Target] = []
        self.notes: list[str] = []
        self._began = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._load = os.getloadavg()[0]

    def add(self, case: str, loop: str, contender: str, figures: Mapping[str, float]) -> None:
        """The figures of one turn."""
        row = self.rows.setdefault((case, loop, contender), {metric.key: [] for metric in self.metrics})
        for metric in self.metrics:
            row[metric.key].append(figures[metric.key])

    def ratios(self, one: str, other: str, *, case: str, loop: str = "uvloop", metric: str = "") -> list[float]:
        """One contender's figure divided by another's, in each round; none when one of them was left out."""
        key = metric or self.metrics[0].key
        above, below = (self.rows.get((case, loop, name), {}).get(key, []) for name in (one, other))
        return [a / b for a, b in zip(above, below, strict=False) if b]

    def target(self, text: str, values: Sequence[float], bound: float, *, at_most: bool = True) -> None:
        """Say what is wanted; left out where nothing was measured."""
        if values:
            self.targets.append(Target(text, values, bound, at_most))

    # -- on the terminal

    def show(self) -> None:
        """Print a table for each case, the notes, and the targets."""
        print(f"\n{self.title}\n{machine_line()}; one-minute load before: {self._load:.2f}")
        first, *others = self.metrics
        columns = ["loop", "server", first.heading, "quartiles", f"to {self.baseline}", "quartiles "]
        columns += [metric.heading for metric in others]
        for case in self._cases():
            print(f"\n{case}")
            rows = [self._cells(row) for row in self._in_order(case)]
            print_table(columns, rows, right=columns[2:])
        for note in self.notes:
            print(note)
        if self.targets:
            print()
            print_table(
                ["target", "wanted", "measured", "quartiles", "verdict"],
                [_target_cells(target) for target in self.targets],
                right=["wanted", "measured", "quartiles"],
                styles=["red" if target.verdict == "MISS" else "green" for target in self.targets],
            )

    def _cases(self) -> list[str]:
        return list(dict.fromkeys(case for case, _, _ in self.rows))

    def _in_order(self, case: str) -> list[_Row]:
        rows = [row for row in self.rows if row[0] == case]
        return sorted(rows, key=lambda row: (_place(row[1], ("-", *LOOPS)), _place(row[2], tuple(CONTENDERS))))

    def _cells(self, row: _Row) -> list[str]:
        case, loop, contender = row
        figures = self.rows[row]
        first, *others = (figures[metric.key] for metric in self.metrics)
        cells = [loop, contender, short(statistics.median(first)), _spread(first, short)]
        ratios = self.ratios(contender, self.baseline, case=case, loop=loop)
        if ratios:
            cells += [f"{statistics.median(ratios):.3f}", _spread(ratios, "{:.3f}".format)]
        else:
            cells += ["", ""]
        return cells + [short(statistics.median(values)) for values in others]

    # -- in files

    def save(self, folder: pathlib.Path, options: dict[str, Any]) -> None:
        """Write the JSON document and the picture."""
        folder.mkdir(parents=True, exist_ok=True)
        document = self.document(options)
        path = folder / f"{self.question}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"\nwritten: {path}", end="")
        picture = folder / f"{self.question}.svg"
        print(f", {picture}" if plots.draw(document, picture) else "; no picture: matplotlib is not installed")

    def document(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return all that was measured, as plain data."""
        return {
            "question": self.question,
            "title": self.title,
            "began": self._began,
            "machine": {**machine(), "load before": self._load},
            "options": options,
            "baseline": self.baseline,
            "metrics": {metric.key: metric.heading for metric in self.metrics},
            "rows": [self._plain(row) for case in self._cases() for row in self._in_order(case)],
            "notes": self.notes,
            "targets": [
                {"text": target.text, "wanted": target.wanted, **_summary(target.values), "verdict": target.verdict}
                for target in self.targets
            ],
        }

    def _plain(self, row: _Row) -> dict[str, Any]:
        case, loop, contender = row
        ratios = self.ratios(contender, self.baseline, case=case, loop=loop)
        return {
            "case": case,
            "loop": loop,
            "contender": contender,
            "figures": {key: _summary(values) for key, values in self.rows[row].items()},
            "ratio": _summary(ratios) if ratios else None,
        }


def _place(name: str, known: Sequence[str]) -> int:
    return known.index(name) if name in known else len(known)


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The quartiles as text; empty for a single round."""
    low, high = quartiles(values)
    return f"{form(low)} - {form(high)}" if len(values) > 1 else ""


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "quartiles": quartiles(values), "rounds": list(values)}


def _target_cells(target: Target) -> list[str]:
    return [
        target.text,
        target.wanted,
        f"{statistics.median(target.values):.3f}",
        _spread(target.values, "{:.3f}".format),
        target.verdict,
    ]


# -- where it was measured

_PACKAGES: Final = ("kaio-net", "anyio", "uvloop")


def machine() -> dict[str, Any]:
    """What a reader needs to judge the figures by."""
    models = [
        line.partition(":")[2].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        **{name: version(name) for name in _PACKAGES},
    }


def machine_line() -> str:
    """Return the machine's description in one line."""
    here = machine()
    packages = ", ".join(f"{name} {here[name]}" for name in _PACKAGES)
    return f"Python {here['python']}, {packages}; Linux {here['kernel']}, {here['cores']} x {here['cpu']}"
