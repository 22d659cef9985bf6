"""Heartbeats: the far application hangs and is found, or is slow in every way and is not."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pickle
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import kaio
from kaio import Heartbeat

from .conftest import until

EVERY, WITHIN = 1.0, 0.5
PING = b"ping\n"
BEAT = Heartbeat(PING, EVERY, WITHIN)
LATE = 10.0  # seconds for a busy machine


class Far:
    """The far application: answers pings while it is well, with or without a delay."""

    def __init__(self) -> None:
        self.hangs = False
        self.delay = 0.0
        self.pings = 0
        self.ends: list[kaio.Connection] = []
        self.over = asyncio.Event()

    async def __call__(self, connection: kaio.Connection) -> None:
        self.ends.append(connection)
        with contextlib.suppress(kaio.ConnectionEnded):
            while True:
                line = await connection.receive_until(b"\n", 1000)
                if self.hangs:
                    await self.over.wait()
                if line == b"ping":
                    self.pings += 1
                    await asyncio.sleep(self.delay)
                await connection.send(b"pong\n")


@contextlib.asynccontextmanager
async def far(address: str = "127.0.0.1:0", tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Far, Any]]:
    """A far application, and its address."""
    application = Far()
    async with kaio.serve(application, listeners=[kaio.Listener(address, ssl=tls)], close_timeout=0) as server:
        try:
            yield application, server.listeners[0].address
        finally:
            application.over.set()


async def fails(awaitable: Awaitable[object]) -> BaseException:
    """Return what is raised."""
    with pytest.raises(kaio.ConnectionEnded) as caught:
        await awaitable
    return caught.value


async def read_all(connection: kaio.Connection, into: bytearray | None = None) -> None:
    """Receive for ever."""
    while True:
        data = await connection.receive()
        if into is not None:
            into += data


# -- found


KINDS = ["tcp", "tls", "unix"]


@contextlib.asynccontextmanager
async def of_kind(kind: str, contexts: tuple[ssl.SSLContext, ssl.SSLContext], path: Any) -> AsyncIterator[Any]:
    """A far application, and how to connect to it."""
    server_tls, client_tls = contexts
    where = f"unix:{path}/{kind}" if kind == "unix" else "localhost:0"
    async with far(where, server_tls if kind == "tls" else None) as (application, address):
        options: Any = {"ssl": client_tls, "server_hostname": "localhost"} if kind == "tls" else {}
        yield application, functools.partial(kaio.connect, address, **options)


@pytest.mark.slow
async def test_an_application_that_hangs_is_found(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, tmp_path: Any
) -> None:
    """Whatever the kind of connection and of question; its kernel goes on answering. All wait side by side."""
    loop = asyncio.get_running_loop()

    def own(connection: kaio.Connection) -> Callable[[], None]:
        return lambda: connection.transport.write(PING)

    async def ask(connection: kaio.Connection) -> None:
        await connection.send(PING)

    questions: dict[str, Callable[[kaio.Connection], Any]] = {
        "bytes": lambda _: PING,
        "bytearray": lambda _: bytearray(PING),
        "function": lambda _: lambda: PING,
        "sends itself": own,
        "asynchronous": lambda connection: lambda: ask(connection),
    }

    async def life(kind: str, question: str) -> None:
        async with of_kind(kind, (server_tls, client_tls), tmp_path / question) as (application, connect):
            connection = await connect()
            await connection.send(b"x\n")
            await connection.receive()
            connection.heartbeat(Heartbeat(questions[question](connection), EVERY, WITHIN))
            reading = asyncio.ensure_future(read_all(connection))
            await until(lambda: application.pings == 2, within=LATE)
            assert not reading.done()
            application.hangs = True
            began = loop.time()
            error = await fails(asyncio.wait_for(reading, LATE))
            assert isinstance(error, kaio.DeadPeerError), error
            assert error.cause is kaio.Cause.HEARTBEAT
            assert error.silence >= EVERY + WITHIN - 0.6
            assert loop.time() - began >= WITHIN
            assert await fails(connection.send(b"x")) is error
            assert "(heartbeat): silent for" in str(error)

    async with asyncio.TaskGroup() as group:
        for question in questions:
            (tmp_path / question).mkdir()
            for kind in KINDS:
                group.create_task(life(kind, question))
    assert kaio.get_monitor().counters.deaths[kaio.Cause.HEARTBEAT] == len(KINDS) * len(questions)


@pytest.mark.slow
@pytest.mark.parametrize("buffered", [False, True])
async def test_protocols_have_heartbeats_too(buffered: bool, tmp_path: Any) -> None:
    """`peer_dead` and `connection_lost` with the same error."""

    class Client(kaio.KeepaliveProtocol):
        def __init__(self) -> None:
            self.calls: list[tuple[str, Any]] = []
            self.data = b""

        def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
            transport.heartbeat(BEAT)
            transport.write(b"x\n")

        def data_received(self, data: bytes) -> None:
            self.data += data

        def peer_dead(self, error: kaio.DeadPeerError) -> None:
            self.calls.append(("dead", error))

        def connection_lost(self, exc: Exception | None) -> None:
            self.calls.append(("lost", exc))

    class Buffered(kaio.BufferedKeepaliveProtocol):
        __init__ = Client.__init__
        connection_made = Client.connection_made
        peer_dead = Client.peer_dead
        connection_lost = Client.connection_lost

        def get_buffer(self, sizehint: int) -> bytearray:
            self.buffer = bytearray(100)
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            Client.data_received(self, self.buffer[:nbytes])  # type: ignore[arg-type]

    kind: Any = Buffered if buffered else Client
    async with far() as (application, address):
        transport, protocol = await kaio.create_connection(kind, address.host, address.port)
        await until(lambda: application.pings == 2, within=LATE)
        application.hangs = True
        await asyncio.wait_for(transport.wait_closed(), LATE)
        assert protocol.data == b"pong\n" * (1 + application.pings)
        assert [name for name, _ in protocol.calls] == ["dead", "lost"]
        assert protocol.calls[0][1] is protocol.calls[1][1]
        assert protocol.calls[0][1].cause is kaio.Cause.HEARTBEAT


@pytest.mark.slow
async def test_a_server_finds_clients_that_hang() -> None:
    """The handler's connection is like any other."""
    found: list[BaseException] = []

    async def handler(connection: kaio.Connection) -> None:
        connection.heartbeat(BEAT)
        found.append(await fails(read_all(connection)))

    async with (
        kaio.serve(handler, "127.0.0.1", 0) as server,
        kaio.connect(server.listeners[0].address) as mute,
    ):
        assert await mute.receive() == PING
        await until(lambda: len(found), within=LATE)
        assert isinstance(found[0], kaio.DeadPeerError)
        await fails(mute.receive())


