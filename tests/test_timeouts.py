"""Idle and send timeouts: who is silent, or does not read, is let go; who is neither is not."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import ssl
from typing import Any

import anyio
import pytest

import kaio

from .conftest import Recorder, echo, until

IDLE = 0.5


@contextlib.asynccontextmanager
async def serving(handler: Any, address: str = "127.0.0.1:0", **options: Any) -> Any:
    """Serve at an address with a listener's options."""
    listener = kaio.Listener(address, **options)
    async with kaio.serve(handler, listeners=[listener], close_timeout=1) as server:
        yield server


async def test_a_silent_client_is_idle(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, tmp_path: Any) -> None:
    """Handlers and protocols, with and without TLS, TCP and Unix: the error is the same for all who wait."""
    errors: dict[str, BaseException | None] = {}

    def handler(name: str, method: str) -> Any:
        async def handle(connection: kaio.Connection) -> None:
            try:
                async with connection.while_alive():
                    if method == "receive_exactly":
                        await connection.receive_exactly(10)
                    elif method == "receive_until":
                        await connection.receive_until(b"\n", 100)
                    else:
                        async for _ in connection:
                            pass
            except BaseException as exc:
                errors[name] = exc
                with pytest.raises(kaio.IdleTimeoutError):
                    await connection.send(b"x")
                raise

        return handle

    class Silent(kaio.KeepaliveProtocol):
        def connection_lost(self, exc: Exception | None) -> None:
            errors["protocol"] = exc

    async with contextlib.AsyncExitStack() as stack:
        places: dict[str, tuple[Any, str, Any]] = {
            "async for": (handler("async for", "async for"), "127.0.0.1:0", None),
            "exactly": (handler("exactly", "receive_exactly"), "[::1]:0", None),
            "until": (handler("until", "receive_until"), f"unix:{tmp_path}/s", None),
            "tls": (handler("tls", "async for"), "localhost:0", server_tls),
            "protocol": (Silent, "127.0.0.1:0", None),
        }
        clients = []
        for serve, address, tls in places.values():
            server = await stack.enter_async_context(serving(serve, address, ssl=tls, idle_timeout=IDLE))
            where = server.listeners[0].address
            client = await kaio.connect(where, ssl=client_tls if tls else None)
            clients.append(await stack.enter_async_context(client))
            await client.send(b"half")
            assert {each.idle_timeout for each in server.connections} <= {IDLE}
        for client in clients:
            with pytest.raises((anyio.EndOfStream, kaio.ResetError)):
                await client.receive()
    assert set(errors) == set(places)
    for error in errors.values():
        assert isinstance(error, kaio.IdleTimeoutError)
        assert error.timeout == IDLE
        assert "for 0.5 s" in str(error)


async def test_who_sends_now_and_then_is_not_idle() -> None:
    """For many times the timeout, with handlers and protocols."""

    class Quiet(kaio.KeepaliveProtocol):
        pass

    for handler in (echo, Quiet):
        async with serving(handler, idle_timeout=IDLE) as server, kaio.connect(server.listeners[0].address) as client:
            for _ in range(12):
                await client.send(b"x")
                await asyncio.sleep(IDLE / 4)
            assert len(server.connections) == 1


async def test_waiting_again_and_again_is_idle_all_the_same() -> None:
    """A handler that looks at something else in between; but not while data comes."""
    error: list[BaseException] = []

    async def handler(connection: kaio.Connection) -> None:
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE / 10):
                        await connection.receive()
        except BaseException as exc:
            error.append(exc)
            raise

    async with serving(handler, idle_timeout=IDLE) as server, kaio.connect(server.listeners[0].address) as client:
        for _ in range(12):
            await client.send(b"x")
            await asyncio.sleep(IDLE / 4)
        assert not error
        await until(lambda: error, within=30)
        assert isinstance(error[0], kaio.IdleTimeoutError)


