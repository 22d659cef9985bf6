"""Servers with thousands of connections, and their clients: run by test_monitor_scale, each in a process of its own.

Arguments: what is measured, on which loop, and what that takes. The figures come as one line of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import uvloop

import kaio
from kaio.testing import blackhole

DESCRIPTORS = 12_000
CHUNK = 250  # connections that are opened in one go
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing resets, and leaves no TIME_WAIT


async def until(condition: Callable[[], object], *, within: float, every: float = 0.005) -> None:
    """Wait for a condition that no event announces."""
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(every)


class Greeter(kaio.KeepaliveProtocol):
    """Sends one byte, so that a client knows that it has been accepted."""

    def connection_made(self, transport: Any) -> None:
        transport.write(b"x")


async def greet(factory: Any, keepalive: Any) -> tuple[kaio.Server, int]:
    """A server for such protocols, and its port."""
    server = await kaio.create_server(factory, "127.0.0.1", 0, keepalive=keepalive, backlog=2048)
    return server, server.sockets[0].getsockname()[1]


def client(what: str, port: int, count: int) -> subprocess.Popen[bytes]:
    """A client process, which ends when its standard input does."""
    command = [sys.executable, __file__, what, str(port), str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def connect(port: int, count: int) -> list[socket.socket]:
    """Open connections, all of them accepted when this returns."""
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for sock in socks:
        assert sock.recv(1) == b"x"
    return socks


def hold(port: int, count: int) -> None:
    """A client that opens connections and keeps them until its standard input ends."""
    socks = [sock for _ in range(count // CHUNK) for sock in connect(port, CHUNK)]
    sys.stdin.read()
    for sock in socks:
        sock.close()


def churn_through(port: int, count: int) -> None:
    """A client that opens connections and resets them, a few hundred at a time."""
    for _ in range(count // CHUNK):
        for sock in connect(port, CHUNK):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()


# -- idle: what the monitor costs while nothing happens


async def idle(count: int) -> dict[str, Any]:
    """Idle connections over one idle time, in which each is looked at for the first time."""
    policy = kaio.Keepalive(20, 10, 4)
    counters = kaio.get_monitor().counters
    server, port = await greet(Greeter, policy)
    process = client("hold", port, count)
    await until(lambda: counters.watched, within=60, every=0.001)
    began = time.monotonic()
    await until(lambda: counters.watched == count, within=60)
    accepted = time.monotonic() - began
    await asyncio.sleep(began + 24 - time.monotonic())  # the first looks come after 25 s
    start, cpu, looks, wakeups = time.monotonic(), time.process_time(), counters.looks, counters.wakeups
    await asyncio.sleep(20)
    took, cpu = time.monotonic() - start, time.process_time() - cpu
    figures = {
        "accepted in": accepted,
        "window": took,
        "looks before": looks,
        "looks a second": (counters.looks - looks) / took,
        "wakeups a second": (counters.wakeups - wakeups) / took,
        "cpu": cpu / took,
        "watched": counters.watched,
        "suspects": counters.suspects,
        "deaths": sum(counters.deaths.values()),
    }
    server.close()
    server.abort_clients()
    process.communicate()
    await server.wait_closed()
    return figures


# -- die: thousands of deaths in the same instant


class Mortal(Greeter):
    """Writes down how it was told of its end."""

    def __init__(self) -> None:
        self.dead: list[BaseException] = []
        self.lost: list[BaseException | None] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(b"x")

    def peer_dead(self, error: kaio.DeadPeerError) -> None:
        self.dead.append(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


class Ticker:
    """Runs once in every turn of the loop, and measures what CPU time the turns take."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.longest = self.longest_wall = 0.0
        self._cpu, self._wall = time.thread_time(), time.monotonic()
        self._handle = self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        cpu, wall = time.thread_time(), time.monotonic()
        self.longest = max(self.longest, cpu - self._cpu)
        self.longest_wall = max(self.longest_wall, wall - self._wall)
        self._cpu, self._wall = cpu, wall
        self._handle = self._loop.call_soon(self._tick)

    def stop(self) -> None:
        self._handle.cancel()


