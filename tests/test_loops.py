"""The drop-in loop: sockets of libraries that never heard of kaio have the policy, and their deaths are heard."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import gc
import http.client
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio.abc
import pytest
import uvloop

import kaio
from kaio.loop.foreign import ForeignDescriptor, ForeignTransport
from kaio.testing import blackhole

from .conftest import echo, reset, until


class OwnLoop(asyncio.SelectorEventLoop):
    """A loop of the application's own, over asyncio's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class OwnUvloop(uvloop.Loop):
    """A loop of the application's own, over uvloop's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


BASES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
OWN_BASES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "own": lambda: OwnLoop("own"),
    "own uvloop": lambda: OwnUvloop("own"),
}
ALL_BASES = BASES | OWN_BASES
POLICIES = hasattr(asyncio, "set_event_loop_policy")  # Python 3.16 has none

POLICY = kaio.Keepalive(7, 3, 5)


def has(idle: int, interval: int, count: int, user_timeout: float | None = None) -> kaio.SocketState:
    """What a socket has whose keepalive is on."""
    return kaio.SocketState(enabled=True, idle=idle, interval=interval, count=count, user_timeout=user_timeout)


HAS_POLICY = has(7, 3, 5)
QUICK = kaio.Keepalive(1, 1, 2)
DROP = kaio.Keepalive(1, 1, 2, stalled="drop")
BOUND = 3.0  # the detection time of both
SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h
LATEST = BOUND + 1 + 1.5  # seconds after which a death must have been heard: policy, interval, and some slack

TCP = socket.IPPROTO_TCP


def on_kaio(policy: Any, bases: dict[str, Callable[[], asyncio.AbstractEventLoop]] = BASES) -> pytest.MarkDecorator:
    """Let an asynchronous test run on kaio's loops, over each base; it may ask for the `base`'s name."""
    return pytest.mark.loops({name: kaio.loop_factory(policy, base=base) for name, base in bases.items()})


@pytest.fixture
def base(loop_name: str) -> str:
    """The name of the base under kaio's loop."""
    return loop_name


class Plain(asyncio.Protocol):
    """A protocol of somebody who never heard of kaio; it writes down what it is told, and what its socket has."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.events: list[str] = []
        self.received = b""
        self.lost_at = 0.0
        self.made: asyncio.Future[asyncio.Transport] = loop.create_future()
        self.lost: asyncio.Future[Exception | None] = loop.create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport: Any = transport
        self.events.append("made")
        self.state = kaio.inspect(transport)
        self.made.set_result(transport)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> bool:
        self.events.append("eof")
        return self.transport.get_extra_info("sslcontext") is None

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_at = asyncio.get_running_loop().time()
        self.events.append("lost")
        if not self.lost.done():
            self.lost.set_result(exc)


class Accepted:
    """A factory of protocols that keeps them."""

    def __init__(self) -> None:
        self.protocols: list[Plain] = []

    def __call__(self) -> Plain:
        self.protocols.append(Plain())
        return self.protocols[-1]

    async def states(self, count: int) -> list[kaio.SocketState]:
        """What the first accepted sockets had in connection_made."""
        await until(lambda: sum(each.made.done() for each in self.protocols) >= count)
        return [each.state for each in self.protocols if each.made.done()]

    def close(self) -> None:
        for each in self.protocols:
            if each.made.done():
                each.transport.abort()


@contextlib.contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A listening socket of somebody else, without keepalive; nobody accepts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as sock:
        sock.setblocking(False)
        yield sock


@contextlib.contextmanager
def connected_to(address: Any, count: int) -> Iterator[list[socket.socket]]:
    """Connections of somebody else to an address."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address[:2])) for _ in range(count)]


def choose(
    sock: socket.socket, *, idle: int | None = None, interval: int | None = None, count: int | None = None
) -> None:
    """What an application does that knows of keepalive."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, idle),
        (socket.TCP_KEEPINTVL, interval),
        (socket.TCP_KEEPCNT, count),
    ):
        if value is not None:
            sock.setsockopt(TCP, option, value)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- what a library opens


@on_kaio(POLICY, ALL_BASES)
async def test_connections_by_name_have_the_policy_before_connection_made(
    base: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """Every argument of create_connection that leads to a socket; nothing else of the connection changes."""
    loop: Any = asyncio.get_running_loop()
    accepted = Accepted()
    server = await loop.create_server(accepted, ["127.0.0.1", "::1"], 0, ssl=None)
    secure = await loop.create_server(accepted, "127.0.0.1", 0, ssl=server_tls)
    port, port6 = (
        next(sock.getsockname()[1] for sock in server.sockets if sock.family == family)
        for family in (socket.AF_INET, socket.AF_INET6)
    )
    tls_port = secure.sockets[0].getsockname()[1]
    ways: dict[str, dict[str, Any]] = {
        "address": {"host": "127.0.0.1", "port": port},
        "name": {"host": "localhost", "port": port},
        "port as text": {"host": "127.0.0.1", "port": str(port)},
        "IPv6": {"host": "::1", "port": port6},
        "two addresses": {"host": None, "port": port},
        "TLS": {"host": "127.0.0.1", "port": tls_port, "ssl": client_tls},
        "TLS, named": {
            "host": "127.0.0.1",
            "port": tls_port,
            "ssl": client_tls,
            "server_hostname": "localhost",
            "ssl_handshake_timeout": 20,
            "ssl_shutdown_timeout": 20,
        },
        "happy eyeballs": {"host": "localhost", "port": port, "happy_eyeballs_delay": 0.2, "interleave": 1},
        "happy eyeballs, two addresses": {"host": None, "port": port, "happy_eyeballs_delay": 0.2},
        "from an address": {"host": "127.0.0.1", "port": port, "local_addr": ("127.0.0.2", 0)},
        "family": {"host": "localhost", "port": port, "family": socket.AF_INET, "proto": TCP, "flags": 0},
    }
    if "uvloop" in base or sys.version_info >= (3, 12):
        ways["all errors"] = {"host": "127.0.0.1", "port": port, "all_errors": True}
    for number, (way, arguments) in enumerate(ways.items(), 1):
        transport, protocol = await loop.create_connection(Plain, **arguments)
        assert protocol.state == HAS_POLICY, way
        assert kaio.inspect(transport) == HAS_POLICY, way
        assert transport.get_protocol() is protocol, way
        assert transport.get_extra_info("socket").getsockopt(TCP, socket.TCP_NODELAY), way
        if "local_addr" in arguments:
            assert transport.get_extra_info("sockname")[0] == "127.0.0.2"
        assert await accepted.states(number) == [HAS_POLICY] * number, way
        transport.abort()
    accepted.close()
    server.close()
    secure.close()


@on_kaio(POLICY, ALL_BASES)
async def test_sockets_handed_over_get_the_policy(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    """create_connection(sock=), sock_connect, sock_accept, connect_accepted_socket, start_tls, asyncio's streams."""
    loop = asyncio.get_running_loop()
    with listening() as listener, contextlib.ExitStack() as stack:
        address = listener.getsockname()
        for options in ({}, {"ssl": client_tls, "server_hostname": "localhost"}):
            sock = socket.create_connection(address)
            connecting = asyncio.create_task(loop.create_connection(Plain, sock=sock, **options))  # type: ignore[call-overload]
            conn, _ = await loop.sock_accept(listener)
            assert kaio.inspect(conn) == HAS_POLICY  # it waited in the queue of a socket that had none
            theirs, _ = await loop.connect_accepted_socket(Plain, conn, ssl=server_tls if options else None)
            transport, protocol = await connecting
            assert protocol.state == theirs.get_protocol().state == HAS_POLICY  # type: ignore[attr-defined]
            transport.abort()
            theirs.abort()
        assert kaio.inspect(listener) == HAS_POLICY

        sock = stack.enter_context(socket.socket())
        sock.setblocking(False)
        await loop.sock_connect(sock, address)
        assert kaio.inspect(sock) == HAS_POLICY
        conn, _ = await loop.sock_accept(listener)
        stack.enter_context(conn)
        await loop.sock_sendall(conn, b"hello")
        assert await loop.sock_recv(sock, 100) == b"hello"

        raw = stack.enter_context(socket.create_connection(address))
        conn, _ = listener.accept()
        transport, protocol = await loop.connect_accepted_socket(Plain, conn)
        assert protocol.state == HAS_POLICY
        secure = asyncio.create_task(loop.start_tls(transport, protocol, server_tls, server_side=True))
        await asyncio.sleep(0)  # it takes the reading over
        peer = await asyncio.to_thread(client_tls.wrap_socket, raw, server_hostname="localhost")
        upgraded = await secure
        assert upgraded is not None
        assert kaio.inspect(upgraded) == HAS_POLICY
        await asyncio.to_thread(peer.sendall, b"hello")
        await until(lambda: protocol.received == b"hello")
        upgraded.abort()
        peer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(str(kaio.inspect(writer)).encode())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_tls) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), ssl=client_tls)
        assert kaio.inspect(writer) == HAS_POLICY
        assert await reader.read() == str(HAS_POLICY).encode()
        writer.close()
        await writer.wait_closed()


@on_kaio(POLICY, ALL_BASES)
async def test_what_anyio_makes_has_the_policy() -> None:
    """anyio's listeners and clients use sock_accept, connect_accepted_socket and create_connection."""
    states: list[kaio.SocketState] = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            states.append(kaio.inspect(stream))
            await stream.send(await stream.receive())

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        async with await anyio.connect_tcp("127.0.0.1", listener.extra(anyio.abc.SocketAttribute.local_port)) as stream:
            states.append(kaio.inspect(stream))
            await stream.send(b"x")
            assert await stream.receive() == b"x"
        tasks.cancel_scope.cancel()
    assert states == [HAS_POLICY] * 2


# -- what a library serves


