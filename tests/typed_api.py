"""What the public functions return and what a user's classes may say: checked by mypy and pyright, never run."""

from __future__ import annotations

import asyncio
from typing import assert_type

import kaio


class Ours(kaio.KeepaliveProtocol):
    """Says which transport it gets."""

    def __init__(self) -> None:
        self.received = 0

    def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
        self.transport = transport
        assert_type(transport.health(), kaio.Health)
        assert_type(self.received, int)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)


class OursBuffered(kaio.BufferedKeepaliveProtocol):
    """The same with a buffer."""

    def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
        self.transport = transport


class Plain(asyncio.Protocol):
    """A protocol that is none of kaio's."""


async def handler(connection: kaio.Connection) -> None:
    """Serves a connection."""


async def stream_handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serves asyncio's streams."""


def any_server(server: kaio.Server) -> int:
    """Takes a server of any kind."""
    return len(server.connections)


async def clients() -> None:
    """Connections by each function."""
    assert_type(await kaio.connect("localhost:1"), kaio.Connection)
    async with kaio.connect("localhost:1") as connection:
        assert_type(connection, kaio.Connection)
    made = await kaio.create_connection(Ours, "localhost", 1, keepalive="20s:10s:4")
    assert_type(made, tuple[kaio.KeepaliveTransport, Ours])
    buffered = await kaio.create_connection(OursBuffered, "localhost", 1)
    assert_type(buffered, tuple[kaio.KeepaliveTransport, OursBuffered])
    plain = await kaio.create_connection(Plain, "localhost", 1)
    assert_type(plain, tuple[asyncio.Transport, Plain])
    streams = await kaio.open_connection("localhost", 1, keepalive=True)
    assert_type(streams, tuple[asyncio.StreamReader, asyncio.StreamWriter])


async def clients_that_last() -> None:
    """One connection after the other, and a pool."""
    async for connection in kaio.connect("localhost:1", retry=kaio.Retry(attempts=3)):
        assert_type(connection, kaio.Connection)
        async with connection:
            connection.heartbeat(kaio.Heartbeat(b"ping", 30, 10))
    async for transport, protocol in kaio.create_connection(Ours, "localhost", 1, retry=kaio.Retry()):
        assert_type(transport, kaio.KeepaliveTransport)
        assert_type(protocol, Ours)
        await transport.wait_closed()
    task = asyncio.create_task(kaio.create_connection(Ours, "localhost", 1))
    assert_type(await task, tuple[kaio.KeepaliveTransport, Ours])
    async with kaio.Pool("localhost", 1, max_size=2, ssl=True) as pool:
        async with pool.acquire(timeout=3) as one:
            assert_type(one, kaio.Connection)
        assert_type(await pool.run(count, b"x", times=2), int)
    policy = kaio.Keepalive()
    assert_type(policy.socket_options(), list[tuple[int, int, int]])
    assert_type(policy.libpq(), dict[str, int])


async def count(connection: kaio.Connection, data: bytes, *, times: int) -> int:
    """What a pool may call."""
    return len(data) * times


async def servers() -> None:
    """Servers by each function."""
    assert_type(await kaio.serve(handler, "localhost:1"), kaio.Server[kaio.Connection])
    assert_type(await kaio.serve(Ours, "localhost:1"), kaio.Server[kaio.KeepaliveTransport])
    async with kaio.serve(handler, "localhost:1") as server:
        assert_type(server.connections, frozenset[kaio.Connection])
        any_server(server)
    assert_type(await kaio.create_server(Ours, "localhost", 1), kaio.Server[kaio.KeepaliveTransport])
    assert_type(await kaio.start_server(stream_handler, "localhost", 1), kaio.Server[kaio.KeepaliveTransport])


async def bare_loop() -> None:
    """A protocol of kaio's is one of asyncio's to a loop's own methods."""
    transport, protocol = await asyncio.get_running_loop().create_connection(Ours, "localhost", 1)
    assert_type(protocol, Ours)
    transport.set_protocol(protocol)


class Reports(kaio.KeepaliveProtocol):
    """Overrides every hook, with the types of its arguments."""

    def peer_suspect(self, health: kaio.Health) -> None:
        assert_type(health.state, kaio.State)
        assert_type(health.silence, float | None)

    def peer_recovered(self, health: kaio.Health) -> None: ...

    def peer_dead(self, error: kaio.DeadPeerError) -> None:
        assert_type(error.cause, kaio.Cause)
        assert_type(error.silence, float)
        assert_type(error.info, kaio.TcpInfo | None)

    def connection_lost(self, exc: Exception | None) -> None: ...


async def stream(connection: kaio.Connection) -> None:
    """A connection as a stream."""
    assert_type(await connection.receive_exactly(5), bytes)
    assert_type(await connection.receive_until(b"\n", 1024), bytes)
    async for data in connection:
        assert_type(data, bytes)
    connection.keepalive = "detect=30s"
    assert_type(connection.keepalive, kaio.Keepalive | None)


def any_socket(writer: asyncio.StreamWriter, transport: asyncio.Transport, connection: kaio.Connection) -> None:
    """The functions that accept whatever has a socket."""
    for each in (writer, transport, connection):
        assert_type(kaio.apply(each, "20s:10s:4"), kaio.SocketState)
        assert_type(kaio.inspect(each).idle, float | None)
        assert_type(kaio.health(each), kaio.Health)


async def main() -> int:
    """A program's main function."""
    return 0


def loops() -> None:
    """The loop keeps the type of what it runs."""
    assert_type(kaio.run(main(), keepalive="20s:10s:4"), int)
    factory = kaio.loop_factory(keepalive="on", base=asyncio.SelectorEventLoop)
    with asyncio.Runner(loop_factory=factory) as runner:
        assert_type(runner.run(main()), int)


async def mistakes() -> None:
    """Misspelled and mistyped arguments are errors; an unused comment would be one, too."""
    await kaio.open_connection("localhost", 1, keepalife="20s:10s:4")  # type: ignore[call-arg]
    await kaio.open_connection("localhost", 1, keepalive=20.0)  # type: ignore[arg-type]
    await kaio.create_connection(Ours, "localhost", 1, keepalive=[])  # type: ignore[call-overload]
    await kaio.start_server(stream_handler, "localhost", 1, keepalife="on")  # type: ignore[call-arg]
    await kaio.start_server(stream_handler, "localhost", 1, backlog="many")  # type: ignore[arg-type]
    async with kaio.Pool("localhost", 1) as pool:
        await pool.run(count, 1, times=2)  # type: ignore[arg-type]
    kaio.Pool("localhost", 1, keepalife="on")  # type: ignore[call-arg]
    kaio.serve(handler, keepalive=1.5)  # type: ignore[call-overload]
