"""`Connection`: no data is lost, backpressure, closing in time, anyio's errors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import itertools
import pathlib
import random
import socket
import ssl
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.tls import TLSAttribute

import kaio

from .conftest import echo, reset, until


@contextlib.asynccontextmanager
async def pair(**kwargs: Any) -> AsyncIterator[tuple[kaio.Connection, kaio.Connection]]:
    """A client's connection and the server's end of it."""
    accepted: asyncio.Future[kaio.Connection] = asyncio.get_running_loop().create_future()

    async def handler(connection: kaio.Connection) -> None:
        accepted.set_result(connection)
        await asyncio.Event().wait()

    server_tls, client_tls = kwargs.pop("server_tls", None), kwargs.pop("client_tls", None)
    async with (
        kaio.serve(handler, "127.0.0.1", 0, ssl=server_tls, close_timeout=0.2) as server,
        kaio.connect("127.0.0.1", server.listeners[0].address[1], ssl=client_tls) as client,  # type: ignore[misc]
    ):
        yield client, await accepted


async def test_connection_is_an_anyio_socket_stream() -> None:
    """Data arrives in both directions through anyio's interface."""
    async with pair() as (client, server):
        assert isinstance(client, SocketStream)
        await client.send(b"ping")
        assert await server.receive() == b"ping"
        await server.send(memoryview(b"pong"))  # type: ignore[arg-type]
        assert await client.receive(2) == b"po"
        assert await client.receive(1) == b"n"
        assert await client.receive() == b"g"
        await client.send(b"")


async def test_end_of_stream_and_half_close() -> None:
    """send_eof ends the peer's `async for`; the other direction stays open."""
    async with pair() as (client, server):
        await client.send(b"a")
        await client.send(b"b")
        await client.send_eof()
        await client.send_eof()
        with pytest.raises(anyio.ClosedResourceError):
            await client.send(b"more")
        assert b"".join([data async for data in server]) == b"ab"
        with pytest.raises(anyio.EndOfStream):
            await server.receive()
        await server.send(b"still here")
        assert await client.receive() == b"still here"


