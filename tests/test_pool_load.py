"""`Pool` under load: connections are killed all the time, and at no hand-out is one known to be dead.

200 tasks share 20 connections, and each second a third of these is killed at random: closed, reset, half-closed, given
data that nobody asked for, or made to play dead, for good or for a while. The server is in the same process, so what it
has sent or closed is in the client's kernel before anything else runs; and what this kernel and the monitor know at the
moment of a hand-out is read before anything is awaited.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import os
import random
from typing import Any, Final

import anyio
import pytest

import kaio
from kaio import ConnectionEnded, TcpState
from kaio.kernel.queues import unread
from kaio.net.pooled import PooledConnection
from kaio.testing import blackhole

from .conftest import reset, until

SECONDS: Final = min(float(os.environ.get("KAIO_LOAD_SECONDS", "60")), 75.0)
TASKS, CONNECTIONS = 200, 20
TIMEOUT: Final = 10.0  # the pool's, in seconds
POLICY: Final = "1s:1s:2"
KINDS: Final = ("closed", "reset", "half-closed", "unasked data", "dead", "silent for a while")
UNASKED: Final = b"unasked"


class Server:
    """Answers each line with the same line, soon or a little later. Its ends of connections are killed at random."""

    def __init__(self) -> None:
        self.kills: collections.Counter[str] = collections.Counter()
        self.kills_at_once = False  # a tenth of the connections, when they are accepted
        self._ends: dict[int, kaio.Connection] = {}  # by the client's port, those that nothing has befallen
        self._playing_dead: set[asyncio.Task[None]] = set()

    async def __call__(self, connection: kaio.Connection) -> None:
        port = connection.peername[1]
        self._ends[port] = connection
        if self.kills_at_once and random.random() < 0.1:
            await self._kill(port, random.choice(["closed", "reset", "half-closed"]))
        try:
            while True:
                question = await connection.receive_until(b"\n", 100)
                if random.random() < 0.2:
                    await asyncio.sleep(random.expovariate(1 / 0.01))
                await connection.send(question + b"\n")
        except (ConnectionEnded, anyio.ClosedResourceError):  # anyio's: half-closed, before an answer
            pass
        finally:
            self._ends.pop(port, None)

    async def kill_one(self, preferred: int | None) -> None:
        """Kill a connection in one of all ways: that of this client's port, if it is there, or any."""
        if self._ends:
            port = preferred if preferred in self._ends else random.choice(list(self._ends))
            assert port is not None
            await self._kill(port, random.choice(KINDS))

    async def _kill(self, port: int, kind: str) -> None:
        victim = self._ends.pop(port)
        self.kills[kind] += 1
        with contextlib.suppress(ConnectionEnded, anyio.ClosedResourceError):
            match kind:
                case "closed":
                    victim.transport.close()
                case "reset":
                    reset(victim.transport.get_extra_info("socket"))
                    victim.abort()
                case "half-closed":
                    await victim.send_eof()
                case "unasked data":
                    await victim.send(UNASKED + b"\n")
                case _:
                    playing = asyncio.create_task(self._play_dead(port, victim, for_good=kind == "dead"))
                    self._playing_dead.add(playing)
                    playing.add_done_callback(self._playing_dead.discard)

    async def _play_dead(self, port: int, victim: kaio.Connection, *, for_good: bool) -> None:
        """What it had in flight it sends again and again, which its peer takes for a sign of life for some seconds."""
        with blackhole(victim.transport):
            await asyncio.sleep(random.uniform(10.5, 12) if for_good else random.uniform(0.2, 2.5))
            if for_good:
                victim.abort()
        if not victim.transport.is_closing():
            self._ends[port] = victim

    async def settle(self) -> None:
        """Wait for those that play dead."""
        await asyncio.gather(*self._playing_dead)


