"""All questions, or those that are named: `python -m benchmarks [QUESTION ...] [OPTION ...]`."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Sequence
from typing import Final

QUESTIONS: Final = ("echo", "bulk", "accept", "memory", "supervise", "detect", "workers", "pool", "import_time")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks one after the other; one that cannot run here is named, and the others still run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = list(itertools.takewhile(lambda each: not each.startswith("-"), arguments))
    options = arguments[len(named) :]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [QUESTION ...] [OPTION ...]",
        description="What kaio costs beside its peers. Options go to each question: python -m benchmarks.echo --help.",
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)} (all)")
    parsed = parser.parse_args([*named, *({"-h", "--help"} & {*options})])
    unknown = [question for question in parsed.questions if question not in QUESTIONS]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(QUESTIONS)}")
    failed = 0
    for question in parsed.questions or QUESTIONS:
        try:
            importlib.import_module(f"benchmarks.{question}").main(options)
        except SystemExit as exc:
            if not isinstance(exc.code, str):
                raise
            print(exc.code, file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
