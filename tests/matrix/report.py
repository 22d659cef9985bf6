"""Tables: places as rows, states as columns, and each cell that failed on a line of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from .cells import MODES, Cell, Seen
from .expect import expected, problems
from .live import TROUBLES, Result
from .places import PLACES
from .states import STATES

__all__ = ["digest", "failures", "live_failures", "live_table", "table"]

_MARKS: Final = {
    "missed": "MISSED",
    "late": "late",
    "early": "EARLY",
    "cause": "cause",
    "error": "error",
    "callbacks": "calls",
    "log": "log",
    "count": "count",
    "left": "left",
    "bytes": "bytes",
    "unready": "unready",
}


def table(results: Sequence[Seen], *, markdown: bool = False) -> str:
    """The longest time until an owner was told, of all loops, modes and kinds, and what was wrong with how many."""
    places = [name for name in PLACES if any(seen.cell.place == name for seen in results)]
    states = [name for name in STATES if any(seen.cell.state == name for seen in results)]
    cells: dict[tuple[str, str], list[Seen]] = {}
    for seen in results:
        cells.setdefault((seen.cell.place, seen.cell.state), []).append(seen)
    if markdown:
        return _markdown(places, results)
    columns = [[state, *(_text(cells.get((place, state), [])) for place in places)] for state in states]
    return _boxes(["", *places], columns)


def _text(found: Iterable[Seen]) -> str:
    """Such as "3.4", "7.0 late:2", "MISSED:4"."""
    found = list(found)
    times = [seen.ended_at for seen in found if seen.ended_at is not None and not seen.unready]
    counted: dict[str, int] = {}
    for seen in found:
        for kind in dict.fromkeys(problem.partition(":")[0] for problem in problems(seen)):
            counted[kind] = counted.get(kind, 0) + 1
    marks = [f"{_MARKS[kind]}:{count}" for kind, count in counted.items()]
    worst = [f"{max(times):.1f}"] if times else []
    if not found:
        return ""
    if not any(expected(seen.cell) for seen in found):
        return "*"
    return " ".join(worst + marks)


def _boxes(head: list[str], columns: list[list[str]], width: int = 150) -> str:
    """Columns side by side, in as many blocks as the width asks for."""
    first = max(map(len, head))
    blocks: list[list[list[str]]] = [[]]
    room = width - first
    for column in columns:
        need = max(map(len, column)) + 2
        if need > room and blocks[-1]:
            blocks.append([])
            room = width - first
        blocks[-1].append(column)
        room -= need
    lines = []
    for block in blocks:
        for number, label in enumerate(head):
            cells = (column[number].ljust(max(map(len, column))) for column in block)
            lines.append("  ".join([label.ljust(first), *cells]).rstrip())
        lines.append("")
    return "\n".join(lines)


# The README's columns, and the beginnings of the names of the states that are in each.
_COLUMNS: Final = {
    "idle": ("idle",),
    "in flight": ("in flight",),
    "written afterwards": ("written",),
    "window shut": ("window shut",),
    "window shrunk": ("window shrunk",),
    "paused": ("paused",),
    "half-closed": ("our FIN", "their FIN"),
    "TLS": ("TLS",),
    "STARTTLS": ("STARTTLS",),
    "sendfile": ("sendfile",),
    "connecting": ("connecting",),
}


def _markdown(places: list[str], results: Sequence[Seen]) -> str:
    rows = [["seconds at most, until", *_COLUMNS], ["---", *("---:" for _ in _COLUMNS)]]
    for place in places:
        here = [seen for seen in results if seen.cell.place == place and seen.cell.state in STATES]
        columns = ([seen for seen in here if seen.cell.state.startswith(names)] for names in _COLUMNS.values())
        rows.append([place, *map(_text, columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def failures(results: Iterable[Seen]) -> list[str]:
    """A line for each cell that is not as the contract says, with all that is known of it."""
    lines = []
    for seen in sorted(results, key=lambda seen: seen.cell):
        wrong = problems(seen)
        if wrong:
            times = "never" if seen.told_at is None else f"{seen.told_at:.2f} s"
            facts = (
                f"told {times}, {seen.cause or '-'}, {seen.error or 'no error'}, {' '.join(seen.events) or '-'},"
                f" log {seen.logged}, count {seen.counted}"
            )
            before = f"; at the break: {seen.before}" if seen.before else ""
            lines.append(f"{seen.cell}: {'; '.join(wrong)}  [{facts}{before}]")
    return lines


def digest(results: Iterable[Seen]) -> list[str]:
    """Summarize the failures by kind: their number, and their places, states, kinds, loops and modes."""
    groups: dict[str, list[Cell]] = {}
    for seen in results:
        for problem in problems(seen):
            # Numbers differ, names do not.
            groups.setdefault(re.sub(r"\d+\.\d+", "N", problem)[:100], []).append(seen.cell)
    return [f"{len(cells):5}  {problem}  [{_common(cells)}]" for problem, cells in sorted(groups.items())]


def _common(cells: Sequence[Cell]) -> str:
    """Each dimension's values, where there are few of them."""
    parts = []
    for name in ("place", "state", "kind", "loop", "mode"):
        values = list(dict.fromkeys(getattr(cell, name) for cell in cells))
        parts.append(" | ".join(values) if len(values) <= 5 else f"{len(values)} {name}s")
    return "; ".join(filter(None, parts))


def live_table(results: Sequence[Result], *, markdown: bool = False) -> str:
    """What became of live peers that look dead, of all loops and kinds."""
    rows = [["", *MODES]]
    for trouble in TROUBLES.values():
        for life in trouble.lives:
            name = (trouble.name, life.name)
            found = [result for result in results if (result.cell.place, result.cell.state) == name]
            if found:
                each = ([result for result in found if result.cell.mode == mode] for mode in MODES)
                rows.append([f"{trouble.name}: {life.name}", *map(_outcome, each)])
    if markdown:
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _outcome(found: Sequence[Result]) -> str:
    """Such as "16 alive", "7 alive, 1 NOT AS IT SHOULD BE"; "dead after 3.5 s, UNACKNOWLEDGED" where that is right."""
    wrong = [result for result in found if result.problems]
    deaths = sorted(result.note for result in found if not result.problems and result.note.startswith("dead"))
    alive = len(found) - len(wrong) - len(deaths)
    parts = [f"{alive} alive"] if alive else []
    if deaths:
        parts.append(f"{len(deaths)} {deaths[-1]}")
    if wrong:
        parts.append(f"{len(wrong)} NOT AS IT SHOULD BE")
    return ", ".join(parts)


def live_failures(results: Iterable[Result]) -> list[str]:
    """A line for each live peer that was reported dead, or whose bytes are missing."""
    return [
        f"{result.cell}: {'; '.join(result.problems)}"
        for result in sorted(results, key=lambda result: result.cell)
        if result.problems
    ]