async def test_tls_stream_transfers_data_and_has_tls_attributes(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """With asyncio's TLS arguments: no half close, anyio's TLS attributes, a large transfer."""
    async with pair(server_tls=server_tls, client_tls=client_tls) as (client, server):
        assert client.extra(TLSAttribute.tls_version) in ("TLSv1.2", "TLSv1.3")
        assert server.extra(TLSAttribute.server_side)
        with pytest.raises(NotImplementedError):
            await client.send_eof()
        blob = random.randbytes(3_000_000)
        sending = asyncio.create_task(client.send(blob))
        assert await server.receive_exactly(len(blob)) == blob
        await sending
        await client.aclose()
        with pytest.raises(anyio.EndOfStream):
            await server.receive()


async def test_typed_attributes_describe_the_socket() -> None:
    """The family, addresses, ports and the raw socket."""
    async with pair() as (client, server):
        assert client.extra(SocketAttribute.family) == socket.AF_INET
        assert client.extra(SocketAttribute.remote_port) == server.extra(SocketAttribute.local_port)
        assert client.extra(SocketAttribute.local_address) == server.extra(SocketAttribute.remote_address)
        assert client.extra(SocketAttribute.raw_socket).fileno() > 0
        assert kaio.inspect(client).enabled


async def test_second_task_in_one_method_gets_busy_error() -> None:
    """A second receiver, and a second sender that would wait, get BusyResourceError; the first is not disturbed."""
    async with pair() as (client, server):
        first = asyncio.create_task(client.receive())
        await asyncio.sleep(0)
        for method in (client.receive(), client.receive_exactly(1), client.receive_until(b"\n", 9)):
            with pytest.raises(anyio.BusyResourceError):
                await method
        await server.send(b"x")
        assert await first == b"x"

        big = bytes(20_000_000)
        sending = asyncio.create_task(client.send(big))
        await asyncio.sleep(0)
        with pytest.raises(anyio.BusyResourceError):
            await client.send(b"y")
        assert await server.receive_exactly(len(big)) == big
        await sending


async def test_slow_reader_blocks_the_sender() -> None:
    """While the reader does not read, the sender waits, and the buffers of both ends stay bounded."""
    async with pair() as (client, server):
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await client.send(bytes(100_000))
                sent += 100_000

        flooding = asyncio.create_task(flood())
        await until(lambda: server._protocol._reading_paused)
        await until(lambda: client._protocol._writing_paused)
        await asyncio.sleep(0.1)
        before = sent
        await asyncio.sleep(0.1)
        assert sent == before
        assert server._protocol.buffer.size < 1_000_000
        received = 0
        while received < before + 1_000_000:
            received += len(await server.receive())
        assert sent > before
        flooding.cancel()
        client.abort()


async def test_cancellation_loses_no_data() -> None:
    """All data is received in order while each method of receiving is cancelled at random."""
    async with pair() as (client, server):
        whole = b"".join(b"%06d\n" % number for number in range(20_000))
        chance = random.Random(1)

        async def send() -> None:
            position = 0
            while position < len(whole):
                size = chance.randrange(1, 4000)
                await client.send(whole[position : position + size])
                position += size
                await asyncio.sleep(0)
            await client.send_eof()

        sending = asyncio.create_task(send())
        got = bytearray()
        while len(got) < len(whole):
            method = chance.choice(["receive", "exactly", "until"])
            wanted = chance.randrange(1, 50)
            call: Any
            if method == "receive":
                call = server.receive(wanted)
            elif method == "exactly":
                call = server.receive_exactly(min(wanted, len(whole) - len(got)))
            else:
                call = server.receive_until(b"\n", 1000)
            task = asyncio.ensure_future(call)
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                task.cancel()
            try:
                data = await task
            except asyncio.CancelledError:
                continue
            got += data + (b"\n" if method == "until" else b"")
        assert bytes(got) == whole
        await sending


async def test_cancellation_by_anyio_scopes_works() -> None:
    """After anyio's move_on_after has cancelled a receive, the connection can be used."""
    async with pair() as (client, server):
        with anyio.move_on_after(0.02) as scope:
            await client.receive()
        assert scope.cancelled_caught
        await server.send(b"later")
        assert await client.receive() == b"later"


async def test_failed_receive_exactly_and_until_leave_data_in_the_buffer() -> None:
    """IncompleteRead and DelimiterNotFound leave the data in the buffer."""
    async with pair() as (client, server):
        await client.send(b"12345")
        with pytest.raises(anyio.DelimiterNotFound):
            await server.receive_until(b"\n", 3)
        assert await server.receive_exactly(0) == b""
        await client.send_eof()
        with pytest.raises(anyio.IncompleteRead):
            await server.receive_exactly(6)
        with pytest.raises(anyio.IncompleteRead):
            await server.receive_until(b"\n", 100)
        assert await server.receive_exactly(5) == b"12345"


async def test_reset_raises_reset_error() -> None:
    """After the data, it raises a ConnectionResetError that is a BrokenResourceError and no DeadPeerError."""
    async with pair() as (client, server):
        await server.send(b"last")
        await until(lambda: client._protocol.buffer.size)
        reset(server.extra(SocketAttribute.raw_socket))
        server.abort()
        await until(lambda: client._protocol.is_lost)
        assert await client.receive() == b"last"
        for method in (client.receive(), client.send(b"x")):
            with pytest.raises(ConnectionResetError) as caught:
                await method
            assert isinstance(caught.value, anyio.BrokenResourceError)
            assert not isinstance(caught.value, kaio.DeadPeerError)
            assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_aclose_wakes_waiting_tasks() -> None:
    """aclose wakes a receiver and a sender with ClosedResourceError, which every later call raises, too."""
    async with pair() as (client, server):
        receiving = asyncio.create_task(client.receive())
        sending = asyncio.create_task(client.send(bytes(50_000_000)))
        await asyncio.sleep(0.05)
        await client.aclose(timeout=0.05)
        for task in (receiving, sending):
            with pytest.raises(anyio.ClosedResourceError):
                await task
        for method in (client.receive(), client.send(b"x"), client.send_eof(), client.receive_exactly(1)):
            with pytest.raises(anyio.ClosedResourceError):
                await method
        await client.aclose()
        with pytest.raises(kaio.KeepaliveError):
            client.health()
        assert "closed" in repr(client)
        del server


async def test_aclose_waits_until_data_is_sent() -> None:
    """A slow reader gets all data if the timeout of aclose allows it."""
    async with pair() as (client, server):
        blob = random.randbytes(2_000_000)
        sending = asyncio.create_task(client.send(blob))
        await asyncio.sleep(0)
        closing = asyncio.create_task(client.aclose(timeout=5))
        got = bytearray()
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                got += await server.receive()
        assert bytes(got) == blob
        await closing
        await asyncio.gather(sending, return_exceptions=True)


async def test_cancelled_aclose_aborts() -> None:
    """Cancelling aclose aborts the connection and raises CancelledError."""
    async with pair() as (client, server):
        sending = asyncio.create_task(client.send(bytes(50_000_000)))
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(client.aclose(timeout=None))
        await asyncio.sleep(0.02)
        assert not closing.done()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await until(lambda: client._protocol.is_lost)
        await asyncio.gather(sending, return_exceptions=True)
        del server


async def test_arguments_are_checked_before_anything_happens() -> None:
    """Negative and zero sizes, empty delimiters."""
    async with pair() as (client, _):
        for method in (client.receive(0), client.receive_exactly(-1), client.receive_until(b"", 5)):
            with pytest.raises(ValueError, match="must"):
                await method


async def test_policy_changes_on_the_live_connection() -> None:
    """Setting `keepalive` changes the socket's options; an invalid policy changes nothing."""
    async with pair() as (client, _):
        client.keepalive = "5s:2s:3"
        assert client.keepalive == kaio.Keepalive(5, 2, 3)
        assert (kaio.inspect(client).idle, kaio.inspect(client).count) == (5, 3)
        with pytest.raises(kaio.PolicyError):
            client.keepalive = "5s"
        assert kaio.inspect(client).idle == 5
        client.keepalive = False
        assert not kaio.inspect(client).enabled


async def test_a_connection_is_an_echo_over_every_address_family(tmp_path: pathlib.Path) -> None:
    """IPv4, IPv6, Unix."""
    path = f"unix:{tmp_path}/echo.sock"
    listeners = [kaio.Listener("127.0.0.1:0"), kaio.Listener("[::1]:0"), kaio.Listener(path)]
    async with kaio.serve(echo, listeners=listeners) as server:
        for listener in server.listeners:
            async with kaio.connect(str(listener.address)) as client:
                await client.send(b"x" * 100_000)
                assert await client.receive_exactly(100_000) == b"x" * 100_000
                assert str(listener.address) in repr(client)


async def test_a_delimiter_at_the_start_and_across_many_small_chunks() -> None:
    """It is found at the start of the buffer, and when it is longer than a chunk."""
    async with pair() as (client, server):
        await client.send(b"\r\n")
        await until(lambda: server._protocol.buffer.size == 2)
        receiving = asyncio.create_task(server.receive_until(b"\r\n\r\n", 65536))
        await asyncio.sleep(0)
        await client.send(b"\r\n")
        assert await receiving == b""


async def test_sender_that_never_waits_gets_the_error(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """After a reset, a loop of sends raises an error and does not block the event loop."""
    for tls in ({}, {"server_tls": server_tls, "client_tls": client_tls}):
        async with pair(**tls) as (client, server):

            async def send(client: kaio.Connection = client) -> None:
                while True:
                    await client.send(b"x" * 1000)

            sending = asyncio.create_task(send())
            await server.receive()
            reset(server.extra(SocketAttribute.raw_socket))
            server.abort()
            with pytest.raises(anyio.BrokenResourceError):
                await sending
            await asyncio.sleep(0.05)  # uvloop closes the descriptor in a later turn


async def test_closed_connection_is_freed_without_garbage_collector() -> None:
    """A closed connection is freed with the garbage collector off."""
    gc.collect()
    gc.disable()
    try:
        async with kaio.serve(echo, "127.0.0.1", 0) as server:
            client = await kaio.connect(str(server.listeners[0].address))
            await client.send(b"x")
            await client.receive()
            dead: list[weakref.ref[object]] = [weakref.ref(client), weakref.ref(client.transport)]
            dead += [weakref.ref(each) for each in server.connections]
            await client.aclose()
            del client
            await until(lambda: not server.connections)
            await asyncio.sleep(0.01)
            assert [ref() for ref in dead] == [None] * 3
    finally:
        gc.enable()


async def test_closed_connection_has_no_options() -> None:
    """apply, inspect and health raise KeepaliveError, as for any closed socket."""
    async with pair() as (client, _):
        await client.aclose()
        asks: list[Any] = [kaio.inspect, kaio.health, kaio.apply]
        for ask in asks:
            with pytest.raises(kaio.KeepaliveError, match="closed"):
                ask(client)


# -- the task that waits is woken directly


@pytest.mark.slow
async def test_closing_tls_to_a_silent_peer_takes_no_longer_than_close_timeout(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """The unanswered close_notify of TLS takes no longer than the close timeout."""

    async def leave(connection: kaio.Connection) -> None:
        await connection.receive()

    async with kaio.serve(leave, listeners=[kaio.Listener("127.0.0.1:0", ssl=server_tls)], close_timeout=1) as server:
        port = server.sockets[0].getsockname()[1]
        plain = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port))
        mute = await asyncio.to_thread(client_tls.wrap_socket, plain, server_hostname="localhost")
        with mute:
            await asyncio.to_thread(mute.sendall, b"bye")
            await until(lambda: not server.connections, within=4)


async def test_aclose_returns_although_the_handler_has_ended() -> None:
    """The server, with its timeout, and a task of the handler wait for the same connection_lost."""
    closing: list[asyncio.Task[None]] = []

    async def fill(connection: kaio.Connection) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                while True:
                    await connection.send(bytes(65536))
        closing.append(asyncio.create_task(connection.aclose(timeout=None)))
        await asyncio.sleep(0.05)

    async with kaio.serve(fill, "127.0.0.1", 0, close_timeout=0.3) as server:
        client = await asyncio.open_connection(*server.sockets[0].getsockname()[:2], limit=1)
        await until(lambda: closing)
        async with asyncio.timeout(5):
            await closing[0]
        client[1].transport.abort()


async def test_an_exit_in_a_handler_ends_the_program() -> None:
    """SystemExit propagates, although uvloop does not propagate exceptions of data_received."""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", EXITS], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 7, done.stderr


EXITS = """
import asyncio, sys, kaio, uvloop

async def leave(connection):
    async for _ in connection:
        sys.exit(7)

async def main():
    async with kaio.serve(leave, "127.0.0.1", 0) as server:
        connection = await kaio.connect(*server.sockets[0].getsockname()[:2])
        await connection.send(b"x")
        await asyncio.sleep(5)

uvloop.run(main())
"""


async def test_flood_on_one_connection_does_not_starve_another() -> None:
    """While one handler works on each chunk of a flood, another connection is served in between."""
    order: list[str] = []

    async def handle(connection: kaio.Connection) -> None:
        async for data in connection:
            if data.startswith(b"ping"):
                order.append("ping")
                await connection.send(b"pong")
            else:
                order.append("flood")
                time.sleep(0.002)  # noqa: ASYNC251 - it is to keep the loop busy

    async def flood(connection: kaio.Connection) -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                await connection.send(bytes(1 << 20))

    async with kaio.serve(handle, "127.0.0.1", 0, close_timeout=0.1) as server:
        where = server.sockets[0].getsockname()[:2]
        async with kaio.connect(*where) as noisy, kaio.connect(*where) as quiet:
            sending = asyncio.create_task(flood(noisy))
            for _ in range(20):
                await quiet.send(b"ping")
                assert await quiet.receive() == b"pong"
            sending.cancel()
            noisy.abort()
    runs = [len(list(run)) for kind, run in itertools.groupby(order) if kind == "flood"]
    assert statistics.median(runs or [0]) <= 8, runs


async def test_waiting_task_is_blocked_for_anyio() -> None:
    """anyio.wait_all_tasks_blocked calls done() of what each task awaits."""
    async with pair() as (ours, _):
        task = asyncio.create_task(ours.receive())
        async with asyncio.timeout(5):
            await anyio.wait_all_tasks_blocked()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_anext_is_a_coroutine() -> None:
    """create_task() accepts it on every version of Python; it raises StopAsyncIteration at the end."""
    async with pair() as (ours, theirs):
        assert inspect.iscoroutinefunction(type(ours).__anext__)
        task = asyncio.create_task(anext(ours))
        await theirs.send(b"x")
        assert await task == b"x"
        task = asyncio.create_task(anext(ours))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await theirs.send_eof()
        with pytest.raises(StopAsyncIteration):
            await anext(ours)
        with pytest.warns(RuntimeWarning, match="never awaited"):
            anext(ours)
