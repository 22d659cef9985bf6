"""The command: `python -m scripts.conformance [--suite NAME] [-k PART]`.

Exit status: 0 when no test is worse over kaio's loop, 1 when one is or a suite never met kaio's loop, 2 when the suites
cannot be had.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from . import report, suites
from .compare import Comparison, compare
from .jobs import Runner
from .places import Place, PlaceError
from .suites import Suite

__all__: list[str] = []


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.conformance",
        description="Run other projects' test suites over a base loop and over kaio's loop on it, and compare.",
    )
    parser.add_argument("--suite", action="append", choices=suites.NAMES, help="only this suite; may be repeated")
    parser.add_argument("-k", dest="pattern", default="", metavar="PART", help="only tests with PART in their names")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter (default: this one)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="modules at a time (default: as cores)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--control",
        action="store_true",
        help="put an empty subclass of the base in kaio's place: what is worse then is the comparison's own doing",
    )
    return parser.parse_args(argv)


def _compared(runner: Runner, suite: Suite, module: str) -> Comparison:
    began = time.monotonic()
    base = runner.run(suite, module, kaio=False)
    kaio = runner.run(suite, module, kaio=True) if base else {}
    comparison = compare(suite.name, module, base, kaio, functools.partial(runner.run, suite, module))
    _say(f"{suite.name} {module}: {len(base)} tests, {time.monotonic() - began:.0f} s")
    return comparison


def _main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    try:
        place = Place(arguments.python)
        chosen = suites.prepared(place, arguments.suite or suites.NAMES)
    except PlaceError as exc:
        _say(f"conformance: {exc}")
        return 2
    if not place.isolated:
        _say("no network namespaces here: the suites share this machine's network")
    runner = Runner(place, pattern=arguments.pattern, control=arguments.control)
    with ThreadPoolExecutor(max(arguments.jobs, 1)) as pool:
        started = [pool.submit(_compared, runner, suite, module) for suite in chosen for module in suite.modules]
        comparisons = [future.result() for future in started]
    comparisons = [comparison for comparison in comparisons if comparison.base]
    if arguments.json:
        print(json.dumps(report.as_json(place.version, comparisons), indent=2))
    else:
        print(place.version, *report.as_text(comparisons), sep="\n")
    return _judged(comparisons, whole=not arguments.pattern)


def _judged(comparisons: Sequence[Comparison], *, whole: bool) -> int:
    if not comparisons:
        _say("conformance: no test has such a name")
        return 2
    met = {comparison.suite for comparison in comparisons if comparison.loops}
    idle = sorted({comparison.suite for comparison in comparisons} - met) if whole else []
    if idle:
        _say(f"conformance: no loop of kaio's was made in {', '.join(idle)}: it proves nothing")
    return 1 if idle or any(comparison.regressions for comparison in comparisons) else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
