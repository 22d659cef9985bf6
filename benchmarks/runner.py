"""How a benchmark runs: its options, the two cores, and the order of the contestants."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from .contenders import CONTENDERS, LOOPS, NATIVE
from .networks import congestion_control, own_network
from .processes import Server
from .results import Results

__all__ = ["POLICY", "Contestant", "Option", "Setting", "all_started", "ask", "headroom", "percent", "rotated"]

POLICY: Final = "20s:10s:4"
"""What kaio's contenders watch their connections with."""
_CORES: Final = sorted(os.sched_getaffinity(0))
_RESULTS: Final = pathlib.Path(__file__).parent / "results"


class Contestant(NamedTuple):
    """A contender on a loop."""

    loop: str
    contender: str


class Option(NamedTuple):
    """A number that one question takes beside the common options: its value, and that with --quick."""

    name: str
    usual: float
    quick: float
    help: str


@dataclasses.dataclass
class Setting:
    """What was asked for, and where the processes go."""

    rounds: int
    quick: bool
    loops: Sequence[str]
    only: Sequence[str]
    results: pathlib.Path | None
    """Where they are written."""
    case: str
    own: dict[str, float]
    """The question's own options."""
    server_core: int
    """Where the servers run; all else is on another one."""

    def wants(self, case: str) -> bool:
        """Whether a case was not deselected."""
        return self.case in case

    def contestants(self, names: Sequence[str]) -> list[Contestant]:
        """Those of the named contenders that were not deselected, on every loop."""
        chosen = [name for name in names if not self.only or name in self.only]
        made = [Contestant(loop, name) for loop in self.loops for name in chosen if name != NATIVE]
        return [Contestant("-", NATIVE)] * (NATIVE in chosen) + made

    def turns(self, contestants: Sequence[Contestant]) -> Iterator[list[Contestant]]:
        """For each round all contestants; each has every place in the order, and every other as its neighbour."""
        for number in range(self.rounds):
            if sys.stderr.isatty():
                print(f"round {number + 1} of {self.rounds}", end="\r", file=sys.stderr, flush=True)
            order = rotated(contestants, number * len(contestants) // self.rounds)
            yield order[::-1] if number % 2 else order

    def start(self, contestant: Contestant, application: str, *, policy: str = POLICY) -> Server:
        """A server on its core."""
        return Server(contestant.contender, contestant.loop, application, policy=policy, core=self.server_core)


def rotated(turn: Sequence[Contestant], by: int) -> list[Contestant]:
    """The same order with another beginning."""
    return [turn[(place + by) % len(turn)] for place in range(len(turn))]


def headroom(results: Results, case: str, what: str) -> list[str]:
    """What shows that the load generator is not what was waited for: its rate against the server in C."""
    rates = {row: statistics.median(figures["rate"]) for row, figures in results.rows.items() if row[0] == case}
    limit = rates.pop((case, "-", NATIVE), None)
    if limit is None or not rates:
        return []
    quickest = max(rates, key=lambda row: rates[row])
    figures = {key: statistics.median(values) for key, values in results.rows[quickest].items()}
    said = (
        f"load generator, {case}: {limit:,.0f} {what}/s against the server in C; {rates[quickest]:,.0f}/s against the"
        f" quickest other, {quickest[2]} on {quickest[1]}, whose core is {figures['server']:.0f} % busy then, and the"
        f" load's {figures['load']:.0f} %"
    )
    return [said]


@contextlib.contextmanager
def all_started(setting: Setting, turn: Sequence[Contestant], application: str) -> Iterator[dict[Contestant, Server]]:
    """A server for each, within the block. All have started when it begins: none takes time from another."""
    with contextlib.ExitStack() as stack:
        servers = {each: stack.enter_context(setting.start(each, application)) for each in turn}
        for server in servers.values():
            server.wait()
        yield servers


def percent(part: float, whole: float) -> float:
    """Return a part of a whole in percent."""
    return 100 * part / whole if whole else 0.0


def ask(
    results: Results,
    measure: Callable[[Setting, Results], None],
    argv: Sequence[str] | None,
    own: Sequence[Option] = (),
    *,
    rounds: int = 9,
) -> None:
    """Parse the command line, measure, and print the results."""
    setting = _setting(results, argv, own, rounds)
    with own_network():
        tcp = congestion_control()
        measure(setting, results)
    results.show()
    options: dict[str, Any] = {"rounds": setting.rounds, "quick": setting.quick, "tcp": tcp, **setting.own}
    if setting.results is not None:
        results.save(setting.results, options)


def _setting(results: Results, argv: Sequence[str] | None, own: Sequence[Option], rounds: int) -> Setting:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{results.question}",
        description=results.title,
        epilog="Contenders: " + "; ".join(f"{name} ({each.label})" for name, each in CONTENDERS.items()) + ".",
    )
    parser.add_argument("--rounds", type=int, help=f"how often each has its turn ({rounds}; with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="tiny numbers: whether it works, not what it costs")
    parser.add_argument("--loops", default=",".join(LOOPS), help="which event loops (%(default)s)")
    parser.add_argument("--only", default="", help="which contenders, with commas between (all)")
    parser.add_argument(
        "--results", type=pathlib.Path, help="folder for JSON and pictures (benchmarks/results, for a whole run)"
    )
    parser.add_argument("--case", default="", help="only the cases in whose name this is")
    for option in own:
        parser.add_argument(f"--{option.name}", type=float, help=f"{option.help} ({option.usual:g})")
    parsed = parser.parse_args(argv)
    loops, only = ([each for each in text.split(",") if each] for text in (parsed.loops, parsed.only))
    for given, known, what in ((loops, LOOPS, "loops"), (only, CONTENDERS, "only")):
        for each in given:
            if each not in known:
                parser.error(f"argument --{what}: {each!r} is none of {', '.join(known)}")
    if parsed.rounds is not None and parsed.rounds < 1:
        parser.error(f"argument --rounds: {parsed.rounds}: must be at least 1")
    whole = not (parsed.quick or parsed.only or parsed.case or set(loops) != set(LOOPS))
    return Setting(
        rounds=parsed.rounds or (1 if parsed.quick else rounds),
        quick=parsed.quick,
        loops=loops,
        only=only,
        results=parsed.results or (_RESULTS if whole else None),
        case=parsed.case,
        own={option.name: _value(parsed, option) for option in own},
        server_core=_server_core(),
    )


def _value(parsed: argparse.Namespace, option: Option) -> float:
    given = getattr(parsed, option.name)
    return float((option.quick if parsed.quick else option.usual) if given is None else given)


def _server_core() -> int:
    """The core for servers. This process goes to another one, and what it starts follows it."""
    if len(_CORES) < 2:
        print("one core only: server and load disturb each other, and the figures say little", file=sys.stderr)
    os.sched_setaffinity(0, {_CORES[0]})
    return _CORES[-1]