async def test_a_protocol_whose_peer_has_sent_eof_is_not_idle() -> None:
    """Nothing can come, and it may have much to say yet."""

    class Half(kaio.KeepaliveProtocol):
        def eof_received(self) -> bool:
            return True

    async with serving(Half, idle_timeout=IDLE) as server, kaio.connect(server.listeners[0].address) as client:
        await client.send_eof()
        await asyncio.sleep(4 * IDLE)
        (transport,) = server.connections
        transport.write(b"done")
        assert await client.receive() == b"done"
        transport.close()


async def test_a_handler_that_works_or_sends_is_not_idle() -> None:
    """Nor is the client that waits for it."""

    async def handler(connection: kaio.Connection) -> None:
        await connection.receive()
        await asyncio.sleep(3 * IDLE)
        for _ in range(6):
            await connection.send(b"x")
            await asyncio.sleep(IDLE / 2)
        await connection.receive_exactly(3)

    async with serving(handler, idle_timeout=IDLE) as server, kaio.connect(server.listeners[0].address) as client:
        await client.send(b"x")
        assert await client.receive_exactly(6) == b"xxxxxx"
        await client.send(b"xxx")
        with pytest.raises(anyio.EndOfStream):
            await client.receive()


async def test_a_protocol_that_does_not_read_is_not_idle() -> None:
    """It has said so itself."""
    made: list[Recorder] = []

    class Paused(Recorder):
        def data_received(self, data: bytes) -> None:
            self.transport.pause_reading()
            made.append(self)

    async with serving(Paused, idle_timeout=IDLE) as server, kaio.connect(server.listeners[0].address) as client:
        await client.send(b"x")
        await asyncio.sleep(3 * IDLE)
        assert len(server.connections) == 1
        resumed = asyncio.get_running_loop().time()
        next(iter(server.connections)).resume_reading()
        with pytest.raises(anyio.EndOfStream):
            await client.receive()
        assert asyncio.get_running_loop().time() - resumed >= IDLE
        assert isinstance(made[0].lost.result(), kaio.IdleTimeoutError)


async def test_it_is_set_live_and_counts_from_then() -> None:
    """On a connection, of a client too, and on a listener for new ones."""
    async with serving(echo) as server, kaio.connect(server.listeners[0].address) as client:
        await client.send(b"x")
        await client.receive()
        await asyncio.sleep(2 * IDLE)
        assert client.idle_timeout is None
        client.idle_timeout = 4 * IDLE
        client.idle_timeout = IDLE
        assert client.idle_timeout == IDLE
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(kaio.IdleTimeoutError):
            await client.receive()
        assert loop.time() - began >= IDLE
        assert client.server is None
        server.listeners[0].idle_timeout = IDLE
        async with kaio.connect(server.listeners[0].address) as other:
            assert await until_closed(other)
        server.listeners[0].idle_timeout = None
        async with kaio.connect(server.listeners[0].address) as other:
            await until(lambda: server.connections)
            (connection,) = server.connections
            connection.idle_timeout = IDLE
            connection.idle_timeout = None
            await asyncio.sleep(3 * IDLE)
            assert len(server.connections) == 1


async def until_closed(connection: kaio.Connection) -> bool:
    """Wait for the end of a stream."""
    try:
        await connection.receive()
    except anyio.EndOfStream:
        return True
    return False


