"""The command: every property for its part of the time, then a table."""

from __future__ import annotations

import argparse
import random
import sys

from . import headers, netlink, proc, processes, settings, tables, texts, types
from .search import Property, search

__all__ = ["PROPERTIES", "main"]

PROPERTIES: dict[str, Property] = {
    each.name: each
    for module in (proc, processes, netlink, types, settings, texts, headers, tables)
    for each in module.PROPERTIES
}


def main(arguments: list[str] | None = None) -> int:
    """Search for input that breaks a property; the exit status is 1 if there is any."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random input for all parsers.")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all together; default 10")
    parser.add_argument("--seed", type=int, default=None, help="printed, so that a run can be had again")
    parser.add_argument("--only", default="", help="the properties that have this in their names")
    chosen = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**32) if chosen.seed is None else chosen.seed
    wanted = [each for name, each in PROPERTIES.items() if chosen.only in name]
    if not wanted:
        parser.error(f"no property has {chosen.only!r} in its name")
    print(f"{len(wanted)} properties, {chosen.minutes:g} minutes, seed {seed}", flush=True)
    total, broken = 0, 0
    for each in wanted:
        outcome = search(each, seed=seed, seconds=60 * chosen.minutes / len(wanted), examples=1)
        total += outcome.examples
        verdict = "holds" if outcome.failure is None else "BROKEN"
        print(f"{outcome.examples:>9} in {outcome.seconds:5.1f} s  {verdict:<6}  {each.name}", flush=True)
        if outcome.failure is not None:
            broken += 1
            print(outcome.failure, flush=True)
    print(f"{total} examples; {broken} of {len(wanted)} properties broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
