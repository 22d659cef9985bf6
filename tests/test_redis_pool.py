"""The example `redis_pool`: many tasks share few connections to a real redis, which restarts, is silent, fails over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import pytest

import kaio
from examples.redis_pool import RedisError, command, make_pool

from . import servers
from .conftest import until
from .namespaces import Routed
from .test_examples import running

POLICY: Final = "1s:1s:2"
DETECTION: Final = 3.0  # seconds
BOUND: Final = DETECTION + 5  # a connection attempt that has begun in the silence, and a busy machine
TASKS, CONNECTIONS = 50, 5
AT_ONCE: Final = ("--repl-diskless-sync-delay", "0")  # a master otherwise waits 5 s for other replicas
KEYS: Final = [f"key:{number}" for number in range(500)]

pytestmark = pytest.mark.skipif(servers.lacking() is not None, reason=str(servers.lacking()))


def value(key: str) -> bytes:
    """What is stored at a key; no two have the same."""
    return f"the value of {key}".encode() * 20


@pytest.fixture
def redis() -> Iterator[servers.Running]:
    with servers.redis() as running:
        yield running


# -- the protocol


async def test_each_kind_of_reply(redis: servers.Running) -> None:
    """Simple string, error, integer, bulk, nil, array, and errors within an array."""
    async with make_pool(redis.host, redis.port) as pool, pool.acquire() as connection:
        assert await command(connection, "SET", "key", b"a\r\nb\0" * 50_000) == b"OK"
        assert await command(connection, "GET", "key") == b"a\r\nb\0" * 50_000
        assert await command(connection, "SET", "empty", b"") == b"OK"
        assert await command(connection, "GET", "empty") == b""
        assert await command(connection, "GET", "no such key") is None
        assert await command(connection, "INCRBY", "number", 7) == 7
        assert await command(connection, "DECRBY", "number", 10) == -3
        assert await command(connection, "RPUSH", "list", "a", 1.5, b"\xff") == 3
        assert await command(connection, "LRANGE", "list", 0, -1) == [b"a", b"1.5", b"\xff"]
        assert await command(connection, "LRANGE", "no such key", 0, -1) == []
        assert await command(connection, "BLPOP", "no such key", 0.01) is None
        with pytest.raises(RedisError, match="WRONGTYPE"):
            await command(connection, "INCR", "list")
        assert await command(connection, "MULTI") == b"OK"
        for words in (("INCR", "list"), ("LRANGE", "list", 0, 0), ("GET", "no such key")):
            assert await command(connection, *words) == b"QUEUED"
        failed, *others = await command(connection, "EXEC")  # type: ignore[misc]
        assert isinstance(failed, RedisError)
        assert others == [[b"a"], None]
        assert pool.size == 1  # all of it on one connection


async def test_connections_are_authenticated(redis: servers.Running) -> None:
    """Before anybody gets them; a wrong password is an error of the server's."""
    async with make_pool(redis.host, redis.port) as pool:
        await pool.run(command, "ACL", "SETUSER", "ann", "on", ">secret", "+@all", "~*")
        await pool.run(command, "CONFIG", "SET", "requirepass", "sesame")
    async with make_pool(redis.host, redis.port, user="ann", password="secret", database=3) as pool:
        assert await pool.run(command, "ACL", "WHOAMI") == b"ann"
        assert b" db=3 " in bytes(await pool.run(command, "CLIENT", "INFO"))  # type: ignore[arg-type]
    async with make_pool(redis.host, redis.port, password="wrong") as pool:
        with pytest.raises(RedisError, match="WRONGPASS"):
            await pool.run(command, "PING")
        assert pool.size == 0


@pytest.mark.parametrize("words", [("BLPOP", "no such key", 0.002), ("COMMAND",)], ids=["nil", "array"])
async def test_a_command_that_was_cut_off_leaves_no_reply_behind(
    words: tuple[str | float, ...], redis: servers.Running
) -> None:
    """Cancelled while it waits for a reply that comes late, or in the middle of one that is long; or an error."""
    async with make_pool(redis.host, redis.port, connections=1) as pool:
        for number in range(30):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0, 0.004)):
                    await pool.run(command, *words)
            if number % 5 == 0:
                with pytest.raises(RedisError, match="wrong number of arguments"):
                    await pool.run(command, "ECHO")
            assert await pool.run(command, "ECHO", number) == b"%d" % number


