"""`Pool`: what is handed out, what is given back, and what is closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest

import kaio
from kaio.testing import blackhole

from .conftest import reset, until


class Backend:
    """A server that answers each line with its connection's number, and does what a line says."""

    def __init__(self) -> None:
        self.connections: list[kaio.Connection] = []
        self.open = 0

    async def __call__(self, connection: kaio.Connection) -> None:
        self.connections.append(connection)
        number = len(self.connections)
        self.open += 1
        try:
            while True:
                line = await connection.receive_until(b"\n", 100)
                if line == b"close":
                    return
                if line == b"twice":
                    await connection.send(b"%d\n" % number)
                await connection.send(b"%d\n" % number)
        except kaio.ConnectionEnded:
            pass
        finally:
            self.open -= 1


@contextlib.asynccontextmanager
async def backend(tls: ssl.SSLContext | None = None, address: str = "127.0.0.1:0") -> AsyncIterator[Any]:
    """Such a server, and its address."""
    handler = Backend()
    async with kaio.serve(handler, listeners=[kaio.Listener(address, ssl=tls)], close_timeout=0) as server:
        yield handler, server.listeners[0].address


async def ask(connection: kaio.Connection, line: bytes = b"who") -> int:
    """Send a line, and return the number of the connection."""
    await connection.send(line + b"\n")
    return int(await connection.receive_until(b"\n", 100))


async def settle() -> None:
    """Let the loop hear what has happened."""
    await asyncio.sleep(0.05)


# -- the same connection again, or another one


@pytest.mark.parametrize("kind", ["tcp", "tls", "unix"])
async def test_a_connection_is_used_again(
    kind: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, tmp_path: Any
) -> None:
    """Of whatever kind."""
    tls = kind == "tls"
    where = f"unix:{tmp_path}/s" if kind == "unix" else "127.0.0.1:0"
    options: Any = {"ssl": client_tls, "server_hostname": "localhost"} if tls else {}
    async with backend(server_tls if tls else None, where) as (_, address), kaio.Pool(address, **options) as pool:
        for _ in range(5):
            async with pool.acquire() as connection:
                assert await ask(connection) == 1
                assert (pool.size, pool.idle) == (1, 0)
            assert (pool.size, pool.idle) == (1, 1)


ENDS = ["closed", "reset", "half-closed", "answered unasked"]


async def let_go(how: str, connection: kaio.Connection) -> None:
    match how:
        case "closed":
            await connection.aclose()
        case "reset":
            reset(connection.transport.get_extra_info("socket"))
            connection.abort()
        case "half-closed":
            await connection.send_eof()
        case _:
            await connection.send(b"something\n")


@pytest.mark.parametrize("how", ENDS)
async def test_a_connection_that_has_ended_is_not_handed_out(how: str) -> None:
    """The task gets a fresh one."""
    async with backend() as (handler, address), kaio.Pool(address) as pool:
        async with pool.acquire() as connection:
            assert await ask(connection) == 1
        await let_go(how, handler.connections[0])
        await settle()
        assert pool.size == (1 if how == "answered unasked" else 0)
        async with pool.acquire() as connection:
            assert await ask(connection) == 2


