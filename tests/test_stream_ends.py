"""The end of streams: no received or sent data is lost, and everything is freed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import pathlib
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute

import kaio
from kaio.kernel.queues import unacknowledged, unread
from kaio.net.stream import StreamProtocol
from kaio.testing import blackhole

from .conftest import Recorder, echo, reset, until


@pytest.mark.parametrize("kind", ["path", "pair"])
async def test_closed_unix_connection_has_repr_and_peername(kind: str, tmp_path: pathlib.Path) -> None:
    """repr, peername and keepalive of both ends return a value or raise KeepaliveError, never AttributeError."""
    ends: list[Any] = []

    class Protocol(kaio.KeepaliveProtocol):
        def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
            ends.append(transport)

    if kind == "path":
        async with kaio.serve(Protocol, f"unix:{tmp_path}/socket"):
            connection = await kaio.connect(f"unix:{tmp_path}/socket")
            ends.append(connection.transport)
            await until(lambda: len(ends) == 2)
            await connection.aclose()
            assert connection.peername == f"{tmp_path}/socket"
            assert "closed" in repr(connection)
            with pytest.raises(kaio.KeepaliveError, match="closed"):
                connection.keepalive = "5s:2s:3"
    else:
        for sock in socket.socketpair():
            await kaio.create_connection(Protocol, sock=sock)
        ends[0].close()
    await until(lambda: all(end.ended for end in ends))
    await asyncio.sleep(0.01)  # uvloop closes the descriptor in a later turn
    for end in ends:
        assert "closed" in repr(end)
        assert isinstance(end.peername, str)
        with pytest.raises(kaio.KeepaliveError, match="closed"):
            end.keepalive = "5s:2s:3"
        with pytest.raises(kaio.KeepaliveError, match="closed"):
            kaio.inspect(end)


async def test_handler_failure_is_logged_after_the_end_of_a_unix_connection(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The record contains the handler's traceback and the connection's repr."""

    async def fail(connection: kaio.Connection) -> None:
        await connection.receive()
        await connection.aclose()
        await asyncio.sleep(0.01)
        raise LookupError("the handler's own")

    with caplog.at_level(logging.ERROR, "kaio"):
        async with kaio.serve(fail, f"unix:{tmp_path}/socket"), kaio.connect(f"unix:{tmp_path}/socket") as client:
            await client.send(b"x")
            await until(lambda: caplog.records)
    assert "the handler's own" in caplog.text
    assert "<Connection to unix:" in caplog.text


# -- a reset that the loop does not hear of


ARRIVED = 600_000


@contextlib.asynccontextmanager
async def filled(factory: Any = None, keepalive: str | None = None) -> AsyncIterator[tuple[Any, socket.socket, bytes]]:
    """A client that has paused reading with data left in its socket; its peer's socket; and the data."""
    blob = random.randbytes(ARRIVED)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what the client sends soon has to wait
        if factory is None:
            client: Any = await kaio.connect(*listening.getsockname(), keepalive=keepalive)
            raw = client.transport.get_extra_info("socket")
        else:
            client, _ = await kaio.create_connection(factory, *listening.getsockname())
            raw = client.get_extra_info("socket")
            client.pause_reading()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_000_000)
        peer, _ = listening.accept()
        with peer:
            for start in range(0, ARRIVED, 20_000):
                await asyncio.to_thread(peer.sendall, blob[start : start + 20_000])
            await until(lambda: not unacknowledged(peer))
            await until(lambda: not client.is_reading() if factory else client._protocol._reading_paused)
            yield client, peer, blob
        client.abort()


async def heard_of_the_reset(client: kaio.Connection) -> None:
    """Wait without reading until the connection has noticed a reset."""
    with pytest.raises(kaio.ResetError):
        async with client.while_alive():
            await asyncio.sleep(5)


