"""A client for redis over a pool of connections: many tasks, few connections, and none of them is handed out dead.

    python examples/redis_pool.py --port 6379 --tasks 50 --connections 5

redis' protocol (RESP2, https://redis.io/docs/latest/develop/reference/protocol-spec/) is the two functions at the top.
A connection on which a command has failed does not go back into the pool, so nobody gets another's reply. What is safe
to send twice goes through `pool.run`, which tries again with a fresh connection when the old one had just ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import TypeAlias

import kaio

LONGEST_LINE = 65536
Reply: TypeAlias = "bytes | int | RedisError | list[Reply] | None"


class RedisError(Exception):
    """The server's answer is an error."""


async def command(connection: kaio.Connection, *words: str | bytes | float) -> Reply:
    """Send a command, and return the reply. Raises RedisError, and what ends connections."""
    encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    bulk = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)
    await connection.send(b"*%d\r\n%b" % (len(encoded), bulk))
    reply = await receive_reply(connection)
    if isinstance(reply, RedisError):
        raise reply
    return reply


async def receive_reply(connection: kaio.Connection) -> Reply:
    """Receive one reply. An error is returned: as a part of an array it does not make the rest worthless."""
    line = await connection.receive_until(b"\r\n", LONGEST_LINE)
    kind, rest = line[:1], line[1:]
    if kind == b"+":
        return rest
    if kind == b"-":
        return RedisError(rest.decode(errors="replace"))
    number = int(rest)
    if kind == b":":
        return number
    if kind not in (b"$", b"*"):
        raise ValueError(f"{line!r} is no reply")
    if number < 0:
        return None
    if kind == b"$":
        return (await connection.receive_exactly(number + 2))[:-2]
    return [await receive_reply(connection) for _ in range(number)]


def make_pool(
    host: str,
    port: int,
    *,
    user: str = "default",
    password: str | None = None,
    database: int = 0,
    connections: int = 10,
    keepalive: str | None = None,
    retry: kaio.Retry | None = None,
) -> kaio.Pool:
    """Make a pool whose connections are authenticated and have selected a database."""

    async def log_in(connection: kaio.Connection) -> None:
        if password is not None:
            await command(connection, "AUTH", user, password)
        if database:
            await command(connection, "SELECT", database)

    return kaio.Pool(host, port, max_size=connections, keepalive=keepalive, on_connect=log_in, retry=retry)


# -- what many tasks do with it


async def visit(pool: kaio.Pool, key: str, every: float) -> None:
    """Count visits, and read the count back; go on whatever becomes of the server."""
    while True:
        try:
            async with pool.acquire() as connection:  # not pool.run: a visit would count twice
                counted = await command(connection, "INCR", key)
            read = await pool.run(command, "GET", key)
            print(f"{key}: counted {counted!r}, read {read!r}", flush=True)
        except (kaio.ConnectionEnded, OSError, RedisError) as error:  # RedisError: it loads its data, or is a replica
            print(f"{key}: {error!r}", flush=True)
        await asyncio.sleep(every)


async def main() -> None:
    """Visit until interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--user", default="default")
    parser.add_argument("--password")
    parser.add_argument("--database", type=int, default=0)
    parser.add_argument("--keepalive", help="a policy such as 20s:10s:4, detect=30s or off")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--connections", type=int, default=5)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between a task's visits")
    options = parser.parse_args()
    pool = make_pool(
        options.host,
        options.port,
        user=options.user,
        password=options.password,
        database=options.database,
        connections=options.connections,
        keepalive=options.keepalive,
        retry=kaio.Retry(max_delay=1.0),  # for as long as a task waits for a connection
    )
    async with pool, asyncio.TaskGroup() as visitors:
        for number in range(options.tasks):
            visitors.create_task(visit(pool, f"visits:{number}", options.every))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        kaio.run(main())