@pytest.mark.parametrize("how", ENDS)
async def test_what_only_the_kernel_knows_counts_too(how: str) -> None:
    """The loop has not heard of it yet when the connection is asked for."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with kaio.Pool(*listening.getsockname()) as pool:
            async with pool.acquire() as first:
                end, _ = listening.accept()
            lease = pool.acquire()
            with end:
                match how:
                    case "closed":
                        end.close()
                    case "reset":
                        reset(end)
                        end.close()
                    case "half-closed":
                        end.shutdown(socket.SHUT_WR)
                    case _:
                        end.sendall(b"x")
                assert await lease.__aenter__() is not first
                await lease.__aexit__(None, None, None)
                listening.accept()[0].close()


@pytest.mark.parametrize("how", ENDS[:3])
@pytest.mark.parametrize("known_to", ["the loop", "the kernel"])
async def test_nor_is_a_fresh_connection_that_has_ended(known_to: str, how: str) -> None:
    """Its end while it is being opened is an error of `acquire`, and one that is tried again."""
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as ends:
        listening.setblocking(False)
        opened = 0

        async def on_connect(connection: kaio.Connection) -> None:
            nonlocal opened
            opened += 1
            end = ends.enter_context(listening.accept()[0])
            if opened % 3 != 0:
                if how == "half-closed":
                    end.shutdown(socket.SHUT_WR)
                else:
                    if how == "reset":
                        reset(end)
                    end.close()
            if known_to == "the loop":
                await settle()

        async with kaio.Pool(*listening.getsockname(), on_connect=on_connect) as pool:
            with pytest.raises(kaio.ConnectionEnded):
                await pool.acquire().__aenter__()
            assert pool.size == 0
        opened = 0
        retry = kaio.Retry(initial_delay=0.01)
        pool = kaio.Pool(*listening.getsockname(), on_connect=on_connect, retry=retry)
        async with pool, pool.acquire() as connection:
            assert opened == 3
            assert connection.health().state is kaio.State.ALIVE


@pytest.mark.slow
async def test_a_suspect_or_dead_connection_is_not_handed_out(dead_peers: None) -> None:
    """Nor one that is idle: it has left the pool when its peer is found dead."""
    async with backend() as (handler, address), kaio.Pool(address, keepalive="1s:1s:3", max_size=2) as pool:
        async with pool.acquire() as connection:
            await ask(connection)
        events: list[kaio.Event] = []
        kaio.get_monitor().hook = events.append
        with blackhole(handler.connections[0].transport):
            await until(lambda: events, within=10)
            assert events[0].kind == "suspect"
            async with pool.acquire() as other:
                assert await ask(other) == 2
            assert connection.transport.is_closing()
        with blackhole(handler.connections[1].transport):
            await until(lambda: pool.size == 0, within=20)


@pytest.mark.parametrize("why", ["raised", "cancelled", "unread", "read by another", "half-closed", "closed"])
async def test_a_connection_in_an_unknown_state_is_closed(why: str) -> None:
    """Its next user would get the answer to another's question."""
    tasks: list[asyncio.Future[Any]] = []
    async with backend() as (handler, address), kaio.Pool(address, max_size=1) as pool:

        async def use() -> None:
            async with pool.acquire() as connection:
                match why:
                    case "raised":
                        await connection.send(b"who\n")
                        raise LookupError
                    case "cancelled":
                        await connection.send(b"who\n")
                        await asyncio.sleep(30)
                    case "unread":
                        await ask(connection, b"twice")
                        await until(lambda: connection._protocol.buffer.size)
                    case "read by another":
                        tasks.append(asyncio.ensure_future(connection.receive()))
                        await asyncio.sleep(0)
                    case "half-closed":
                        await connection.send_eof()
                    case _:
                        connection.abort()

        task = asyncio.ensure_future(use())
        await asyncio.wait([task], timeout=0.2)
        task.cancel()
        with contextlib.suppress(LookupError, asyncio.CancelledError):
            await task
        assert pool.size == 0
        async with pool.acquire() as connection:
            assert await ask(connection) == 2
        await until(lambda: handler.open == 1)
        for each in tasks:
            with pytest.raises(kaio.ClosedResourceError):
                await each


# -- waiting


async def test_tasks_wait_their_turn() -> None:
    """No more connections than allowed, and the first to come is the first to be served."""
    async with backend() as (handler, address), kaio.Pool(address, max_size=2) as pool:
        order: list[int] = []

        async def use(number: int) -> None:
            async with pool.acquire() as connection:
                order.append(number)
                await ask(connection)

        await asyncio.gather(*map(use, range(50)))
        assert [number for number in order if number >= 2] == list(range(2, 50))  # the first two open one each
        assert len(handler.connections) == 2
        assert repr(pool) == f"<Pool of {address}: 2 of 2, 2 idle, 0 waiting>"


