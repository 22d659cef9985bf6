"""What does a message cost? Echo of small and large messages over few and many connections.

Each connection has one message under way; the load generator sends the next when the last has come back. Before each
timed part, messages whose content differs by connection and number are sent and compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .contenders import NATIVE
from .native_programs import load
from .processes import Server
from .results import Metric, Results
from .runner import Option, Setting, all_started, ask, headroom, percent, rotated

__all__ = ["main"]

CONTENDERS = (NATIVE, "bare", "drop-in", "protocol", "connection", "timed", "streams", "timeout", "anyio")
METRICS = (
    Metric("cpu", "CPU us/message"),
    Metric("rate", "messages/s"),
    Metric("p50", "p50 us"),
    Metric("p99", "p99 us"),
    Metric("server", "server core %"),
    Metric("load", "load core %"),
)
SIZES = (64, 1024, 65536)
CONNECTIONS = (1, 64, 1000)
USUAL = "1 KiB, 64 connections"
OPTIONS = (Option("seconds", 0.5, 0.03, "seconds of each turn"),)


def case_name(size: int, connections: int) -> str:
    """Return the name of a case."""
    text = f"{size} B" if size < 1024 else f"{size // 1024} KiB"
    return f"{text}, {connections:,} connection{'s' * (connections > 1)}"


def measure(setting: Setting, results: Results) -> None:
    """Measure all cases, with a fresh server for each round."""
    sizes, connections = (SIZES[:2], CONNECTIONS[:2]) if setting.quick else (SIZES, CONNECTIONS)
    cases = [each for each in itertools.product(sizes, connections) if setting.wants(case_name(*each))]
    for turn in setting.turns(setting.contestants(CONTENDERS)):
        with all_started(setting, turn, "echo") as servers:
            for number, case in enumerate(cases):
                for each in rotated(turn, number):
                    figures = one_turn(servers[each], *case, seconds=setting.own["seconds"])
                    results.add(case_name(*case), *each, figures)
    judge(results)
    results.notes += headroom(results, USUAL, "messages")


def one_turn(server: Server, size: int, connections: int, *, seconds: float) -> dict[str, float]:
    """Check what the server sends back, then measure."""
    load("check", server.port, connections, size, 3)
    got = load("echo", server.port, server.pid, connections, size, int(seconds * 200), int(seconds * 1000))
    return {
        "cpu": got["server_cpu"] / max(1, got["operations"]) * 1e6,
        "rate": got["operations"] / got["seconds"],
        "p50": got["p50"],
        "p99": got["p99"],
        "server": percent(got["server_cpu"], got["seconds"]),
        "load": percent(got["load_cpu"], got["seconds"]),
    }


def judge(results: Results) -> None:
    """CPU for each message, 1 KiB, 64 connections, uvloop; kaio's loop on both bases."""
    for one, other, bound in (
        ("protocol", "bare", 1.02),
        ("connection", "bare", 1.20),
        ("connection", "streams", 0.80),
        ("connection", "anyio", 0.50),
        ("drop-in", "bare", 1.03),
    ):
        for loop in ("uvloop", "asyncio") if one == "drop-in" else ("uvloop",):
            ratios = results.ratios(one, other, case=USUAL, loop=loop)
            results.target(f"CPU/message, {USUAL}, {loop}: {one} / {other}", ratios, bound)


def main(argv: Sequence[str] | None = None) -> None:
    """Run this benchmark."""
    ask(Results("echo", "Echo: what a message costs", METRICS), measure, argv, OPTIONS)


if __name__ == "__main__":
    main()
