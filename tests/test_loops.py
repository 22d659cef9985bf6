"""The drop-in loop: what it gives to the sockets of libraries that never heard of kaio, and what it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import warnings
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio.abc
import pytest

import kaio
from kaio.loop.foreign import ForeignDescriptor, ForeignTransport
from kaio.testing import blackhole

from .conftest import reset, until
from .on_loops import (
    ALL_BASES,
    BASES,
    BOUND,
    DROP,
    HAS_POLICY,
    LATEST,
    OWN_BASES,
    POLICIES,
    POLICY,
    QUICK,
    TCP,
    Accepted,
    Plain,
    choose,
    connected_to,
    has,
    listening,
    on_kaio,
    open_descriptors,
)

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