@pytest.mark.parametrize("where", ["the pool's", "the call's"])
async def test_waiting_has_a_limit(where: str) -> None:
    """A TimeoutError of the caller's, which says what there was."""
    async with backend() as (_, address), kaio.Pool(address, max_size=1, timeout=1.0) as pool:
        async with pool.acquire():
            waiting = pool.acquire(timeout=0.05) if where == "the call's" else pool.acquire()
            with pytest.raises(TimeoutError, match=r"within (0\.05|1) s: 1 of at most 1 are in use"):
                await waiting.__aenter__()
        assert pool.waiting == 0
        async with pool.acquire() as connection:
            await ask(connection)


async def test_who_waits_gets_the_place_of_a_connection_that_cannot_be_opened() -> None:
    """Nobody waits for ever because another's attempt has failed."""
    calls = 0

    async def fail_at_first(connection: kaio.Connection) -> None:
        nonlocal calls
        calls += 1
        if calls <= 2:
            await asyncio.sleep(0.02)
            raise PermissionError("wrong password")

    async with backend() as (_, address), kaio.Pool(address, max_size=1, on_connect=fail_at_first) as pool:

        async def use() -> int:
            async with pool.acquire() as connection:
                return await ask(connection)

        results = await asyncio.gather(*(use() for _ in range(4)), return_exceptions=True)
        assert [type(result) for result in results] == [PermissionError, PermissionError, int, int]
        assert pool.size == 1


async def test_opening_is_bounded_and_can_be_cancelled() -> None:
    """By the same limit."""

    async def hang(connection: kaio.Connection) -> None:
        await asyncio.sleep(30)

    async with backend() as (handler, address), kaio.Pool(address, on_connect=hang) as pool:
        with pytest.raises(TimeoutError, match="no connection to"):
            await pool.acquire(timeout=0.05).__aenter__()
        task = asyncio.ensure_future(pool.acquire().__aenter__())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.size == 0
        await until(lambda: handler.open == 0)


async def test_errors_of_connecting_are_the_callers() -> None:
    """At once, or after the attempts that `retry` allows."""
    async with backend() as (_, address):
        pass
    async with kaio.Pool(address) as pool:
        with pytest.raises(ConnectionRefusedError):
            await pool.acquire().__aenter__()
        assert pool.size == 0
    failures: list[Exception] = []

    def note(error: Exception) -> bool:
        failures.append(error)
        return len(failures) == 3

    async with kaio.Pool(address, retry=kaio.Retry(initial_delay=0.01, final=note)) as pool:
        with pytest.raises(ConnectionRefusedError):
            await pool.acquire().__aenter__()
    assert len(failures) == 3


# -- functions


async def test_a_function_is_called_once_more_when_its_connection_had_ended() -> None:
    """With a fresh one; but not when it was fresh, nor for another reason."""
    async with backend() as (_, address), kaio.Pool(address, max_size=1) as pool:
        calls: list[int] = []

        async def close_in_this_moment(connection: kaio.Connection, *, times: int) -> int:
            calls.append(0)
            return await ask(connection, b"close" if len(calls) <= times else b"who")

        with pytest.raises(kaio.ConnectionEnded):
            await pool.run(close_in_this_moment, times=9)  # on its first connection
        assert calls == [0]
        calls.clear()
        assert await pool.run(ask) == 2
        assert await pool.run(close_in_this_moment, times=1) == 3
        assert len(calls) == 2
        calls.clear()
        with pytest.raises(kaio.ConnectionEnded):
            await pool.run(close_in_this_moment, times=9)
        assert len(calls) == 2
        calls.clear()

        async def another_end(connection: kaio.Connection) -> None:
            calls.append(0)
            raise kaio.EndOfStream

        await pool.run(ask)
        with pytest.raises(kaio.EndOfStream):
            await pool.run(another_end)
        assert calls == [0]
        assert pool.size == 0


