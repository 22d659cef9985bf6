"""What the monitor costs for each accepted connection, in CPU time of the server.

    python benchmarks/monitor_cost.py [--rounds 9] [--connections 3000]

Three servers for each event loop, each a process: a bare asyncio.Protocol on loop.create_server, a KeepaliveProtocol
with keepalive="off", and one with keepalive="20s:10s:4", whose connections are in the monitor's wheel. They take turns,
in an order that changes from round to round; the client is on another core. The first round is not counted.

A connection is accepted, gets one byte, and is reset by its peer. Sockets' own work in the kernel is included.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import uvloop

import kaio

KINDS = {"bare": "asyncio.Protocol", "off": 'keepalive="off"', "on": 'keepalive="20s:10s:4"'}
LOOPS = ("asyncio", "uvloop")
CHUNK = 100  # connections that are open at the same time
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: no TIME_WAIT is left


class Bare(asyncio.Protocol):
    """What the others are compared with."""

    def connection_made(self, transport: Any) -> None:
        transport.write(b"x")


class Ours(kaio.KeepaliveProtocol):
    """The same as a KeepaliveProtocol."""

    def connection_made(self, transport: Any) -> None:
        transport.write(b"x")


async def serve(kind: str) -> None:
    """Serve until the standard input ends; for each line of it, print the CPU time so far."""
    loop = asyncio.get_running_loop()
    server: Any
    if kind == "bare":
        server = await loop.create_server(Bare, "127.0.0.1", 0, backlog=2048)
    else:
        keepalive = "off" if kind == "off" else "20s:10s:4"
        server = await kaio.create_server(Ours, "127.0.0.1", 0, keepalive=keepalive, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()

    def answer() -> None:
        if os.read(0, 1):
            print(time.process_time(), flush=True)
        else:
            ended.set()

    loop.add_reader(0, answer)
    await ended.wait()
    loop.remove_reader(0)
    server.close()


class Server:
    """A server process, pinned to a core."""

    def __init__(self, kind: str, loop: str, core: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", kind, "--loop", loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        os.sched_setaffinity(self.process.pid, {core})
        self.port = int(self._line())

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def cpu(self) -> float:
        """CPU seconds that it has used."""
        assert self.process.stdin is not None
        self.process.stdin.write(b".")
        self.process.stdin.flush()
        return float(self._line())

    def round(self, connections: int) -> float:
        """CPU seconds for each of so many connections."""
        before = self.cpu()
        for _ in range(connections // CHUNK):
            socks = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(CHUNK)]
            for sock in socks:
                assert sock.recv(1) == b"x"
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                sock.close()
        time.sleep(0.05)  # the last ends are seen
        return (self.cpu() - before) / (connections // CHUNK * CHUNK)

    def close(self) -> None:
        self.process.communicate()


def measure(loop: str, rounds: int, connections: int, core: int) -> dict[str, list[float]]:
    """Microseconds for each connection, by kind, in each round."""
    servers = {kind: Server(kind, loop, core) for kind in KINDS}
    order = list(KINDS)
    measured: dict[str, list[float]] = {kind: [] for kind in KINDS}
    try:
        for number in range(rounds + 1):
            for kind in order:
                cost = servers[kind].round(connections)
                if number:
                    measured[kind].append(cost * 1e6)
            order = [*order[1:], order[0]] if number % 2 else order[::-1]
    finally:
        for server in servers.values():
            server.close()
    return measured


def report(loop: str, measured: dict[str, list[float]]) -> None:
    """Print one loop's rows and ratios."""
    for kind, costs in measured.items():
        low, median, high = min(costs), statistics.median(costs), max(costs)
        print(f"{loop:8} {KINDS[kind]:22} {median:8.1f} {low:8.1f} {high:8.1f}")
    for one, other in (("on", "off"), ("off", "bare"), ("on", "bare")):
        ratios = [a / b for a, b in zip(measured[one], measured[other], strict=True)]
        ratio = statistics.median(measured[one]) / statistics.median(measured[other])
        print(f"{loop:8} {one + ' / ' + other:22} {ratio:8.3f} {min(ratios):8.3f} {max(ratios):8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of the server for each accepted connection")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--connections", type=int, default=3_000, help="in each round")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--loop", choices=LOOPS, help="only this one")
    options = parser.parse_args()
    if options.serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if options.loop == "uvloop" else None) as runner:
            runner.run(serve(options.serve))
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    print(f"Python {platform.python_version()}, uvloop {version('uvloop')}, Linux {platform.release()}")
    print(f"{options.rounds} rounds of {options.connections} connections each; us of CPU for each connection\n")
    print(f"{'loop':8} {'server':22} {'median':>8} {'least':>8} {'most':>8}")
    for loop in [options.loop] if options.loop else LOOPS:
        report(loop, measure(loop, options.rounds, options.connections, cores[-1]))


if __name__ == "__main__":
    main()