@on_kaio(POLICY, ALL_BASES)
async def test_servers_and_what_they_accept_have_the_policy(base: str, server_tls: ssl.SSLContext) -> None:
    """Every way to make a server; the listening sockets have the options, so that accepting costs nothing."""
    loop: Any = asyncio.get_running_loop()
    bound, queue = socket.socket(), socket.create_server(("127.0.0.1", 0))
    bound.bind(("127.0.0.1", 0))
    ways: dict[str, dict[str, Any]] = {
        "host": {"host": "127.0.0.1", "port": 0},
        "several hosts": {"host": ["127.0.0.1", "::1", "127.0.0.2"], "port": 0},
        "every host": {"host": None, "port": 0},
        "bound": {"sock": bound},
        "listening": {"sock": queue},
        "reuse_port": {"host": "127.0.0.1", "port": 0, "reuse_port": True, "reuse_address": True},
        "TLS": {"host": "127.0.0.1", "port": 0, "ssl": server_tls},
        "later": {"host": "127.0.0.1", "port": 0, "start_serving": False, "backlog": 5},
        "keep_alive=True": {"host": "127.0.0.1", "port": 0, "keep_alive": True},
        "keep_alive=None": {"host": "127.0.0.1", "port": 0, "keep_alive": None},
    }
    for way, arguments in ways.items():
        accepted = Accepted()
        server = await loop.create_server(accepted, **arguments)
        assert server.is_serving() is (way != "later")
        assert server.get_loop() is loop
        if way == "later":
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(server.sockets[0].getsockname())
            await server.start_serving()
        addresses = [sock.getsockname() for sock in server.sockets]
        assert all(kaio.inspect(sock) == HAS_POLICY for sock in server.sockets), way
        if "ssl" not in arguments:
            with contextlib.ExitStack() as clients:
                for address in addresses:
                    clients.enter_context(connected_to(address, 2))
                assert await accepted.states(2 * len(addresses)) == [HAS_POLICY] * 2 * len(addresses), way
                assert all(each.transport.get_protocol() is each for each in accepted.protocols), way
        accepted.close()
        server.close()


@on_kaio(POLICY, ALL_BASES)
async def test_keep_alive_false_is_respected() -> None:
    """The application's word, on every base and version; the base may not even know the argument."""
    loop: Any = asyncio.get_running_loop()
    accepted = Accepted()
    server = await loop.create_server(accepted, "127.0.0.1", 0, keep_alive=False)
    address = server.sockets[0].getsockname()
    with connected_to(address, 2):
        assert [state.enabled for state in await accepted.states(2)] == [False, False]
    accepted.close()
    server.close()


@on_kaio("off", BASES)
async def test_keep_alive_true_is_respected_with_the_policy_off() -> None:
    """As Python 3.13 has it: keepalive on, with the system's times."""
    loop: Any = asyncio.get_running_loop()
    accepted = Accepted()
    server = await loop.create_server(accepted, "127.0.0.1", 0, keep_alive=True)
    with connected_to(server.sockets[0].getsockname(), 1):
        (state,) = await accepted.states(1)
    assert state.enabled
    assert state.idle != 7
    accepted.close()
    server.close()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@on_kaio(POLICY)
async def test_connections_in_the_accept_queue_get_the_policy(
    tls: bool, later: bool, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """A socket that comes already listening: what is in its queue has what it had then; one of them has gone again."""
    loop = asyncio.get_running_loop()
    accepted = Accepted()
    with listening() as listener, contextlib.ExitStack() as stack:
        address = listener.getsockname()
        socks = stack.enter_context(connected_to(address, 4))
        gone = socket.create_connection(address)
        reset(gone)
        gone.close()
        server = await loop.create_server(
            accepted, sock=listener, ssl=server_tls if tls else None, start_serving=not later
        )
        if later:
            await server.start_serving()
        socks += stack.enter_context(connected_to(address, 2))
        if tls:
            wrap = functools.partial(client_tls.wrap_socket, server_hostname="localhost")
            for sock in await asyncio.gather(*(asyncio.to_thread(wrap, sock) for sock in socks)):
                stack.enter_context(sock)
        states = await accepted.states(6)
        assert states == [HAS_POLICY] * len(states)
        accepted.close()
        server.close()


@on_kaio(POLICY)
async def test_a_listening_socket_with_a_queue_can_be_handed_over() -> None:
    """Whom that server does not concern: connections that the loop makes, and its other servers'."""
    loop = asyncio.get_running_loop()
    accepted, others = Accepted(), Accepted()
    with listening() as listener, connected_to(listener.getsockname(), 3):
        server = await loop.create_server(accepted, sock=listener, start_serving=False)
        other = await loop.create_server(others, "127.0.0.1", 0)
        transport, protocol = await loop.create_connection(Plain, *other.sockets[0].getsockname())
        assert protocol.state == HAS_POLICY
        assert await others.states(1) == [HAS_POLICY]
        listener.accept()[0].close()  # one is taken from it
        await server.start_serving()
        assert await accepted.states(2) == [HAS_POLICY] * 2
        transport.abort()
        for each in (accepted, others, server, other):
            each.close()


@pytest.mark.parametrize("kind", ["create_server", "start_server", "listening already"])
@on_kaio(POLICY)
async def test_every_one_of_many_simultaneous_connections_has_the_policy(kind: str) -> None:
    """5,000 connections as fast as they come; each is read in connection_made. They begin before the server listens, or
    while nobody accepts from a socket that does."""
    count, bare, seen = 5_000, [], 0
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def look(transport: Any) -> None:
        nonlocal seen
        seen += 1
        sock = transport.get_extra_info("socket")
        if (sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), sock.getsockopt(TCP, socket.TCP_KEEPIDLE)) != (
            1,
            7,
        ):
            bare.append(seen)
        transport.abort()
        if seen == count:
            done.set()

    class Looking(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            look(transport)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        look(writer.transport)

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if kind == "listening already":
        listener.listen(4096)
    else:
        listener.close()
    storm = await asyncio.create_subprocess_exec(
        sys.executable, "tests/programs/loops_storm.py", str(port), str(count), stdout=asyncio.subprocess.PIPE
    )
    assert storm.stdout is not None
    assert await storm.stdout.readline() == b"ready\n"
    if kind == "listening already":
        await asyncio.sleep(0.02)
        server = await loop.create_server(Looking, sock=listener, backlog=4096)
    elif kind == "create_server":
        server = await loop.create_server(Looking, "127.0.0.1", port, backlog=4096)
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=4096)
    began = loop.time()
    async with asyncio.timeout(30):
        await done.wait()
    print(f"{seen} accepted in {loop.time() - began:.2f} s")
    assert bare == []
    assert await storm.wait() == 0
    server.close()