# -- many tasks


class Crowd:
    """Tasks that ask for keys at random, again and again, and check every answer. What they meet with is kept."""

    def __init__(self, pool: kaio.Pool) -> None:
        self.errors: list[Exception] = []
        self.answered = [0] * TASKS
        self._pool = pool
        self._over = False
        self._group = asyncio.TaskGroup()

    async def _ask(self, number: int) -> None:
        while not self._over:
            key = random.choice(KEYS)
            try:
                reply = await self._pool.run(command, "GET", key)
            except (kaio.ConnectionEnded, OSError) as exc:
                self.errors.append(exc)
                await asyncio.sleep(0.05)
            else:
                assert reply == value(key)
                self.answered[number] += 1
                await asyncio.sleep(random.choice([0, 0, 0.002, 0.02]))

    async def all_answered(self, times: int = 1) -> None:
        """Wait until each task has been answered so many times more. What takes longer than `BOUND` is a failure."""
        goals = [answered + times for answered in self.answered]
        await until(lambda: all(map(int.__ge__, self.answered, goals)), within=BOUND)

    async def __aenter__(self) -> Crowd:
        await self._group.__aenter__()
        for number in range(TASKS):
            self._group.create_task(self._ask(number))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        await self._group.__aexit__(kind, exc, trace)


