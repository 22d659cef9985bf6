"""`async for` over connections: when it connects again, when it does not, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trustme
from anyio.streams.buffered import BufferedByteReceiveStream

import kaio
from kaio.net import dialing
from kaio.net.retry import Backoff
from kaio.testing import blackhole

from .conftest import Recorder, reset, until

QUICK = kaio.Retry(initial_delay=0.01, max_delay=0.02, lasting=0)


class Peer:
    """A server that counts its connections, and does with each of them what the test says."""

    def __init__(self) -> None:
        self.seen = 0
        self.ended = 0
        self.ends: asyncio.Queue[kaio.Connection] = asyncio.Queue()

    async def __call__(self, connection: kaio.Connection) -> None:
        self.seen += 1
        self.ends.put_nowait(connection)
        with contextlib.suppress(kaio.ConnectionEnded):
            async for data in connection:
                await connection.send(data)
        self.ended += 1


@contextlib.asynccontextmanager
async def peer(port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Peer, Any]]:
    """Such a server, and its address."""
    handler = Peer()
    listener = kaio.Listener(f"127.0.0.1:{port}", ssl=tls)
    async with kaio.serve(handler, listeners=[listener], close_timeout=0) as server:
        yield handler, server.listeners[0].address


async def end(how: str, connection: kaio.Connection) -> None:
    """Let the peer's end of a connection go."""
    if how == "reset":
        reset(connection.transport.get_extra_info("socket"))
        connection.abort()
    else:
        await connection.aclose()


# -- again


async def receive(connection: kaio.Connection) -> None:
    async for _ in connection:
        pass


async def receive_in_a_group(connection: kaio.Connection) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(connection.receive_exactly(100))
        group.create_task(asyncio.sleep(100))


async def receive_in_groups(connection: kaio.Connection) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(receive_in_a_group(connection) if not _ else raise_when_over(connection))


async def raise_when_over(connection: kaio.Connection) -> None:
    async with connection.while_alive():
        await asyncio.sleep(100)


async def receive_by_anyio(connection: kaio.Connection) -> None:
    await BufferedByteReceiveStream(connection).receive_exactly(100)


async def close_it(connection: kaio.Connection) -> None:
    await connection.aclose()
    await connection.send(b"x")


async def come_to_an_end(connection: kaio.Connection) -> None:
    """Return while the connection is still open."""


BLOCKS: list[Callable[[kaio.Connection], Awaitable[object]]] = [
    receive,
    receive_in_a_group,
    receive_in_groups,
    receive_by_anyio,
    close_it,
    come_to_an_end,
]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("how", ["reset", "closed"])
async def test_it_connects_again_when_the_connection_has_ended(how: str, block: Any) -> None:
    """Whatever is raised by that, also in a group; each connection is another one, and the one before is closed."""
    async with peer() as (server, address):
        before: kaio.Connection | None = None
        async for connection in kaio.connect(address, retry=QUICK):
            assert before is None or (before is not connection and before.transport.is_closing())
            before = connection
            there = await server.ends.get()
            if server.seen == 4:
                break
            ending = asyncio.ensure_future(end(how, there))
            async with connection:
                await block(connection)
            await ending
        assert server.seen == 4
        await until(lambda: server.ended == 4)


@pytest.mark.parametrize("how", ["reset", "closed"])
async def test_the_end_can_be_seen(how: str) -> None:
    """By `try` in place of `async with`."""
    seen: list[BaseException] = []
    async with peer() as (server, address):
        async for connection in kaio.connect(address, retry=QUICK):
            await end(how, await server.ends.get())
            try:
                await connection.receive()
            except kaio.ConnectionEnded as exc:
                seen.append(exc)
                if len(seen) == 3:
                    break
    assert [type(exc) for exc in seen] == [kaio.ResetError if how == "reset" else kaio.EndOfStream] * 3


