"""Clients of databases at their work: asyncpg and psycopg, each plain and by its pool, and redis-py's asyncio half.

Each class has the methods that `lib_clients` calls in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import asyncpg  # type: ignore[import-untyped]
import psycopg
import psycopg_pool
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

__all__ = ["Asyncpg", "Psycopg", "Redis"]

PORT: Final = "select inet_client_port()"
LONG: Final = "do $$ begin raise notice 'begun'; perform pg_sleep(30); end $$"
ROWS: Final = [(number,) for number in range(1000)]
SUM: Final = sum(range(1000))


class Asyncpg:
    """asyncpg, plain connections and a pool."""

    name = "asyncpg"

    def __init__(self, peers: dict[str, Any]) -> None:
        self._at = {"host": peers["host"], "port": peers["postgres"], "user": "kaio", "database": "postgres"}

    async def open(self) -> dict[str, list[int]]:
        self._pool = await asyncpg.create_pool(**self._at, min_size=1, max_size=1)
        self._idle, self._asking, self._sending = [await asyncpg.connect(**self._at) for _ in range(3)]
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("create temp table numbers (n int) on commit drop")
            await connection.copy_records_to_table("numbers", records=ROWS)
            assert await connection.fetchval("select sum(n) from numbers") == SUM
        return {"idle": [await self._idle.fetchval(PORT), await self._pool.fetchval(PORT)]}

    async def request(self, begun: Callable[[], None]) -> None:
        self._asking.add_log_listener(lambda *_: begun())
        await self._asking.execute(LONG)

    async def send(self) -> None:
        await self._sending.fetchval(PORT)

    async def use(self) -> None:
        await self._idle.fetchval(PORT)

    async def again(self) -> None:
        await self._pool.fetchval(PORT)


class Psycopg:
    """psycopg, plain connections and psycopg_pool: libpq's sockets, of which a loop only sees the descriptors."""

    name = "psycopg"

    def __init__(self, peers: dict[str, Any]) -> None:
        self._at = f"host={peers['host']} port={peers['postgres']} user=kaio dbname=postgres"

    async def open(self) -> dict[str, list[int]]:
        check = psycopg_pool.AsyncConnectionPool.check_connection
        self._pool = psycopg_pool.AsyncConnectionPool(self._at, min_size=1, max_size=1, open=False, check=check)
        await self._pool.open(wait=True)
        self._idle, self._asking, self._sending = [
            await psycopg.AsyncConnection.connect(self._at, autocommit=True) for _ in range(3)
        ]
        async with self._pool.connection() as connection, connection.cursor() as cursor:
            await cursor.execute("create temp table numbers (n int) on commit drop")
            async with cursor.copy("copy numbers from stdin") as copy:
                for row in ROWS:
                    await copy.write_row(row)
            await cursor.execute("select sum(n) from numbers")
            assert await cursor.fetchone() == (SUM,)
        async with self._pool.connection() as connection:
            return {"idle": [await _port(self._idle), await _port(connection)]}

    async def request(self, begun: Callable[[], None]) -> None:
        self._asking.add_notice_handler(lambda _: begun())
        await self._asking.execute(LONG)

    async def send(self) -> None:
        await _port(self._sending)

    async def use(self) -> None:
        await _port(self._idle)

    async def again(self) -> None:
        async with self._pool.connection() as connection:
            await _port(connection)


async def _port(connection: psycopg.AsyncConnection) -> int:
    cursor = await connection.execute(PORT)
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


class Redis:
    """redis-py. Left to itself it gives its sockets 30 s, 5 s and 3 of its own, gives up on a silent server after 5 s,
    and tries ten times more: one client is left to itself, and the others show the connection's end at once.
    """

    name = "redis.asyncio"

    def __init__(self, peers: dict[str, Any]) -> None:
        self._at = {"host": peers["host"], "port": peers["redis"]}

    async def open(self) -> dict[str, list[int]]:
        self._own = redis.asyncio.Redis(**self._at)
        self._pool = redis.asyncio.Redis(**self._at, socket_keepalive=False)
        self._idle, self._asking, self._sending = [
            redis.asyncio.Redis(**self._at, socket_keepalive=False, socket_timeout=None, retry=Retry(NoBackoff(), 0))
            for _ in range(3)
        ]
        async with self._own.pipeline() as pipeline:
            for (number,) in ROWS:
                pipeline.incrby("sum", number)
            assert (await pipeline.execute())[-1] == SUM
        await self._own.delete("sum")
        await self._asking.ping()
        await self._sending.ping()
        return {"idle": [await _redis_port(self._idle), await _redis_port(self._pool)],
                "own": [await _redis_port(self._own)]}  # fmt: skip

    async def request(self, begun: Callable[[], None]) -> None:
        asking = asyncio.ensure_future(self._asking.blpop(["nothing"], timeout=0))
        while (await self._own.info("clients"))["blocked_clients"] == 0:
            await asyncio.sleep(0.01)
        begun()
        await asking

    async def send(self) -> None:
        await self._sending.ping()

    async def use(self) -> None:
        await self._idle.ping()

    async def again(self) -> None:
        try:
            await self._pool.ping()
        except (RuntimeError, AttributeError):  # a write after the end: uvloop's, and asyncio's in Python 3.13
            await self._pool.ping()  # redis-py does not expect them, with kaio or without: the next use connects


async def _redis_port(client: redis.asyncio.Redis) -> int:
    about = await client.client_info()
    return int(str(about["addr"]).rpartition(":")[2])