@contextlib.asynccontextmanager
async def crowd(host: str, port: int, **options: Any) -> AsyncIterator[tuple[Crowd, kaio.Pool]]:
    """Such tasks, and the pool that they share; in the end nothing is left of either."""
    async with make_pool(host, port, connections=CONNECTIONS, keepalive=POLICY, **options) as pool:
        await pool.run(command, "MSET", *(word for key in KEYS for word in (key, value(key))))
        async with Crowd(pool) as asking:
            await asking.all_answered(10)
            assert asking.errors == []
            yield asking, pool
            await asking.all_answered(10)
        assert pool.waiting == 0
        assert 0 < pool.size == pool.idle <= CONNECTIONS
    assert (pool.size, pool.idle, pool.waiting) == (0, 0, 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_many_tasks_share_few_connections(redis: servers.Running) -> None:
    async with crowd(redis.host, redis.port) as (asking, pool):
        await asking.all_answered(50)
        assert asking.errors == []
        info = await pool.run(command, "INFO", "clients")
        assert b"connected_clients:5\r\n" in bytes(info)  # type: ignore[arg-type]


RETRIES: Final = pytest.mark.parametrize(
    "retry", [None, kaio.Retry(initial_delay=0.05, max_delay=0.5)], ids=["once", "retry"]
)


@RETRIES
async def test_the_server_restarts(retry: kaio.Retry | None, tmp_path: Path) -> None:
    """On the same port, after a moment in which it refuses connections."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(servers.redis("127.0.0.1", "--dir", str(tmp_path)))
        async with crowd(redis.host, redis.port, retry=retry) as (asking, pool):
            assert await pool.run(command, "SAVE") == b"OK"
            await asyncio.to_thread(stack.close)
            if retry is None:
                await until(lambda: any(isinstance(error, ConnectionRefusedError) for error in asking.errors))
            again = servers.redis("127.0.0.1", "--dir", str(tmp_path), port=redis.port)
            await asyncio.to_thread(stack.enter_context, again)
            await asking.all_answered()


@contextlib.contextmanager
def silence(network: Routed) -> Iterator[None]:
    """For the block, the router throws away all that it should forward."""
    network.rules("""
        table ip silence {
            chain everything {
                type filter hook forward priority filter; policy drop;
            }
        }
    """)
    yield
    network.rules("delete table ip silence")


@pytest.mark.slow
@RETRIES
async def test_the_server_is_silent(retry: kaio.Retry | None, network: Routed) -> None:
    """For longer than it takes to be found dead; all tasks are served again soon after its end."""
    with contextlib.ExitStack() as stack:
        with network.server.entered():
            redis = stack.enter_context(servers.redis(Routed.SERVER))
        stack.enter_context(network.client.entered())
        deaths: list[kaio.Event] = []
        kaio.get_monitor().hook = lambda event: deaths.append(event) if event.kind == "dead" else None
        async with crowd(redis.host, redis.port, retry=retry) as (asking, _):
            with silence(network):
                await until(lambda: len(deaths) >= CONNECTIONS, within=BOUND)
                if retry is None:
                    await until(lambda: asking.errors, within=BOUND)
                    assert {type(error) for error in asking.errors} == {kaio.DeadPeerError}
            await asking.all_answered()


async def replicated(replica: kaio.Connection) -> None:
    """Wait until a replica has what its master has."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(RedisError):  # it loads what the master has sent
                if await command(replica, "DBSIZE") == len(KEYS):
                    return
            await asyncio.sleep(0.02)


def replica_of(master: servers.Running) -> tuple[str, str]:
    return ("--replicaof", f"{master.host} {master.port}")


@RETRIES
async def test_the_server_is_killed_and_another_takes_over(retry: kaio.Retry | None) -> None:
    """A replica becomes the master, and takes its port."""
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(servers.redis("127.0.0.1", *AT_ONCE))
        other = stack.enter_context(servers.redis("127.0.0.1", *replica_of(master)))
        async with (
            crowd(master.host, master.port, retry=retry) as (asking, pool),
            kaio.connect(other.host, other.port) as replica,
        ):
            await replicated(replica)
            os.kill(master.pid, signal.SIGKILL)
            await asyncio.to_thread(os.waitid, os.P_PID, master.pid, os.WEXITED | os.WNOWAIT)
            assert await command(replica, "REPLICAOF", "NO", "ONE") == b"OK"
            assert await command(replica, "CONFIG", "SET", "port", master.port) == b"OK"
            await asking.all_answered()
            assert await pool.run(command, "CONFIG", "GET", "port") == [b"port", str(master.port).encode()]
            assert await pool.run(command, "SET", "written", 1) == b"OK"


@pytest.mark.slow
@RETRIES
async def test_the_address_moves_to_another_server(retry: kaio.Retry | None, network: Routed) -> None:
    """The old one falls silent; the new one knows nothing of the connections, and resets them."""
    with contextlib.ExitStack() as stack:
        with network.server.entered():
            master = stack.enter_context(servers.redis(Routed.SERVER, *AT_ONCE))
            other = stack.enter_context(servers.redis(Routed.SERVER, *replica_of(master)))
        stack.enter_context(network.client.entered())
        async with crowd(master.host, master.port, retry=retry) as (asking, pool):
            async with kaio.connect(other.host, other.port) as replica:
                await replicated(replica)
                assert await command(replica, "REPLICAOF", "NO", "ONE") == b"OK"
            with silence(network):
                await asyncio.sleep(1)
                network.rules(f"""
                    table ip move {{
                        chain gone {{
                            type filter hook prerouting priority raw; policy accept;
                            iifname server tcp sport {master.port} drop
                        }}
                        chain incoming {{
                            type nat hook prerouting priority dstnat; policy accept;
                            ip daddr {Routed.SERVER} tcp dport {master.port} dnat to {Routed.SERVER}:{other.port}
                        }}
                    }}
                """)
            await asking.all_answered()
            assert await pool.run(command, "CONFIG", "GET", "port") == [b"port", str(other.port).encode()]


# -- the program


def test_the_program_goes_on_when_its_server_comes_back() -> None:
    """As anybody runs it."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(servers.redis())
        options = ("--tasks", "20", "--connections", "3", "--every", "0.1", "--keepalive", POLICY, "--database", "2")
        with running("redis_pool.py", "--port", str(redis.port), *options) as program:
            program.find("visits:19: counted 3, read b'3'")
            stack.close()
            stack.enter_context(servers.redis(port=redis.port))
            program.find("visits:19: counted 2, read b'2'")  # it saves nothing