# -- size and age


async def test_it_is_warm_when_it_is_entered_and_stays_so() -> None:
    """Connections that end are replaced."""
    async with backend() as (handler, address), kaio.Pool(address, min_size=3) as pool:
        assert (pool.size, pool.idle) == (3, 3)
        for there in (3, 6, 9):
            await until(lambda: len(handler.connections) == there and pool.idle == 3)  # noqa: B023
            for connection in handler.connections[-3:]:
                await let_go("reset", connection)


async def test_what_cannot_be_warmed_up_is_an_error() -> None:
    """The first one, and nothing stays open."""

    async def refuse(connection: kaio.Connection) -> None:
        raise PermissionError

    async with backend() as (handler, address):
        pool = kaio.Pool(address, min_size=3, on_connect=refuse)
        with pytest.raises(PermissionError):
            await pool.__aenter__()
        assert pool.size == 0
        await until(lambda: handler.open == 0)


async def test_filling_up_counts_what_tasks_open_meanwhile() -> None:
    """There are never more connections than allowed."""
    async with backend() as (handler, address), kaio.Pool(address, min_size=1, max_size=1) as pool:
        for _ in range(5):
            with contextlib.suppress(LookupError):
                async with pool.acquire():
                    raise LookupError
            await asyncio.sleep(0)  # it has found that there are too few
            async with pool.acquire() as connection:
                assert await ask(connection) == len(handler.connections)
                await settle()
                assert pool.size == 1
        assert len(handler.connections) == 6


async def test_it_fills_up_again_when_the_server_is_back() -> None:
    """Without a spin meanwhile."""
    attempts = 0

    def count(error: Exception) -> bool:
        nonlocal attempts
        attempts += 1
        return False

    async with backend() as (handler, address):
        pool = kaio.Pool(address, min_size=2, retry=kaio.Retry(initial_delay=0.02, max_delay=0.05, final=count))
        await pool.__aenter__()
    await asyncio.sleep(0.5)
    assert 2 <= attempts <= 200
    async with backend(address=str(address)) as (handler, _):
        await until(lambda: handler.open == 2)
        await pool.aclose()


async def test_it_fills_up_in_one_go() -> None:
    """Only what fails, or does not last, is delayed."""
    async with backend() as (handler, address), kaio.Pool(address, min_size=10) as pool:
        await until(lambda: len(handler.connections) == 10)
        for connection in handler.connections[:10]:
            await let_go("reset", connection)
        await until(lambda: len(handler.connections) == 20 and pool.idle == 10)


@pytest.mark.parametrize("size", [1, 2, 5])
async def test_connections_that_end_at_once_are_not_replaced_at_once(size: int) -> None:
    """A server that accepts and closes is not called without a delay."""
    opened, warm = 0, asyncio.Event()

    async def close_soon(connection: kaio.Connection) -> None:
        nonlocal opened
        opened += 1
        await warm.wait()
        await asyncio.sleep(0.001)

    async with kaio.serve(close_soon, "127.0.0.1", 0) as server:
        async with kaio.Pool(server.listeners[0].address, min_size=size):
            warm.set()
            await asyncio.sleep(1)
        assert size < opened <= 30 * size


async def test_connections_that_nobody_uses_are_closed() -> None:
    """But for the smallest number."""
    async with backend() as (_, address), kaio.Pool(address, min_size=1, max_idle=0.2) as pool:
        leases = [pool.acquire() for _ in range(4)]
        for lease in leases:
            await lease.__aenter__()
        for lease in leases:
            await lease.__aexit__(None, None, None)
        assert pool.idle == 4
        await until(lambda: pool.idle == 1)
        await asyncio.sleep(0.3)
        assert pool.size == 1