# -- connecting


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_connecting_to_a_silent_host_ends_after_the_user_timeout(client_tls: ssl.SSLContext) -> None:
    """A listener that drops SYNs: TimeoutError with ETIMEDOUT from every way to connect, and no death is counted."""
    loop: Any = asyncio.get_running_loop()
    with listening() as listener, listening() as lively, blackhole(listener), contextlib.ExitStack() as stack:
        address = listener.getsockname()
        socks = [stack.enter_context(socket.socket()) for _ in range(3)]
        for sock in socks:
            sock.setblocking(False)
        choose(socks[1], idle=1, interval=1, count=1)  # chosen, but no user timeout: this one waits for long
        choose(socks[2], idle=1, interval=1, count=1)
        socks[2].setsockopt(TCP, socket.TCP_USER_TIMEOUT, 4_000)
        attempts = {
            "create_connection": loop.create_connection(Plain, *address),
            "TLS": loop.create_connection(Plain, *address, ssl=client_tls),
            "happy eyeballs": loop.create_connection(Plain, *address, happy_eyeballs_delay=0.2),
            "open_connection": asyncio.open_connection(*address),
            "sock_connect": loop.sock_connect(socks[0], address),
            "chosen": loop.sock_connect(socks[2], address),
        }
        waiting = asyncio.create_task(loop.sock_connect(socks[1], address))
        began = loop.time()

        async def timed(attempt: Awaitable[Any]) -> tuple[BaseException | None, float]:
            try:
                await attempt
            except BaseException as exc:
                return exc, loop.time() - began
            return None, loop.time() - began

        results = await asyncio.gather(*map(timed, attempts.values()))
        for way, (error, took) in zip(attempts, results, strict=True):
            assert isinstance(error, TimeoutError), (way, error)
            assert error.errno == errno.ETIMEDOUT, way
            bound = 4.0 if way == "chosen" else BOUND
            assert bound - 0.2 < took < bound + 1.5, (way, took)
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert kaio.inspect(socks[0]).user_timeout is None
        assert kaio.inspect(socks[2]).user_timeout == 4
        # Where somebody answers, nothing is left of the bound.
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, lively.getsockname())
            assert kaio.inspect(sock).user_timeout is None
    assert sum(kaio.get_monitor().counters.deaths.values()) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_a_tls_handshake_with_a_dead_peer_is_bounded_too(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """The peer died after it had accepted: long before TLS's own minute is over, from either side."""
    loop = asyncio.get_running_loop()

    async def took(handshake: Awaitable[Any]) -> float:
        began = loop.time()
        with pytest.raises((OSError, ssl.SSLError)):
            await asyncio.wait_for(handshake, 15)
        return loop.time() - began

    with listening() as listener, contextlib.ExitStack() as stack:

        def connected() -> socket.socket:
            sock = socket.create_connection(listener.getsockname())
            stack.enter_context(blackhole(stack.enter_context(listener.accept()[0])))
            return sock

        connecting = loop.create_connection(Plain, sock=connected(), ssl=client_tls, server_hostname="localhost")
        accepting = loop.connect_accepted_socket(Plain, connected(), ssl=server_tls)
        transport, protocol = await loop.create_connection(Plain, sock=connected())
        upgrading = loop.start_tls(transport, protocol, client_tls, server_hostname="localhost")
        for way, time_taken in zip(
            ("connect", "accept", "start_tls"),
            await asyncio.gather(*map(took, (connecting, accepting, upgrading))),
            strict=True,
        ):
            assert time_taken < LATEST, way
        transport.abort()


LEFT_TO_THE_SYSTEM = {"on": has(7200, 75, 9), "::2": has(7200, 75, 2), "30s::": has(30, 75, 9)}


@pytest.mark.loops(
    {
        f"{name}-{policy}": kaio.loop_factory(policy, base=base)
        for name, base in BASES.items()
        for policy in LEFT_TO_THE_SYSTEM
    }
)
async def test_a_policy_may_leave_times_to_the_system(loop_name: str) -> None:
    """What is not said is the system's, on both ends."""
    loop = asyncio.get_running_loop()
    expected = LEFT_TO_THE_SYSTEM[loop_name.partition("-")[2]]
    accepted = Accepted()
    server = await loop.create_server(accepted, "127.0.0.1", 0)
    transport, protocol = await loop.create_connection(Plain, *server.sockets[0].getsockname())
    assert [protocol.state, *await accepted.states(1)] == [expected] * 2
    transport.abort()
    accepted.close()
    server.close()


@on_kaio(POLICY)
async def test_a_cancelled_attempt_leaves_no_socket_open() -> None:
    """Cancelled while connecting, refused, or wrong in its arguments: no socket stays open, and no option of theirs."""
    loop: Any = asyncio.get_running_loop()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        before = open_descriptors()
        with pytest.raises(ConnectionRefusedError):
            await loop.create_connection(Plain, *closed.getsockname())
        with pytest.raises(OSError):  # noqa: PT011 - on asyncio it is of two kinds
            await loop.create_connection(Plain, None, closed.getsockname()[1])
        with socket.socket() as sock:
            sock.setblocking(False)
            with pytest.raises(ConnectionRefusedError):
                await loop.sock_connect(sock, closed.getsockname())
            assert kaio.inspect(sock).user_timeout is None
        with listening() as full:
            full.listen(0)
            with connected_to(full.getsockname(), 1):
                connecting = asyncio.create_task(loop.create_connection(Plain, *full.getsockname()))
                await asyncio.sleep(0.1)
                assert not connecting.done()
                connecting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await connecting
        gc.collect()
        assert open_descriptors() == before


@pytest.mark.parametrize("end", ["abort", "close", "write and close", "close it twice"])
@on_kaio(POLICY)
async def test_closing_in_connection_made_closes_one_descriptor(end: str) -> None:
    """The number is another's right afterwards, and nobody closes that."""

    class Hasty(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            if end == "write and close":
                transport.write(b"bye")
            transport.abort() if end == "abort" else transport.close()
            if end == "close it twice":
                transport.abort()

    loop = asyncio.get_running_loop()
    gone = []
    with listening() as listener, contextlib.ExitStack() as stack:
        for _ in range(5):
            transport, _ = await loop.create_connection(Hasty, *listener.getsockname())
            for left, right in (socket.socketpair() for _ in range(3)):
                gone += [stack.enter_context(left), stack.enter_context(right)]
            listener.accept()[0].close()
            del transport
            await asyncio.sleep(0.01)
            gc.collect()
        for sock in gone:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
        for left, right in zip(gone[::2], gone[1::2], strict=True):
            left.send(b"x")
            assert right.recv(1) == b"x"


# -- what the application chose


@on_kaio(DROP)
async def test_options_set_by_the_application_are_kept_and_keepalive_alone_gets_the_policy() -> None:
    """By every way that a socket of the application's own comes to the loop."""
    loop = asyncio.get_running_loop()
    chosen: dict[str, tuple[dict[str, int], int, kaio.SocketState]] = {
        "all": ({"idle": 30, "interval": 5, "count": 3}, 36_000, has(30, 5, 3, 36.0)),
        "all, no user timeout": ({"idle": 30, "interval": 5, "count": 3}, 0, has(30, 5, 3, None)),
        "idle alone": ({"idle": 100}, 0, has(100, 75, 9, None)),
        "interval alone": ({"interval": 7}, 0, has(7200, 7, 9, None)),
        "count alone": ({"count": 2}, 0, has(7200, 75, 2, None)),
        "the switch": ({}, 0, has(1, 1, 2, 3.0)),
    }

    async def connect(sock: socket.socket, address: Any, listener: socket.socket) -> None:
        sock.setblocking(False)
        await loop.sock_connect(sock, address)

    async def hand_over(sock: socket.socket, address: Any, listener: socket.socket) -> None:
        sock.connect(address)
        transport, protocol = await loop.create_connection(Plain, sock=sock)
        states.append(protocol.state)
        await asyncio.sleep(0)
        transport.abort()

    async def accept(sock: socket.socket, address: Any, listener: socket.socket) -> None:
        sock.connect(address)
        transport, protocol = await loop.connect_accepted_socket(Plain, sock)
        states.append(protocol.state)
        transport.abort()

    async def read(sock: socket.socket, address: Any, listener: socket.socket) -> None:
        sock.connect(address)
        loop.add_reader(sock, lambda: None)
        states.append(kaio.inspect(sock))
        loop.remove_reader(sock)

    async def serve(sock: socket.socket, address: Any, listener: socket.socket) -> None:
        sock.bind(("127.0.0.1", 0))
        accepted = Accepted()
        server = await loop.create_server(accepted, sock=sock)
        with connected_to(sock.getsockname(), 1):
            states.extend(await accepted.states(1))
        accepted.close()
        server.close()

    for way in (connect, hand_over, accept, read, serve):
        for name, (times, user_timeout, expected) in chosen.items():
            states: list[kaio.SocketState] = []
            with listening() as listener, socket.socket() as sock:
                choose(sock, **times)
                if user_timeout:
                    sock.setsockopt(TCP, socket.TCP_USER_TIMEOUT, user_timeout)
                await way(sock, listener.getsockname(), listener)
                if sock.fileno() >= 0 and way is not serve:
                    states.append(kaio.inspect(sock))
                assert states, (way.__name__, name)
                assert states == [expected] * len(states), (way.__name__, name)


@on_kaio(POLICY)
async def test_sockets_that_are_not_tcp_are_left_alone(tmp_path: Any) -> None:
    """Unix sockets, UDP, pipes, pairs of sockets and subprocesses work, and have what they had."""
    loop = asyncio.get_running_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        enabled = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        writer.write(bytes([enabled]) + await reader.readline())
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "unix.sock") as server:
        assert not server.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "unix.sock")
        assert not writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        writer.write(b"over unix\n")
        assert await reader.read() == b"\0over unix\n"
        writer.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "own.sock"))
        server = await loop.create_server(asyncio.Protocol, sock=listener)
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        server.close()

    received = loop.create_future()

    class Datagrams(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            received.set_result(data)

    there, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", 0))
    here, _ = await loop.create_datagram_endpoint(
        asyncio.DatagramProtocol, remote_addr=there.get_extra_info("sockname")
    )
    here.sendto(b"over UDP")
    assert await received == b"over UDP"
    assert not here.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    here.close()
    there.close()

    left, right = socket.socketpair()
    readable = asyncio.Event()
    with left, right:
        for end in (left, right):
            end.setblocking(False)
        loop.add_reader(left, readable.set)
        await loop.sock_sendall(right, b"x")
        await readable.wait()
        loop.remove_reader(left)
        assert not left.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    out, into = os.pipe()
    readable = asyncio.Event()
    loop.add_reader(out, readable.set)
    os.write(into, b"x")
    await readable.wait()
    loop.remove_reader(out)
    os.close(into)
    stream = asyncio.StreamReader()
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(out, "rb"))
    assert await stream.read() == b"x"
    pipe.close()

    process = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate(b"through a process"))[0] == b"through a process"
    assert kaio.get_monitor().counters.watched == 0


@on_kaio(POLICY)
async def test_multipath_tcp_has_the_policy_without_a_user_timeout(base: str) -> None:
    """Its sockets refuse TCP_USER_TIMEOUT (ENOPROTOOPT): that is no reason to leave them bare, nor to fail."""
    loop = asyncio.get_running_loop()
    multipath = 262
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, multipath)
    except OSError as exc:
        pytest.skip(f"no multipath TCP: {exc.strerror}")
    with listening() as listener, sock:
        sock.connect(listener.getsockname())
        sock.setblocking(False)
        loop.add_reader(sock, lambda: None)
        assert kaio.inspect(sock) == HAS_POLICY
        loop.remove_reader(sock)
        transport, protocol = await loop.create_connection(Plain, sock=sock)
        assert protocol.state == HAS_POLICY
        transport.close()
        await protocol.lost
    with listening() as listener, socket.socket(socket.AF_INET, socket.SOCK_STREAM, multipath) as sock:
        if base == "uvloop":  # asyncio's own sock_connect does not know the protocol
            sock.setblocking(False)
            await loop.sock_connect(sock, listener.getsockname())
            assert kaio.inspect(sock) == HAS_POLICY


# -- descriptors


@pytest.mark.parametrize("method", ["add_reader", "add_writer"])
@on_kaio(POLICY, ALL_BASES)
async def test_a_socket_given_to_add_reader_gets_the_policy(method: str) -> None:
    """Whether it comes as a number, as a socket or as any other object with one; what it was set to later stands."""
    loop = asyncio.get_running_loop()
    wait, stop = getattr(loop, method), getattr(loop, method.replace("add", "remove"))

    class Handle:
        def __init__(self, sock: socket.socket) -> None:
            self.fileno = sock.fileno

    kinds: tuple[Callable[[socket.socket], Any], ...] = (lambda sock: sock, lambda sock: sock.fileno(), Handle)
    with listening() as listener:
        for kind in kinds:
            with socket.create_connection(listener.getsockname()) as sock:
                sock.setblocking(False)
                number = sock.fileno()
                wait(kind(sock), lambda: None)
                assert kaio.inspect(sock) == HAS_POLICY
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
                wait(kind(sock), lambda: None)  # the loop has seen it
                assert not kaio.inspect(sock).enabled
                stop(number)
            # The number is another socket's now.
            with socket.create_connection(listener.getsockname()) as sock:
                assert sock.fileno() == number
                wait(kind(sock), lambda: None)
                assert kaio.inspect(sock) == HAS_POLICY
                stop(number)
        assert not kaio.inspect(listener).enabled
        loop.add_reader(listener, lambda: None)  # tornado's way to serve
        assert kaio.inspect(listener) == HAS_POLICY
        loop.remove_reader(listener)