@pytest.mark.slow
async def test_it_connects_again_when_the_peer_has_died(dead_peers: None) -> None:
    """Within the detection time, and at once."""
    async with peer() as (server, address):
        async for connection in kaio.connect(address, keepalive="1s:1s:2", retry=kaio.Retry(lasting=1)):
            there = await server.ends.get()
            if server.seen == 2:
                break
            with blackhole(there.transport):
                async with connection:
                    await connection.receive()


async def test_each_loop_begins_anew() -> None:
    """One `connect(...)` can be iterated over again."""
    async with peer() as (server, address):
        connecting = kaio.connect(address)
        for _ in range(2):
            async for connection in connecting:
                await connection.send(b"x")
                assert await connection.receive() == b"x"
                break
        assert server.seen == 2


# -- no more


class MyError(Exception):
    """The application's."""


@pytest.mark.parametrize("inner", [True, False], ids=["async with", "bare"])
@pytest.mark.parametrize("way", ["break", "return", "raise", "raise in a group", "cancel", "timeout", "another's end"])
async def test_leaving_the_loop_closes_the_connection(way: str, inner: bool) -> None:
    """At once, and waits for nobody; no task is left."""
    tasks = asyncio.all_tasks()

    async def client(address: Any) -> None:
        async for connection in kaio.connect(address, retry=QUICK):
            async with connection if inner else contextlib.nullcontext():
                await connection.send(b"x")
                await connection.receive()
                match way:
                    case "break":
                        break
                    case "return":
                        return
                    case "raise":
                        raise MyError
                    case "raise in a group":
                        raise ExceptionGroup("", [MyError(), kaio.EndOfStream()])
                    case "another's end":
                        raise kaio.EndOfStream  # of a connection that is not this one
                    case "timeout":
                        async with asyncio.timeout(0.01):
                            await connection.receive()
                    case _:
                        await connection.receive()

    expected: dict[str, type[BaseException]] = {
        "raise": MyError,
        "raise in a group": ExceptionGroup,
        "cancel": asyncio.CancelledError,
        "timeout": TimeoutError,
        "another's end": kaio.EndOfStream,
    }
    async with peer() as (server, address):
        task = asyncio.ensure_future(client(address))
        await server.ends.get()
        if way == "cancel":
            await asyncio.sleep(0.05)
            task.cancel()
        with pytest.raises(expected[way]) if way in expected else contextlib.nullcontext():
            await task
        await until(lambda: server.ended == 1)
        assert server.seen == 1
        await until(lambda: len(asyncio.all_tasks() - tasks - {task}) <= 1)  # the server's own


async def test_cancelled_between_two_connections() -> None:
    """While it waits, and while it connects."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = "127.0.0.1", listening.getsockname()[1]
    for delay in (0.001, 0.01, 0.05):

        async def client() -> None:
            async for _ in kaio.connect(*address, retry=QUICK):
                raise AssertionError

        task = asyncio.ensure_future(client())
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_an_iterator_that_is_dropped_in_another_thread_closes_its_connection() -> None:
    """There it must not touch the loop."""
    async with peer() as (server, address):
        iterators = [aiter(kaio.connect(address))]
        await anext(iterators[0])
        await asyncio.to_thread(iterators.clear)
        await until(lambda: server.ended == 1)


# -- how often


async def refuse() -> tuple[str, int]:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["loop", "await", "protocols", "a protocol"])
async def test_attempts_are_limited(kind: str) -> None:
    """And the last error is raised."""
    retry = kaio.Retry(attempts=3, initial_delay=0.01)
    address = await refuse()
    streams = kaio.connect(*address, retry=retry)
    protocols = kaio.create_connection(kaio.KeepaliveProtocol, *address, retry=retry)
    ways: dict[str, Any] = {
        "loop": aiter(streams).__anext__,
        "await": lambda: streams,
        "protocols": aiter(protocols).__anext__,
        "a protocol": lambda: protocols,
    }
    with pytest.raises(ConnectionRefusedError):
        await ways[kind]()
    streams.close()
    protocols.close()


async def test_connections_that_do_not_last_count_as_attempts() -> None:
    """A server that accepts and closes is not called for ever."""
    async with peer() as (server, address):
        connections = aiter(kaio.connect(address, retry=kaio.Retry(attempts=3, initial_delay=0.01)))
        for _ in range(3):
            await anext(connections)
            await (await server.ends.get()).aclose()
        with pytest.raises(kaio.EndOfStream):
            await anext(connections)
        assert server.seen == 3


async def test_the_total_time_is_limited() -> None:
    """An attempt under way is cancelled; the error is that of the last attempt, else a TimeoutError of the caller's."""
    address = await refuse()
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ConnectionRefusedError):
        await kaio.connect(*address, retry=kaio.Retry(timeout=0.2, initial_delay=0.05))
    assert loop.time() - began < 10
    with socket.socket() as mute:  # a queue that is full answers no SYN
        mute.bind(("127.0.0.1", 0))
        mute.listen(0)
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(mute.getsockname())
        with pytest.raises(TimeoutError, match=r"no connection to 127\.0\.0\.1:\d+ within 0\.2 s"):
            await kaio.connect(*mute.getsockname(), retry=kaio.Retry(timeout=0.2))
        for filler in fillers:
            filler.close()


