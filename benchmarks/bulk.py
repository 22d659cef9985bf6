"""What does a large transfer cost? One connection, one direction at a time.

The server receives or sends in pieces of 64 KiB, as its handler would. Before each timed part, a smaller amount whose
every byte is known is transferred and compared: by checksum when the server receives, by content when it sends.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from .contenders import NATIVE
from .native_programs import load
from .processes import Server
from .results import Metric, Results
from .runner import Option, Setting, all_started, ask, percent, rotated
from .servers.wire import checked_chunks

__all__ = ["main"]

CONTENDERS = (NATIVE, "bare", "drop-in", "protocol", "connection", "streams", "anyio")
METRICS = (
    Metric("cpu", "CPU us/MiB"),
    Metric("rate", "MiB/s"),
    Metric("server", "server core %"),
    Metric("load", "load core %"),
)
OPTIONS = (Option("mib", 1024, 16, "MiB of each transfer"),)
CASES = {"receive": ("upload", "u"), "send": ("download", "d")}
MIB = 1024 * 1024
CHECKED = 4 * MIB + 12345


def measure(setting: Setting, results: Results) -> None:
    """Measure both directions, with a fresh server for each round."""
    expected = zlib.crc32(b"".join(checked_chunks(CHECKED)))
    total = int(setting.own["mib"] * MIB)
    for turn in setting.turns(setting.contestants(CONTENDERS)):
        with all_started(setting, turn, "bulk") as servers:
            for number, case in enumerate(filter(setting.wants, CASES)):
                for each in rotated(turn, number):
                    if each.contender != NATIVE:
                        check(servers[each], case, expected)
                    results.add(case, *each, one_turn(servers[each], case, total))
    judge(results)


def check(server: Server, case: str, expected: int) -> None:
    """Check that what arrives is what was sent."""
    what, mode = CASES[case]
    answer = load(what, server.port, server.pid, CHECKED, mode.upper())["answer"]
    if case == "receive" and answer != expected:
        raise SystemExit(f"benchmarks: checksum {answer:#x} of what was received, expected {expected:#x}")


def one_turn(server: Server, case: str, total: int) -> dict[str, float]:
    """Measure one transfer."""
    what, mode = CASES[case]
    got = load(what, server.port, server.pid, total, mode)
    return {
        "cpu": got["server_cpu"] / (total / MIB) * 1e6,
        "rate": total / MIB / got["seconds"],
        "server": percent(got["server_cpu"], got["seconds"]),
        "load": percent(got["load_cpu"], got["seconds"]),
    }


def judge(results: Results) -> None:
    """Throughput of Connection beside asyncio's streams, on uvloop."""
    for case in CASES:
        ratios = results.ratios("connection", "streams", case=case, metric="rate")
        results.target(f"throughput, {case}, uvloop: connection / streams", ratios, 1.2, at_most=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Run this benchmark."""
    ask(Results("bulk", "Bulk transfer: one connection, one direction", METRICS), measure, argv, OPTIONS)


if __name__ == "__main__":
    main()
