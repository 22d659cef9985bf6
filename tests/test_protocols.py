"""The callbacks: in order and once, whatever a subclass does; and data reaches user code directly."""

from __future__ import annotations

import asyncio
import errno
import logging
import pathlib
import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest

import kaio
from kaio.net.protocols import Watched

from .conftest import Recorder, until

DEATH = OSError(errno.ETIMEDOUT, "Connection timed out")


async def connected(factory: Callable[[], Any], **kwargs: Any) -> tuple[Any, Any, socket.socket]:
    """Connect a protocol to a plain socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport, protocol = await kaio.create_connection(factory, *listener.getsockname(), **kwargs)
        return transport, protocol, listener.accept()[0]


def classes() -> list[type[Watched]]:
    """Return subclasses that override the callbacks in every way, mostly without calling super()."""

    class Base(Recorder):
        pass

    class Plain:
        def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
            self.note("mixin made")  # type: ignore[attr-defined]
            super().connection_made(transport)  # type: ignore[misc]

    class Mixed(Plain, Recorder):
        def note(self, name: str) -> None:
            self.events.append((name, None))

    class Twice(Recorder):
        def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)

    class Thrice(Twice):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)

    class ByName(Recorder):
        def connection_lost(self, exc: Exception | None) -> None:
            Recorder.connection_lost(self, exc)

    return [Base, Mixed, Twice, Thrice, ByName]


@pytest.mark.parametrize("kind", range(5))
async def test_every_subclass_gets_all_callbacks_once(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made with a KeepaliveTransport, dead, lost: also with mixins, super() chains and calls by name."""
    transport, protocol, their = await connected(classes()[kind])
    assert isinstance(transport, kaio.KeepaliveTransport)
    assert protocol.transport is transport
    # The kernel's verdict, as the loop would pass it on.
    transport.pause_reading()
    protocol.connection_lost(DEATH)
    assert [name for name in protocol.names if name != "mixin made"] == ["made", "dead", "lost"]
    assert protocol.events[-1][1] is protocol.events[-2][1]
    monkeypatch.setattr(type(protocol), "connection_lost", lambda self, exc: None)
    transport.abort()
    their.close()
    await asyncio.sleep(0.01)


async def test_protocol_without_methods() -> None:
    """Nothing has to be overridden."""

    class Nothing(kaio.KeepaliveProtocol):
        pass

    transport, protocol, their = await connected(Nothing)
    their.close()
    await until(transport.is_closing)
    assert isinstance(protocol, Nothing)


@pytest.mark.complains
async def test_connection_lost_is_called_if_peer_dead_raises() -> None:
    """The exception goes to the loop's exception handler, and connection_lost is called."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

    class Clumsy(Recorder):
        def peer_dead(self, error: kaio.DeadPeerError) -> None:
            raise RuntimeError("clumsy")

    transport, protocol, their = await connected(Clumsy)
    protocol.connection_lost(DEATH)
    assert protocol.names == ["made", "lost"]
    assert isinstance(told[0]["exception"], RuntimeError)
    assert told[0]["protocol"] is protocol
    protocol.lost = asyncio.get_running_loop().create_future()
    transport.abort()
    their.close()
    await protocol.lost


@pytest.mark.parametrize(
    "exc",
    [
        None,
        ConnectionResetError(errno.ECONNRESET, "reset"),
        BrokenPipeError(errno.EPIPE, "pipe"),
        TimeoutError("an application's own"),
        ValueError("other"),
    ],
)
async def test_other_errors_are_passed_on_unchanged(exc: Exception | None) -> None:
    """A reset, an application's own TimeoutError and other exceptions are passed on unchanged."""
    transport, protocol, their = await connected(Recorder)
    protocol.connection_lost(exc)
    assert protocol.names == ["made", "lost"]
    assert protocol.events[-1][1] is exc
    protocol.lost = asyncio.get_running_loop().create_future()
    transport.abort()
    their.close()
    await protocol.lost


async def test_data_passes_through_no_code_of_kaio() -> None:
    """transport.write is the bound method of the loop's transport, and the loop calls data_received itself."""
    transport, protocol, their = await connected(Recorder)
    inner = transport.loop_transport
    assert transport.write == inner.write
    assert type(protocol).data_received is Recorder.data_received
    assert inner.get_protocol() is protocol
    assert transport.get_protocol() is protocol
    with pytest.raises(AttributeError):
        transport.no_such_method  # noqa: B018
    transport.write(b"through")
    assert await asyncio.get_running_loop().run_in_executor(None, their.recv, 100) == b"through"
    assert isinstance(transport, asyncio.Transport)
    assert "alive" in repr(transport)
    transport.abort()
    await protocol.lost
    assert "closed" in repr(transport)
    their.close()