class Load:
    """The tasks, and what they have met with."""

    def __init__(self, pool: kaio.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hand_outs = self.answers = 0
        self.longest_wait = 0.0
        self.errors: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()  # connections that were not handed out
        self.deaths: collections.Counter[kaio.Cause] = collections.Counter()
        self._pool = pool
        self._numbers = itertools.count()
        self._suspects: set[Any] = set()  # transports, also of those that have died
        kaio.get_monitor().hook = self._on_event
        is_healthy = PooledConnection.is_healthy

        def counted(pooled: PooledConnection) -> bool:
            usable, healthy = pooled.is_usable(), is_healthy(pooled)
            if not healthy:
                self.refused["known to the kernel alone" if usable else "known to the loop or monitor"] += 1
            return healthy

        monkeypatch.setattr(PooledConnection, "is_healthy", counted)

    def _on_event(self, event: kaio.Event) -> None:
        if event.kind == "recovered":
            self._suspects.discard(event.transport)
        else:
            self._suspects.add(event.transport)
        if event.error is not None:
            self.deaths[event.error.cause] += 1

    def _check(self, connection: kaio.Connection, *, fresh: bool) -> None:
        """What has just been handed out is not known to be dead: by the kernel, the loop, or the monitor."""
        health = kaio.health(connection)
        left = unread(connection.transport.get_extra_info("socket")) + connection._protocol.buffer.size
        assert (health.state is not kaio.State.DEAD, health.info.state) == (True, TcpState.ESTABLISHED)
        assert fresh or not left  # for all that the pool knows, a fresh one's is a greeting
        assert connection.transport not in self._suspects
        assert not connection._protocol.is_over
        assert not connection.transport.is_closing()
        self.hand_outs += 1

    async def kill(self, server: Server, until: float) -> None:
        """Until that time kill a third of the connections in each second, half of them those that are next in turn.

        Somebody asks for a connection in the same moment, in which the loop may not have heard of it.
        """
        loop = asyncio.get_running_loop()
        server.kills_at_once = True
        async with asyncio.TaskGroup() as group:
            while loop.time() < until:
                await asyncio.sleep(random.expovariate(CONNECTIONS / 3))
                following = next(reversed(self._pool._slots.idle), None) if random.random() < 0.5 else None
                await server.kill_one(
                    None if following is None else following.connection.transport.get_extra_info("sockname")[1]
                )
                group.create_task(self._use(turns=random.randint(0, 2)))

    async def use(self, until: float) -> None:
        """Ask until that time: two seconds at once, then two seconds now and then, so that connections are idle."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            await asyncio.sleep(random.expovariate(1 / 0.3) if loop.time() % 4 < 2 else 0)
            await self._use(turns=0)

    async def _use(self, *, turns: int) -> None:
        """Use a connection after so many turns of the loop. Some are in a hurry, and cancel whatever they are at."""
        for _ in range(turns):
            await asyncio.sleep(0)
        hurry = random.uniform(0, 0.02) if random.random() < 0.05 else None
        try:
            async with asyncio.timeout(hurry):
                await self._use_once()
        except TimeoutError:
            self.errors["was in a hurry" if hurry is not None else "TimeoutError"] += 1
        except (ConnectionEnded, OSError, LookupError) as exc:
            self.errors[type(exc).__name__] += 1

    async def _use_once(self) -> None:
        loop = asyncio.get_running_loop()
        lease, asked = self._pool.acquire(), loop.time()
        try:
            connection = await lease.__aenter__()
        finally:
            self.longest_wait = max(self.longest_wait, loop.time() - asked)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_exit(lease)
            self._check(connection, fresh=not lease.was_used)
            for _ in range(random.randint(1, 3)):
                await self._ask(connection)

    async def _ask(self, connection: kaio.Connection) -> None:
        question = b"%d" % next(self._numbers)
        await connection.send(question + b"\n")
        answer = await connection.receive_until(b"\n", 100)
        if answer == UNASKED:  # it came while the connection was in use
            raise LookupError(answer)
        assert answer == question
        self.answers += 1


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.heavy
@pytest.mark.slow
async def test_no_connection_is_handed_out_that_is_known_to_be_dead(
    loop_name: str, dead_peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every hand-out; no task waits too long, every answer is to its question, and nothing is left in the end."""
    server = Server()
    async with kaio.serve(server, "127.0.0.1", 0, keepalive="off", close_timeout=0) as serving:
        address = serving.listeners[0].address
        async with kaio.connect(address, keepalive=POLICY):
            pass  # what the monitor and the loop need once is open
        await until(lambda: not serving.connections)
        before = descriptors()
        pool = kaio.Pool(
            address, min_size=3, max_size=CONNECTIONS, timeout=TIMEOUT, max_lifetime=20.0, keepalive=POLICY
        )
        async with pool:
            load = Load(pool, monkeypatch)
            over = asyncio.get_running_loop().time() + SECONDS
            async with asyncio.TaskGroup() as group:
                group.create_task(load.kill(server, over))
                for _ in range(TASKS):
                    group.create_task(load.use(over))
            assert (pool.waiting, len(pool._slots.leased)) == (0, 0)
            assert pool.idle <= pool.size <= CONNECTIONS
        assert (pool.size, pool.idle, pool.waiting) == (0, 0, 0)
        await server.settle()
        serving.abort_clients()
        await until(lambda: descriptors() <= before)
        await until(lambda: not serving.connections)
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    kills = ", ".join(f"{server.kills[kind]} {kind}" for kind in KINDS)
    refused = ", ".join(f"{count} {why}" for why, count in sorted(load.refused.items()))
    deaths = ", ".join(f"{count} {cause}" for cause, count in sorted(load.deaths.items()))
    errors = ", ".join(f"{count} {name}" for name, count in load.errors.most_common())
    print(
        f"\n{loop_name}, {SECONDS:.0f} s: {load.hand_outs} hand-outs, {load.answers} answers; kills: {kills}; dropped"
        f" at check-out: {refused}; deaths noticed: {deaths}; longest wait {load.longest_wait:.2f} s;"
        f" tasks got: {errors}"
    )
    assert load.longest_wait <= TIMEOUT + 2
    assert load.hand_outs > 100 * SECONDS
    assert set(load.refused) == {"known to the kernel alone", "known to the loop or monitor"}
    assert load.deaths
    assert set(server.kills) == set(KINDS)