async def die(how: str, count: int) -> dict[str, Any]:
    """All peers go silent at once: idle, or with a byte under way to each."""
    made: list[Mortal] = []

    def factory() -> Mortal:
        made.append(Mortal())
        return made[-1]

    server, port = await greet(factory, kaio.Keepalive(1, 1, 2))
    counters = server.counters
    peers: list[socket.socket] = []

    def accepted() -> bool:
        return server.counters.watched == len(peers)

    while len(peers) < count:
        peers += [socket.create_connection(("127.0.0.1", port)) for _ in range(CHUNK)]
        await until(accepted, within=60)
    for protocol in made:  # acknowledged at once: so all have been heard in the same instant
        protocol.transport.write(b"x")
    await asyncio.sleep(0.1)
    with blackhole(*peers):
        if how == "writing":
            for protocol in made:
                protocol.transport.write(b"x")
        await asyncio.sleep(0)  # uvloop writes at the end of its turn
        began = time.monotonic()
        cpu = time.thread_time()
        ticker = Ticker()
        await until(lambda: counters.suspects + sum(counters.deaths.values()) >= count, within=60)
        suspected, at_suspicion = time.monotonic() - began, ticker.longest
        await until(lambda: sum(counters.deaths.values()) == count and all(p.lost for p in made), within=60)
        took = time.monotonic() - began
        cpu = time.thread_time() - cpu
        await asyncio.sleep(0.2)
        ticker.stop()
    once = sum(len(p.dead) == 1 and len(p.lost) == 1 and p.dead[0] is p.lost[0] for p in made)
    figures = {
        "once": once,
        "took": took,
        "suspected after": suspected,
        "longest turn": ticker.longest,
        "longest turn up to suspicion": at_suspicion,
        "longest turn by the clock": ticker.longest_wall,
        "cpu": cpu,
        "suspects": counters.suspects,
        "causes": {str(cause): number for cause, number in counters.deaths.items() if number},
    }
    for sock in peers:
        sock.close()
    server.close()
    await server.wait_closed()
    return figures


# -- churn: connections that come and go


class Paused(Greeter):
    """Pauses reading at once, and so depends on the error watch."""

    def connection_made(self, transport: Any) -> None:
        transport.write(b"x")
        transport.pause_reading()


def footprint(monitor: kaio.Monitor) -> dict[str, int]:
    """What a process has and the monitor holds now."""
    gc.collect()
    wheel = monitor._wheel
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return {
        "resident": pages * resource.getpagesize(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "watched": monitor.counters.watched,
        "in buckets": sum(map(len, wheel._buckets.values())),
        "buckets": len(wheel._buckets),
        "ticks": len(wheel._ticks),
        "now": len(wheel._due),
        "errors": 0 if monitor._errors is None else len(monitor._errors.connections) + 1,
    }


async def churn(warm: int, plain: int, paused: int) -> dict[str, Any]:
    """Rounds of connections opened and reset: to warm up, ordinary ones, and some that pause reading."""
    monitor = kaio.get_monitor()
    pausing = False
    error_watched = 0

    def factory() -> kaio.KeepaliveProtocol:
        return Paused() if pausing else Greeter()

    server, port = await greet(factory, kaio.Keepalive(20, 10, 4))

    async def once(count: int) -> None:
        nonlocal error_watched
        process = client("churn_through", port, count)
        while process.poll() is None:
            await asyncio.sleep(0.005)
            error_watched = max(error_watched, 0 if monitor._errors is None else len(monitor._errors.connections))
        assert process.wait() == 0
        process.communicate()
        await until(lambda: not server.connections, within=60)

    figures: dict[str, Any] = {}
    await once(warm)
    pausing = True
    await once(CHUNK)
    figures["warm"] = footprint(monitor)
    pausing = False
    await once(plain)
    figures["plain"] = footprint(monitor)
    pausing = True
    await once(paused)
    figures["paused"] = footprint(monitor)
    figures["most in the error watch"] = error_watched
    server.close()
    await server.wait_closed()
    return figures


# -- memory: what Python allocates for a connection


async def memory(keepalive: str, count: int) -> dict[str, Any]:
    """Bytes for each accepted connection."""
    counters = kaio.get_monitor().counters
    server, port = await greet(Greeter, keepalive)
    warm = client("hold", port, CHUNK)
    await until(lambda: counters.watched == CHUNK, within=60)
    tracemalloc.start()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    process = client("hold", port, count)
    await until(lambda: counters.watched == CHUNK + count, within=60)
    after = sys.maxsize
    for _ in range(10):  # what made the transports takes memory too, and ends in the next turns
        await asyncio.sleep(0.05)
        gc.collect()
        after = min(after, tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    for each in (warm, process):
        each.communicate()
    server.close()
    await server.wait_closed()
    return {"each": (after - before) / count}


# -- echo: for counting system calls


class Echo(kaio.KeepaliveProtocol):
    """Greets, and sends back what comes."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(b"x")

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended()


async def echo(keepalive: str, count: int) -> dict[str, Any]:
    """Serve a number of connections; the port comes as the first line."""
    left = count
    done = asyncio.Event()

    def ended() -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    server, port = await greet(lambda: Echo(ended), keepalive)
    print(port, flush=True)
    await done.wait()
    server.close()
    await server.wait_closed()
    return {}


SERVERS: dict[str, Any] = {"idle": idle, "die": die, "churn": churn, "memory": memory, "echo": echo}
CLIENTS: dict[str, Any] = {"hold": hold, "churn_through": churn_through}


def main(what: str, *arguments: str) -> None:
    logging.getLogger("kaio").addHandler(logging.NullHandler())  # thousands of warnings need not be read
    logging.getLogger("kaio").propagate = False
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard >= DESCRIPTORS:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), hard)
        )
    if what in CLIENTS:
        CLIENTS[what](*map(int, arguments))
        return
    loop, *rest = arguments
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        figures = runner.run(SERVERS[what](*(int(each) if each.isdecimal() else each for each in rest)))
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