@on_kaio(POLICY, {"asyncio": BASES["asyncio"]})  # uvloop's own add_reader does change it
async def test_the_blocking_mode_of_a_descriptor_is_not_changed() -> None:
    """Not under socket.setdefaulttimeout either, which makes every new socket object's descriptor non-blocking."""
    loop = asyncio.get_running_loop()
    with listening() as listener, socket.create_connection(listener.getsockname()) as sock:
        sock.setblocking(True)
        socket.setdefaulttimeout(5)
        try:
            loop.add_reader(sock.fileno(), lambda: None)
            await asyncio.sleep(0)
            assert os.get_blocking(sock.fileno())
            kaio.report()
            kaio.sweep()
            assert os.get_blocking(sock.fileno())
        finally:
            socket.setdefaulttimeout(None)
            loop.remove_reader(sock.fileno())
        assert kaio.inspect(sock) == HAS_POLICY


# -- the base, to the letter


@pytest.mark.parametrize("base", BASES)
def test_mistakes_raise_the_same_errors_as_on_the_base(
    base: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """The same kind of exception with the same error number, and no more descriptors left open."""

    async def answers() -> dict[str, Any]:
        loop: Any = asyncio.get_running_loop()
        found: dict[str, Any] = {}
        before = open_descriptors()
        with listening() as listener, socket.socket() as closed, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            closed.bind(("127.0.0.1", 0))
            there, nobody = listener.getsockname(), closed.getsockname()
            gone = socket.socket()
            gone.close()
            name = "127.0.0.1"
            mistakes: dict[str, Callable[[], Awaitable[Any]]] = {
                "nowhere": lambda: loop.create_connection(Plain),
                "two places": lambda: loop.create_connection(Plain, *there, sock=closed),
                "refused": lambda: loop.create_connection(Plain, *nobody),
                "refused twice": lambda: loop.create_connection(Plain, None, nobody[1]),
                "refused, TLS": lambda: loop.create_connection(Plain, *nobody, ssl=client_tls),
                "no such name": lambda: loop.create_connection(Plain, "none", 1, flags=socket.AI_NUMERICHOST),
                "no such service": lambda: loop.create_connection(Plain, name, "no-such-service"),
                "family": lambda: loop.create_connection(Plain, *there, family=socket.AF_INET6),
                "name without TLS": lambda: loop.create_connection(Plain, *there, server_hostname="x"),
                "time without TLS": lambda: loop.create_connection(Plain, *there, ssl_handshake_timeout=1),
                "end without TLS": lambda: loop.create_connection(Plain, *there, ssl_shutdown_timeout=1),
                "TLS without name": lambda: loop.create_connection(Plain, sock=closed, ssl=client_tls),
                "TLS without host": lambda: loop.create_connection(Plain, None, there[1], ssl=client_tls),
                "TLS time": lambda: loop.create_connection(Plain, *there, ssl=client_tls, ssl_handshake_timeout=-1),
                "TLS time 0": lambda: loop.create_connection(Plain, *there, ssl=client_tls, ssl_shutdown_timeout=0),
                "datagrams": lambda: loop.create_connection(Plain, sock=datagrams),
                "from nowhere": lambda: loop.create_connection(Plain, *there, local_addr="127.0.0.1"),
                "from elsewhere": lambda: loop.create_connection(Plain, *there, local_addr=("192.0.2.1", 0)),
                "from a port in use": lambda: loop.create_connection(Plain, *there, local_addr=there),
                "no such argument": lambda: loop.create_connection(Plain, *there, bogus=1),
                "no such argument, sock": lambda: loop.create_connection(Plain, sock=closed, bogus=1),
                "no factory": lambda: loop.create_connection(lambda: 1 / 0, *there),
                "serve nowhere": lambda: loop.create_server(Plain),
                "serve two places": lambda: loop.create_server(Plain, name, 0, sock=closed),
                "serve, in use": lambda: loop.create_server(Plain, *there),
                "serve, half in use": lambda: loop.create_server(Plain, ["127.0.0.3", name], there[1]),
                "serve elsewhere": lambda: loop.create_server(Plain, "192.0.2.1", 0),
                "serve datagrams": lambda: loop.create_server(Plain, sock=datagrams),
                "serve a closed one": lambda: loop.create_server(Plain, sock=gone),
                "serve wrong TLS": lambda: loop.create_server(Plain, name, 0, ssl="x"),
                "serve time without TLS": lambda: loop.create_server(Plain, name, 0, ssl_handshake_timeout=1),
                "serve no such argument": lambda: loop.create_server(Plain, name, 0, bogus=1),
                "accept datagrams": lambda: loop.connect_accepted_socket(Plain, datagrams),
                "accept, time without TLS": lambda: loop.connect_accepted_socket(
                    Plain, closed, ssl_handshake_timeout=1
                ),
                "sock_connect, refused": lambda: loop.sock_connect(_nonblocking(closed), nobody),
                "sock_connect, closed": lambda: loop.sock_connect(gone, there),
                "sock_connect, connected": lambda: loop.sock_connect(listener, there),
                "sock_accept, closed": lambda: loop.sock_accept(gone),
                "sock_accept, not listening": lambda: loop.sock_accept(_nonblocking(closed)),
                "read -1": lambda: _awaited(loop.add_reader, -1, print),
                "read 99999": lambda: _awaited(loop.add_reader, 99_999, print),
                "read a text": lambda: _awaited(loop.add_reader, "5", print),
                "write a closed one": lambda: _awaited(loop.add_writer, gone, print),
            }
            for mistake, make in mistakes.items():
                try:
                    async with asyncio.timeout(0.5):
                        found[mistake] = type(await make()).__name__
                except Exception as exc:
                    found[mistake] = type(exc).__name__, getattr(exc, "errno", None)
        gc.collect()
        await asyncio.sleep(0.01)  # uvloop closes descriptors later
        found["descriptors left open"] = open_descriptors() - before
        return found

    async def quietly() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        results.append(await answers())

    results: list[dict[str, Any]] = []
    for factory in (BASES[base], kaio.loop_factory(POLICY, base=BASES[base])):
        with warnings.catch_warnings(record=True) as caught:  # the bases leave some open, too
            warnings.simplefilter("always", ResourceWarning)
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(quietly())
            gc.collect()
        results[-1]["warnings"] = len(caught)
    theirs, ours = results
    counts = {key: (ours.pop(key), theirs.pop(key)) for key in ("descriptors left open", "warnings")}
    assert (ours, {key: both for key, both in counts.items() if both[0] > both[1]}) == (theirs, {})


async def _awaited(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _nonblocking(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    return sock


# -- deaths


@dataclasses.dataclass
class Case:
    """A connection of somebody's protocol on the loop, and its peer: a socket that no loop has."""

    name: str
    protocol: Plain
    transport: Any
    peer: socket.socket
    began: float = 0.0
    """When the peer died."""
    expected: bytes = b""
    """What the peer had sent before."""


Make = Callable[["Case | None"], Awaitable[Case]]


class Connections:
    """Makes connections of every kind; all of them end with it."""

    def __init__(self, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
        self._server_tls = server_tls
        self._client_tls = client_tls
        self._stack = contextlib.ExitStack()
        self.cases: list[Case] = []

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for case in self.cases:
            case.transport.abort()
        self._stack.close()
        await asyncio.sleep(0)

    def add(self, protocol: Plain, transport: Any, peer: socket.socket) -> Case:
        self._stack.enter_context(peer)
        self.cases.append(Case("", protocol, transport, peer))
        return self.cases[-1]

    def darken(self, case: Case) -> None:
        """The peer loses power."""
        self._stack.enter_context(blackhole(case.peer))
        case.began = asyncio.get_running_loop().time()

    async def accepted(self, tls: bool = False, protocol: Callable[[], Plain] = Plain) -> Case:
        """By the loop's server."""
        made: list[Plain] = []

        def factory() -> Plain:
            made.append(protocol())
            return made[-1]

        loop = asyncio.get_running_loop()
        server = await loop.create_server(factory, "127.0.0.1", 0, ssl=self._server_tls if tls else None)
        peer = socket.create_connection(server.sockets[0].getsockname())
        if tls:
            peer = await asyncio.to_thread(self._client_tls.wrap_socket, peer, server_hostname="localhost")
        await until(lambda: made)
        transport = await made[0].made
        server.close()
        return self.add(made[0], transport, peer)

    async def connected(self, tls: bool = False, protocol: Callable[[], Plain] = Plain) -> Case:
        """By the loop's create_connection."""
        with listening() as listener:
            options = {"ssl": self._client_tls, "server_hostname": "localhost"} if tls else {}
            connecting = asyncio.create_task(
                asyncio.get_running_loop().create_connection(protocol, *listener.getsockname(), **options)  # type: ignore[call-overload]
            )
            peer = await self._accept(listener, tls)
            transport, made = await connecting
        return self.add(made, transport, peer)

    async def by_hand(self, tls: bool = False, protocol: Callable[[], Plain] = Plain) -> Case:
        """By sock_accept and connect_accepted_socket."""
        loop = asyncio.get_running_loop()
        with listening() as listener:
            peer = socket.create_connection(listener.getsockname())
            conn, _ = await loop.sock_accept(listener)
        options = {"ssl": self._server_tls if tls else None}
        if tls:
            wrapping = asyncio.create_task(
                asyncio.to_thread(self._client_tls.wrap_socket, peer, server_hostname="localhost")
            )
            transport, _ = await loop.connect_accepted_socket(protocol, conn, **options)  # type: ignore[arg-type]
            peer = await wrapping
        else:
            transport, _ = await loop.connect_accepted_socket(protocol, conn)
        made: Any = transport.get_protocol()
        return self.add(made, transport, peer)

    async def upgraded(self, tls: bool = True, protocol: Callable[[], Plain] = Plain) -> Case:
        """By create_connection, and start_tls after it."""
        loop = asyncio.get_running_loop()
        with listening() as listener:
            connecting = asyncio.create_task(loop.create_connection(protocol, *listener.getsockname()))
            accepting = asyncio.create_task(self._accept(listener, True))
            transport, made = await connecting
            upgraded: Any = await loop.start_tls(transport, made, self._client_tls, server_hostname="localhost")
            made.transport = upgraded
            return self.add(made, upgraded, await accepting)

    async def _accept(self, listener: socket.socket, tls: bool) -> socket.socket:
        while True:
            try:
                peer, _ = listener.accept()
                break
            except BlockingIOError:
                await asyncio.sleep(0.001)
        peer.setblocking(True)
        return await asyncio.to_thread(self._server_tls.wrap_socket, peer, server_side=True) if tls else peer


class Pausing(Plain):
    """Takes a little, and then no more until it is asked to."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.pause_reading()


async def idle(case: Case) -> None:
    """Nothing is sent."""


async def in_flight(case: Case) -> None:
    """Sent after the peer's death."""
    case.transport.write(b"into the dark")


async def paused(case: Case) -> None:
    """Nobody reads, and nothing came."""
    case.transport.pause_reading()


async def send_before(case: Case) -> None:
    """Reading is paused, and the peer has sent something before it died."""
    case.transport.pause_reading()
    case.expected = os.urandom(100_000)
    case.peer.sendall(case.expected)


async def send_more_than_is_read(case: Case) -> None:
    """More than the loop reads at once, and the protocol pauses again with each piece.

    All of it has to be in the socket: what the peer could not send it goes on probing the window for, and is heard.
    """
    case.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
    case.expected = os.urandom(600_000)
    await asyncio.to_thread(case.peer.sendall, case.expected)
    await until(lambda: not kaio.health(case.peer).unsent and not case.transport.is_reading())


async def half_close(case: Case) -> None:
    """Our half is closed."""
    case.transport.write_eof()
    assert await asyncio.to_thread(case.peer.recv, 1) == b""


async def peer_half_closes(case: Case) -> None:
    """The peer's half is closed, and the protocol keeps the connection."""
    case.peer.shutdown(socket.SHUT_WR)
    await until(lambda: "eof" in case.protocol.events)


async def shut_window(case: Case) -> None:
    """The peer reads nothing and its window is shut."""
    case.transport.write(bytes(16 << 20))
    await until(lambda: kaio.health(case.transport).state is kaio.State.STALLED)


async def close_with_data(case: Case) -> None:
    """The application has closed it, and there is more to send than the peer takes."""
    await shut_window(case)
    case.transport.close()


SUSPECT = (kaio.Cause.KEEPALIVE,)
STUCK = (kaio.Cause.UNACKNOWLEDGED,)
SHUT = (kaio.Cause.ZERO_WINDOW,)
# how it is made, over TLS, the protocol, before the peer's death, after it, causes
DEATHS: list[tuple[str, bool, type[Plain], Any, Any, tuple[kaio.Cause, ...]]] = [
    *((how, tls, Plain, idle, idle, SUSPECT) for how in ("accepted", "connected", "by_hand") for tls in (False, True)),
    *((how, tls, Plain, idle, in_flight, STUCK) for how in ("accepted", "connected") for tls in (False, True)),
    *((how, tls, Plain, paused, idle, SUSPECT) for how in ("accepted", "connected") for tls in (False, True)),
    *((how, tls, Plain, paused, in_flight, STUCK) for how in ("accepted", "connected") for tls in (False, True)),
    *((how, False, Plain, send_before, idle, SUSPECT) for how in ("accepted", "connected", "by_hand")),
    *((how, False, Plain, send_before, in_flight, STUCK) for how in ("accepted", "connected")),
    *((how, False, Plain, half_close, idle, SUSPECT) for how in ("accepted", "connected")),
    *((how, False, Plain, peer_half_closes, idle, SUSPECT) for how in ("accepted", "connected")),
    *((how, False, Plain, peer_half_closes, in_flight, STUCK) for how in ("accepted", "connected")),
    *((how, tls, Plain, shut_window, idle, SHUT) for how in ("accepted", "connected") for tls in (False, True)),
    *((how, False, Plain, close_with_data, idle, SHUT) for how in ("accepted", "connected")),
    ("upgraded", True, Plain, idle, idle, SUSPECT),
    ("upgraded", True, Plain, idle, in_flight, STUCK),
    ("upgraded", True, Plain, paused, idle, SUSPECT),
    ("upgraded", True, Plain, shut_window, idle, SHUT),
]


async def die(connections: Connections, death: Any, rest: float = 0.0, patience: float = LATEST + 1.5) -> Case:
    """One of the deaths, after a rest, until the protocol was told or patience is over."""
    how, tls, protocol, before, after, _ = death
    case: Case = await getattr(connections, how)(tls, protocol)
    case.name = f"{how}{', TLS' if tls else ''}: {before.__name__}, {after.__name__}"
    await before(case)
    await asyncio.sleep(rest)
    # What is not acknowledged when the peer dies it goes on sending, and would be heard: TLS's tickets, say.
    await until(lambda: not kaio.health(case.peer).unacked)
    connections.darken(case)
    await after(case)
    await asyncio.wait([case.protocol.lost], timeout=patience)
    return case


def complaints_about(case: Case) -> list[str]:
    """How a death was not told as it should be."""
    protocol = case.protocol
    if not protocol.lost.done():
        return [f"{case.name}: never told"]
    error, took = protocol.lost.result(), protocol.lost_at - case.began
    found = []
    if not isinstance(error, TimeoutError) or error.errno != errno.ETIMEDOUT:
        found.append(f"{case.name}: {error!r}")
    if not BOUND - 1 < took < LATEST:
        found.append(f"{case.name}: after {took:.2f} s")
    if protocol.events.count("lost") != 1:
        found.append(f"{case.name}: {protocol.events}")
    if protocol.received != case.expected:
        found.append(f"{case.name}: {len(case.expected)} bytes came before, {len(protocol.received)} were given")
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_the_death_of_a_librarys_peer_is_reported_in_every_state(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """connection_lost(TimeoutError) once and in time; log, counters and hook tell why, once each."""
    monitor = kaio.get_monitor()
    events: list[kaio.Event] = []
    monitor.hook = events.append
    async with Connections(server_tls, client_tls) as connections:
        cases = await asyncio.gather(*(die(connections, death) for death in DEATHS))
        assert [complaint for case in cases for complaint in complaints_about(case)] == []
        await asyncio.sleep(0.1)
        expected = sorted(death[-1][0] for death in DEATHS)
        dead = [event.error for event in events if event.kind == "dead"]
        assert sorted(error.cause for error in dead if error is not None) == expected
        assert {cause: number for cause, number in monitor.counters.deaths.items() if number} == {
            cause: expected.count(cause) for cause in set(expected)
        }
        records = [record for record in caplog.records if record.name == "kaio" and record.levelno >= logging.WARNING]
        assert sorted(record.__dict__["cause"] for record in records) == expected
        peers = {"{}:{}".format(*case.peer.getsockname()) for case in cases}
        for record in records:
            extra = record.__dict__
            assert extra["event"] == "peer_dead"
            assert extra["policy"] == str(QUICK)
            assert extra["errno"] == errno.ETIMEDOUT
            assert BOUND - 1 < extra["silence"] < LATEST
            peers.remove(extra["peer"])
        assert peers == set()
        assert monitor.counters.watched == 0


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_a_death_is_reported_to_a_protocol_that_always_pauses_again(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """Backpressure of the strict kind: one helping at a time. The end comes in time, whoever asks for no more."""
    async with Connections(server_tls, client_tls) as connections:
        deaths = [(how, False, Pausing, send_more_than_is_read, idle, SUSPECT) for how in ("accepted", "connected")]
        for case in await asyncio.gather(*(die(connections, death) for death in deaths)):
            assert [text for text in complaints_about(case) if "bytes came before" not in text] == []
            assert case.expected.startswith(case.protocol.received)


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_streams_of_asyncio_raise_the_death_from_every_method(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """A read and a drain that wait, on both sides, plain and TLS; what was read before the end is not lost."""
    loop = asyncio.get_running_loop()

    async def error_of(awaitable: Awaitable[Any]) -> BaseException | None:
        try:
            await awaitable
        except BaseException as exc:
            return exc
        return None

    async def case(tls: bool, stack: contextlib.ExitStack) -> None:
        inside: asyncio.Future[Any] = loop.create_future()
        server = await asyncio.start_server(
            lambda *ends: inside.set_result(ends), "127.0.0.1", 0, ssl=server_tls if tls else None, limit=1_000
        )
        peer = await asyncio.to_thread(socket.create_connection, server.sockets[0].getsockname())
        if tls:
            peer = await asyncio.to_thread(client_tls.wrap_socket, peer, server_hostname="localhost")
        stack.enter_context(peer)
        reader, writer = await inside
        peer.sendall(b"a line\n" + bytes(500))
        assert await reader.readline() == b"a line\n"
        await until(lambda: not kaio.health(peer).unacked)
        stack.enter_context(blackhole(peer))
        began = loop.time()

        async def fill() -> None:
            while True:
                writer.write(bytes(1 << 20))
                await writer.drain()

        errors = await asyncio.gather(error_of(reader.readexactly(501)), error_of(fill()))
        assert loop.time() - began < LATEST
        for error in errors:
            assert isinstance(error, TimeoutError), (tls, error)
            assert error.errno == errno.ETIMEDOUT
        writer.close()
        with contextlib.suppress(TimeoutError):
            await writer.wait_closed()
        server.close()

    with contextlib.ExitStack() as stack:
        await asyncio.gather(case(False, stack), case(True, stack))
    assert kaio.get_monitor().counters.deaths[kaio.Cause.UNACKNOWLEDGED] == 2


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_live_peers_are_not_reported_dead(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Stalled and answering, away for a moment, reset, closed by both sides and kept, or chosen otherwise."""
    loop = asyncio.get_running_loop()

    async def stalled(how: str, tls: bool) -> Case:
        case: Case = await getattr(connections, how)(tls)
        await shut_window(case)
        return case

    async def away() -> list[Case]:
        """Each until a probe or a retransmission was lost; together, so that none is away for much longer."""
        cases: list[Case] = []
        for how in ("accepted", "connected"):
            cases += [await getattr(connections, how)() for _ in range(2)]
        idle_ones, others = cases[::2], cases[1::2]
        with blackhole(*(case.peer for case in cases)):
            for case in others:
                await in_flight(case)
            await until(
                lambda: (
                    all(kaio.health(case.transport).probes for case in idle_ones)
                    and all(kaio.health(case.transport).retransmits for case in others)
                )
            )
        return cases

    async def another_choice(delay: float, after: Any, option: int, value: int) -> Case:
        """The peer is dead, and the application has said how long that may last."""
        case: Case = await connections.connected()
        await asyncio.sleep(delay)
        case.transport.get_extra_info("socket").setsockopt(TCP, option, value)
        connections.darken(case)
        await after(case)
        return case

    async def without(delay: float) -> Case:
        case: Case = await connections.connected()
        await asyncio.sleep(delay)
        case.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
        connections.darken(case)
        return case

    async def closed_by_both(count: int) -> Case:
        """And the application keeps it for a while, to work on what it was sent."""
        case: Case = await connections.accepted()
        case.transport.get_extra_info("socket").setsockopt(TCP, socket.TCP_KEEPCNT, count)
        await peer_half_closes(case)
        await half_close(case)
        return case

    async def was_reset(after: Any, count: int) -> Case:
        case: Case = await connections.accepted()
        case.transport.get_extra_info("socket").setsockopt(TCP, socket.TCP_KEEPCNT, count)
        await after(case)
        await asyncio.sleep(0.9)
        reset(case.peer)
        case.peer.close()
        await case.protocol.lost
        return case

    async with Connections(server_tls, client_tls) as connections:
        absent = asyncio.create_task(away())
        living = await asyncio.gather(
            *(stalled(how, tls) for how in ("accepted", "connected") for tls in (False, True)),
            *(another_choice(delay, after, socket.TCP_KEEPIDLE, 30) for delay in (0, 1) for after in (idle, in_flight)),
            another_choice(0, idle, socket.TCP_KEEPCNT, 30),
            *(without(delay) for delay in (0, 1)),
            *(closed_by_both(count) for count in (2, 1)),
            *(connections.accepted(tls) for tls in (False, True)),
        )
        living += await absent
        began = loop.time()
        ended = await asyncio.gather(*(was_reset(after, count) for after in (idle, paused) for count in (2, 1)))
        for case in ended:
            assert isinstance(case.protocol.lost.result(), ConnectionResetError)
            assert case.protocol.events.count("lost") == 1
        await asyncio.sleep(6 - (loop.time() - began))
        for case in living:
            assert "lost" not in case.protocol.events, living.index(case)
        for case in living[:4]:
            assert kaio.health(case.transport).state is kaio.State.STALLED
            assert kaio.inspect(case.transport).user_timeout is None
            case.peer.settimeout(5)
            await asyncio.to_thread(case.peer.recv, 1 << 16)
        assert [record.getMessage() for record in caplog.records if record.name == "kaio"] == []
        assert sum(kaio.get_monitor().counters.deaths.values()) == 0


@pytest.mark.slow
@on_kaio(DROP)
async def test_times_set_later_by_the_application_remove_the_policys_user_timeout() -> None:
    """Or a policy's user timeout would end, after one lost probe, a connection whose application is more patient."""
    loop = asyncio.get_running_loop()
    with listening() as listener:
        for delay in (0.0, 1.2):  # before and after the monitor knows of it
            transport, protocol = await loop.create_connection(Plain, *listener.getsockname())
            assert protocol.state == has(1, 1, 2, 3)
            await asyncio.sleep(delay)
            choose(transport.get_extra_info("socket"), idle=30, interval=5, count=3)
            await until(lambda: kaio.inspect(transport) == has(30, 5, 3), within=3)  # noqa: B023
            transport.abort()
        # Of its own it may have what it wants.
        transport, protocol = await loop.create_connection(Plain, *listener.getsockname())
        await asyncio.sleep(1)
        choose(transport.get_extra_info("socket"), idle=30, interval=5, count=3)
        transport.get_extra_info("socket").setsockopt(TCP, socket.TCP_USER_TIMEOUT, 40_000)
        await asyncio.sleep(2)
        assert kaio.inspect(transport) == has(30, 5, 3, 40)
        transport.abort()


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_a_loop_that_was_blocked_for_longer_than_the_policy_judges_correctly(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """Who is dead is told soon after, once, and is counted; who lives is not."""
    loop = asyncio.get_running_loop()
    async with Connections(server_tls, client_tls) as connections:
        deaths = [
            (how, False, Plain, before, after, ())
            for how in ("accepted", "connected")
            for before in (idle, paused, shut_window)
            for after in (idle, in_flight)
        ]
        living = [await connections.accepted() for _ in range(3)]
        await shut_window(living[0])
        # They are known to the monitor when they die.
        dying = [asyncio.create_task(die(connections, death, rest=1.0, patience=12)) for death in deaths]
        await until(lambda: all(case.began for case in connections.cases if case not in living))
        await until(lambda: len(connections.cases) == len(living) + len(deaths))
        await asyncio.sleep(0.2)
        living[1].transport.write(b"to a living peer")
        time.sleep(BOUND + 1.5)  # noqa: ASYNC251 - that is the point
        free = loop.time()
        for case in await asyncio.gather(*dying):
            assert case.protocol.lost.done(), case.name
            error = case.protocol.lost.result()
            assert isinstance(error, TimeoutError), (case.name, error)
            # Data in flight has to be seen for two intervals first: who was busy cannot tell how long it waited.
            assert case.protocol.lost_at - free < 2 + 1 + 1.5, case.name
        for case in living:
            assert "lost" not in case.protocol.events
        assert sum(kaio.get_monitor().counters.deaths.values()) == len(deaths)


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_a_death_on_a_descriptor_wakes_the_library_that_waits_for_it() -> None:
    """Sockets that only add_reader has seen: idle, data in flight, window shut; spared where the peer answers."""
    loop = asyncio.get_running_loop()
    monitor = kaio.get_monitor()
    with listening() as listener, contextlib.ExitStack() as stack:

        def connect() -> tuple[socket.socket, socket.socket]:
            ours = stack.enter_context(socket.create_connection(listener.getsockname()))
            ours.setblocking(False)
            theirs = stack.enter_context(listener.accept()[0])
            return ours, theirs

        def wait_for_end(sock: socket.socket) -> asyncio.Future[tuple[BaseException | None, float]]:
            ended: asyncio.Future[tuple[BaseException | None, float]] = loop.create_future()

            def readable() -> None:
                try:
                    if sock.recv(1000):
                        return
                    error = None
                except BlockingIOError:
                    return
                except OSError as exc:
                    error = exc
                loop.remove_reader(sock)
                ended.set_result((error, loop.time()))

            loop.add_reader(sock, readable)
            return ended

        def fill(sock: socket.socket) -> None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(1 << 20))

        pairs = [connect() for _ in range(7)]
        ends = [wait_for_end(ours) for ours, _ in pairs]
        silent, flying, shut, stalled, lively, choosy, patient = pairs
        for ours, _ in (shut, stalled):
            fill(ours)
            await until(lambda: kaio.health(ours).state is kaio.State.STALLED)  # noqa: B023
        await asyncio.sleep(1.2)
        lively[0].send(b"x")
        choosy[0].setsockopt(TCP, socket.TCP_USER_TIMEOUT, 60_000)
        patient[0].setsockopt(TCP, socket.TCP_KEEPIDLE, 30)
        began = loop.time()
        stack.enter_context(blackhole(silent[1], flying[1], shut[1], patient[1]))
        for ours, _ in (flying, patient):
            ours.send(b"into the dark")
        for number, ended in enumerate(ends[:3]):
            await asyncio.wait([ended], timeout=LATEST + 2)
            assert ended.done(), number
            error, at = ended.result()
            assert isinstance(error, TimeoutError), number
            assert at - began < LATEST + 1, (number, at - began)  # the kernel delivers it at its next timer
        await asyncio.sleep(max(0, began + 6 - loop.time()))
        assert not any(ended.done() for ended in ends[3:])
        assert kaio.inspect(choosy[0]).user_timeout == 60  # what the application set later stands
        assert {cause: number for cause, number in monitor.counters.deaths.items() if number} == {
            kaio.Cause.KEEPALIVE: 1,
            kaio.Cause.UNACKNOWLEDGED: 1,
            kaio.Cause.ZERO_WINDOW: 1,
        }
        for ours, _ in pairs:
            loop.remove_reader(ours)


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_a_death_is_reported_although_the_library_closes_the_descriptor_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel ends an idle one, the library takes the error and closes: one record, one count, one call of the hook.

    One that the library closes while it is suspect has not died.
    """
    loop = asyncio.get_running_loop()
    monitor = kaio.get_monitor()
    events: list[kaio.Event] = []
    monitor.hook = events.append
    with listening() as listener, contextlib.ExitStack() as stack:
        ended: dict[int, OSError | None] = {}
        ours = [socket.create_connection(listener.getsockname()) for _ in range(12)]
        theirs = [stack.enter_context(listener.accept()[0]) for _ in ours]

        def close(sock: socket.socket, error: OSError | None) -> None:
            ended[sock.fileno()] = error
            loop.remove_reader(sock)
            sock.close()

        def readable(sock: socket.socket) -> None:
            try:
                sock.recv(1000)
            except OSError as exc:
                close(sock, exc)

        for sock in ours:
            sock.setblocking(False)
            loop.add_reader(sock, readable, sock)
        stack.enter_context(blackhole(*theirs))
        await until(lambda: len(events) == 12, within=5)
        assert {event.kind for event in events} == {"suspect"}
        for sock in ours[10:]:
            close(sock, None)
        await until(lambda: len(ended) == 12, within=5)
        await asyncio.sleep(1.5)  # for a look at those that the library closed
        assert sum(isinstance(error, TimeoutError) for error in ended.values()) == 10
        dead = [event.error for event in events if event.kind == "dead"]
        assert [error.cause for error in dead if error is not None] == [kaio.Cause.KEEPALIVE] * 10
        assert all(2.5 < error.silence < 4.5 for error in dead if error is not None)
        assert monitor.counters.deaths[kaio.Cause.KEEPALIVE] == 10
        assert monitor.counters.watched == 0
        assert sum(getattr(record, "event", "") == "peer_dead" for record in caplog.records) == 10


# -- kaio's own


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(POLICY)
async def test_kaios_own_connections_keep_their_policy_and_are_counted_once(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """serve, connect and KeepaliveProtocol work on this loop as on any other, each under its own policy, also off."""
    monitor = kaio.get_monitor()
    dead: list[kaio.Event] = []
    monitor.hook = dead.append
    for tls in (False, True):
        listener = kaio.Listener("127.0.0.1:0", keepalive="9s:2s:4", ssl=server_tls if tls else None)
        async with kaio.serve(echo, listeners=[listener]) as server:
            address = server.listeners[0].address
            for keepalive, expected in (("8s:2s:4", has(8, 2, 4)), (None, has(20, 10, 4)), ("off", None)):
                options: Any = {"ssl": client_tls, "server_hostname": "localhost"} if tls else {}
                async with kaio.connect(str(address), keepalive=keepalive, **options) as connection:
                    await connection.send(b"x")
                    assert await connection.receive() == b"x"
                    state = kaio.inspect(connection)
                    assert state == expected if expected else not state.enabled
                    (accepted,) = server.connections
                    assert kaio.inspect(accepted) == has(9, 2, 4)
                    assert monitor.counters.watched == 2
                await until(lambda: monitor.counters.watched == 0)

    class Own(kaio.KeepaliveProtocol):
        keepalive = QUICK
        errors: list[BaseException | None] = []  # noqa: RUF012

        def peer_dead(self, error: kaio.DeadPeerError) -> None:
            self.errors.append(error)

        def connection_lost(self, exc: Exception | None) -> None:
            self.errors.append(exc)

    loop = asyncio.get_running_loop()
    with listening() as raw:
        transport, _ = await kaio.create_connection(Own, *raw.getsockname())
        stray, _ = await loop.create_connection(Plain, *raw.getsockname())  # somebody else's, at its side
        with raw.accept()[0] as peer, raw.accept()[0], blackhole(peer):
            assert kaio.inspect(transport) == has(1, 1, 2)
            assert kaio.inspect(stray) == HAS_POLICY
            await until(lambda: len(Own.errors) == 2, within=LATEST)
        assert isinstance(Own.errors[0], kaio.DeadPeerError)
        assert Own.errors[0] is Own.errors[1]
        stray.abort()
    assert sum(monitor.counters.deaths.values()) == 1
    assert [event.kind for event in dead].count("dead") == 1
    async with await kaio.start_server(lambda reader, writer: None, "127.0.0.1", 0, keepalive="off") as quiet:
        assert not kaio.inspect(quiet.sockets[0]).enabled


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(QUICK)
async def test_kaios_protocols_by_the_loops_own_functions_are_watched_once(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """loop.create_server and loop.create_connection: the class's policy, one watcher, one report of a death."""

    class Own(kaio.KeepaliveProtocol):
        keepalive = kaio.Keepalive(2, 1, 1)

        def __init__(self) -> None:
            self.made: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.events: list[str] = []
            self.received = b""

        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.made.set_result(transport)

        def peer_dead(self, error: kaio.DeadPeerError) -> None:
            self.events.append("dead")

        def connection_lost(self, exc: Exception | None) -> None:
            self.events.append("lost")
            self.lost.set_result(exc)

    monitor = kaio.get_monitor()
    events: list[kaio.Event] = []
    monitor.hook = events.append
    async with Connections(server_tls, client_tls) as connections:
        protocol: Any = Own
        cases = [
            await getattr(connections, how)(tls, protocol)
            for how in ("accepted", "connected", "by_hand")
            for tls in (False, True)
        ]
        for case in cases:
            assert kaio.inspect(case.transport) == has(2, 1, 1)
        await asyncio.sleep(1.5)
        assert monitor.counters.watched == len(cases)
        for case in cases:
            connections.darken(case)
        for case in cases[::2]:
            case.transport.write(b"into the dark")
        await asyncio.wait([case.protocol.lost for case in cases], timeout=LATEST + 1)
        assert [case.protocol.events for case in cases] == [["dead", "lost"]] * len(cases)
        assert sum(monitor.counters.deaths.values()) == len(cases)
        assert [event.kind for event in events].count("dead") == len(cases)
        await until(lambda: monitor.counters.watched == 0)


# -- what it leaves


@pytest.mark.slow
@on_kaio(QUICK)
async def test_thousands_of_short_connections_leave_nothing_behind(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """No protocols, transports, watchers or descriptors; some live long enough to be known to the monitor."""
    loop = asyncio.get_running_loop()
    made: weakref.WeakSet[asyncio.Protocol] = weakref.WeakSet()

    class Brief(asyncio.Protocol):
        def __init__(self) -> None:
            made.add(self)

        def connection_made(self, transport: Any) -> None:
            self.transport = transport

    (await loop.create_server(Brief, "127.0.0.1", 0)).close()  # libuv keeps a descriptor in reserve for accept()
    await asyncio.sleep(0.01)
    before, known = open_descriptors(), set(_links())
    for tls, count in ((False, 1_000), (True, 50)):
        server = await loop.create_server(Brief, "127.0.0.1", 0, ssl=server_tls if tls else None)
        address = server.sockets[0].getsockname()
        for number in range(count):
            transport = (await loop.create_connection(Brief, *address, ssl=client_tls if tls else None))[0]
            if number % (count // 10) == 5:
                await asyncio.sleep(0.1)
            transport.close()
        server.close()
    with listening() as listener:
        for number in range(100):
            with socket.create_connection(listener.getsockname()) as sock, listener.accept()[0]:
                sock.setblocking(False)
                loop.add_reader(sock, lambda: None)
                if number % 10 == 5:
                    await asyncio.sleep(0.1)
                loop.remove_reader(sock)
    del transport, server
    monitor = kaio.get_monitor()

    def nothing_left() -> bool:
        gc.collect()
        left = set(_links()) - known
        return not made and not left and not monitor.counters.watched and open_descriptors() <= before

    with contextlib.suppress(TimeoutError):
        await until(nothing_left, within=6)
    assert (len(made), monitor.counters.watched, open_descriptors() - before) == (0, 0, 0)
    assert set(_links()) - known == set()


def _links() -> list[object]:
    return [each for each in gc.get_objects() if isinstance(each, (ForeignTransport, ForeignDescriptor))]


@pytest.mark.slow
@on_kaio(QUICK)
async def test_ended_connections_are_not_counted_as_watched(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """Keepalive never on, switched off before or after the monitor knew, closed by both sides, reset while paused."""
    loop: Any = asyncio.get_running_loop()
    monitor = kaio.get_monitor()
    accepted = Accepted()
    server = await loop.create_server(accepted, "127.0.0.1", 0, keep_alive=False)
    async with Connections(server_tls, client_tls) as connections:
        with connected_to(server.sockets[0].getsockname(), 2):
            await accepted.states(2)
            cases = [await connections.accepted() for _ in range(4)]
            options = [case.transport.get_extra_info("socket") for case in cases]
            options[0].setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
            await asyncio.sleep(1.2)
            options[1].setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
            await peer_half_closes(cases[2])
            await half_close(cases[2])
            await paused(cases[3])
            reset(cases[3].peer)
            cases[3].peer.close()
            await asyncio.sleep(2.5)
            accepted.close()
    server.close()
    await until(lambda: monitor.counters.watched == 0, within=3)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("left_open", [False, True], ids=["all closed", "connections open"])
@pytest.mark.usefixtures("dead_peers")
def test_a_closed_loop_is_collected_and_its_descriptors_are_back(base: str, left_open: bool) -> None:
    """With connections that nobody closed too: watched ones, and one whose peer is suspect."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        transports = [(await loop.create_connection(asyncio.Protocol, *address))[0] for _ in range(3)]
        with socket.create_connection(address) as sock:
            sock.setblocking(False)
            loop.add_reader(sock, lambda: None)
            with blackhole(transports[0]):
                await until(lambda: kaio.get_monitor().counters.suspects, within=5)
            loop.remove_reader(sock)
        if not left_open:
            for transport in transports:
                transport.close()
            server.close()
            await asyncio.sleep(0.1)

    BASES[base]().close()  # libuv keeps the pipe for signals that the first of its loops opens
    gc.collect()
    before = open_descriptors()
    loop = kaio.loop_factory(QUICK, base=BASES[base])()
    gone = weakref.ref(loop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if left_open else "error", ResourceWarning)
        loop.run_until_complete(main())
        loop.close()
        del loop
        gc.collect()
        gc.collect()
    assert (open_descriptors() - before, gone()) == (0, None)


# -- the ways to such a loop


@pytest.mark.parametrize("keepalive", ["1s:1s", "0s:1s:1", "20s:10s:4,user_timeout=1s", 7])
def test_a_bad_policy_is_refused_at_once(keepalive: Any) -> None:
    """Before there is a loop, by every function that takes one."""
    before = asyncio.new_event_loop, asyncio.SelectorEventLoop.__init__
    functions: list[Callable[[Any], object]] = [kaio.loop_factory, kaio.install, kaio.sweep]
    if POLICIES:
        functions.append(kaio.EventLoopPolicy)
    for refuse in functions:
        with pytest.raises(kaio.PolicyError):
            refuse(keepalive)
    main = asyncio.sleep(0)
    with pytest.raises(kaio.PolicyError):
        kaio.run(main, keepalive=keepalive)
    main.close()
    assert (asyncio.new_event_loop, asyncio.SelectorEventLoop.__init__) == before
    if POLICIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert type(asyncio.get_event_loop_policy()).__module__.startswith("asyncio")


def test_a_base_whose_loops_cannot_be_covered_is_refused() -> None:
    """TypeError that says so, and what had been made is closed; a base that fails by itself fails by itself."""

    class Closed(asyncio.SelectorEventLoop):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise TypeError("no")
            super().__setattr__(name, value)

    made: list[Closed] = []

    def make() -> Closed:
        made.append(Closed())
        return made[-1]

    for base in (make, lambda: None, object):
        with pytest.raises(TypeError, match="kaio cannot cover"):
            kaio.loop_factory(base=base)()  # type: ignore[arg-type]
    assert made[0].is_closed()
    with pytest.raises(ZeroDivisionError):
        kaio.loop_factory(base=lambda: 1 / 0)()  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("base", ALL_BASES)
def test_the_loop_has_the_name_and_type_of_its_base(base: str) -> None:
    """isinstance holds, attributes of its own are there, the class is made once, and factories nest: the last wins."""
    factory = kaio.loop_factory(POLICY, base=ALL_BASES[base])
    again = kaio.loop_factory(QUICK, base=factory)
    with contextlib.closing(ALL_BASES[base]()) as bare, contextlib.closing(factory()) as loop:
        assert isinstance(loop, type(bare))
        assert type(bare).__module__ != "kaio.loop.covering"
        if base in OWN_BASES:
            assert loop.name == "own"  # type: ignore[attr-defined]
        assert loop.keepalive == POLICY  # type: ignore[attr-defined]
        with contextlib.closing(factory()) as another, contextlib.closing(again()) as nested:
            assert type(another) is type(loop) is type(nested)
            assert nested.keepalive == QUICK  # type: ignore[attr-defined]


@on_kaio("off", ALL_BASES)
async def test_with_the_policy_off_the_loop_does_nothing() -> None:
    """Whatever is opened or accepted has what the system gives, also what the application itself set."""
    loop = asyncio.get_running_loop()
    accepted = Accepted()
    server = await loop.create_server(accepted, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    transport, protocol = await loop.create_connection(Plain, *address)
    (theirs,) = await accepted.states(1)
    assert not protocol.state.enabled
    assert not theirs.enabled
    with socket.create_connection(address) as sock, socket.socket() as other:
        choose(sock, idle=40)
        for each in (sock, other):
            each.setblocking(False)
        loop.add_reader(sock, lambda: None)
        loop.remove_reader(sock)
        assert kaio.inspect(sock) == has(40, 75, 9)
        await loop.sock_connect(other, address)
        assert not kaio.inspect(other).enabled
    assert kaio.get_monitor().counters.watched == 0
    transport.abort()
    accepted.close()
    server.close()


PROGRAMS = {
    "run": """
kaio.run(main(), keepalive="7s:3s:5")
kaio.run(main(), keepalive="7s:3s:5", base=asyncio.SelectorEventLoop)
assert kaio.run(asyncio.sleep(0, 42)) == 42
""",
    "debug": """
debug = True
kaio.run(main(), keepalive="7s:3s:5", debug=True)
""",
    "environment": """
os.environ["KAIO_KEEPALIVE"] = "7s:3s:5"
kaio.run(main())
with asyncio.Runner(loop_factory=kaio.new_event_loop) as runner:
    runner.run(main())
""",
    "install": """
kaio.install("7s:3s:5")
asyncio.run(main())
assert kinds == [uvloop.Loop]
kaio.install("7s:3s:5", base=asyncio.SelectorEventLoop)
asyncio.run(main())
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
assert kinds[1:] == [asyncio.SelectorEventLoop] * 2
""",
    "install over whatever asyncio makes": """
kaio.install("7s:3s:5", base=asyncio.new_event_loop)  # the default where there is no uvloop
asyncio.run(main())
kaio.install("7s:3s:5", base=asyncio.new_event_loop)  # over itself
asyncio.run(main())
assert kinds == [asyncio.SelectorEventLoop] * 2
""",
    "install, and whoever makes the loop": """
kaio.install("7s:3s:5")
asyncio.run(main())
uvloop.run(main())
anyio.run(main)
anyio.run(main, backend_options={"use_uvloop": True})
for factory in (None, asyncio.SelectorEventLoop, uvloop.new_event_loop, uvloop.Loop, OwnLoop):
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
for make in (asyncio.SelectorEventLoop, uvloop.new_event_loop, uvloop.Loop, OwnLoop):
    loop = make()
    loop.run_until_complete(main())
    loop.close()
assert kinds.count(asyncio.SelectorEventLoop) == 4, kinds
kaio.run(main(), keepalive="7s:3s:5")
""",
    "install twice: the last one counts for the loops that come": """
kaio.install("9s:3s:5")
before = [asyncio.new_event_loop(), uvloop.new_event_loop(), asyncio.SelectorEventLoop()]
kaio.install("7s:3s:5")
after = [asyncio.new_event_loop(), uvloop.new_event_loop(), asyncio.SelectorEventLoop()]
for loop in after:
    loop.run_until_complete(main())
wanted = "9s:3s:5"
for loop in before:
    loop.run_until_complete(main())
for loop in before + after:
    loop.close()
kaio.install("off")
wanted = "off"
asyncio.run(main())
uvloop.run(main())
asyncio.SelectorEventLoop().close()
kaio.install("7s:3s:5")
wanted = "7s:3s:5"
uvloop.run(main())
""",
    "install where there are no policies": """
take_policies_away()
assert not hasattr(kaio, "EventLoopPolicy")
kaio.install("7s:3s:5", base=asyncio.SelectorEventLoop)
asyncio.run(main())
asyncio.new_event_loop().close()
assert kinds == [asyncio.SelectorEventLoop]
kaio.install("7s:3s:5")
asyncio.run(main())
uvloop.run(main())
with asyncio.Runner() as runner:
    runner.run(main())
assert kinds[1:] == [uvloop.Loop] * 3
kaio.install("7s:3s:5", base=asyncio.new_event_loop)
asyncio.run(main())
kaio.run(main(), keepalive="7s:3s:5", base=asyncio.SelectorEventLoop)
""",
    "kaio run where there are no policies": """
from kaio.tools.bootstrap import Settings, begin

take_policies_away()
begin(str(Settings("7s:3s:5", sweep=None)))
asyncio.run(main())
begin(str(Settings("7s:3s:5", sweep=None, loop="uvloop")))
asyncio.run(main())
begin(str(Settings("7s:3s:5", sweep=None, loop="asyncio")))
asyncio.run(main())
assert kinds == [asyncio.SelectorEventLoop, uvloop.Loop, asyncio.SelectorEventLoop]
""",
}
if POLICIES:
    PROGRAMS |= {
        "install, and a loop by a policy": """
kaio.install("7s:3s:5")
with deprecated():
    loop = asyncio.get_event_loop_policy().new_event_loop()
loop.run_until_complete(main())
loop.close()
with deprecated():
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
asyncio.run(main())
assert kinds == [uvloop.Loop, asyncio.SelectorEventLoop]
""",
        "EventLoopPolicy": """
with deprecated():
    asyncio.set_event_loop_policy(kaio.EventLoopPolicy("7s:3s:5"))
asyncio.run(main())
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
loop.run_until_complete(main())
loop.close()
wanted = "off"
uvloop.run(main())  # no policy's business
""",
    }
PROLOGUE = """
import anyio, asyncio, contextlib, os, uvloop, warnings, kaio

made, debug, wanted = 0, False, "7s:3s:5"
kinds = []  # of loops

class OwnLoop(asyncio.SelectorEventLoop):
    pass

@contextlib.contextmanager
def deprecated():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield

def take_policies_away():  # as Python 3.16 does
    for module in (asyncio, asyncio.events, asyncio.unix_events):
        vars(module).pop("__getattr__", None)  # warns of policies
        for name in [name for name in vars(module) if "polic" in name.lower()]:
            delattr(module, name)
    asyncio.events.set_event_loop = asyncio.set_event_loop = lambda loop: None
    asyncio.events.new_event_loop = asyncio.new_event_loop = asyncio.SelectorEventLoop

if hasattr(asyncio, "get_event_loop_policy"):
    with deprecated():
        assert type(asyncio.get_event_loop_policy()).__module__.startswith("asyncio")

async def main():
    global made
    made += 1
    loop = asyncio.get_running_loop()
    kinds.append(next(kind for kind in (uvloop.Loop, asyncio.SelectorEventLoop) if isinstance(loop, kind)))
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    assert str(kaio.inspect(writer)) == wanted, kaio.inspect(writer)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
    assert asyncio.get_running_loop().get_debug() == debug
"""


@pytest.mark.parametrize("way", PROGRAMS)
def test_programs_get_kaios_loop_without_a_warning(way: str) -> None:
    """In a process of their own, with every warning an error; importing kaio alone sets no event loop policy."""
    program = f"{PROLOGUE}\n{PROGRAMS[way]}\nassert made"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=40)
    # In debug mode asyncio says, too, which callback took long on a busy machine.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.returncode, said) == (0, [])


@pytest.mark.parametrize("loop", ["auto", "asyncio", "uvloop"])
def test_what_uvicorn_accepts_has_the_policy_after_install(loop: str) -> None:
    """uvicorn.run names uvloop's loops or asyncio's, and asks neither a policy nor asyncio.new_event_loop for one."""
    program = str(Path(__file__).parent / "programs" / "loops_uvicorn.py")
    with subprocess.Popen([sys.executable, program, loop, "7s:3s:5"], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said = next(line for line in server.stderr if "running on http" in line)
            port = int(said.partition("127.0.0.1:")[2].split()[0])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/")
            answer = json.loads(connection.getresponse().read())
            connection.close()
        finally:
            server.terminate()
    assert answer == {"uvloop": loop != "asyncio", "options": [1, 7, 3, 5]}
