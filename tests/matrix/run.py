"""The whole of it, or a part: processes side by side, which mostly wait."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from .. import namespaces
from .cells import KINDS, LOOPS, MODES, Cell, Seen
from .crowd import Secrets
from .expect import expected, problems
from .places import PLACES
from .report import failures, table
from .states import STATES

__all__ = ["all_cells", "main", "run"]

_AT_ONCE: Final = 4
"""Processes: more make the machine so busy that times are no longer the kernel's."""
_LIMIT: Final = 90.0
"""Seconds that one process may take."""


def all_cells(
    places: Collection[str] = (),
    states: Collection[str] = (),
    kinds: Collection[str] = (),
    loops: Collection[str] = (),
    modes: Collection[str] = (),
) -> list[Cell]:
    """Every cell that there is, or those with these names."""
    found = []
    for place, state, mode in itertools.product(places or PLACES, states or STATES, modes or MODES):
        for kind in KINDS:
            if kind not in STATES[state].kinds or (kinds and kind not in kinds):
                continue
            on = [""] if kind in ("sweep", "attach") else [loop for loop in LOOPS if loop in STATES[state].loops]
            if loops:
                on = [loop for loop in on if loop in loops]
            found += [Cell(place, state, kind, loop, mode) for loop in on]
    return found


async def run(cells: Iterable[Cell]) -> list[Seen]:
    """Try all these cells, and say what was seen, in no order."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.place, cell.loop, cell.mode if cell.loop else ""), []).append(cell)
    with tempfile.TemporaryDirectory() as secrets:
        Secrets.make(secrets)
        room = asyncio.Semaphore(_AT_ONCE)
        results = await asyncio.gather(*(_group(group, secrets, room) for group in groups.values()))
    return [seen for found in results for seen in found]


async def _group(cells: list[Cell], secrets: str, room: asyncio.Semaphore) -> list[Seen]:
    """One process."""
    module = "crowd" if cells[0].loop else "guarded"
    task = {"secrets": secrets, "cells": [dataclasses.asdict(cell) for cell in cells]}
    async with room:
        lines, complaint = await process(module, task)
    seen = [Seen.from_json(line) for line in lines]
    missing = set(cells) - {each.cell for each in seen}
    return seen + [Seen(cell, unready=f"no result: {complaint}") for cell in sorted(missing)]


async def process(module: str, task: dict[str, Any]) -> tuple[list[str], str]:
    """Run one of this package's modules as a program: its lines, and what it complains of."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"{__package__}.{module}",
        json.dumps(task),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        async with asyncio.timeout(_LIMIT):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        out, err = await process.communicate()
        err += b"not done in time"
    return [line for line in out.decode().splitlines() if line.startswith("{")], err.decode().strip()[-2000:]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; what it returns is its exit status."""
    options = _parse(argv)
    lacking = namespaces.lacking()
    if lacking is not None:
        print(lacking, file=sys.stderr)
        return 1
    began = time.monotonic()
    cells = all_cells(options.place, options.state, options.kind, options.loop, options.mode)
    results = asyncio.run(run(cells))
    print(table(results, markdown=options.markdown))
    wrong = failures(results)
    for line in wrong:
        print(line)
    deaths = [seen for seen in results if seen.cell.state in STATES and expected(seen.cell)]
    missed = sum(any(problem.startswith("missed") for problem in problems(seen)) for seen in deaths)
    print(
        f"{len(deaths)} deaths: {missed} missed, {len(wrong)} lines of what is not as the contract says;"
        f" {time.monotonic() - began:.0f} s",
    )
    return 1 if wrong else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    for name, choices in (
        ("place", PLACES),
        ("state", STATES),
        ("kind", KINDS),
        ("loop", LOOPS),
        ("mode", MODES),
    ):
        parser.add_argument(
            f"--{name}", action="append", default=[], choices=list(choices), help="may be given more than once"
        )
    parser.add_argument("--markdown", action="store_true", help="the table for the README")
    return parser.parse_args(argv)
