"""One picture for each question: the compared figure of every contender, with its quartiles."""

from __future__ import annotations

import importlib
import importlib.util
import math
import pathlib
from typing import Any, Final

__all__ = ["draw"]

_COLOURS: Final = {"uvloop": "#3b6fb6", "asyncio": "#d98c3f", "-": "#888888"}


def draw(document: dict[str, Any], path: pathlib.Path) -> bool:
    """Draw what `Results.document` has. False when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    matplotlib: Any = importlib.import_module("matplotlib")  # takes longer than some questions: only at the end
    figures: Any = importlib.import_module("matplotlib.figure")
    cases = list(dict.fromkeys(row["case"] for row in document["rows"]))
    across = min(3, len(cases))
    down = math.ceil(len(cases) / across)
    tallest = max(sum(row["case"] == case for row in document["rows"]) for case in cases)
    figure = figures.Figure(figsize=(6 * across, (0.9 + 0.27 * tallest) * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for number, axis in enumerate(axes.flat):
        if number < len(cases):
            _bars(axis, document, cases[number])
        else:
            axis.set_axis_off()
    figure.suptitle(document["title"], fontsize=11)
    with matplotlib.rc_context({"svg.hashsalt": "kaio"}):  # the same figures give the same file
        figure.savefig(path, metadata={"Date": None})
    return True


def _bars(axis: Any, document: dict[str, Any], case: str) -> None:
    rows = [row for row in document["rows"] if row["case"] == case]
    key, heading = next(iter(document["metrics"].items()))
    for place, row in enumerate(rows):
        summary = row["figures"][key]
        median, (low, high) = summary["median"], summary["quartiles"]
        errors = [[max(0.0, median - low)], [max(0.0, high - median)]]
        axis.barh(place, median, xerr=errors, color=_COLOURS.get(row["loop"], "#888888"), ecolor="#444444", height=0.7)
        ratio = row["ratio"]
        axis.text(median, place, f"  {ratio['median']:.2f} x" if ratio else "", va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [f"{row['contender']} ({row['loop']})" for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(heading, fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title(case, fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
