"""What memory does an idle connection take? The server's proportional set size, before and after they came.

The client's ends are in another process. A few connections come first, and stay: what is made once is made by then.
The kernel's own memory for sockets is the same for all, and not in it. Every connection was greeted, and all stand
while it is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from .native_programs import hold
from .results import Metric, Results
from .runner import Option, Setting, ask

__all__ = ["main"]

CONTENDERS = ("bare", "drop-in", "protocol", "connection", "streams", "anyio", "ping", "read-timeout")
METRICS = (Metric("memory", "bytes/connection"), Metric("whole", "MiB of all"))
OPTIONS = (Option("connections", 10_000, 500, "idle connections"),)
FIRST = 200


def measure(setting: Setting, results: Results) -> None:
    """Measure, with a fresh server for each turn and no other beside it."""
    connections = int(setting.own["connections"])
    case = f"{connections:,} idle connections"
    for turn in setting.turns(setting.contestants(CONTENDERS)):
        for each in turn:
            with setting.start(each, "greet") as server, held(server.port, FIRST):
                before = server.memory()
                with held(server.port, connections):
                    after = server.memory()
            results.add(case, *each, {"memory": (after - before) / connections, "whole": after / 2**20})
    for one, other, bound in (
        ("protocol", "bare", 1.40),
        ("connection", "streams", 0.65),
        ("connection", "anyio", 0.35),
    ):
        ratios = results.ratios(one, other, case=case)
        results.target(f"memory/connection, uvloop: {one} / {other}", ratios, bound)


@contextlib.contextmanager
def held(port: int, connections: int) -> Iterator[None]:
    """Keep the connections open within the block."""
    client = hold(port, connections)
    assert client.stdout is not None
    try:
        if not client.stdout.readline():
            raise SystemExit(f"benchmarks: {connections} connections could not be held")
        yield
    finally:
        client.communicate()


def main(argv: Sequence[str] | None = None) -> None:
    """Run this benchmark."""
    ask(Results("memory", "Memory of an idle connection", METRICS), measure, argv, OPTIONS, rounds=5)


if __name__ == "__main__":
    main()