async def test_buffered_protocol_gets_its_buffer_filled() -> None:
    """A BufferedKeepaliveProtocol's get_buffer and buffer_updated are called."""

    class Buffered(kaio.BufferedKeepaliveProtocol):
        def __init__(self) -> None:
            self.buffer = bytearray(100)
            self.filled = asyncio.get_running_loop().create_future()
            self.lost = asyncio.get_running_loop().create_future()

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.filled.set_result(nbytes)

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set_result(exc)

    transport, protocol, their = await connected(Buffered)
    assert isinstance(transport, kaio.KeepaliveTransport)
    their.sendall(b"seven!!")
    assert await protocol.filled == 7
    assert bytes(protocol.buffer[:7]) == b"seven!!"
    their.close()
    await protocol.lost


async def test_keepalive_argument_overrides_the_class() -> None:
    """`keepalive` of the class, and as an argument; also if the factory is not the class itself."""

    class Own(Recorder):
        keepalive = kaio.Keepalive.detect(within=30)

    cases: list[tuple[Callable[[], Any], Any, kaio.Keepalive]] = [
        (Own, None, kaio.Keepalive(10, 5, 4)),
        (Own, "7s:7s:7", kaio.Keepalive(7, 7, 7)),
        (lambda: Own(), None, kaio.Keepalive(10, 5, 4)),
        (lambda: Own(), "7s:7s:7", kaio.Keepalive(7, 7, 7)),
        (Recorder, None, kaio.Keepalive()),
    ]
    for factory, argument, expected in cases:
        transport, protocol, their = await connected(factory, keepalive=argument)
        assert transport.keepalive == expected
        state = kaio.inspect(transport)
        assert (state.idle, state.interval, state.count) == (expected.idle, expected.interval, expected.count)
        assert state.user_timeout is None
        server = await kaio.create_server(factory, "127.0.0.1", 0, keepalive=argument)
        client = socket.create_connection(server.sockets[0].getsockname())
        await until(lambda server=server: server.connections)  # type: ignore[misc]
        (accepted,) = server.connections
        state = kaio.inspect(accepted)
        assert (state.idle, state.interval, state.count) == (expected.idle, expected.interval, expected.count)
        assert accepted.keepalive == expected
        client.close()
        their.close()
        await protocol.lost
        server.close()
        await server.wait_closed()


async def test_protocol_sets_its_policy_on_asyncios_loop() -> None:
    """loop.create_server and loop.create_connection with a KeepaliveProtocol set its policy and call its callbacks."""

    class Own(Recorder):
        keepalive = "5s:2s:3"

    loop = asyncio.get_running_loop()
    made: list[Own] = []

    def factory() -> Own:
        made.append(Own())
        return made[-1]

    server = await loop.create_server(factory, "127.0.0.1", 0)
    _, client = await loop.create_connection(Own, *server.sockets[0].getsockname())
    await until(lambda: made and made[0].made.done())
    for protocol in (client, made[0]):
        assert isinstance(protocol.transport, kaio.KeepaliveTransport)
        assert kaio.inspect(protocol.transport).idle == 5
    client.transport.close()
    await client.lost
    await made[0].lost
    server.close()


