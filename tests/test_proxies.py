"""Heartbeats through a real HAProxy, which answers keepalive's probes for a backend that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import pytest

import kaio

from .servers import LOOPBACK, haproxy

BACKEND: Final = Path(__file__).parent / "programs" / "slow_backend.py"
EVERY, WITHIN = 1.0, 1.0
LATE = 5.0  # seconds for a busy machine
PINGS: Final = {
    "lines": b"ping\n",
    "http": b"GET /ping HTTP/1.1\r\nHost: backend\r\n\r\n",
}
ANSWERS: Final = {"lines": b"pong\n", "http": b"\r\n\r\npong\n"}
MODES: Final = [("tcp", "lines"), ("tcp", "http"), ("http", "http")]


@contextlib.contextmanager
def backend(kind: str, delay: float) -> Iterator[tuple[int, int]]:
    """Run a backend; yield its port and its process."""
    command = [sys.executable, str(BACKEND), kind, str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=BACKEND.parent.parent.parent) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def connected(port: int, kind: str) -> AsyncIterator[kaio.Connection]:
    """A connection through the proxy that has answered."""
    async with kaio.connect(LOOPBACK, port, keepalive="1s:1s:2") as connection:
        await connection.send(PINGS[kind])
        await connection.receive_until(ANSWERS[kind], 10_000)
        yield connection


async def read(connection: kaio.Connection, seconds: float) -> int:
    """Receive for so long; return the bytes."""
    count = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                count += len(await connection.receive())
    return count


async def hang(mode: str, kind: str) -> None:
    with backend(kind, 0.0) as (port, pid), haproxy(port, mode=mode) as proxy:
        async with connected(proxy.port, kind) as beating, connected(proxy.port, kind) as blind:
            beating.heartbeat(kaio.Heartbeat(PINGS[kind], EVERY, WITHIN))
            assert await read(beating, 3.5) >= 2 * len(ANSWERS[kind])
            os.kill(pid, signal.SIGSTOP)
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(kaio.DeadPeerError) as caught:
                await read(beating, 30)
            took = loop.time() - began
            print(
                f"HAProxy in {mode} mode, {kind}: its backend frozen, found {took:.2f} s later, "
                f"{caught.value.silence:.2f} s after its last data; {EVERY:g} s + {WITHIN:g} s are allowed"
            )
            assert caught.value.cause is kaio.Cause.HEARTBEAT
            assert took <= EVERY + WITHIN + LATE
            assert caught.value.silence <= EVERY + WITHIN + LATE
            await blind.send(PINGS[kind])
            assert await read(blind, 4.0) == 0  # keepalive's detection time is 3 s
            assert blind.health().state is kaio.State.ALIVE
            os.kill(pid, signal.SIGCONT)
            assert await read(blind, 5.0) >= len(ANSWERS[kind])


@pytest.mark.slow
async def test_a_backend_that_hangs_is_found_through_a_proxy() -> None:
    """Within the two times; keepalive alone sees the proxy, which lives."""
    async with asyncio.TaskGroup() as group:
        for mode, kind in MODES:
            group.create_task(hang(mode, kind))


async def live(mode: str, kind: str, seconds: float) -> None:
    with backend(kind, 0.7 * WITHIN) as (port, _), haproxy(port, mode=mode) as proxy:
        async with connected(proxy.port, kind) as connection:
            connection.heartbeat(kaio.Heartbeat(PINGS[kind], EVERY, WITHIN))
            received = await read(connection, seconds)
            assert received >= len(ANSWERS[kind]) * (seconds / (EVERY + WITHIN) - 1)
            assert connection.health().state is kaio.State.ALIVE
            print(f"HAProxy in {mode} mode, {kind}: {received} bytes of slow answers in {seconds:g} s, no death")


@pytest.mark.slow  # a minute
@pytest.mark.heavy
async def test_a_slow_backend_is_not_given_up_through_a_proxy() -> None:
    """Which answers just in time, again and again for a minute."""
    async with asyncio.TaskGroup() as group:
        for mode, kind in MODES:
            group.create_task(live(mode, kind, 60.0))