# -- not found, because it lives


@pytest.mark.slow
async def test_a_slow_application_is_not_given_up() -> None:
    """It answers late, or not to pings but with other data; or we do not read; or it reads slowly; all side by side."""

    async def answers_late() -> None:
        async with far() as (application, address), kaio.connect(address) as connection:
            application.delay = 0.3
            connection.heartbeat(BEAT)
            reading = asyncio.ensure_future(read_all(connection))
            await asyncio.sleep(6)
            assert application.pings >= 3
            assert not reading.done()
            reading.cancel()

    async def sends_without_answering() -> None:
        async def handler(connection: kaio.Connection) -> None:
            with contextlib.suppress(kaio.ConnectionEnded):
                while True:
                    await connection.send(b".")
                    await asyncio.sleep(0.2)

        serving = kaio.serve(handler, "127.0.0.1", 0, close_timeout=0)
        async with serving as server, kaio.connect(server.listeners[0].address) as connection:
            connection.heartbeat(BEAT)
            reading = asyncio.ensure_future(read_all(connection))
            await asyncio.sleep(6)
            assert not reading.done()
            reading.cancel()

    async def we_do_not_read() -> None:
        async def handler(connection: kaio.Connection) -> None:
            with contextlib.suppress(kaio.ConnectionEnded):
                while True:
                    await connection.send(b"x" * 100_000)

        serving = kaio.serve(handler, "127.0.0.1", 0, close_timeout=0)
        async with serving as server, kaio.connect(server.listeners[0].address) as connection:
            connection.heartbeat(BEAT)
            await connection.receive()
            await asyncio.sleep(5)
            for _ in range(10):
                await connection.receive()

    async def it_reads_slowly() -> None:
        """Our question stands behind a large upload, which the peer takes bit by bit, and says nothing."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            listening.setblocking(False)
            loop = asyncio.get_running_loop()
            async with kaio.connect(*listening.getsockname()) as connection:
                connection.transport.set_write_buffer_limits(high=1 << 30)
                end, _ = await loop.sock_accept(listening)
                with end:
                    end.setblocking(False)
                    connection.heartbeat(BEAT)
                    reading = asyncio.ensure_future(read_all(connection))
                    await connection.send(b"x" * (16 << 20))
                    for _ in range(60):
                        await asyncio.sleep(0.1)
                        await loop.sock_recv(end, 65536)
                    assert not reading.done()
                    error = await fails(asyncio.wait_for(reading, LATE))  # it takes no more, and says nothing
                    assert isinstance(error, kaio.DeadPeerError)

    async def is_half_closed() -> None:
        """Who has sent EOF owes no answer."""
        async with far() as (application, address), kaio.connect(address) as connection:
            await connection.send(b"x\n")
            await connection.receive()
            await application.ends[0].send_eof()
            connection.heartbeat(BEAT)
            await asyncio.sleep(4)
            await connection.send(b"x\n")

    async with asyncio.TaskGroup() as group:
        for life in (answers_late, sends_without_answering, we_do_not_read, it_reads_slowly, is_half_closed):
            group.create_task(life())


@pytest.mark.slow
async def test_a_blocked_loop_is_not_the_peers_fault() -> None:
    """For longer than both times together: the answer is in the socket, or the question has not left."""
    async with far() as (application, address), kaio.connect(address) as connection:
        connection.heartbeat(BEAT)
        reading = asyncio.ensure_future(read_all(connection))
        for blocked in (0.4, 1.2, 2.5, 4.0):
            await asyncio.sleep(0.9)
            time.sleep(blocked)  # noqa: ASYNC251 - the point of the test
        await asyncio.sleep(1.5)
        assert not reading.done()
        assert application.pings
        reading.cancel()


# -- contents


def is_event(data: bytes) -> bool:
    """Whether server-sent events are more than comments."""
    return not data.startswith(b":")


@pytest.mark.slow
async def test_contents_have_a_time_of_their_own(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, tmp_path: Any
) -> None:
    """Comments of a server that is alive do not count; events do. On each kind of connection, side by side."""

    async def handler(connection: kaio.Connection) -> None:
        with contextlib.suppress(kaio.ConnectionEnded):
            for number in range(100):
                await connection.send(b"data: 1\n\n" if number < 10 else b": alive\n\n")
                await asyncio.sleep(0.2)

    async def life(kind: str) -> None:
        where = f"unix:{tmp_path}/c" if kind == "unix" else "localhost:0"
        listener = kaio.Listener(where, ssl=server_tls if kind == "tls" else None)
        async with kaio.serve(handler, listeners=[listener], close_timeout=0) as server:
            options: Any = {"ssl": client_tls, "server_hostname": "localhost"} if kind == "tls" else {}
            async with kaio.connect(server.listeners[0].address, **options) as connection:
                connection.heartbeat(Heartbeat(content_timeout=1.0, is_content=is_event))
                data = bytearray()
                error = await fails(read_all(connection, data))
                assert data.count(b"data: 1") == 10
                assert data.count(b": alive") >= 3
                assert isinstance(error, kaio.ContentTimeoutError)
                assert error.timeout == 1.0
                assert "no content received" in str(error)
                assert type(pickle.loads(pickle.dumps(error))) is kaio.ContentTimeoutError

    async with asyncio.TaskGroup() as group:
        for kind in KINDS:
            group.create_task(life(kind))


@pytest.mark.complains
async def test_a_predicate_that_fails_ends_nothing() -> None:
    """The loop's exception handler is told, and the data counts."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    def fail(data: bytes) -> bool:
        raise LookupError

    async with far() as (_, address), kaio.connect(address) as connection:
        connection.heartbeat(Heartbeat(content_timeout=0.5, is_content=fail))
        for _ in range(8):
            await connection.send(b"x\n")
            await connection.receive()
            await asyncio.sleep(0.15)
    assert len(complaints) == 8
    assert isinstance(complaints[0]["exception"], LookupError)