@pytest.mark.parametrize("kind", ["handler", "protocol", "tls", "unix"])
async def test_a_peer_that_does_not_read_has_the_send_timeout(
    kind: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, tmp_path: Any
) -> None:
    """It is alive, and spared by the keepalive policy: without this it would have no end."""
    ends: list[BaseException | None] = []

    async def send(connection: kaio.Connection) -> None:
        try:
            while True:
                await connection.send(bytes(1 << 16))
        except BaseException as exc:
            ends.append(exc)
            raise

    class Flood(kaio.KeepaliveProtocol):
        def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
            transport.write(bytes(1 << 25))

        def connection_lost(self, exc: Exception | None) -> None:
            ends.append(exc)

    tls = kind == "tls"
    address = f"unix:{tmp_path}/s" if kind == "unix" else "localhost:0" if tls else "127.0.0.1:0"
    options = {"ssl": server_tls if tls else None, "send_timeout": 1}
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(Flood if kind == "protocol" else send, address, **options))
        there = server.listeners[0].address
        client = await stack.enter_async_context(kaio.connect(there, ssl=client_tls if tls else None))
        for _ in range(6):  # who reads slowly is not let go
            await client.receive_exactly(1 << 20)
            await asyncio.sleep(0.4)
        assert not ends
        await until(lambda: ends, within=30)
        assert isinstance(ends[0], kaio.SendTimeoutError)
        assert ends[0].timeout == 1


async def test_neither_ends_a_connection_to_which_nothing_is_owed() -> None:
    """A send timeout is no idle timeout."""
    async with serving(echo, send_timeout=IDLE) as server, kaio.connect(server.listeners[0].address) as client:
        await client.send(b"x")
        await client.receive()
        await asyncio.sleep(4 * IDLE)
        assert len(server.connections) == 1
        await client.send(b"x")
        await client.receive()


async def test_nothing_is_left_behind() -> None:
    """Of connections that end before their time, however many."""
    async with serving(echo, idle_timeout=60, send_timeout=60) as server:
        timeouts = kaio.get_monitor().timeouts
        clients = await asyncio.gather(*(kaio.connect(server.listeners[0].address) for _ in range(200)))
        await until(lambda: len(server.connections) == 200)
        assert timeouts
        for client in clients:
            client.abort()
        await until(lambda: not server.connections)
        assert not timeouts
        assert timeouts._wheel._timer is None


@pytest.mark.parametrize("name", ["idle_timeout", "send_timeout", "handshake_timeout"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("5", TypeError)],
)
async def test_bad_timeouts_are_refused(name: str, value: Any, error: type[Exception]) -> None:
    """The error names the argument and the value, and nothing has changed."""
    with pytest.raises(error, match=rf"{name}.*{value}"):
        kaio.Listener("127.0.0.1:0", **{name: value})
    if name == "handshake_timeout":
        return
    async with serving(echo) as server, kaio.connect(server.listeners[0].address) as client:
        setattr(client, name, 50)
        for owner in (client, client.transport):
            with pytest.raises(error, match=name):
                setattr(owner, name, value)
        assert getattr(client, name) == 50


async def test_a_protocol_on_a_unix_socket_has_no_timeouts(tmp_path: Any) -> None:
    """Nobody tells when it received data: an error, and no timeout that is silently missing."""
    for name in ("idle_timeout", "send_timeout"):
        with pytest.raises(ValueError, match=f"{name}=5"):
            async with serving(kaio.KeepaliveProtocol, f"unix:{tmp_path}/s", **{name: 5}):
                pass
    async with serving(kaio.KeepaliveProtocol, f"unix:{tmp_path}/s") as server, kaio.connect(f"unix:{tmp_path}/s"):
        await until(lambda: server.connections)
        (transport,) = server.connections
        with pytest.raises(kaio.KeepaliveError, match="idle_timeout=5"):
            transport.idle_timeout = 5
        with pytest.raises(kaio.KeepaliveError, match="send_timeout=5"):
            transport.send_timeout = 5


@pytest.mark.parametrize("kind", [kaio.IdleTimeoutError, kaio.SendTimeoutError])
def test_the_errors_can_be_copied(kind: type[Any]) -> None:
    """And say who it was."""
    error = kind(5.0, ("192.0.2.1", 80))
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.timeout, copy.peername, str(copy)) == (5.0, ("192.0.2.1", 80), str(error))
    assert "192.0.2.1:80" in str(copy)
