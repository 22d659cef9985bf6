"""The limits of a listener: what is beyond them waits in the kernel's queue, or is closed; nobody is dropped unseen."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

import kaio
from kaio.net.gate import peer_key

from . import hostile_peers
from .conftest import echo, until


def limit_texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of limits."""
    return [record.getMessage() for record in caplog.records if "max_connections" in record.getMessage()]


class Echo(kaio.KeepaliveProtocol):
    """Sends back what it receives."""

    transport: kaio.KeepaliveTransport

    def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def asks(port: int, tls: ssl.SSLContext | None) -> kaio.Connection:
    """Connect, and get an answer."""
    connection = await kaio.connect("localhost" if tls else "127.0.0.1", port, ssl=tls)
    try:
        await connection.send(b"here")
        assert await connection.receive_exactly(4) == b"here"
    except BaseException:
        connection.abort()
        raise
    return connection


@pytest.mark.parametrize("kind", ["handler", "protocol", "tls"])
@pytest.mark.parametrize("limit", [1, 2, 3, 100, 300])
async def test_what_is_beyond_the_limit_waits_and_is_served_when_one_leaves(
    kind: str, limit: int, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """The 101st, say. One log record when the limit is reached, one when it has ended, however often they change."""
    caplog.set_level(logging.INFO, "kaio")
    listener = kaio.Listener(
        "localhost:0" if kind == "tls" else "127.0.0.1:0",
        ssl=server_tls if kind == "tls" else None,
        max_connections=limit,
    )
    handler: Any = Echo if kind == "protocol" else echo
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(kaio.serve(handler, listeners=[listener], close_timeout=1))
        port = server.sockets[0].getsockname()[1]
        tls = client_tls if kind == "tls" else None
        inside = await asyncio.gather(*(asks(port, tls) for _ in range(limit)))
        for each in inside:
            stack.push_async_callback(each.aclose)
        assert len(server.connections) == limit
        waiting = [asyncio.create_task(asks(port, tls)) for _ in range(3)]
        await until(lambda: len(limit_texts(caplog)) == 1)
        assert not any(task.done() for task in waiting)
        assert len(server.connections) == limit
        for _ in range(3):
            await inside.pop().aclose()
            done, _ = await asyncio.wait(waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            assert len(done) == 1
            assert len(server.connections) <= limit
            waiting = [task for task in waiting if task not in done]
            inside.insert(0, done.pop().result())
            stack.push_async_callback(inside[0].aclose)
        texts = limit_texts(caplog)
        assert f"max_connections={limit}" in texts[0]
        assert f":{port}: " in texts[0]
        if limit > 10:  # else one less is a tenth less
            assert len(texts) == 1, texts
        for each in inside:
            await each.aclose()
        await until(lambda: "below" in limit_texts(caplog)[-1])


async def test_a_burst_is_accepted_up_to_the_limit_and_no_further(loop_name: str) -> None:
    """A thousand connect within one turn of the loop."""
    listener = kaio.Listener("127.0.0.1:0", max_connections=300)
    with contextlib.ExitStack() as stack:
        async with kaio.serve(echo, listeners=[listener], close_timeout=0) as server:
            there = server.sockets[0].getsockname()
            sockets = [stack.enter_context(socket.create_connection(there)) for _ in range(1000)]
            most = 0
            for _ in range(50):
                await asyncio.sleep(0.01)
                most = max(most, len(server.connections))
            assert most == 300
            # All others are still connected: the kernel has them, and lets them wait.
            for sock in sockets:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01"


async def test_handshakes_that_do_not_end_count(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """Silent clients fill a listener with TLS until its handshake timeout."""
    listener = kaio.Listener("localhost:0", ssl=server_tls, max_connections=10, handshake_timeout=1)
    with contextlib.ExitStack() as stack:
        async with kaio.serve(echo, listeners=[listener], close_timeout=1) as server:
            where = server.sockets[0].getsockname()[:2]
            silent = [stack.enter_context(socket.create_connection(where)) for _ in range(10)]
            await asyncio.sleep(0.2)
            connection = await asks(where[1], client_tls)
            await connection.aclose()
            for sock in silent:
                sock.settimeout(10)
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.to_thread(sock.recv, 1) == b""


async def test_handshakes_that_fail_make_room(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """Also when the loop has accepted all of them before kaio took over."""
    listener = kaio.Listener("localhost:0", ssl=server_tls, max_connections=300)
    with contextlib.ExitStack() as stack:
        async with kaio.serve(echo, listeners=[listener], close_timeout=1) as server:
            where = server.sockets[0].getsockname()[:2]
            silent = []
            for _ in range(300):
                silent.append(stack.enter_context(socket.create_connection(where)))
                await asyncio.sleep(0)
            gate: Any = listener._endpoint.gate
            await until(gate.is_full, within=20)
            waiting = asyncio.create_task(asks(where[1], client_tls))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            silent[0].close()  # of those that came first
            await (await waiting).aclose()


async def test_a_limit_can_be_set_while_serving() -> None:
    """Raised, it lets those in who wait."""
    listener = kaio.Listener("127.0.0.1:0", max_connections=1)
    async with kaio.serve(echo, listeners=[listener], close_timeout=1) as server:
        port = server.sockets[0].getsockname()[1]
        first = await asks(port, None)
        second = asyncio.create_task(asks(port, None))
        await asyncio.sleep(0.2)
        assert not second.done()
        listener.max_connections = 2
        await (await second).aclose()
        listener.max_connections = None
        assert listener.max_connections is None
        await first.aclose()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_one_peer_has_so_many_connections_and_no_more(host: str, caplog: pytest.LogCaptureFixture) -> None:
    """What it opens beyond is closed; another address is not concerned."""
    caplog.set_level(logging.INFO, "kaio")
    listener = kaio.Listener(kaio.TcpAddress(host, 0), max_connections_per_peer=3)
    async with kaio.serve(echo, listeners=[listener], close_timeout=1) as server:
        port = server.sockets[0].getsockname()[1]
        inside = [await asks_from(host, port) for _ in range(3)]
        for _ in range(5):
            with pytest.raises((ConnectionError, EOFError)):
                await asks_from(host, port)
        if host == "127.0.0.1":
            _, other = await asks_from(host, port, "127.0.0.2")
            other.close()
            await other.wait_closed()
        texts = limit_texts(caplog)
        assert len(texts) == 1
        assert ("::/64" if host == "::1" else "127.0.0.1 ") in texts[0]
        _, writer = inside.pop()
        writer.close()
        await writer.wait_closed()
        await until(lambda: len(limit_texts(caplog)) == 2)
        inside.append(await asks_from(host, port))
        for _, writer in inside:
            writer.close()
            await writer.wait_closed()
        await until(lambda: not server.connections)
        gate: Any = listener._endpoint.gate
        assert gate._peers == {}
        assert gate._refused == set()


async def asks_from(
    host: str, port: int, source: str | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect from an address, and get an answer."""
    reader, writer = await asyncio.open_connection(host, port, local_addr=(source, 0) if source else None)
    try:
        writer.write(b"here")
        assert await reader.readexactly(4) == b"here"
    except BaseException:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        raise
    return reader, writer


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::ffff:c000:207", "192.0.2.7"),
        ("2001:db8:0:1::7", 0x20010DB800000001),
        ("fe80::1%eth0", 0xFE80 << 48),
    ],
)
def test_what_counts_as_one_peer(host: str, key: str | int) -> None:
    """An IPv4 address however it is written, or the first half of an IPv6 address."""
    assert peer_key((host, 1)) == key
    assert peer_key("") is None


@pytest.mark.parametrize("name", ["max_connections", "max_connections_per_peer"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("10", TypeError), (True, TypeError)]
)
def test_bad_limits_are_refused(name: str, value: Any, error: type[Exception]) -> None:
    """The error names the argument and the value."""
    with pytest.raises(error, match=rf"{name}.*{value}"):
        kaio.Listener("127.0.0.1:0", **{name: value})


def test_clients_of_a_unix_socket_cannot_be_told_apart() -> None:
    """So that they cannot be limited."""
    with pytest.raises(ValueError, match="max_connections_per_peer=3"):
        kaio.Listener("unix:/tmp/x.sock", max_connections_per_peer=3)


@pytest.mark.parametrize("limit", [2, 30])
async def test_a_limited_unix_listener(limit: int, tmp_path: Path) -> None:
    """The queue of a Unix socket holds those that wait, too; and its path stays, whoever accepts."""
    listener = kaio.Listener(f"unix:{tmp_path}/s", max_connections=limit)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(kaio.serve(echo, listeners=[listener], close_timeout=1))
        clients = []
        for _ in range(limit):
            client = await stack.enter_async_context(kaio.connect(f"unix:{tmp_path}/s"))
            await client.send(b"x")
            await client.receive()
            clients.append(client)
        last = await stack.enter_async_context(kaio.connect(f"unix:{tmp_path}/s"))
        await last.send(b"x")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await last.receive()
        await clients[0].aclose()
        assert await last.receive() == b"x"
        for client in clients:
            await client.aclose()
        await asyncio.sleep(1.2)  # the loop accepts again
        for _ in range(3):
            async with kaio.connect(f"unix:{tmp_path}/s") as client:
                await client.send(b"x")
                assert await client.receive() == b"x"
    assert not (tmp_path / "s").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_ten_thousand_hostile_peers(loop: str) -> None:
    """They go by themselves, memory is bounded, and others are served meanwhile."""
    measured = asyncio.run(hostile_peers.measure(loop, 10_000))
    print(loop, measured)
    assert measured["most open"] > 1_000
    # asyncio's TLS has a buffer of 256 KiB for each connection, uvloop's one for all.
    assert measured["memory per peer"] < 200_000
    assert measured["served under attack"] > 50
    assert measured["let go"]["reset"] == 2_000
    assert measured["let go"]["slow"] == 0  # they are no more than slow
