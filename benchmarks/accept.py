"""What does a connection cost that comes and goes? From accept to the end of both sides.

The client connects, gets one byte, says that it is done, and waits until the server has closed, too: a connection is
counted once it has come to its end on both sides, and one that was not greeted ends the run. A number of them is under
way at any time.
"""

from __future__ import annotations

from collections.abc import Sequence

from .contenders import NATIVE
from .native_programs import load
from .processes import Server
from .results import Metric, Results
from .runner import Option, Setting, all_started, ask, headroom, percent

__all__ = ["main"]

CONTENDERS = (NATIVE, "bare", "kernel", "drop-in", "protocol", "unwatched", "connection", "timed", "streams", "anyio")
METRICS = (
    Metric("cpu", "CPU us/connection"),
    Metric("rate", "connections/s"),
    Metric("p50", "p50 us"),
    Metric("p99", "p99 us"),
    Metric("server", "server core %"),
    Metric("load", "load core %"),
)
OPTIONS = (
    Option("seconds", 0.5, 0.05, "seconds of each turn"),
    Option("parallel", 64, 16, "connections under way at a time"),
)


def measure(setting: Setting, results: Results) -> None:
    """Measure, with a fresh server for each round."""
    parallel = int(setting.own["parallel"])
    case = f"{parallel} at a time"
    for turn in setting.turns(setting.contestants(CONTENDERS)):
        with all_started(setting, turn, "greet") as servers:
            for each in turn:
                results.add(case, *each, one_turn(servers[each], parallel, seconds=setting.own["seconds"]))
    judge(results, case)
    results.notes += headroom(results, case, "connections")


def one_turn(server: Server, parallel: int, *, seconds: float) -> dict[str, float]:
    """Open and close connections for a while."""
    got = load("accept", server.port, server.pid, parallel, int(seconds * 200), int(seconds * 1000))
    return {
        "cpu": got["server_cpu"] / got["operations"] * 1e6,
        "rate": got["operations"] / got["seconds"],
        "p50": got["p50"],
        "p99": got["p99"],
        "server": percent(got["server_cpu"], got["seconds"]),
        "load": percent(got["load_cpu"], got["seconds"]),
    }


def judge(results: Results, case: str) -> None:
    """CPU for each connection, on uvloop; kaio's loop on both bases."""
    for one, other, bound in (
        ("protocol", "bare", 1.15),
        ("connection", "streams", 0.50),
        ("connection", "anyio", 0.30),
        ("drop-in", "bare", 1.03),
    ):
        for loop in ("uvloop", "asyncio") if one == "drop-in" else ("uvloop",):
            ratios = results.ratios(one, other, case=case, loop=loop)
            results.target(f"CPU/connection, {loop}: {one} / {other}", ratios, bound)


def main(argv: Sequence[str] | None = None) -> None:
    """Run this benchmark."""
    ask(Results("accept", "Accept: what a connection costs that comes and goes", METRICS), measure, argv, OPTIONS)


if __name__ == "__main__":
    main()