async def test_unix_connection_of_a_class_with_keepalive_logs_a_warning(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning is logged if the class has a policy of its own, and not for the default."""
    loop = asyncio.get_running_loop()

    class Own(Recorder):
        keepalive = "5s:2s:3"

    for kind, warned in ((Recorder, False), (Own, True)):
        caplog.clear()
        server = await loop.create_unix_server(asyncio.Protocol, str(tmp_path / kind.__name__))
        with caplog.at_level(logging.WARNING, "kaio"):
            transport, protocol = await loop.create_unix_connection(kind, str(tmp_path / kind.__name__))
        assert bool(caplog.records) is warned
        assert protocol.transport.keepalive is None
        transport.close()
        await protocol.lost
        server.close()


async def test_protocol_can_be_reused() -> None:
    """A client protocol that reconnects as the same object gets a new transport and all callbacks again."""
    again = Recorder()
    for _ in range(2):
        again.made = asyncio.get_running_loop().create_future()
        again.lost = asyncio.get_running_loop().create_future()
        transport, protocol, their = await connected(lambda: again)
        assert protocol is again
        assert transport is again.transport
        their.close()
        await again.lost
    assert again.names.count("made") == again.names.count("lost") == 2


async def test_set_protocol_keeps_the_callbacks() -> None:
    """A protocol that takes over a connection gets peer_dead and connection_lost."""
    transport, _, their = await connected(Recorder)
    second = Recorder()
    second.transport = transport
    transport.set_protocol(second)
    assert transport.get_protocol() is second
    second.connection_lost(DEATH)
    assert second.names == ["dead", "lost"]
    second.lost = asyncio.get_running_loop().create_future()
    transport.abort()
    await second.lost
    their.close()


async def test_stream_writers_can_start_tls(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """StreamWriter.start_tls works with kaio's open_connection and start_server, and keeps the policy."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"GO\n")
        await writer.drain()
        await writer.start_tls(server_tls)
        writer.write((await reader.readline()).upper())
        await writer.drain()
        writer.close()

    async with await kaio.start_server(serve_one, "127.0.0.1", 0, keepalive="5s:2s:3") as server:
        reader, writer = await kaio.open_connection(*server.sockets[0].getsockname(), keepalive="5s:2s:3")
        writer.write(b"STARTTLS\n")
        assert await reader.readline() == b"GO\n"
        await writer.start_tls(client_tls, server_hostname="localhost")
        writer.write(b"secret\n")
        assert await reader.readline() == b"SECRET\n"
        assert kaio.inspect(writer).idle == 5
        writer.close()


async def test_server_ends_after_set_protocol_with_a_plain_protocol() -> None:
    """The server ends although the end of such a connection is not reported to kaio."""

    class HandsOver(Recorder):
        def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
            transport.set_protocol(asyncio.Protocol())

    async with await kaio.create_server(HandsOver, "127.0.0.1", 0) as server:
        sock = socket.create_connection(server.sockets[0].getsockname())
        await asyncio.sleep(0.05)
        assert not server.connections
        assert kaio.get_monitor().counters.watched == 0
        sock.close()
        await asyncio.sleep(0.05)


async def test_one_protocol_for_several_connections_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """The second connection is refused with a log record that says why; the first and the server go on."""
    shared = Recorder()
    async with await kaio.create_server(lambda: shared, "127.0.0.1", 0) as server:
        address = server.sockets[0].getsockname()
        with socket.create_connection(address) as first:
            await shared.made
            for _ in range(2):
                with socket.create_connection(address) as second:
                    second.settimeout(5)
                    assert await asyncio.get_running_loop().run_in_executor(None, _ended, second)
            first.sendall(b"x")
            await until(lambda: "data" in shared.names)
        await shared.lost
    assert "the factory must make a protocol for each" in caplog.text


def _ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


async def test_closing_in_connection_made_does_not_fail_the_call() -> None:
    """create_connection returns the closed transport, as asyncio's does."""
    for method in ("close", "abort"):

        class Closes(Recorder):
            def connection_made(self, transport: kaio.KeepaliveTransport, method: str = method) -> None:
                super().connection_made(transport)
                getattr(transport, method)()

        _, protocol, their = await connected(Closes)
        await protocol.lost
        their.close()


async def test_policy_of_the_protocol_is_kept_after_connecting() -> None:
    """The socket has its user timeout, although connecting needed another one."""

    class Own(Recorder):
        keepalive = kaio.Keepalive(5, 5, 2, stalled="drop")

    class Sets(Recorder):
        def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
            super().connection_made(transport)
            transport.keepalive = kaio.Keepalive(5, 5, 2, stalled="drop")

    for factory in (lambda: Own(), Own, Sets):
        transport, protocol, their = await connected(factory)
        assert kaio.inspect(transport).user_timeout == 15
        transport.abort()
        await protocol.lost
        their.close()


async def test_start_tls_of_the_loop_upgrades_a_transport(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """loop.start_tls accepts transport.inner on both loops."""
    async with kaio.serve(_echo_once, "127.0.0.1", 0, ssl=server_tls) as server:
        host, port = server.listeners[0].address  # type: ignore[misc]
        transport, protocol = await kaio.create_connection(Recorder, host, port)
        assert isinstance(transport, kaio.KeepaliveTransport)
        loop = asyncio.get_running_loop()
        tls = await loop.start_tls(transport.inner, protocol, client_tls, server_hostname="localhost")
        assert tls is not None
        tls.write(b"x")
        await until(lambda: "data" in protocol.names)
        await protocol.lost
        await until(lambda: not server.connections)
        await asyncio.sleep(0.05)  # uvloop closes the descriptor in a later turn


async def _echo_once(connection: kaio.Connection) -> None:
    await connection.send(await connection.receive())