async def test_connections_do_not_become_old() -> None:
    """Neither in the pool nor in use."""
    async with backend() as (_, address), kaio.Pool(address, max_lifetime=0.2) as pool:
        async with pool.acquire() as connection:
            await ask(connection)
            await asyncio.sleep(0.25)
        assert pool.size == 0
        async with pool.acquire() as connection:
            assert await ask(connection) == 2
        await until(lambda: pool.size == 0)


# -- the end


async def test_closing_waits_for_who_uses_a_connection() -> None:
    """It may finish; who waits hears that the pool is closed, and so does who comes later."""
    async with backend() as (handler, address):
        pool = kaio.Pool(address, max_size=1)
        done = asyncio.Event()

        async def use() -> int:
            async with pool.acquire() as connection:
                await done.wait()
                return await ask(connection)

        async with pool:
            user = asyncio.ensure_future(use())
            await until(lambda: pool._slots.leased)
            waiting = asyncio.ensure_future(use())
            await until(lambda: pool.waiting == 1)
            closing = asyncio.ensure_future(pool.aclose())
            with pytest.raises(kaio.ClosedResourceError):
                await waiting
            with pytest.raises(kaio.ClosedResourceError):
                await pool.acquire().__aenter__()
            assert not closing.done()
            done.set()
            assert await user == 1
            await closing
        await until(lambda: handler.open == 0)
        assert repr(pool).endswith("closed, 0 waiting>")


@pytest.mark.parametrize("cancel", [False, True])
async def test_closing_is_bounded(cancel: bool) -> None:
    """Who does not finish loses the connection."""
    async with backend() as (_, address):
        pool = kaio.Pool(address)
        await pool.__aenter__()

        async def use() -> None:
            async with pool.acquire() as connection:
                await connection.receive()

        user = asyncio.ensure_future(use())
        await until(lambda: pool._slots.leased)
        closing = asyncio.ensure_future(pool.aclose(timeout=30 if cancel else 0.05))
        await asyncio.sleep(0)
        if cancel:
            closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await closing
        with pytest.raises(kaio.ClosedResourceError):
            await user
        assert pool.size == 0


@pytest.mark.parametrize(
    ("arguments", "kind", "name"),
    [
        ({"min_size": -1}, ValueError, "min_size"),
        ({"min_size": 11}, ValueError, "min_size"),
        ({"max_size": 0}, ValueError, "max_size"),
        ({"max_size": 1.5}, TypeError, "max_size"),
        ({"max_size": True}, TypeError, "max_size"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"max_idle": "1"}, TypeError, "max_idle"),
        ({"max_lifetime": -1}, ValueError, "max_lifetime"),
        ({"on_connect": 1}, TypeError, "on_connect"),
        ({"retry": 3}, TypeError, "retry"),
        ({"keepalive": "never"}, kaio.PolicyError, "keepalive"),
        ({"server_hostname": "x"}, ValueError, "server_hostname"),
    ],
)
def test_a_bad_argument_is_named(arguments: Any, kind: type[Exception], name: str) -> None:
    """Before anything is opened."""
    with pytest.raises(kind, match=name):
        kaio.Pool("127.0.0.1", 1, **arguments)


async def test_misuse_is_an_error() -> None:
    """Before it is entered, twice, and a lease twice."""
    async with backend() as (_, address):
        pool = kaio.Pool(address)
        with pytest.raises(RuntimeError, match="enter the pool first"):
            await pool.acquire().__aenter__()
        with pytest.raises(ValueError, match="timeout"):
            pool.acquire(timeout=0)
        async with pool:
            with pytest.raises(RuntimeError, match="entered already"):
                await pool.__aenter__()
            lease = pool.acquire()
            async with lease:
                with pytest.raises(RuntimeError, match="entered already"):
                    await lease.__aenter__()
        other = kaio.Pool(address)
        async with other:
            with pytest.raises(RuntimeError, match="in the same loop"):
                await asyncio.to_thread(lambda: asyncio.run(_enter(other)))


async def _enter(pool: kaio.Pool) -> None:
    await pool.acquire().__aenter__()
