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
from typing import Final

from .. import namespaces
from .cells import KINDS, LOOPS, MODES, Cell, Seen
from .crowd import Secrets
from .expect import expected, problems
from .live import TROUBLES, Result, live_cells
from .places import PLACES
from .report import failures, live_failures, live_table, table
from .states import STATES

__all__ = ["all_cells", "main", "run"]

LIVES: Final = tuple(dict.fromkeys(life.name for trouble in TROUBLES.values() for life in trouble.lives))
_AT_ONCE: Final = 8
"""Processes: more make the machine so busy that times are no longer the kernel's."""
_LIMIT: Final = 160.0
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


async def run(cells: Iterable[Cell], live: Iterable[Cell] = ()) -> tuple[list[Seen], list[Result]]:
    """Try all these cells, deaths and live peers, and say what was seen, in no order."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.place, cell.loop, cell.mode if cell.loop else ""), []).append(cell)
    troubles: dict[str, list[Cell]] = {}
    for cell in live:
        troubles.setdefault(cell.place, []).append(cell)
    with tempfile.TemporaryDirectory() as secrets:
        Secrets.make(secrets)
        room = asyncio.Semaphore(_AT_ONCE)
        # The longest first.
        lives = [asyncio.create_task(_trouble(each, room)) for each in troubles.values()]
        deaths = [asyncio.create_task(_group(each, secrets, room)) for each in groups.values()]
        seen = [each for found in await asyncio.gather(*deaths) for each in found]
        results = [each for found in await asyncio.gather(*lives) for each in found]
    return seen, results


async def _group(cells: list[Cell], secrets: str, room: asyncio.Semaphore) -> list[Seen]:
    """One process's worth of deaths."""
    module = "crowd" if cells[0].loop else "guarded"
    async with room:
        lines, complaint = await process(module, cells, secrets=secrets)
    seen = [Seen.from_json(line) for line in lines]
    missing = set(cells) - {each.cell for each in seen}
    return seen + [Seen(cell, unready=f"no result: {complaint}") for cell in sorted(missing)]


async def _trouble(cells: list[Cell], room: asyncio.Semaphore) -> list[Result]:
    """One trouble of live peers."""
    async with room:
        lines, complaint = await process("live", cells)
    results = [Result.from_json(line) for line in lines]
    missing = set(cells) - {each.cell for each in results}
    return results + [Result(cell, [f"no result: {complaint}"]) for cell in sorted(missing)]


async def process(module: str, cells: list[Cell], **more: str) -> tuple[list[str], str]:
    """Run one of this package's modules as a program: its lines, and what it complains of."""
    task = {"cells": [dataclasses.asdict(cell) for cell in cells], **more}
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
    # --place and --state may name what befalls live peers, too.
    places, troubles = ([name for name in options.place if name in names] for names in (PLACES, TROUBLES))
    states, lives = ([name for name in options.state if name in names] for names in (STATES, LIVES))
    chosen = (options.kind, options.loop, options.mode)
    deaths = [] if options.live or _elsewhere(options, places, states) else all_cells(places, states, *chosen)
    live = [] if options.deaths or _elsewhere(options, troubles, lives) else live_cells(troubles, lives, *chosen)
    seen, results = asyncio.run(run(deaths, live))
    wrong = [*failures(seen), *live_failures(results)]
    if seen:
        print(table(seen, markdown=options.markdown))
    if results:
        print(live_table(results, markdown=options.markdown))
    if not options.markdown:
        print("\n".join(["", *wrong]))
    print(_summary(seen, results, wrong, time.monotonic() - began), file=sys.stderr if options.markdown else sys.stdout)
    return 1 if wrong or not (seen or results) else 0


def _elsewhere(options: argparse.Namespace, places: list[str], states: list[str]) -> bool:
    """Whether the places or states that were asked for are all of the other kind."""
    return bool((options.place and not places) or (options.state and not states))


def _summary(seen: list[Seen], results: list[Result], wrong: list[str], took: float) -> str:
    deaths = [each for each in seen if each.cell.state in STATES and expected(each.cell)]
    missed = sum(any(problem.startswith("missed") for problem in problems(each)) for each in deaths)
    false = sum("FALSE DEATH" in " ".join(each.problems) for each in results)
    return (
        f"{len(deaths)} deaths, {missed} of them missed; {len(results)} live peers, {false} of them taken for dead;"
        f" {len(wrong)} lines of what is not as the contract says; {took:.0f} s"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    for name, choices in (
        ("place", [*PLACES, *TROUBLES]),
        ("state", [*STATES, *LIVES]),
        ("kind", KINDS),
        ("loop", LOOPS),
        ("mode", MODES),
    ):
        parser.add_argument(
            f"--{name}", action="append", default=[], choices=list(choices), help="may be given more than once"
        )
    parser.add_argument("--live", action="store_true", help="only the live peers")
    parser.add_argument("--deaths", action="store_true", help="only the deaths")
    parser.add_argument("--markdown", action="store_true", help="the tables for the README")
    return parser.parse_args(argv)
