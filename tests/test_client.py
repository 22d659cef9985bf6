"""Connecting: bad arguments, refusals, several addresses, cancellation, sockets that are handed over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from typing import Any

import pytest

import kaio
from kaio.testing import blackhole

from .conftest import Recorder, echo, until


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


async def test_a_refusal_is_not_a_dead_peer() -> None:
    """The host has answered: ConnectionRefusedError."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        host, port = bound.getsockname()
        for attempt in (kaio.connect(host, port), kaio.connect(f"{host}:{port}")):
            with pytest.raises(ConnectionRefusedError):
                await attempt
        with pytest.raises(ConnectionRefusedError):
            await kaio.create_connection(Recorder, host, port)


async def test_happy_eyeballs_takes_the_address_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name has two addresses, and a server listens on one of them."""

    async def resolve(loop: Any, host: Any, port: Any, **rest: Any) -> list[Any]:
        kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(socket.AF_INET6, *kind, ("::1", port, 0, 0)), (socket.AF_INET, *kind, ("127.0.0.1", port))]

    # Before the name is replaced: what imports it for the first time meanwhile would keep the replacement.
    servers = [await kaio.serve(echo, host, 0) for host in ("127.0.0.1", "::1")]
    monkeypatch.setattr("kaio.net.dialing.resolve", resolve)
    for server in servers:
        async with server, kaio.connect("localhost", server.sockets[0].getsockname()[1]) as client:
            await client.send(b"x")
            assert await client.receive() == b"x"


class Suspicious(Recorder):
    """Records when its peer is suspect."""

    def __init__(self) -> None:
        super().__init__()
        self.suspect = asyncio.get_running_loop().create_future()

    def peer_suspect(self, health: kaio.Health) -> None:
        self.suspect.set_result(health)


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
async def test_times_left_to_the_system_are_read_from_the_kernel() -> None:
    """By each function that connects, the monitor knows them: the peer is suspect after its first probe."""
    policy = "1s:1s:"
    with socket.socket() as fresh:
        system = kaio.inspect(fresh).count
    async with kaio.serve(echo, "127.0.0.1", 0, keepalive="off", close_timeout=0.1) as server:
        host, port = server.listeners[0].address  # type: ignore[misc]
        with socket.create_connection((host, port)) as sock:
            made = [
                await kaio.create_connection(Suspicious, host, port, keepalive=policy),
                await kaio.create_connection(Suspicious, sock=sock, keepalive=policy),
                await kaio.create_connection(type("Own", (Suspicious,), {"keepalive": policy}), host, port),
            ]
            stream = await kaio.connect(host, port, keepalive=policy)
            await until(lambda: len(server.connections) == 4)
            for connection in (*(transport for transport, _ in made), stream):
                assert kaio.inspect(connection).times == (1, 1, system)
                assert connection.keepalive == kaio.Keepalive.parse(policy)  # type: ignore[attr-defined]
            with blackhole(*server.connections):
                async with asyncio.timeout(6):
                    for _, protocol in made:
                        await protocol.suspect
                    await until(lambda: kaio.get_monitor().counters.suspects == 4)
                for transport, _ in made:
                    transport.abort()
                stream.abort()


async def test_tcp_user_timeout_stays_after_connect_with_stalled_drop_only() -> None:
    """With stalled="keep" it is set for the handshake and removed."""
    async with kaio.serve(echo, "127.0.0.1", 0) as server:
        address = str(server.listeners[0].address)
        for policy, expected in (
            (kaio.Keepalive(5, 2, 3), None),
            (kaio.Keepalive(5, 2, 3, stalled="drop"), 11.0),
            (kaio.Keepalive(5, 2, 3, user_timeout=60, stalled="drop"), 60.0),
            (kaio.Keepalive(5, 2, 3, user_timeout=None, stalled="drop"), None),
            (kaio.Keepalive.SYSTEM, None),
            (kaio.Keepalive.OFF, None),
        ):
            async with kaio.connect(address, keepalive=policy) as client:
                state = kaio.inspect(client)
                assert state.user_timeout == expected
                assert state.enabled is policy.enabled


async def test_arguments_are_checked_before_there_is_a_socket() -> None:
    """asyncio's rules and kaio's; nothing is left open."""
    before = descriptors()
    sync: list[tuple[Any, type[BaseException]]] = [
        (lambda: kaio.connect("no-port"), kaio.AddressError),
        (lambda: kaio.connect("host", "http"), kaio.AddressError),
        (lambda: kaio.connect("host", 80, keepalive=5), kaio.PolicyError),  # type: ignore[arg-type]
        (lambda: kaio.connect("host", 80, server_hostname="x"), ValueError),
        (lambda: kaio.connect("host", 80, ssl=True, ssl_handshake_timeout=0), ValueError),
        (lambda: kaio.connect("unix:/tmp/x", ssl=True), ValueError),
    ]
    for call, error in sync:
        with pytest.raises(error):
            call()
    with socket.socket() as sock:
        several: list[dict[str, Any]] = [
            {},
            {"host": "127.0.0.1", "port": 1, "sock": sock},
            {"host": "127.0.0.1", "port": 1, "server_hostname": "x"},
        ]
        for kwargs in several:
            with pytest.raises(ValueError):  # noqa: PT011 - the table is of kinds
                await kaio.create_connection(asyncio.Protocol, **kwargs)
    with pytest.raises(socket.gaierror):
        await kaio.connect("name.invalid", 80)
    assert descriptors() == before


async def test_a_cancelled_connect_leaves_nothing_open(client_tls: Any) -> None:
    """Cancelled after each number of the loop's iterations, with and without TLS."""
    async with kaio.serve(echo, "127.0.0.1", 0) as server:
        host, port = server.listeners[0].address  # type: ignore[misc]
        await asyncio.sleep(0.01)
        gc.collect()
        before = descriptors()
        for tls in (None, client_tls):
            for turns in range(12):
                task = asyncio.ensure_future(_connect(host, port, tls))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                result = (await asyncio.gather(task, return_exceptions=True))[0]
                if isinstance(result, kaio.Connection):
                    await result.aclose()
        await until(lambda: not server.connections)
        await until(lambda: descriptors() <= before)