async def test_it_comes_as_soon_as_the_server_does() -> None:
    """With one that is not there yet."""
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        connecting = asyncio.ensure_future(_connect(late.getsockname()))
        await asyncio.sleep(0.1)
        late.listen()
        await (await connecting).aclose()


async def _connect(address: tuple[str, int]) -> kaio.Connection:
    return await kaio.connect(*address, retry=QUICK)


# -- what is final


async def test_a_certificate_that_was_never_good_is_final(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """A mistake is told at once; one that comes later may be mended."""
    async with peer(tls=server_tls) as (_, address):
        with pytest.raises(ssl.SSLCertVerificationError):
            async for _ in kaio.connect(address, ssl=ssl.create_default_context(), retry=QUICK):
                pass
        with pytest.raises(ssl.SSLCertVerificationError):
            await kaio.connect(address, ssl=client_tls, server_hostname="elsewhere", retry=QUICK)


async def test_a_certificate_that_was_good_before_is_not(client_tls: ssl.SSLContext, authority: trustme.CA) -> None:
    """It is mended meanwhile."""

    def context(authority: trustme.CA) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost", "127.0.0.1").configure_cert(made)
        return made

    failures: list[Exception] = []

    def note(error: Exception) -> bool:
        failures.append(error)
        return False

    for retry in (kaio.Retry(initial_delay=0.01, final=note), kaio.Retry(initial_delay=0.01)):
        handler, listener, times = Peer(), kaio.Listener("127.0.0.1:0", ssl=context(authority)), 0
        async with kaio.serve(handler, listeners=[listener], close_timeout=0):
            connecting = kaio.connect(listener.address, ssl=client_tls, server_hostname="localhost", retry=retry)
            async for connection in connecting:
                times += 1
                if times == 2:
                    break
                listener.ssl = context(trustme.CA())
                asyncio.get_running_loop().call_later(0.3, setattr, listener, "ssl", context(authority))
                await (await handler.ends.get()).aclose()
                async with connection:
                    await connection.receive()
    assert any(isinstance(error, ssl.SSLCertVerificationError) for error in failures)


async def test_a_name_that_does_not_exist_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the predicate says otherwise. What a resolver says without a network is not the test's matter."""

    async def resolve(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(dialing, "resolve", resolve)
    with pytest.raises(socket.gaierror):
        await kaio.connect("nobody.invalid", 80, retry=QUICK)
    tried: list[Exception] = []

    def wait_for_it(error: Exception) -> bool:
        tried.append(error)
        return len(tried) == 3

    with pytest.raises(socket.gaierror):
        await kaio.connect("nobody.invalid", 80, retry=kaio.Retry(initial_delay=0.01, final=wait_for_it))
    assert len(tried) == 3


class Rejected(kaio.ConnectionEnded):
    """What a user's protocol raises when the server does not accept a password, and closes."""


@pytest.mark.parametrize("group", [False, True])
async def test_an_end_can_be_final(group: bool) -> None:
    """By the predicate: authentication, for example."""
    retry = kaio.Retry(initial_delay=0.01, final=lambda error: isinstance(error, Rejected))
    async with peer() as (server, address):

        async def client() -> None:
            async for connection in kaio.connect(address, retry=retry):
                await (await server.ends.get()).aclose()
                async with connection:
                    with contextlib.suppress(kaio.EndOfStream):
                        await connection.receive()
                    raise ExceptionGroup("", [Rejected()]) if group else Rejected

        with pytest.raises(ExceptionGroup if group else Rejected):
            await client()
        assert server.seen == 1


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("attempts", 0, ValueError),
        ("attempts", 1.5, TypeError),
        ("attempts", True, TypeError),
        ("at_once", -1, ValueError),
        ("at_once", None, TypeError),
        ("timeout", 0, ValueError),
        ("timeout", float("nan"), ValueError),
        ("timeout", "1", TypeError),
        ("initial_delay", 0, ValueError),
        ("initial_delay", 31, ValueError),
        ("max_delay", float("inf"), ValueError),
        ("lasting", -1, ValueError),
        ("final", ValueError(), TypeError),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, kind: type[Exception]) -> None:
    """With its value, before anything is tried."""
    with pytest.raises(kind, match=rf"^{field}="):
        kaio.Retry(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("retry", [True, 3, "always"])
async def test_a_retry_that_is_none_is_refused(retry: Any) -> None:
    """At once, and not when it is awaited."""
    with pytest.raises(TypeError, match="retry="):
        kaio.connect("127.0.0.1", 1, retry=retry)
    with pytest.raises(TypeError, match="retry="):
        kaio.create_connection(kaio.KeepaliveProtocol, "127.0.0.1", 1, retry=retry)


async def test_a_connected_socket_is_used_once() -> None:
    """Neither `retry` nor a loop can connect it again; the mistake is told before it is taken."""
    async with peer() as (_, address):
        with socket.create_connection((address.host, address.port)) as sock:
            with pytest.raises(ValueError, match="a sock cannot be connected again"):
                kaio.create_connection(Recorder, sock=sock, retry=QUICK)
            with pytest.raises(ValueError, match="a sock cannot be connected again"):
                aiter(kaio.create_connection(Recorder, sock=sock))
            assert sock.fileno() >= 0


# -- the delays


def test_delays_grow_and_are_drawn_in_full() -> None:
    """Exponentially up to the longest, each between 0 and that."""
    longest = Backoff(kaio.Retry(at_once=2, initial_delay=1, max_delay=10), 0.0, lambda: 1.0)
    delays = []
    for longest.attempts in range(8):
        delays.append(longest.delay())
    assert delays == [0, 0, 1, 2, 4, 8, 10, 10]
    longest.attempts = 10_000
    assert longest.delay() == 10
    drawn = Backoff(kaio.Retry(), 0.0)
    drawn.attempts = 3
    several = [drawn.delay() for _ in range(1000)]
    assert 0 <= min(several) < 0.1
    assert 1.9 < max(several) <= 2


def test_a_connection_that_lasted_begins_all_anew() -> None:
    """Attempts, and the total time; one that did not leaves both as they are."""
    backoff = Backoff(kaio.Retry(attempts=5, timeout=60, lasting=10), 100.0)
    backoff.attempts = 5
    assert backoff.exhausted()
    assert backoff.left(130.0) == 30.0
    assert not backoff.ended(kaio.EndOfStream(), 9.9, 140.0)
    assert backoff.exhausted()
    assert backoff.left(170.0) == 0.0
    assert not backoff.ended(kaio.EndOfStream(), 10.0, 170.0)
    assert not backoff.exhausted()
    assert backoff.delay() == 0.0
    assert backoff.left(180.0) == 50.0


# -- protocols


async def test_protocols_one_after_the_other() -> None:
    """A new one for each connection, with connection_lost before the next."""
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    async with peer() as (server, address):
        async for transport, protocol in kaio.create_connection(factory, address.host, address.port, retry=QUICK):
            assert protocol is made[-1]
            assert all(each.lost.done() for each in made[:-1])
            transport.write(b"x")
            if len(made) == 4:
                break
            if len(made) < 3:  # the third is left open
                await end("reset" if len(made) == 1 else "closed", await server.ends.get())
                await transport.wait_closed()
            await transport.wait_closed() if protocol.lost.done() else None
        await until(lambda: made[-1].lost.done())
    assert [each.names[0] for each in made] == ["made"] * 4


async def test_create_connection_is_still_a_coroutine() -> None:
    """For all that take one."""
    async with peer() as (_, address):
        where = address.host, address.port
        transports = [
            (await asyncio.create_task(kaio.create_connection(Recorder, *where)))[0],
            (await asyncio.wait_for(kaio.create_connection(Recorder, *where), 10))[0],
            (await asyncio.gather(kaio.create_connection(Recorder, *where)))[0][0],
        ]
        async with asyncio.TaskGroup() as group:
            task = group.create_task(kaio.create_connection(Recorder, *where))
        for transport in (*transports, task.result()[0]):
            transport.abort()
            await transport.wait_closed()
            await transport.wait_closed()
        cancelled = asyncio.create_task(kaio.create_connection(Recorder, *where))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        forgotten = [kaio.create_connection(Recorder, *where)]
        with pytest.warns(RuntimeWarning, match="never awaited"):
            forgotten.clear()
        kaio.create_connection(Recorder, *where).close()


async def test_other_protocols_can_be_iterated_over_too() -> None:
    """Their transports are the loop's own."""
    async with peer() as (server, address):
        seen = 0
        async for transport, _ in kaio.create_connection(asyncio.Protocol, address.host, address.port, retry=QUICK):
            seen += 1
            transport.write(b"x")
            if seen == 3:
                break
        await until(lambda: server.ended == 3)


# -- cancelled at each step


async def steps(count: int) -> None:
    """Let the loop make so many turns."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("kind", ["tcp", "tls", "unix"])
@pytest.mark.parametrize("way", ["loop", "protocols", "await", "pool"])
async def test_cancelled_at_each_step_it_leaves_nothing(
    way: str, kind: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, tmp_path: Any
) -> None:
    """Whatever it was doing: every connection is closed, and no task is left."""
    if (way, kind) == ("protocols", "unix"):
        return
    where = f"unix:{tmp_path}/s" if kind == "unix" else "127.0.0.1:0"
    options: Any = {"ssl": client_tls, "server_hostname": "localhost"} if kind == "tls" else {}
    handler, listener = Peer(), kaio.Listener(where, ssl=server_tls if kind == "tls" else None)
    async with kaio.serve(handler, listeners=[listener], close_timeout=0) as server:
        address: Any = server.listeners[0].address
        before = asyncio.all_tasks()

        async def use_loop() -> None:
            async for connection in kaio.connect(address, retry=QUICK, **options):
                async with connection:
                    await connection.send(b"x")
                    await connection.receive()

        async def use_protocols() -> None:
            made = kaio.create_connection(Recorder, address.host, address.port, retry=QUICK, **options)
            async for transport, _ in made:
                transport.write(b"x")
                await steps(3)

        async def use_await() -> None:
            connection = await kaio.connect(address, retry=QUICK, **options)
            async with connection:
                await connection.receive()

        async def use_pool() -> None:
            async with kaio.Pool(address, min_size=2, max_size=2, retry=QUICK, **options) as pool:
                for _ in range(10):
                    async with pool.acquire() as connection:
                        await connection.send(b"x")
                        await connection.receive()

        uses = {"loop": use_loop, "protocols": use_protocols, "await": use_await, "pool": use_pool}
        for count in range(45):
            task = asyncio.ensure_future(uses[way]())
            await steps(count)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(task, 10)
        await until(lambda: not server.connections, within=15)
        await until(lambda: handler.ended == handler.seen, within=15)
        await until(lambda: asyncio.all_tasks() <= before, within=15)