async def test_reset_while_reading_is_paused_fails_sends_and_loses_no_data() -> None:
    """send raises ResetError; receiving returns all data, and raises ResetError after it."""
    async with filled() as (client, peer, blob):
        reset(peer)
        peer.close()
        await heard_of_the_reset(client)
        for method in (client.send(b"x"), client.send_eof(), client.send(b"x")):
            with pytest.raises(kaio.ResetError):
                await method
        await asyncio.sleep(0.02)
        assert await client.receive_exactly(ARRIVED) == blob
        for method in (client.receive(), client.send(b"x")):
            with pytest.raises(kaio.ResetError) as caught:
                await method
            assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_reset_found_by_a_write_loses_no_data() -> None:
    """All data in the socket is received, although the loop closes the transport when a write fails."""
    async with filled() as (client, peer, blob):
        sending = asyncio.create_task(client.send(bytes(8_000_000)))
        await until(lambda: client.transport.get_write_buffer_size())
        reset(peer)
        peer.close()
        with pytest.raises(kaio.ResetError):
            await sending
        await asyncio.sleep(0.02)
        assert await client.receive_exactly(ARRIVED) == blob
        with pytest.raises(kaio.ResetError):
            await client.receive()


async def test_protocol_that_writes_after_a_reset_gets_all_data() -> None:
    """What it writes while reading is paused is discarded, and does not close the connection."""
    async with filled(Recorder) as (transport, peer, blob):
        reset(peer)
        peer.close()
        await heard_of_the_reset(transport)
        transport.write(b"x")
        transport.writelines([b"x", b"y"])
        transport.write_eof()
        await asyncio.sleep(0.02)
        protocol = transport._protocol
        transport.resume_reading()
        assert isinstance(await protocol.lost, ConnectionResetError)
        assert b"".join(data for name, data in protocol.events if name == "data") == blob


# -- a connection that another protocol takes over


class Plain(asyncio.Protocol):
    """A protocol that knows nothing of kaio."""


@pytest.mark.parametrize("taker", [Plain, Recorder])
async def test_set_protocol_closes_the_stream_only(taker: Any) -> None:
    """Waiting tasks get ClosedResourceError; aclose returns at once and does not close the connection."""
    async with kaio.serve(echo, "127.0.0.1", 0) as server:
        client = await kaio.connect(str(server.listeners[0].address))
        transport = client.transport
        receiving = asyncio.create_task(client.receive())
        await asyncio.sleep(0)
        got = asyncio.get_running_loop().create_future()
        protocol = taker()
        protocol.data_received = got.set_result
        transport.set_protocol(protocol)
        with pytest.raises(anyio.ClosedResourceError):
            await receiving
        for method in (client.receive(), client.send(b"x"), client.receive_exactly(1), client.send_eof()):
            with pytest.raises(anyio.ClosedResourceError):
                await method
        async with asyncio.timeout(1):
            await client.aclose(timeout=None)
        assert "closed" in repr(client)
        transport.write(b"still mine")
        assert await got == b"still mine"
        transport.close()


async def test_set_protocol_wakes_a_sender_and_ends_scopes() -> None:
    """A waiting sender gets ClosedResourceError, and a scope's block is cancelled."""
    async with filled() as (client, _, _):
        transport = client.transport
        sending = asyncio.create_task(client.send(bytes(8_000_000)))

        async def watch() -> None:
            async with client.while_alive():
                await asyncio.sleep(5)

        watching = asyncio.create_task(watch())
        await until(lambda: client.transport.get_write_buffer_size())
        transport.set_protocol(Plain())
        assert transport.is_reading()  # the taker knows nothing of the stream's pause
        with pytest.raises(anyio.ClosedResourceError):
            await sending
        with pytest.raises(anyio.BrokenResourceError, match="handed over"):
            await watching


