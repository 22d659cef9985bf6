"""What does `kaio enforce` cost a connection? Connect, accept and close on loopback, with and without the programs.

    python -m benchmarks.enforce [--rounds N] [--connections N]

One process, which is in a cgroup of its own, makes all connections; the programs are attached for every other turn, so
that both ways see the same machine. setsockopt(2) is measured alike, because the guard runs before each of its calls.
The third way sets the five options by the program itself, as it would have to without the kernel's help.

CPU time of the process, which includes the kernel's work for it. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

from kaio.tools.enforcing import linked
from tests import own_cgroup

__all__ = ["main"]

POLICY: Final = "20s:10s:4"
TIMES: Final = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (6, 4, 20), (6, 5, 10), (6, 6, 4), (6, 18, 60_000))


def connections(number: int, *, options: bool) -> None:
    """Make connections, and give both ends the options if asked to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        for _ in range(number):
            client = socket.socket()
            for option in TIMES if options else ():
                client.setsockopt(*option)
            client.connect(address)
            accepted, _ = listener.accept()
            for option in TIMES if options else ():
                accepted.setsockopt(*option)
            client.close()
            accepted.close()


def calls(number: int) -> None:
    """Set an option that the guard is not interested in."""
    with socket.socket() as sock:
        for _ in range(number):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def cpu(doing: Callable[[], None], number: int) -> float:
    """CPU time of one of them, in microseconds."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    doing()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / number * 1e6


def measure(group: str, rounds: int, number: int) -> None:
    """Take the turns, and print medians and ratios."""
    found: dict[str, list[float]] = {}
    for turn in range(2 * rounds):
        enforced = turn % 2 == 1
        with linked(group, POLICY) if enforced else contextlib.nullcontext():
            way = "enforced" if enforced else "plain"
            took = cpu(lambda: connections(number, options=False), number)
            found.setdefault(f"connection, {way}", []).append(took)
            found.setdefault(f"setsockopt, {way}", []).append(cpu(lambda: calls(number * 10), number * 10))
            if not enforced:
                took = cpu(lambda: connections(number, options=True), number)
                found.setdefault("connection, by itself", []).append(took)
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, median in sorted(medians.items()):
        base = medians[f"{name.split(',')[0]}, plain"]
        print(f"{name:24} {median:8.2f} us CPU, {median / base:.2f} of plain")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark in a cgroup of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.enforce", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--within", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.within:
        measure(options.within, options.rounds, options.connections)
        return
    reason = own_cgroup.lacking()
    if reason is not None:
        sys.exit(reason)
    with own_cgroup.cgroup() as group:
        words = ["--rounds", str(options.rounds), "--connections", str(options.connections), "--within", group]
        command = [*own_cgroup.inside(group), sys.executable, "-m", "benchmarks.enforce", *words]
        subprocess.run(command, check=True, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


if __name__ == "__main__":
    main()
