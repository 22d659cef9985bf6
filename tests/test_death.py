"""A real peer stops answering: its death is reported in time, once, in order and with its cause."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import kaio
from kaio.testing import blackhole

from .conftest import Recorder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("dead_peers")]

QUICK = kaio.Keepalive(1, 1, 2)
DROP = kaio.Keepalive(1, 1, 2, stalled="drop")
BOUND = 3.0


class Their:
    """The other end: asyncio's streams without keepalive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def close(self) -> None:
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def ours_accepted(
    policy: kaio.Keepalive, host: str, server_tls: ssl.SSLContext | None, client_tls: ssl.SSLContext | None
) -> AsyncIterator[tuple[Recorder, Their]]:
    """A connection accepted by kaio, and the other end."""
    recorders: list[Recorder] = []

    def factory() -> Recorder:
        recorders.append(Recorder())
        return recorders[-1]

    async with await kaio.create_server(factory, host, 0, keepalive=policy, ssl=server_tls) as server:
        port = server.sockets[0].getsockname()[1]
        their = Their(*await asyncio.open_connection(host, port, ssl=client_tls))
        while not recorders:
            await asyncio.sleep(0.001)
        await recorders[0].made
        try:
            yield recorders[0], their
        finally:
            their.close()


@contextlib.asynccontextmanager
async def ours_connected(
    policy: kaio.Keepalive, host: str, server_tls: ssl.SSLContext | None, client_tls: ssl.SSLContext | None
) -> AsyncIterator[tuple[Recorder, Their]]:
    """A connection made by kaio, and the other end."""
    accepted: asyncio.Future[Their] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(
        lambda reader, writer: accepted.set_result(Their(reader, writer)), host, 0, ssl=server_tls
    )
    port = server.sockets[0].getsockname()[1]
    transport, recorder = await kaio.create_connection(Recorder, host, port, keepalive=policy, ssl=client_tls)
    their = await accepted
    try:
        yield recorder, their
    finally:
        transport.abort()
        their.close()
        server.close()


async def nothing(recorder: Recorder, their: Their) -> None:
    """Leave the connection idle."""


async def half_close(recorder: Recorder, their: Their) -> None:
    """Send EOF, and wait until the peer has it."""
    recorder.transport.write_eof()
    assert await their.reader.read() == b""


CASES: list[tuple[str, Any, str, bool, Callable[[Recorder, Their], Awaitable[None]]]] = [
    ("accepted", ours_accepted, "127.0.0.1", False, nothing),
    ("connected", ours_connected, "127.0.0.1", False, nothing),
    ("accepted, TLS", ours_accepted, "127.0.0.1", True, nothing),
    ("connected, TLS", ours_connected, "127.0.0.1", True, nothing),
    ("accepted, IPv6", ours_accepted, "::1", False, nothing),
    ("connected, IPv6", ours_connected, "::1", False, nothing),
    ("accepted, after write_eof", ours_accepted, "127.0.0.1", False, half_close),
    ("connected, after write_eof", ours_connected, "127.0.0.1", False, half_close),
]


def check_story(recorder: Recorder, policy: kaio.Keepalive, cause: kaio.Cause) -> kaio.DeadPeerError:
    """Check that peer_dead and then connection_lost were called once with the same error."""
    assert recorder.names.count("dead") == 1
    assert recorder.names[-2:] == ["dead", "lost"]
    error = recorder.events[-1][1]
    assert recorder.events[-2][1] is error
    assert isinstance(error, kaio.DeadPeerError)
    assert not isinstance(error, TimeoutError)
    assert error.cause is cause
    assert error.errno == errno.ETIMEDOUT
    assert isinstance(error.__cause__, OSError)
    assert error.policy == policy
    assert error.info is not None
    assert error.info.state == kaio.TcpState.CLOSE
    assert error.peername[1] == recorder.transport.get_extra_info("peername", error.peername)[1]
    return error