async def test_handler_may_call_set_protocol_and_return() -> None:
    """The server does not close the connection then, and does not wait for it at its own end."""
    taken: list[kaio.KeepaliveTransport] = []

    class Echo(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            taken[0].write(data)

    async def hand_over(connection: kaio.Connection) -> None:
        taken.append(connection.transport)
        connection.transport.set_protocol(Echo())

    async with asyncio.timeout(2), kaio.serve(hand_over, "127.0.0.1", 0) as server:
        client = await kaio.connect(str(server.listeners[0].address))
        await client.send(b"x")
        assert await client.receive() == b"x"
        assert not server.connections
    await client.send(b"y")
    assert await client.receive() == b"y"
    taken[0].close()
    with pytest.raises(anyio.EndOfStream):
        await client.receive()
    await client.aclose()


# -- what is left of a connection


async def _clean(client: kaio.Connection) -> None:
    await client.send(b"x")
    await client.receive()


async def _eof(client: kaio.Connection) -> None:
    await client.send(b"bye")
    with contextlib.suppress(anyio.EndOfStream):
        while True:
            await client.receive()


async def _reset_here(client: kaio.Connection) -> None:
    reset(client.extra(SocketAttribute.raw_socket))
    client.abort()


async def _reset_there(client: kaio.Connection) -> None:
    await client.send(b"reset")
    for method in (client.receive, client.receive, lambda: client.send(b"x")):
        with contextlib.suppress(kaio.ResetError):
            await method()


async def _scope(client: kaio.Connection) -> None:
    await client.send(b"reset")
    with contextlib.suppress(kaio.ResetError):
        async with client.while_alive() as scope:
            await asyncio.sleep(5)
        del scope


async def _incomplete(client: kaio.Connection) -> None:
    await client.send(b"exactly")  # the handler ends with IncompleteRead
    await client.send(b"bye")
    await client.send_eof()
    with contextlib.suppress(anyio.IncompleteRead):
        await client.receive_exactly(100)
    with contextlib.suppress(anyio.IncompleteRead):
        await client.receive_until(b"?", 100)


async def _delimiter(client: kaio.Connection) -> None:
    await client.send(b"until")  # DelimiterNotFound in the handler
    with contextlib.suppress(anyio.DelimiterNotFound):
        await client.receive_until(b"?", 2)


async def _cancelled(client: kaio.Connection) -> None:
    for _ in range(2):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await client.receive()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                async for _ in client:
                    pass


async def _obey(connection: kaio.Connection) -> None:
    """Echo, or do what the client asks for."""
    async for data in connection:
        if data.startswith(b"reset"):
            reset(connection.extra(SocketAttribute.raw_socket))
            return connection.abort()
        if data.startswith(b"bye"):
            return None
        await connection.send(data)
        if data.startswith(b"exactly"):
            await connection.receive_exactly(100)
        if data.startswith(b"until"):
            with contextlib.suppress(anyio.DelimiterNotFound):
                await connection.receive_until(b"\n", 0)
    return None


@pytest.mark.parametrize(
    "live",
    [_clean, _eof, _reset_here, _reset_there, _scope, _incomplete, _delimiter, _cancelled],
    ids=lambda f: f.__name__,
)
async def test_connection_is_freed_after_any_end(live: Callable[[kaio.Connection], Awaitable[None]]) -> None:
    """Connection, transport and protocol of both ends are freed with the collector off, however it ended."""
    async with kaio.serve(_obey, "127.0.0.1", 0) as server, nothing_left():
        client = await kaio.connect(str(server.listeners[0].address))
        await until(lambda: server.connections)
        await live(client)
        await client.aclose()
        del client


@contextlib.asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Check that the connections made in the block are freed soon after it without the garbage collector."""
    kinds = (kaio.Connection, kaio.KeepaliveTransport, StreamProtocol)
    gc.collect()
    others = {
        id(each): each for each in gc.get_objects() if isinstance(each, kinds)
    }  # somebody else's, in this process
    gc.disable()
    try:
        yield
        await until(
            lambda: not [each for each in gc.get_objects() if isinstance(each, kinds) and id(each) not in others]
        )
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
async def test_connection_of_a_dead_peer_is_freed(caplog: pytest.LogCaptureFixture) -> None:
    """All get the same error object with its traceback, which keeps nothing alive once they have dropped it."""
    caplog.set_level(logging.CRITICAL, "kaio")  # a record of the log would hold the error
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with nothing_left():
            client = await kaio.connect(*listening.getsockname(), keepalive="1s:1s:1")
            peer, _ = listening.accept()
            with peer, blackhole(peer):
                first = await death(client.receive())
                text, cause = str(first), first.__cause__
                assert await death(client.send(b"x")) is first
                assert await death(alive(client)) is first
                assert first.__traceback__ is not None
                del first
                later = await death(client.receive())
                assert (str(later), later.__cause__) == (text, cause)
                assert "dead" in repr(client)
                del later, cause
                await client.aclose()
                reset(peer)
            del client


async def alive(connection: kaio.Connection) -> None:
    """Enter a scope that ends with the connection."""
    async with connection.while_alive():
        await asyncio.sleep(10)


async def death(method: Awaitable[object]) -> kaio.DeadPeerError:
    """Return the DeadPeerError that a call raises."""
    with pytest.raises(kaio.DeadPeerError) as caught:
        await method
    error = caught.value
    try:
        return error
    finally:
        del caught, error, method


# -- closing while the peer still sends


ANSWER = 2_000_000
UPLOAD = 8_000_000


def upload(address: tuple[str, int], size: int) -> bytes:
    """Send a whole request before reading the answer, and return the answer."""
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(bytes(size))
        sock.shutdown(socket.SHUT_WR)
        parts = []
        while part := sock.recv(1 << 20):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("way", ["return", "aclose", "raise", "eof sent"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "paused"])
async def test_answer_arrives_although_the_request_was_not_read(way: str, late: bool) -> None:
    """The connection is not reset: what the client still sends is discarded until it closes as well."""
    answer = random.randbytes(ANSWER)
    finished = []

    async def refuse(connection: kaio.Connection) -> None:
        await connection.receive(100)
        if late:
            await until(lambda: connection._protocol._reading_paused)
        sending = asyncio.create_task(connection.send(answer))
        await asyncio.sleep(0)
        if way == "eof sent":
            await connection.send_eof()
        if way == "raise":
            raise anyio.EndOfStream
        if way == "aclose":
            await connection.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await connection.receive()
        finished.append(sending)

    async with kaio.serve(refuse, "127.0.0.1", 0, close_timeout=5) as server:
        address = server.sockets[0].getsockname()
        got = await asyncio.gather(*(asyncio.to_thread(upload, address, UPLOAD) for _ in range(4)))
        assert [each == answer for each in got] == [True] * 4, [len(each) for each in got]
        await until(lambda: not server.connections)
    await asyncio.gather(*finished, return_exceptions=True)


async def test_closing_takes_no_longer_than_timeout_while_the_peer_sends() -> None:
    """aclose, the end of a handler and the end of the server take no longer than their timeouts."""
    closed: list[float] = []

    async def refuse(connection: kaio.Connection) -> None:
        await connection.receive(100)
        await connection.send(bytes(ANSWER // 40))
        began = time.monotonic()
        if not closed:
            await connection.aclose(timeout=0.3)
        closed.append(time.monotonic() - began)

    async def flood(connection: kaio.Connection) -> None:
        while True:
            await connection.send(bytes(100_000))

    server = await kaio.serve(refuse, "127.0.0.1", 0, close_timeout=0.3)
    async with server:
        for _ in range(2):
            async with await kaio.connect(str(server.listeners[0].address)) as client:
                client.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                with pytest.raises(anyio.BrokenResourceError):
                    await asyncio.wait_for(flood(client), 3)
        await until(lambda: not server.connections)
    assert 0.2 < closed[0] < 2


async def test_no_lingering_close_without_data_to_lose() -> None:
    """Closed at once: without a timeout, by abort, all data acknowledged, nothing unread, or after the peer's EOF."""
    connections: list[kaio.Connection] = []
    closing = asyncio.Event()

    async def take(connection: kaio.Connection) -> None:
        connections.append(connection)
        await closing.wait()

    async with kaio.serve(take, "127.0.0.1", 0) as server:
        clients = [await kaio.connect(str(server.listeners[0].address)) for _ in range(5)]
        await until(lambda: len(connections) == 5)
        ports = {each.extra(SocketAttribute.local_port): each for each in clients}
        for number, connection in enumerate(connections):
            client = ports[connection.peername[1]]
            if number != 3:
                await client.send(b"unread")
                await until(lambda c=connection: c._protocol.buffer.size)  # type: ignore[misc]
            if number == 4:
                await client.send_eof()
                await until(lambda c=connection: c._protocol._eof)  # type: ignore[misc]
            await connection.send(b"answer")
            if number == 2:
                sock = connection.extra(SocketAttribute.raw_socket)
                await until(lambda s=sock: not unacknowledged(s))  # type: ignore[misc]
            if number == 1:
                connection.abort()
            else:
                async with asyncio.timeout(1):
                    await connection.aclose(timeout=0 if number == 0 else None)
            assert not connection._protocol._lingering
        closing.set()
        for client in clients:
            client.abort()


async def test_reset_ends_a_lingering_close_without_error() -> None:
    """aclose ends without an error; the scope of another task raises ClosedResourceError."""
    async with filled() as (client, peer, _):
        sending = asyncio.create_task(client.send(bytes(8_000_000)))
        await until(lambda: client.transport.get_write_buffer_size())
        watching = asyncio.create_task(alive(client))
        await asyncio.sleep(0)

        async def close() -> None:
            async with client.while_alive():
                await client.aclose(timeout=None)

        closing = asyncio.create_task(close())
        await until(lambda: client._protocol._lingering and not unread(client.extra(SocketAttribute.raw_socket)))
        again = asyncio.create_task(client.aclose(timeout=None))
        await asyncio.sleep(0.02)
        assert not closing.done()
        assert not again.done()
        while await asyncio.to_thread(peer.recv, 1 << 20):
            pass
        peer.close()
        async with asyncio.timeout(2):
            await asyncio.gather(closing, again)
        for task in (sending, watching):
            with pytest.raises(anyio.ClosedResourceError):
                await task


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
async def test_dead_peer_ends_a_lingering_close() -> None:
    """It ends within the policy's detection time, although aclose has no timeout."""
    async with filled(keepalive="1s:1s:2") as (client, peer, _):
        sending = asyncio.create_task(client.send(bytes(8_000_000)))
        await until(lambda: client.transport.get_write_buffer_size())
        closing = asyncio.create_task(client.aclose(timeout=None))
        await until(lambda: client._protocol._lingering)
        with blackhole(peer):
            began = time.monotonic()
            async with asyncio.timeout(20):
                await closing
            assert time.monotonic() - began < 6
            reset(peer)
        await asyncio.gather(sending, return_exceptions=True)
        assert "dead" in repr(client)


# -- TLS, while reading is paused


@contextlib.asynccontextmanager
async def slow_reader(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, then: Callable[[ssl.SSLSocket], None]
) -> AsyncIterator[tuple[kaio.Connection, bytes]]:
    """A client that has paused reading, and the data that its peer has sent before a last action."""
    blob = random.randbytes(900_000)

    def serve_one(listening: socket.socket) -> None:
        accepted, _ = listening.accept()
        accepted.settimeout(20)
        with server_tls.wrap_socket(accepted, server_side=True) as peer:
            peer.sendall(blob)
            then(peer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_000_000)
        serving = asyncio.create_task(asyncio.to_thread(serve_one, listening))
        client = await kaio.connect(*listening.getsockname(), ssl=client_tls, server_hostname="localhost")
        await until(lambda: client._protocol._reading_paused)
        yield client, blob
        client.abort()
        await serving


def close_roughly(peer: ssl.SSLSocket) -> None:
    """Close without close_notify, as most programs do."""


def bid_farewell(peer: ssl.SSLSocket) -> None:
    """Send close_notify, and do not wait for the peer's."""
    peer.setblocking(False)
    with contextlib.suppress(ssl.SSLError):
        peer.unwrap()


def read_to_the_end(peer: ssl.SSLSocket) -> None:
    """Read until the other side has closed, then close."""
    with contextlib.suppress(OSError):
        while peer.recv(65536):
            pass
        peer.unwrap()


@pytest.mark.parametrize("then", [close_roughly, bid_farewell])
async def test_end_of_tls_loses_no_data_of_a_slow_reader(
    then: Callable[[ssl.SSLSocket], None], server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """All data is received before the end, also with uvloop, whose TLS discards what it has not delivered."""
    async with slow_reader(server_tls, client_tls, then) as (client, blob):
        await asyncio.sleep(0.1)
        got = bytearray()
        async for data in client:
            got += data
            await asyncio.sleep(0.001)
        assert bytes(got) == blob


async def test_closing_a_paused_tls_connection_is_quick(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """The peer's close_notify is read, although reading was paused."""
    async with slow_reader(server_tls, client_tls, read_to_the_end) as (client, _):
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await client.aclose(timeout=8)
        assert time.monotonic() - began < 4
