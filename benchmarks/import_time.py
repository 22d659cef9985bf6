"""What does the import cost? CPU time, user and system, of fresh interpreters; an empty one's is taken off.

kaio and anyio import their parts when a name of them is first asked for: what a program pays that uses kaio's is shown,
too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .processes import ROOT
from .results import Metric, Results
from .runner import Contestant, Setting, ask

__all__ = ["main"]

EMPTY = "nothing"
PEERS = "asyncio, anyio, uvloop"
USED = "kaio; kaio.connect, kaio.serve"
IMPORTS = (EMPTY, PEERS, "kaio", USED, "asyncio", "anyio")
METRICS = (Metric("cpu", "CPU ms"), Metric("whole", "CPU ms with the interpreter"))
CASE = "import"


def measure(setting: Setting, results: Results) -> None:
    """Measure all imports in turn, repeatedly."""
    for name in IMPORTS:
        run(name, setting.server_core)  # all that is read is in the page cache, all bytecode is written
    for turn in setting.turns([Contestant("-", name) for name in IMPORTS]):
        took = {each.contender: run(each.contender, setting.server_core) for each in turn}
        for name in IMPORTS[1:]:
            results.add(CASE, "-", name, {"cpu": (took[name] - took[EMPTY]) * 1e3, "whole": took[name] * 1e3})
    results.target(f"import kaio / import {PEERS}", results.ratios("kaio", PEERS, case=CASE, loop="-"), 1.3)


def run(names: str, core: int) -> float:
    """Return the CPU time, in seconds, of an interpreter that imports these and exits."""
    code = "pass" if names == EMPTY else f"import {names}"
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)})
    os.sched_setaffinity(pid, {core})
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"benchmarks: {code} failed")
    return used.ru_utime + used.ru_stime


def main(argv: Sequence[str] | None = None) -> None:
    """Run this benchmark."""
    ask(
        Results("import_time", "Import: CPU time of import statements", METRICS, baseline=PEERS),
        measure,
        argv,
        rounds=31,
    )


if __name__ == "__main__":
    main()
