"""How are connections spread over workers: by a socket for each (SO_REUSEPORT), or by one that all accept from?

Three ways of coming: one after the other; many at a time, each followed by another; 2,000 at once, which stay. The
unevenness is how much more than its share the busiest worker got. The workers run on all cores, beside the load.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final

from .native_programs import hold, load
from .processes import ROOT
from .results import Metric, Results
from .runner import Contestant, Option, Setting, ask

__all__ = ["main"]

KINDS: Final = ("own", "shared")
METRICS = (Metric("uneven", "busiest worker, % above its share"), Metric("rate", "connections/s"))
OPTIONS = (
    Option("seconds", 0.6, 0.05, "seconds of each turn"),
    Option("parallel", 64, 16, "connections under way at a time"),
    Option("connections", 2000, 100, "connections that come at once"),
)
_CORES: Final = sorted(os.sched_getaffinity(0))


class Server:
    """A supervisor with its workers."""

    def __init__(self, loop: str, workers: int, kind: str) -> None:
        self.counts: list[int] = []
        """How many connections each worker had, after the end."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.servers.workers", loop, str(workers), kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        os.sched_setaffinity(self.process.pid, _CORES)
        assert self.process.stderr is not None
        found = next(
            (found for line in self.process.stderr if (found := re.search(r"serving on \S+:(\d+)", line))), None
        )
        if found is None:
            raise SystemExit("benchmarks: the workers did not start")
        self.port = int(found[1])

    def stop(self) -> None:
        """End it, and read the counts."""
        self.process.terminate()
        self.counts = [int(line) for line in self.process.communicate()[0].splitlines()]


@contextlib.contextmanager
def started(loop: str, workers: int, kind: str) -> Iterator[Server]:
    """A server; its counts are known after the block."""
    server = Server(loop, workers, kind)
    try:
        yield server
    finally:
        server.stop()


def measure(setting: Setting, results: Results) -> None:
    """Each way of coming, each number of workers."""
    contestants = [Contestant(loop, kind) for loop in setting.loops for kind in KINDS]
    parallel, connections = int(setting.own["parallel"]), int(setting.own["connections"])
    ways = {"one by one": 1, f"{parallel} at a time": parallel, f"{connections:,} at once": 0}
    cases = [(workers, way) for workers in ((2,) if setting.quick else (2, 4)) for way in ways]
    for turn in setting.turns(contestants):
        for workers, way in cases:
            case = f"{workers} workers, {way}"
            for each in turn if setting.wants(case) else ():
                with started(each.loop, workers, each.contender) as server:
                    rate = come(server, ways[way], connections, setting.own["seconds"])
                even = sum(server.counts) / workers
                results.add(case, *each, {"uneven": 100 * (max(server.counts) / even - 1), "rate": rate})
    for workers, way in cases:
        case = f"{workers} workers, {way}"
        for loop in setting.loops:
            own = results.rows.get((case, loop, "own"), {}).get("uneven", [])
            results.target(f"own sockets, {case}, {loop}: % above the share", own, 20)


def come(server: Server, parallel: int, connections: int, seconds: float) -> float:
    """Connect; return how many connections came in a second."""
    if parallel:
        got = load("accept", server.port, server.process.pid, parallel, 0, int(seconds * 1000))
        return float(got["operations"] / got["seconds"])
    began = time.monotonic()
    client = hold(server.port, connections)
    assert client.stdout is not None
    client.stdout.readline()
    took = time.monotonic() - began
    client.communicate()
    return connections / took


def main(argv: Sequence[str] | None = None) -> None:
    """Run this benchmark."""
    title = "Workers: a socket for each, or one for all"
    ask(Results("workers", title, METRICS, baseline="shared"), measure, argv, OPTIONS, rounds=5)


if __name__ == "__main__":
    main()