@pytest.mark.parametrize("way", ["connect", "create_connection", "open_connection"])
async def test_a_connect_that_is_cancelled_late_is_not_watched(way: str, server_tls: Any, client_tls: Any) -> None:
    """After each number of iterations until it is made: it is not counted, and its server sees its end."""
    counters = kaio.get_monitor().counters

    async def make(host: Any, port: Any, tls: Any) -> Any:
        if way == "connect":
            return (await kaio.connect(host, port, ssl=tls)).abort
        if way == "create_connection":
            return (await kaio.create_connection(Recorder, host, port, ssl=tls))[0].abort
        return (await kaio.open_connection(host, port, ssl=tls))[1].close

    for context, tls in ((None, None), (server_tls, client_tls)):
        # A server that closes no connection: one that is left open here stays open.
        async with kaio.serve(_Patient, "127.0.0.1", 0, ssl=context) as server:
            host, port = server.listeners[0].address  # type: ignore[misc]
            for turns in range(200):
                task = asyncio.ensure_future(make(host, port, tls))
                for _ in range(turns):
                    await asyncio.sleep(0)
                done = task.done()
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    (await task)()
                await until(lambda: not counters.watched, within=2)
                assert not server.connections
                if done:
                    break
            else:
                pytest.fail("it was never made")
    gc.collect()  # and nothing of it warns


