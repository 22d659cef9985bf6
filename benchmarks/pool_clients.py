"""One pool: `python -m benchmarks.pool_clients KIND LOOP PORT`, told on its standard input what to do, until that ends.

Each line is an operation, a number of tasks, and seconds; the answer has operations, CPU seconds and seconds, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import asyncpg  # type: ignore[import-untyped]
import redis.asyncio
import uvloop

import kaio
from examples.redis_pool import command

__all__ = ["CONNECTIONS", "KINDS", "TASKS"]

TASKS: Final = 200
CONNECTIONS: Final = 20
KINDS: Final = ("kaio", "asyncpg", "asyncpg-bare", "redis-blocking", "redis-plain")
_BATCH: Final = 20  # operations between two looks at the clock
_HOST: Final = "127.0.0.1"

Operation = Callable[[], Awaitable[object]]


def _of_context(acquire: Callable[[], Any]) -> dict[str, Operation]:
    async def alone() -> None:
        async with acquire():
            pass

    async def in_turn() -> None:
        async with acquire():
            await asyncio.sleep(0)

    return {"alone": alone, "in turn": in_turn}


@contextlib.asynccontextmanager
async def _kaio(port: int) -> AsyncIterator[dict[str, Operation]]:
    async with kaio.Pool(_HOST, port, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:
        yield {**_of_context(pool.acquire), "PING": lambda: pool.run(command, "PING")}


@contextlib.asynccontextmanager
async def _asyncpg(port: int, **options: Any) -> AsyncIterator[dict[str, Operation]]:
    sizes = {"min_size": CONNECTIONS, "max_size": CONNECTIONS, "max_inactive_connection_lifetime": 0.0}
    where = {"host": _HOST, "port": port, "user": "kaio", "database": "postgres"}
    async with asyncpg.create_pool(**where, **sizes, **options) as pool:
        yield _of_context(pool.acquire)


async def _no_reset(connection: object) -> None:
    pass


@contextlib.asynccontextmanager
async def _redis(pool: Any) -> AsyncIterator[dict[str, Operation]]:
    client = redis.asyncio.Redis(connection_pool=pool)

    async def alone() -> None:
        await pool.release(await pool.get_connection())

    async def in_turn() -> None:
        connection = await pool.get_connection()
        try:
            await asyncio.sleep(0)
        finally:
            await pool.release(connection)

    try:
        yield {"alone": alone, "in turn": in_turn, "PING": client.ping}
    finally:
        await pool.aclose()


def _make(kind: str, port: int) -> contextlib.AbstractAsyncContextManager[dict[str, Operation]]:
    where: dict[str, Any] = {"host": _HOST, "port": port}
    match kind:
        case "kaio":
            return _kaio(port)
        case "asyncpg":
            return _asyncpg(port)
        case "asyncpg-bare":
            return _asyncpg(port, reset=_no_reset)
        case "redis-blocking":
            return _redis(redis.asyncio.BlockingConnectionPool(**where, max_connections=CONNECTIONS, timeout=60))
    return _redis(redis.asyncio.ConnectionPool(**where, max_connections=TASKS))


async def _repeat(operation: Operation, tasks: int, seconds: float) -> dict[str, float]:
    """Do it at least once in each task, and until the time is over."""
    done, began, end = 0, time.process_time(), time.perf_counter() + seconds

    async def work() -> None:
        nonlocal done
        while True:
            for _ in range(_BATCH):
                await operation()
            done += _BATCH
            if time.perf_counter() >= end:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(work())
    took = time.perf_counter() - end + seconds
    return {"operations": done, "cpu": time.process_time() - began, "seconds": took}


async def main(kind: str, port: int) -> None:
    """Do what the lines say."""
    loop = asyncio.get_running_loop()
    async with _make(kind, port) as operations:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            operation, tasks, seconds = json.loads(line)
            if operation == "check-out":
                operation = "alone" if tasks == 1 else "in turn"
            print(json.dumps(await _repeat(operations[operation], tasks, seconds)), flush=True)


if __name__ == "__main__":
    _, which, base, where = sys.argv
    with asyncio.Runner(
        loop_factory=uvloop.new_event_loop if base == "uvloop" else asyncio.SelectorEventLoop
    ) as runner:
        runner.run(main(which, int(where)))
