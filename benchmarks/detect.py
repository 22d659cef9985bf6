"""How long after the kernel's verdict is a peer's death reported?

The server has one connection after the other die, or all at once. The moment of the kernel's verdict is seen by a
witness: a process on the other core that watches duplicates of the same sockets, and spins (native/witness.c). The
report is peer_dead of a KeepaliveProtocol, DeadPeerError out of Connection.receive, and with the others what they have:
connection_lost, or the TimeoutError out of a read. Both read CLOCK_MONOTONIC.

Peers die as in kaio.testing.blackhole: their kernel drops what arrives. Each sends a byte at a moment of its own before
that, from which on its time counts, so that the deaths come one by one; their kernel timers have a grain of 32 ms.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Sequence

from kaio.testing import blackhole, lacking

from .native_programs import program
from .processes import Server
from .results import Metric, Results, quantile
from .runner import Contestant, Option, Setting, ask

__all__ = ["main"]

CONTENDERS = ("bare", "drop-in", "protocol", "connection", "streams")
METRICS = (
    Metric("p99", "p99 ms"),
    Metric("p50", "p50 ms"),
    Metric("most", "most ms"),
    Metric("span", "first verdict to last report ms"),
    Metric("missing", "not reported"),
)
OPTIONS = (
    Option("deaths", 100, 5, "deaths, one at a time, of each turn"),
    Option("step", 0.05, 0.05, "seconds between them"),
    Option("together", 5_000, 50, "deaths at once"),
)
ONE_BY_ONE = "one at a time"
POLICY = "1s:1s:1"
DETECTION = 2.0  # seconds: what that policy takes
SLACK = 5.0  # seconds that the last one may take longer


def measure(setting: Setting, results: Results) -> None:
    """Measure, with a fresh server for each turn and no other beside it."""
    reason = lacking()
    if reason is not None:
        raise SystemExit(f"benchmarks: peers cannot play dead here: {reason}")
    deaths, together = int(setting.own["deaths"]), int(setting.own["together"])
    at_once = f"{together:,} at once"
    cases = {ONE_BY_ONE: (deaths, setting.own["step"]), at_once: (together, 0.0)}
    pooled: dict[tuple[str, Contestant], list[float]] = {}
    for turn in setting.turns(setting.contestants(CONTENDERS)):
        for each in turn:
            for case in filter(setting.wants, cases):
                overshoots, span = let_die(setting, each, *cases[case])
                pooled.setdefault((case, each), []).extend(overshoots)
                results.add(case, *each, figures(overshoots, span=span, expected=cases[case][0]))
    for (case, each), overshoots in pooled.items():
        if each.contender in ("protocol", "connection"):
            judge(results, case, each, overshoots)


def figures(overshoots: Sequence[float], *, span: float, expected: int) -> dict[str, float]:
    """Return the figures of one turn."""
    return {
        "p99": quantile(overshoots, 0.99),
        "p50": quantile(overshoots, 0.50),
        "most": max(overshoots),
        "span": span,
        "missing": expected - len(overshoots),
    }


def judge(results: Results, case: str, each: Contestant, overshoots: Sequence[float]) -> None:
    """All deaths of all rounds together: a p99 of few would be their greatest."""
    who = f"{each.contender} on {each.loop}, {len(overshoots):,} deaths"
    if case == ONE_BY_ONE:
        results.target(f"p99 of overshoot in ms, {case}, {who}", [quantile(overshoots, 0.99)], 5)
    else:
        results.target(f"greatest overshoot in ms, {case}, {who}", [max(overshoots)], 1000)


def let_die(setting: Setting, each: Contestant, count: int, step: float) -> tuple[list[float], float]:
    """The overshoot of each death, and the time from the first verdict to the last report, in milliseconds."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(setting.start(each, "report", policy=POLICY))
        peers = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(count)]
        witness = stack.enter_context(watching(server, count))
        if step:
            for peer in peers:
                peer.send(b"x")
                time.sleep(step)  # until it is acknowledged, or it would send it again
                stack.enter_context(blackhole(peer))
        else:
            for peer in peers:
                peer.send(b"x")
            time.sleep(0.3)
            stack.enter_context(blackhole(*peers))
        server.says(within=DETECTION + SLACK)
        reported = moments(server.finish())
        seen = moments(witness.communicate()[0].splitlines())
    overshoots = [(reported[port] - seen[port]) / 1e6 for port in reported if port in seen]
    if not overshoots:
        raise SystemExit(f"benchmarks: no death was reported by {each.contender} on {each.loop}")
    return overshoots, (max(reported.values()) - min(seen.values())) / 1e6


def watching(server: Server, count: int) -> subprocess.Popen[str]:
    """A witness of the server's connections. The server says which they are as they come."""
    witness = subprocess.Popen([program("witness")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert witness.stdin is not None
    assert witness.stdout is not None
    for _ in range(count):
        port, descriptor = server.line().split()
        witness.stdin.write(f"{server.pid} {descriptor} {port}\n")
    witness.stdin.write("\n")
    witness.stdin.flush()
    witness.stdout.readline()
    return witness


def moments(lines: Sequence[str]) -> dict[int, int]:
    """Return nanoseconds by the port of the client."""
    return {int(port): int(at) for port, at in (line.split() for line in lines if line)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run this benchmark."""
    results = Results("detect", "Detection: from the kernel's verdict to the report", METRICS)
    ask(results, measure, argv, OPTIONS, rounds=5)


if __name__ == "__main__":
    main()