async def test_a_connect_that_is_cancelled_in_connection_made_calls_connection_lost(
    server_tls: Any, client_tls: Any
) -> None:
    """Each is called once."""
    tasks: list[asyncio.Task[Any]] = []

    class Cancelling(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            tasks[-1].cancel()

    for context, tls in ((None, None), (server_tls, client_tls)):
        async with kaio.serve(_Patient, "127.0.0.1", 0, ssl=context) as server:
            protocol = Cancelling()
            connecting = kaio.create_connection(lambda p=protocol: p, *server.listeners[0].address, ssl=tls)
            tasks.append(asyncio.ensure_future(connecting))
            with pytest.raises(asyncio.CancelledError):
                await tasks[-1]
            async with asyncio.timeout(2):
                assert await protocol.lost is None
            assert protocol.names == ["made", "lost"]
            await until(lambda: not kaio.get_monitor().counters.watched)


class _Patient(kaio.KeepaliveProtocol):
    """Ends when its peer does."""


async def _connect(host: Any, port: Any, tls: Any) -> kaio.Connection:
    return await kaio.connect(host, port, ssl=tls)


async def test_a_connected_socket_gets_the_policy() -> None:
    """A TCP socket does; asking for a policy on a Unix socket is a `PolicyError`."""
    async with kaio.serve(echo, "127.0.0.1", 0) as server:
        sock = socket.create_connection(tuple(server.listeners[0].address))  # type: ignore[arg-type]
        transport, protocol = await kaio.create_connection(Recorder, sock=sock, keepalive="5s:2s:3")
        assert isinstance(transport, kaio.KeepaliveTransport)
        assert kaio.inspect(transport).idle == 5
        transport.close()
        await protocol.lost
    one, other = socket.socketpair()
    with other:
        with pytest.raises(kaio.PolicyError, match="not TCP"):
            await kaio.create_connection(Recorder, sock=one, keepalive="5s:2s:3")
        transport, protocol = await kaio.create_connection(Recorder, sock=one)
        transport.write(b"x")
        assert await asyncio.get_running_loop().run_in_executor(None, other.recv, 1) == b"x"
        transport.close()
        await protocol.lost


async def test_the_sockets_of_plain_protocols_get_the_policy() -> None:
    """On both sides; the protocol gets the loop's own transport."""
    made: list[asyncio.Transport] = []

    class Plain(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            made.append(transport)

    async with await kaio.create_server(Plain, "127.0.0.1", 0, keepalive="5s:2s:3") as server:
        transport, _ = await kaio.create_connection(Plain, *server.sockets[0].getsockname(), keepalive="7s:2s:3")
        await until(lambda: len(made) == 2)
        assert sorted(kaio.inspect(each).idle or 0 for each in made) == [5, 7]
        assert not isinstance(transport, kaio.KeepaliveTransport)
        for each in made:
            each.abort()


async def test_local_address_and_all_errors() -> None:
    """They work as in asyncio."""
    async with kaio.serve(echo, "127.0.0.1", 0) as server:
        host, port = server.listeners[0].address  # type: ignore[misc]
        async with kaio.connect(host, port, local_addr=("127.0.0.2", 0)) as client:
            sock = client.transport.get_extra_info("sockname")
            assert sock[0] == "127.0.0.2"
    with pytest.raises(ExceptionGroup) as caught:
        await kaio.create_connection(Recorder, host, port, all_errors=True)
    assert all(isinstance(exc, ConnectionRefusedError) for exc in caught.value.exceptions)


async def test_the_longest_policy_can_connect() -> None:
    """Its detection time exceeds the largest TCP_USER_TIMEOUT."""
    async with (
        kaio.serve(echo, "127.0.0.1", 0) as server,
        kaio.connect(server.listeners[0].address, keepalive=kaio.Keepalive(32767, 32767, 127)) as client,
    ):
        assert kaio.inspect(client).idle == 32767
        assert kaio.inspect(client).user_timeout is None


@pytest.mark.slow
async def test_the_user_timeout_bounds_the_tls_handshake(client_tls: Any) -> None:
    """The peer's kernel answers and its program does not: asyncio's error. ssl_handshake_timeout wins."""
    loop = asyncio.get_running_loop()
    quick = kaio.Keepalive(1, 1, 2)

    async def took(connecting: Any) -> float:
        began = loop.time()
        with pytest.raises(ConnectionAbortedError):
            await connecting
        return loop.time() - began

    with socket.create_server(("127.0.0.1", 0)) as mute, socket.create_connection(mute.getsockname()) as sock:
        host, port = mute.getsockname()
        there: dict[str, Any] = {"host": host, "port": port, "ssl": client_tls, "keepalive": quick}
        over: dict[str, Any] = {**there, "host": None, "port": None, "sock": sock, "server_hostname": "localhost"}
        times = await asyncio.gather(
            took(_made(kaio.connect(**there))),
            took(kaio.create_connection(Recorder, **there)),
            took(kaio.open_connection(**there)),
            took(kaio.create_connection(Recorder, **over)),
            took(_made(kaio.connect(**there, ssl_handshake_timeout=1.5))),
            took(_made(kaio.connect(**there, ssl_handshake_timeout=5))),
        )
    assert all(3 <= each < 4.5 for each in times[:4]), times
    assert 1.5 <= times[4] < 2.5
    assert 5 <= times[5] < 6
    assert not kaio.get_monitor().counters.watched


async def _made(pending: Any) -> Any:
    return await pending
