"""What does it cost to watch over thousands of idle connections? CPU time, wake-ups, packets.

The connections come evenly over one interval, as they do in life, and then nothing happens on them but what their
supervision does. Each server is alone, in a network namespace of its own where packets are counted. Several intervals
are measured, one after the other, and each counts as a round. Every connection is checked to stand at the end.

A process is not charged for what the kernel does by itself: its keepalive timers run in interrupts. So the CPU time of
the whole machine is shown, too: both ends, kernel and all, counted in ticks of 10 ms. It includes what the machine does
anyway, which is that of "bare", whose connections nobody watches; it means little while anything else runs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from .native_programs import hold
from .networks import own_network
from .processes import Server
from .results import Metric, Results
from .runner import Contestant, Option, Setting, ask

__all__ = ["main"]

CONTENDERS = ("bare", "drop-in", "kernel", "protocol", "connection", "timed", "heartbeat", "ping", "read-timeout")
METRICS = (
    Metric("cpu", "CPU ms/minute"),
    Metric("switches", "wake-ups/minute"),
    Metric("packets", "packets/minute"),
    Metric("machine", "CPU ms/minute of the machine"),
)
OPTIONS = (
    Option("connections", 10_000, 100, "idle connections"),
    Option("interval", 20, 1, "seconds of silence after which a peer is asked"),
    Option("intervals", 3, 1, "how many of them to watch for"),
)


class Sample(NamedTuple):
    """What has been used so far, or in a minute. Names are those of the metrics."""

    cpu: float
    """Milliseconds."""
    switches: float
    packets: float
    machine: float
    """Milliseconds of all cores."""


def measure(setting: Setting, results: Results) -> None:
    """One after the other: side by side, the probes of all would be more than loopback's queue takes."""
    connections, interval = int(setting.own["connections"]), setting.own["interval"]
    case = f"{connections:,} idle connections, asked after {interval:g} s"
    for turn in setting.turns(setting.contestants(CONTENDERS)):
        for each in turn:
            dropped = backlog_drops()
            for used in watch_over(setting, each, connections):
                results.add(case, *each, used._asdict())
            dropped = backlog_drops() - dropped
            if dropped:
                results.notes.append(f"{dropped} packets on this machine were too many for a queue: {each.contender}")
    for one, bound in {"protocol": 1 / 20, "connection": 1 / 20, "heartbeat": 1 / 2}.items():
        ratios = results.ratios(one, "ping", case=case)
        results.target(f"CPU to watch over {connections:,}, uvloop: {one} / ping", ratios, bound)


def watch_over(setting: Setting, each: Contestant, connections: int) -> list[Sample]:
    """What it uses in a minute, by each of several intervals."""
    interval = setting.own["interval"]
    policy = f"{interval:g}s:{max(1, interval // 2):g}s:4"
    with contextlib.ExitStack() as stack:
        with own_network():
            server = stack.enter_context(setting.start(each, "greet", policy=policy))
            client = hold(server.port, connections, spread=interval)
        stack.callback(client.communicate)
        assert client.stdout is not None
        if not client.stdout.readline():
            raise SystemExit(f"benchmarks: {connections} connections could not be held")
        time.sleep(interval / 2)
        moments = [(time.monotonic(), sample(server))]
        for _ in range(int(setting.own["intervals"])):
            time.sleep(interval)
            moments.append((time.monotonic(), sample(server)))
        if client.poll() is not None:
            raise SystemExit(f"benchmarks: an idle connection has ended: {each.contender} on {each.loop}")
    return [
        Sample(*((end - start) * 60 / (until - since) for start, end in zip(before, after, strict=True)))
        for (since, before), (until, after) in itertools.pairwise(moments)
    ]


# -- what the system says


def sample(server: Server) -> Sample:
    """Return the present counters."""
    all_cores = time.monotonic() * 1e3 * (os.cpu_count() or 1)
    return Sample(server.cpu() * 1e3, server.switches(), server.packets(), all_cores - idle_milliseconds())


def idle_milliseconds() -> float:
    """What all cores together have idled, since the machine started: proc(5)."""
    with open("/proc/stat") as file:
        _, _user, _nice, _system, idle, waiting, *_ = file.readline().split()
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK") * 1e3


def backlog_drops() -> int:
    """Packets that were dropped because a core's queue was full: net.core.netdev_max_backlog.

    Timers of 20 s expire in bursts 2 s apart (the grain of the kernel's timer wheel, 512 ticks of 4 ms), and loopback
    puts a burst's probes into one queue of 1,000. What is lost is asked again.
    """
    with open("/proc/net/softnet_stat") as file:
        return sum(int(line.split()[1], 16) for line in file)


def main(argv: Sequence[str] | None = None) -> None:
    """Run this benchmark."""
    title = "Supervision: what it costs to watch over idle connections"
    ask(Results("supervise", title, METRICS), measure, argv, OPTIONS, rounds=1)


if __name__ == "__main__":
    main()
