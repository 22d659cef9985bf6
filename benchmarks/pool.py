"""What does a pool's check-out cost? Taking an idle connection and giving it back, alone and by many tasks at a time.

kaio's pool and redis-py's two have connections to one redis-server, asyncpg's to PostgreSQL; neither is said a word at
a check-out, but by asyncpg, which resets the session of each connection that is given back; "asyncpg-bare" is told not
to. redis-py looks for unread data at each check-out, as kaio does, and asyncpg does not.

200 tasks share 20 connections, and each lets the others run once while it has one, so that most have to wait.
redis-py's plain ConnectionPool does not let anybody wait, and so has 200 connections there. For scale, a whole PING and
its answer: by kaio's example `redis_pool` and by redis-py's client.

Each pool is in a process of its own, which lives as long as the run, and takes its turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from tests import servers

from .pool_clients import CONNECTIONS, KINDS, TASKS
from .processes import ROOT
from .results import Metric, Results
from .runner import Contestant, Option, Setting, ask, rotated

__all__ = ["main"]

METRICS = (Metric("cpu", "CPU us/operation"), Metric("rate", "operations/s"))
OPTIONS = (Option("seconds", 0.4, 0.03, "seconds of each turn"),)
OURS: Final = "kaio"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is asked for."""

    operation: str
    """check-out or PING."""
    tasks: int

    @property
    def name(self) -> str:
        """The case, for people."""
        return (
            f"{self.operation}, {'1 task' if self.tasks == 1 else f'{self.tasks} tasks on {CONNECTIONS} connections'}"
        )

    def is_for(self, kind: str) -> bool:
        """Whether a pool takes part: who speaks redis' protocol can PING."""
        return self.operation == "check-out" or not kind.startswith("asyncpg")


CASES: Final = [Case(operation, tasks) for operation in ("check-out", "PING") for tasks in (1, TASKS)]


class Client:
    """A pool's process."""

    def __init__(self, each: Contestant, port: int, core: int) -> None:
        self._each = each
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.pool_clients", each.contender, each.loop, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        os.sched_setaffinity(self._process.pid, {core})

    def run(self, case: Case, seconds: float) -> dict[str, float]:
        """Let it work for so long; return its figures."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([case.operation, case.tasks, seconds]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmarks: {self._each.contender} on {self._each.loop} has ended")
        got = json.loads(line)
        return {"cpu": got["cpu"] / got["operations"] * 1e6, "rate": got["operations"] / got["seconds"]}

    def finish(self) -> None:
        """End it."""
        self._process.communicate()


@contextlib.contextmanager
def started(setting: Setting, contestants: Sequence[Contestant]) -> Iterator[dict[Contestant, Client]]:
    """The servers, and a process for each pool, within the block."""
    missing = servers.lacking()
    if missing is not None:
        raise SystemExit(f"benchmarks: {missing}")
    with contextlib.ExitStack() as stack:
        redis, postgres = stack.enter_context(servers.redis()), stack.enter_context(servers.postgres())
        clients = {}
        for each in contestants:
            port = postgres.port if each.contender.startswith("asyncpg") else redis.port
            clients[each] = Client(each, port, setting.server_core)
            stack.callback(clients[each].finish)
        yield clients


def measure(setting: Setting, results: Results) -> None:
    """Each case, in each round, by each pool."""
    contestants = [Contestant(loop, kind) for loop in setting.loops for kind in KINDS]
    cases = [case for case in CASES if setting.wants(case.name)]
    with started(setting, contestants) as clients:
        for case in cases:  # what is made once is made by then
            for each in contestants:
                if case.is_for(each.contender):
                    clients[each].run(case, 0)
        for turn in setting.turns(contestants):
            for number, case in enumerate(cases):
                for each in rotated(turn, number):
                    if case.is_for(each.contender):
                        results.add(case.name, *each, clients[each].run(case, setting.own["seconds"]))
    for case in CASES:
        for loop in setting.loops:
            for other in ("redis-blocking", "asyncpg-bare") if case.operation == "check-out" else ("redis-blocking",):
                ratios = results.ratios(OURS, other, case=case.name, loop=loop)
                results.target(f"CPU, {case.name}, {loop}: {OURS} / {other}", ratios, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Run this benchmark."""
    title = "Pools: what it costs to take a connection and give it back"
    ask(Results("pool", title, METRICS, baseline=OURS), measure, argv, OPTIONS)


if __name__ == "__main__":
    main()