async def test_death_of_idle_peer_is_reported_for_every_kind_of_connection(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """Cause KEEPALIVE, within the detection time + 1 s, with the true time of silence."""
    loop = asyncio.get_running_loop()

    async def case(
        name: str, make: Any, host: str, tls: bool, prepare: Callable[[Recorder, Their], Awaitable[None]]
    ) -> str:
        async with make(QUICK, host, server_tls if tls else None, client_tls if tls else None) as (ours, their):
            await prepare(ours, their)
            their.writer.write(b"the last word")
            # What is not acknowledged when the peer dies it goes on sending, and would be heard.
            while "data" not in ours.names or kaio.health(their.writer).unacked:
                await asyncio.sleep(0.001)
            heard = loop.time()
            with blackhole(their.writer):
                await ours.lost
            took = ours.lost_at - heard
            error = check_story(ours, QUICK, kaio.Cause.KEEPALIVE)
            assert BOUND - 0.2 < took < BOUND + 1.0, f"{name}: {took}"
            assert abs(error.silence - took) < 0.3, f"{name}: silence {error.silence}, true {took}"
            return f"{name:28} {took:.2f} s, silence {error.silence:.2f} s"

    for line in await asyncio.gather(*(case(*each) for each in CASES)):
        print(line)


async def test_unacknowledged_data_is_reported_within_the_user_timeout(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """stalled="drop": cause UNACKNOWLEDGED, within the user timeout + 1 s, with TLS too."""
    loop = asyncio.get_running_loop()

    async def case(make: Any, tls: bool) -> None:
        async with make(DROP, "127.0.0.1", server_tls if tls else None, client_tls if tls else None) as (ours, their):
            with blackhole(their.writer):
                ours.transport.write(b"into the dark")
                sent = loop.time()
                await ours.lost
            assert ours.lost_at - sent < BOUND + 1.0
            check_story(ours, DROP, kaio.Cause.UNACKNOWLEDGED)

    await asyncio.gather(*(case(make, tls) for make in (ours_accepted, ours_connected) for tls in (False, True)))


async def test_dead_peer_with_zero_window_has_its_own_cause() -> None:
    """stalled="drop": a peer that stopped reading and then died is reported as ZERO_WINDOW."""
    async with ours_connected(DROP, "127.0.0.1", None, None) as (ours, their):
        their.writer.transport.pause_reading()  # type: ignore[attr-defined]
        ours.transport.write(bytes(16 << 20))
        while ours.transport.health().state is not kaio.State.STALLED:
            await asyncio.sleep(0.01)
        with blackhole(their.writer):
            error = await ours.lost
        assert isinstance(error, kaio.DeadPeerError)
        assert error.cause is kaio.Cause.ZERO_WINDOW


async def test_unanswered_connect_fails_within_the_user_timeout() -> None:
    """A listener that drops SYNs: cause CONNECTING, by the user timeout, from every way to connect."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, blackhole(listener):
        host, port = listener.getsockname()
        attempts = [
            kaio.create_connection(Recorder, host, port, keepalive=QUICK),
            kaio.open_connection(host, port, keepalive=DROP),
            _awaited(kaio.connect(host, port, keepalive=QUICK)),
            _awaited(kaio.connect(f"{host}:{port}", keepalive=kaio.Keepalive(1, 1, 9, user_timeout=3))),
        ]
        began = loop.time()
        errors = await asyncio.gather(*attempts, return_exceptions=True)
        took = loop.time() - began
    for error in errors:
        assert isinstance(error, kaio.DeadPeerError)
        assert error.cause is kaio.Cause.CONNECTING
        assert error.errno == errno.ETIMEDOUT
        assert isinstance(error.__cause__, OSError)
        assert error.peername == (host, port)
        assert abs(error.silence - took) < 0.5
    assert kaio.get_monitor().counters.deaths[kaio.Cause.CONNECTING] == len(attempts)
    assert BOUND - 0.2 < took < BOUND + 1.0


async def _awaited(pending: Awaitable[object]) -> object:
    return await pending


async def test_dead_peer_during_tls_handshake_has_cause_connecting(client_tls: ssl.SSLContext) -> None:
    """A peer that dies after accepting, before the TLS handshake, is reported as soon as in connect()."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def die() -> None:
            conn, _ = await loop.sock_accept(listener)
            with conn, blackhole(conn):
                await asyncio.sleep(6)

        # The filter must be there before the client's hello is acknowledged, so it is on the listener's children too.
        dying = asyncio.create_task(die())
        with pytest.raises(kaio.DeadPeerError) as caught:
            await kaio.connect(*listener.getsockname(), keepalive=QUICK, ssl=client_tls)
        assert caught.value.cause is kaio.Cause.CONNECTING
        assert loop.time() - began < BOUND + 2.0
        dying.cancel()


async def test_every_method_of_a_stream_raises_the_same_error() -> None:
    """receive, a pending send of 100 MB, async for and every later call raise the same error."""
    accepted: asyncio.Future[Their] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(
        lambda reader, writer: accepted.set_result(Their(reader, writer)), "127.0.0.1", 0
    )
    connection = await kaio.connect(*server.sockets[0].getsockname(), keepalive=DROP)
    their = await accepted
    their.writer.write(b"before")
    with blackhole(their.writer):
        sending = asyncio.create_task(connection.send(bytes(100_000_000)))

        async def receive() -> list[bytes]:
            seen = []
            async for data in connection:
                seen.append(data)  # noqa: PERF401
            return seen

        error = await asyncio.create_task(_error_of(receive()))
        assert isinstance(error, kaio.DeadPeerError)
        assert error.cause is kaio.Cause.UNACKNOWLEDGED
        assert await _error_of(sending) is error
        assert await _error_of(connection.receive()) is error
        assert await _error_of(connection.receive_exactly(1)) is error
        assert await _error_of(connection.receive_until(b"\n", 10)) is error
        assert await _error_of(connection.send(b"x")) is error
        assert await _error_of(connection.send_eof()) is error
        await connection.aclose()
    their.close()
    server.close()


async def _error_of(awaitable: Awaitable[object]) -> BaseException | None:
    try:
        await awaitable
    except BaseException as exc:
        return exc
    return None


async def test_asyncio_streams_raise_dead_peer_error() -> None:
    """Readers and writers of open_connection and start_server raise DeadPeerError."""
    errors: list[BaseException | None] = []
    ended = asyncio.Event()
    inside: list[asyncio.StreamWriter] = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside.append(writer)
        errors.append(await _error_of(reader.read()))
        errors.append(await _error_of(writer.drain()))
        ended.set()

    async with await kaio.start_server(serve_one, "127.0.0.1", 0, keepalive=QUICK) as server:
        reader, writer = await kaio.open_connection(*server.sockets[0].getsockname(), keepalive=QUICK)
        while not inside:
            await asyncio.sleep(0.001)
        with blackhole(writer, inside[0]):
            # Neither end has a keepalive of its own now; give ours back, which are to find out.
            for end in (writer, inside[0]):
                kaio.apply(end, QUICK)
            with pytest.raises(kaio.DeadPeerError) as caught:
                await reader.read()
            await ended.wait()
        assert caught.value.cause is kaio.Cause.KEEPALIVE
        assert all(isinstance(error, kaio.DeadPeerError) for error in errors)
        assert errors[0] is errors[1]


async def test_peer_that_answers_again_before_the_verdict_is_alive() -> None:
    """A peer that answers again before the last probe has timed out is not reported."""
    async with ours_accepted(QUICK, "127.0.0.1", None, None) as (ours, their):
        for _ in range(2):
            with blackhole(their.writer):
                while not ours.transport.health().probes:
                    await asyncio.sleep(0.05)
                assert ours.transport.health().state is kaio.State.SUSPECT
            while ours.transport.health().probes:
                await asyncio.sleep(0.05)
            assert ours.transport.health().state is kaio.State.ALIVE
        their.writer.write(b"still here")
        while "data" not in ours.names:
            await asyncio.sleep(0.01)
        assert "dead" not in ours.names


async def test_aclose_to_a_dead_peer_with_unsent_data_takes_no_longer_than_timeout(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """aclose(timeout=) returns in time, also with TLS, and the pending send raises ClosedResourceError."""
    loop = asyncio.get_running_loop()

    async def case(tls: bool) -> None:
        accepted: asyncio.Future[Their] = loop.create_future()
        server = await asyncio.start_server(
            lambda reader, writer: accepted.set_result(Their(reader, writer)),
            "127.0.0.1",
            0,
            ssl=server_tls if tls else None,
        )
        connection = await kaio.connect(*server.sockets[0].getsockname(), ssl=client_tls if tls else None)
        their = await accepted
        with blackhole(their.writer):

            async def send() -> None:
                while True:
                    await connection.send(bytes(8 << 20))

            sending = asyncio.create_task(_error_of(send()))
            await asyncio.sleep(0.1)
            assert not sending.done()
            began = loop.time()
            await connection.aclose(timeout=0.5)
            assert loop.time() - began < 1.0
            assert type(await sending).__name__ == "ClosedResourceError"
        their.close()
        server.close()

    await asyncio.gather(case(False), case(True))