@pytest.mark.slow
@pytest.mark.complains
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_question_that_fails_ends_nothing(asynchronous: bool) -> None:
    """The loop's exception handler is told, and the peer owes no answer; but a question is tried again."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    def fail() -> bytes:
        raise LookupError

    async def fail_later() -> None:
        await asyncio.sleep(0)
        raise LookupError

    async with far() as (_, address), kaio.connect(address) as connection:
        connection.heartbeat(Heartbeat(fail_later if asynchronous else fail, EVERY, WITHIN))
        await until(lambda: len(complaints) >= 2, within=LATE)
        await connection.send(b"x\n")
        assert await connection.receive() == b"pong\n"


# -- setting it


@pytest.mark.slow
async def test_it_can_be_changed_and_taken_away() -> None:
    """A client that stops asking finds nobody dead; its new heartbeat counts from when it is set."""
    async with far() as (application, address), kaio.connect(address) as connection:
        application.hangs = True
        connection.heartbeat(BEAT)
        connection.heartbeat(None)
        connection.heartbeat(None)
        reading = asyncio.ensure_future(read_all(connection))
        await asyncio.sleep(2.5)
        assert not reading.done()
        assert not kaio.get_monitor().heartbeats
        connection.heartbeat(BEAT)
        connection.heartbeat(Heartbeat(PING, 0.4, 0.4))
        assert isinstance(await fails(asyncio.wait_for(reading, LATE)), kaio.DeadPeerError)
        assert not kaio.get_monitor().heartbeats


@pytest.mark.slow
async def test_it_goes_along_to_another_protocol_of_kaios(tmp_path: Any) -> None:
    """With the tap, on a Unix socket; a protocol of another kind is left alone."""

    class Other(kaio.KeepaliveProtocol):
        def __init__(self) -> None:
            self.data = b""
            self.lost: BaseException | None = None

        def data_received(self, data: bytes) -> None:
            self.data += data

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost = exc

    async with far(f"unix:{tmp_path}/s") as (application, address):
        connection = await kaio.connect(address)
        connection.heartbeat(BEAT)
        other = Other()
        connection.transport.set_protocol(other)
        await until(lambda: application.pings >= 2, within=LATE)
        assert other.data
        application.hangs = True
        await until(lambda: other.lost is not None, within=LATE)
        assert isinstance(other.lost, kaio.DeadPeerError)

        plain = await kaio.connect(address)
        plain.heartbeat(BEAT)
        plain.transport.set_protocol(asyncio.Protocol())
        assert not kaio.get_monitor().heartbeats
        plain.transport.inner.abort()


async def test_data_that_cannot_be_seen_is_refused(tmp_path: Any) -> None:
    """A BufferedProtocol, where the kernel does not tell, or contents are asked for."""

    class Buffered(kaio.BufferedKeepaliveProtocol):
        def get_buffer(self, sizehint: int) -> bytearray:
            return bytearray(100)

    async with far() as (_, address):
        transport, _ = await kaio.create_connection(Buffered, address.host, address.port)
        with pytest.raises(TypeError, match="BufferedProtocol: its data cannot be seen"):
            transport.heartbeat(Heartbeat(content_timeout=1))
        assert not kaio.get_monitor().heartbeats
        transport.abort()
        await transport.wait_closed()
        transport.heartbeat(BEAT)  # it has ended: nothing to be done


async def test_ten_thousand_taps_leave_nothing() -> None:
    """The class of a protocol that shows its data is made once."""
    async with far() as (_, address):
        for _ in range(3):
            async with kaio.connect(address) as connection:
                connection.heartbeat(Heartbeat(content_timeout=60))
                connection.heartbeat(Heartbeat(content_timeout=50))
                kinds = {type(connection.transport.get_protocol())}
                assert len(kinds) == 1
                assert type(connection.transport.get_protocol()).__name__ == "StreamProtocol"
                await connection.send(b"x\n")
                assert await connection.receive() == b"pong\n"


@pytest.mark.parametrize(
    ("arguments", "kind", "name"),
    [
        ((), ValueError, "send"),
        ((b"",), ValueError, "send"),
        (("ping",), TypeError, "send"),
        ((PING, 0), ValueError, "every"),
        ((PING, None), TypeError, "every"),
        ((PING, 1, -1), ValueError, "within"),
        ((PING, 1, "1"), TypeError, "within"),
        ((PING, float("nan")), ValueError, "every"),
    ],
)
def test_a_bad_field_is_named(arguments: Any, kind: type[Exception], name: str) -> None:
    """Before anything is asked."""
    with pytest.raises(kind, match=name):
        Heartbeat(*arguments)


@pytest.mark.parametrize(
    ("fields", "kind", "name"),
    [
        ({"content_timeout": 0}, ValueError, "content_timeout"),
        ({"content_timeout": True}, TypeError, "content_timeout"),
        ({"send": PING, "is_content": is_event}, ValueError, "is_content"),
        ({"content_timeout": 1, "is_content": 1}, TypeError, "is_content"),
    ],
)
def test_a_bad_content_field_is_named(fields: Any, kind: type[Exception], name: str) -> None:
    """The same."""
    with pytest.raises(kind, match=name):
        Heartbeat(**fields)


async def test_a_heartbeat_that_is_none_is_refused() -> None:
    """With its value."""
    async with far() as (_, address), kaio.connect(address) as connection:
        with pytest.raises(TypeError, match=r"takes a kaio\.Heartbeat or None, got b'ping"):
            connection.heartbeat(PING)  # type: ignore[arg-type]
