"""Serving: listeners with their own policies, handlers that fail, descriptors that run out, closing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kaio

from .conftest import LOOPS, Recorder, echo, reset, until

SHORT = kaio.Keepalive(5, 2, 3)
LONG = kaio.Keepalive(300, 60, 9, user_timeout=None)


def options(sock: Any) -> tuple[int, int, int, int]:
    """Read SO_KEEPALIVE and the three times from the kernel."""
    return (
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    )


async def turns(number: int) -> None:
    """Wait for a number of the loop's iterations."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_each_listener_has_its_own_policy_before_and_after_a_live_change() -> None:
    """200 connections each have the options of their listener; a change affects new connections only."""
    async with kaio.serve(
        echo,
        listeners=[kaio.Listener("127.0.0.1:0", keepalive=SHORT), kaio.Listener("[::1]:0", keepalive=LONG)],
        close_timeout=1,
    ) as server:
        first, second = server.listeners

        def of(listener: kaio.Listener) -> list[kaio.Connection]:
            port = listener.address[1]  # type: ignore[misc]
            return [each for each in server.connections if each.transport.get_extra_info("sockname")[1] == port]

        async def fill(expected: dict[kaio.Listener, tuple[int, int, int, int]]) -> None:
            with contextlib.ExitStack() as clients:
                for listener in server.listeners:
                    for _ in range(200):
                        clients.enter_context(socket.create_connection(tuple(listener.address)))  # type: ignore[arg-type]
                await until(lambda: len(server.connections) == 400)
                for listener in server.listeners:
                    assert len(of(listener)) == 200
                    for connection in of(listener):
                        assert options(connection.transport.get_extra_info("socket")) == expected[listener]
                        assert connection.keepalive == listener.keepalive
                before = server.connections
                # A live change leaves the present ones alone.
                first.keepalive = "7s:3s:2"
                second.keepalive = "off"
                assert {options(c.transport.get_extra_info("socket")) for c in before} == set(expected.values())
            await until(lambda: not server.connections)

        await fill({first: (1, 5, 2, 3), second: (1, 300, 60, 9)})
        assert first.keepalive == kaio.Keepalive(7, 3, 2)
        assert second.keepalive == kaio.Keepalive.OFF
        await fill({first: (1, 7, 3, 2), second: (0, 300, 60, 9)})


async def test_accepted_and_connected_sockets_have_tcp_nodelay() -> None:
    """As on a bare loop."""
    async with kaio.serve(echo, "127.0.0.1", 0) as server, kaio.connect(str(server.listeners[0].address)) as client:
        await until(lambda: server.connections)
        for connection in (client, *server.connections):
            sock = connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_change_affects_connections_in_the_queue() -> None:
    """Connections that wait to be accepted when the policy changes get the new one."""
    async with kaio.serve(echo, "127.0.0.1", 0, keepalive=SHORT) as server:
        listener = server.listeners[0]
        with contextlib.ExitStack() as clients:
            # The loop does not turn in this block: all of them are in the queue with the old policy.
            for _ in range(50):
                clients.enter_context(socket.create_connection(tuple(listener.address)))  # type: ignore[arg-type]
            listener.keepalive = "7s:3s:2"
            await until(lambda: len(server.connections) == 50)
            assert {options(c.transport.get_extra_info("socket")) for c in server.connections} == {(1, 7, 3, 2)}
        await until(lambda: not server.connections)


async def test_a_refused_change_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the second of two sockets refuses the policy, the first one gets its old policy back."""
    async with await kaio.create_server(asyncio.Protocol, None, 0, keepalive=SHORT) as server:
        listener = server.listeners[0]
        assert len(server.sockets) == 2
        assert len({sock.getsockname()[1] for sock in server.sockets}) == 1
        real = kaio.apply
        calls = []

        def apply(sock: Any, policy: Any) -> Any:
            calls.append(sock)
            if len(calls) == 2:
                raise kaio.KeepaliveError(22, "refused")
            return real(sock, policy)

        monkeypatch.setattr(kaio.net.listeners, "apply", apply)
        with pytest.raises(kaio.KeepaliveError):
            listener.keepalive = "9s:9s:9"
        with pytest.raises(kaio.PolicyError):
            listener.keepalive = "rubbish"
        assert listener.keepalive == SHORT
        assert [options(sock) for sock in server.sockets] == [(1, 5, 2, 3)] * 2


async def test_the_queue_of_a_socket_that_is_handed_over_gets_the_policy() -> None:
    """Clients that connected before kaio had the socket have the policy, too."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=100)
    with contextlib.ExitStack() as clients:
        for _ in range(50):
            clients.enter_context(socket.create_connection(listening.getsockname()))
        async with kaio.serve(echo, listeners=[kaio.Listener(listening, keepalive=SHORT)], close_timeout=1) as server:
            for _ in range(50):
                clients.enter_context(socket.create_connection(listening.getsockname()))
            await until(lambda: len(server.connections) == 100)
            assert {options(c.transport.get_extra_info("socket")) for c in server.connections} == {(1, 5, 2, 3)}
            clients.close()
            await until(lambda: not server.connections)


async def test_a_handler_that_raises_ends_only_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    """The exception is logged with its connection; other connections are served."""

    async def handler(connection: kaio.Connection) -> None:
        async for data in connection:
            if data == b"boom":
                raise RuntimeError("handler's fault")
            await connection.send(data)

    async with kaio.serve(handler, "127.0.0.1", 0) as server:
        address = str(server.listeners[0].address)
        async with kaio.connect(address) as good, kaio.connect(address) as bad:
            await bad.send(b"boom")
            assert [data async for data in bad] == []
            await good.send(b"still served")
            assert await good.receive() == b"still served"
    (record,) = [record for record in caplog.records if record.name == "kaio"]
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert "Connection to 127.0.0.1" in record.getMessage()


async def test_a_handler_that_ends_with_its_connection_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that raises EndOfStream, alone or in a group, is logged at DEBUG only."""

    async def handler(connection: kaio.Connection) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(connection.receive_exactly(0))
            group.create_task(connection.receive())

    with caplog.at_level(logging.DEBUG, "kaio"):
        async with kaio.serve(handler, "127.0.0.1", 0) as server:
            async with kaio.connect(str(server.listeners[0].address)):
                await until(lambda: server.connections)
            await until(lambda: not server.connections)
    (record,) = [record for record in caplog.records if record.name == "kaio"]
    assert record.levelno == logging.DEBUG
    assert record.exc_info is None


async def test_leaving_the_block_closes_listeners_and_connections() -> None:
    """Handlers are cancelled, what they wrote is sent, connections are closed, new ones are refused."""
    ended: list[str] = []

    async def handler(connection: kaio.Connection) -> None:
        try:
            await connection.receive()
        except asyncio.CancelledError:
            ended.append("cancelled")
            await connection.send(b"good-bye")
            raise

    server = await kaio.serve(handler, "127.0.0.1", 0)
    address = server.listeners[0].address
    clients = [await kaio.connect(str(address)) for _ in range(3)]
    await until(lambda: len(server.connections) == 3)
    async with server:
        pass
    assert ended == ["cancelled"] * 3
    assert not server.connections
    assert not server.sockets
    assert not server.is_serving()
    for client in clients:
        assert await client.receive() == b"good-bye"
        await client.aclose()
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await kaio.connect(str(address))
    with pytest.raises(RuntimeError):
        await server.start_serving()
    assert "closed" in repr(server)


async def test_a_connection_whose_handler_does_not_end_is_aborted_after_the_close_timeout() -> None:
    """The handler sends more than its peer reads; leaving the block takes no longer than close_timeout."""
    loop = asyncio.get_running_loop()

    async def handler(connection: kaio.Connection) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await connection.send(bytes(50_000_000))

    async with kaio.serve(handler, "127.0.0.1", 0, close_timeout=0.3) as server:
        client = socket.create_connection(tuple(server.listeners[0].address))  # type: ignore[arg-type]
        await until(lambda: server.connections)
        began = loop.time()
    assert loop.time() - began < 2
    client.close()


async def test_serve_forever_ends_by_cancel_and_by_close() -> None:
    """Both leave the server closed; a second serve_forever is a RuntimeError."""
    server = await kaio.create_server(Recorder, "127.0.0.1", 0, start_serving=False)
    assert not server.is_serving()
    assert len(server.sockets) == 1
    forever = asyncio.create_task(server.serve_forever())
    await until(server.is_serving)
    with pytest.raises(RuntimeError):
        await server.serve_forever()
    forever.cancel()
    with pytest.raises(asyncio.CancelledError):
        await forever
    await server.wait_closed()

    async with kaio.serve(echo, "127.0.0.1", 0) as closed:
        forever = asyncio.create_task(closed.serve_forever())
        await asyncio.sleep(0)
        closed.close()
        await forever


async def test_close_clients_and_abort_clients_of_a_protocol_server() -> None:
    """Either way no connection is left, and what was written before is received."""
    for end in ("close_clients", "abort_clients"):
        server = await kaio.create_server(Recorder, "127.0.0.1", 0)
        client = await kaio.connect(*server.sockets[0].getsockname())
        await until(lambda server=server: server.connections)  # type: ignore[misc]
        (transport,) = server.connections
        transport.write(b"last")
        server.close()
        getattr(server, end)()
        await server.wait_closed()
        assert not server.connections
        assert await client.receive() == b"last"
        await client.aclose()


async def test_unix_sockets_have_no_keepalive_and_no_error(tmp_path: Path) -> None:
    """They can be served and connected to; asking for a policy is a `PolicyError`. The path is removed."""
    path = tmp_path / "app.sock"
    # The socket of a process that has ended is replaced.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with kaio.serve(echo, path) as server:
        assert server.listeners[0].keepalive is None
        async with kaio.connect(path) as client, kaio.connect(f"unix:{path}", keepalive="off") as other:
            await client.send(b"x")
            assert await client.receive() == b"x"
            assert client.keepalive is None
            assert other.keepalive is None
            with pytest.raises(kaio.KeepaliveError, match="not a TCP socket"):
                client.health()
            with pytest.raises(kaio.KeepaliveError, match="not a TCP socket"):
                client.keepalive = "5s:2s:3"
        with pytest.raises(kaio.PolicyError, match="not TCP"):
            kaio.connect(path, keepalive="5s:2s:3")
        with pytest.raises(kaio.PolicyError, match="not TCP"):
            server.listeners[0].keepalive = "5s:2s:3"
    assert not path.exists()
    with pytest.raises(kaio.PolicyError, match="not TCP"):
        kaio.Listener(path, keepalive=SHORT)
    with pytest.raises(kaio.PolicyError, match="not TCP"):
        kaio.serve(echo, path, keepalive=SHORT)
    # A server-wide policy is for the TCP listeners.
    both = [kaio.Listener(path), kaio.Listener("127.0.0.1:0")]
    async with kaio.serve(echo, listeners=both, keepalive=SHORT) as server:
        assert [listener.keepalive for listener in server.listeners] == [None, SHORT]


async def test_invalid_arguments_are_refused_before_anything_is_bound() -> None:
    """Each is an error of its own kind; nothing is left open."""
    cases: list[tuple[Any, dict[str, Any], type[BaseException]]] = [
        (echo, {}, ValueError),
        (echo, {"host": "127.0.0.1:0", "listeners": [kaio.Listener("127.0.0.1:0")]}, ValueError),
        (echo, {"listeners": []}, ValueError),
        (echo, {"host": "127.0.0.1", "port": 70000}, kaio.AddressError),
        (echo, {"host": "127.0.0.1:0", "keepalive": "5"}, kaio.PolicyError),
        (echo, {"host": "127.0.0.1:0", "ssl": True}, TypeError),
        (dict, {"host": "127.0.0.1:0"}, TypeError),
        ("echo", {"host": "127.0.0.1:0"}, TypeError),
    ]
    for handler, kwargs, error in cases:
        with pytest.raises(error):
            kaio.serve(handler, **kwargs)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host, port = taken.getsockname()
        with pytest.raises(OSError, match=f"cannot bind 127.0.0.1:{port}"):
            await kaio.serve(echo, listeners=[kaio.Listener("127.0.0.1:0"), kaio.Listener(f"{host}:{port}")])


async def test_dual_stack_and_every_interface() -> None:
    """One IPv6 socket may accept IPv4 too; no host means every interface, on one port."""
    async with kaio.serve(echo, listeners=[kaio.Listener("[::]:0", dualstack_ipv6=True, keepalive=SHORT)]) as server:
        port = server.listeners[0].address[1]  # type: ignore[misc]
        for host in ("127.0.0.1", "::1"):
            async with kaio.connect(host, port) as client:
                await client.send(b"x")
                assert await client.receive() == b"x"
        assert len(server.sockets) == 1
    async with kaio.serve(echo, ":0", keepalive=SHORT) as server:
        for host in ("127.0.0.1", "::1"):
            async with kaio.connect(host, server.listeners[0].address[1]) as client:  # type: ignore[misc]
                await until(lambda: server.connections)
                (accepted,) = server.connections
                assert options(accepted.transport.get_extra_info("socket")) == (1, 5, 2, 3)
            await until(lambda: not server.connections)


async def test_a_failed_tls_handshake_ends_only_its_connection(server_tls: Any, client_tls: Any) -> None:
    """Clients that send garbage or nothing do not stop others from being served."""
    async with kaio.serve(echo, "127.0.0.1", 0, ssl=server_tls) as server:
        host, port = server.listeners[0].address  # type: ignore[misc]
        with socket.create_connection((host, port)) as rubbish, socket.create_connection((host, port)):
            rubbish.sendall(b"this is no TLS\n" * 10)
            async with kaio.connect(host, port, ssl=client_tls) as client:
                await client.send(b"x")
                assert await client.receive() == b"x"
        assert not server.connections or await _gone(server)


async def _gone(server: kaio.Server) -> bool:
    await until(lambda: not server.connections)
    return True


OUT_OF_DESCRIPTORS = Path(__file__).with_name("out_of_descriptors.py")


@pytest.mark.slow
@pytest.mark.parametrize("descriptors", [100, 600])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_running_out_of_descriptors_is_one_log_record_and_no_flood(loop: str, descriptors: int) -> None:
    """EMFILE is logged once and takes no CPU; accepting goes on when descriptors are free."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(OUT_OF_DESCRIPTORS), loop, str(descriptors)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=OUT_OF_DESCRIPTORS.parent.parent,
        env={**os.environ, "PYTHONPATH": str(OUT_OF_DESCRIPTORS.parent.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


async def test_a_listener_has_one_server_at_a_time() -> None:
    """A second server is a RuntimeError and leaves the first as it is; afterwards the listener can be used again."""
    listener = kaio.Listener("127.0.0.1:0")
    async with kaio.serve(echo, listeners=[listener]) as server:
        with pytest.raises(RuntimeError, match="in use"):
            await kaio.serve(echo, listeners=[listener])
        pending = kaio.serve(echo, "127.0.0.1", 0)
        async with pending:
            with pytest.raises(RuntimeError):
                await pending
            with pytest.raises(RuntimeError):
                await pending.__aenter__()
        async with kaio.connect(server.listeners[0].address) as client:
            await client.send(b"x")
            assert await client.receive() == b"x"
    async with kaio.serve(echo, listeners=[listener]), kaio.connect(listener.address) as client:
        await client.send(b"x")
        assert await client.receive() == b"x"


async def test_leaving_the_block_refuses_connections_in_a_tls_handshake(server_tls: Any) -> None:
    """With half of a ClientHello received, leaving does not wait, and no handler starts when the rest comes."""
    handled: list[kaio.Connection] = []

    async def handler(connection: kaio.Connection) -> None:
        handled.append(connection)

    loop = asyncio.get_running_loop()
    server = await kaio.serve(handler, "127.0.0.1", 0, ssl=server_tls)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    hello = outgoing.read()
    with socket.create_connection(tuple(server.listeners[0].address)) as client:  # type: ignore[arg-type]
        client.sendall(hello[:50])
        await asyncio.sleep(0.05)
        began = loop.time()
        async with server:
            pass
        assert loop.time() - began < 2
        with contextlib.suppress(OSError):
            client.sendall(hello[50:])
        await asyncio.sleep(0.1)
    assert not handled


async def test_leaving_does_not_wait_for_handlers_that_have_not_started() -> None:
    """20 connections come just before the block is left."""
    loop = asyncio.get_running_loop()
    server = await kaio.serve(echo, "127.0.0.1", 0, close_timeout=10)
    with contextlib.ExitStack() as clients:
        for _ in range(20):
            clients.enter_context(socket.create_connection(tuple(server.listeners[0].address)))  # type: ignore[arg-type]
        while not server.connections:
            await asyncio.sleep(0)
        began = loop.time()
        async with server:
            pass
        assert loop.time() - began < 3


async def test_a_factory_that_raises_ends_only_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    """The exception is logged, and the next connection is served."""
    fail = True

    def factory() -> Recorder:
        if fail:
            raise ValueError("factory's fault")
        return Recorder()

    async with await kaio.create_server(factory, "127.0.0.1", 0) as server:
        for _ in range(3):
            socket.create_connection(server.sockets[0].getsockname()).close()
        await until(lambda: len([each for each in caplog.records if each.exc_info]) == 3)
        fail = False
        with socket.create_connection(server.sockets[0].getsockname()):
            await until(lambda: server.connections)


async def test_a_change_affects_accepted_connections_before_connection_made() -> None:
    """After any number of iterations, a connection reports what the kernel has, and set_all misses none."""
    for number in range(10):
        for everywhere in (False, True):
            async with kaio.serve(echo, "127.0.0.1", 0, keepalive=SHORT) as server:
                (listener,) = server.listeners
                with socket.create_connection(tuple(listener.address)):  # type: ignore[arg-type]
                    await turns(number)
                    there = bool(server.connections)
                    if everywhere:
                        listener.set_all("7s:3s:2")
                    else:
                        listener.keepalive = "7s:3s:2"
                    await until(lambda server=server: server.connections)  # type: ignore[misc]
                    (connection,) = server.connections
                    expected = SHORT if there and not everywhere else kaio.Keepalive(7, 3, 2)
                    assert connection.keepalive == expected, (number, everywhere)
                    assert kaio.inspect(connection).idle == expected.idle, (number, everywhere)


async def test_a_change_affects_connections_in_a_tls_handshake(server_tls: Any, client_tls: Any) -> None:
    """They get the new policy. A protocol class's own policy wins over a default, and set_all over both."""

    class Own(Recorder):
        keepalive = "9s:9s:2"

    for handler, before in ((echo, SHORT), (Own, kaio.Keepalive(9, 9, 2))):
        async with kaio.serve(handler, "127.0.0.1", 0, ssl=server_tls, keepalive=None) as server:
            (listener,) = server.listeners
            if handler is echo:
                listener.keepalive = SHORT
            sock = socket.create_connection(tuple(listener.address))  # type: ignore[arg-type]
            await turns(20)  # it is accepted
            assert listener.keepalive == before
            listener.set_all("7s:3s:2")
            transport, _ = await kaio.create_connection(
                Recorder, sock=sock, ssl=client_tls, server_hostname="localhost"
            )
            await until(lambda server=server: server.connections)  # type: ignore[misc]
            (connection,) = server.connections
            assert connection.keepalive == kaio.Keepalive(7, 3, 2)
            assert kaio.inspect(connection).times == (7, 3, 2)
            transport.abort()
            await until(lambda server=server: not server.connections)  # type: ignore[misc]


async def test_two_servers_that_use_a_listener_in_turn_share_no_connections() -> None:
    """The first server keeps its connections, and closing it again does not close the second."""
    listener = kaio.Listener("127.0.0.1:0")
    first = await kaio.serve(echo, listeners=[listener])
    old = await kaio.connect(listener.address)
    await until(lambda: first.connections)
    first.close()
    async with kaio.serve(echo, listeners=[listener]) as second:
        assert not second.connections
        new = await kaio.connect(listener.address)
        await until(lambda: second.connections)
        assert len(first.connections) == 1
        assert not first.connections & second.connections
        first.close()
        assert second.sockets
        with pytest.raises(RuntimeError, match="closed"):
            await first.start_serving()
        assert second.sockets
        second.close()
        second.abort_clients()
        await second.wait_closed()
        await old.send(b"x")
        assert await old.receive() == b"x"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await first.wait_closed()
    await old.aclose()
    await new.aclose()
    await first.wait_closed()
    assert not first.connections


async def test_a_server_that_fails_to_start_releases_its_listeners() -> None:
    """One is in use, was given twice, or its port is taken: none is bound, and the others can be used afterwards."""
    free, used = kaio.Listener("127.0.0.1:0"), kaio.Listener("127.0.0.1:0")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        taken = kaio.Listener("{}:{}".format(*sock.getsockname()))
        async with kaio.serve(echo, listeners=[used]):
            refused: list[tuple[list[kaio.Listener], type[Exception], str]] = [
                ([free, used], RuntimeError, f"127.0.0.1:{used.address[1]}.*in use"),  # type: ignore[misc]
                ([free, free], RuntimeError, "given twice"),
                ([free, taken], OSError, "cannot bind"),
            ]
            for listeners, error, said in refused:
                with pytest.raises(error, match=said):
                    await kaio.serve(echo, listeners=listeners)
                assert not free.sockets
                assert not taken.sockets
    async with kaio.serve(echo, listeners=[free, used, taken]) as server:
        assert len(server.sockets) == 3


async def test_a_second_serve_forever_is_refused() -> None:
    """Also in the same iteration, and before the server has started."""
    for begun in (True, False):
        server = kaio.Server([kaio.Listener("127.0.0.1:0")], Recorder)
        if begun:
            await server.start_serving()
        both = [asyncio.create_task(server.serve_forever()) for _ in range(2)]
        done, (running,) = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        await until(lambda server=server: server.sockets)  # type: ignore[misc]
        assert isinstance(done.pop().exception(), RuntimeError)
        assert server.is_serving()
        server.close()
        await running


async def test_closing_a_server_while_it_starts_is_a_runtime_error() -> None:
    """Nothing listens afterwards."""
    listener = kaio.Listener("127.0.0.1:0")
    server = kaio.Server([listener], Recorder)
    starting = asyncio.create_task(server.start_serving())
    await asyncio.sleep(0)
    server.close()
    if starting.done():  # uvloop looks up no number
        await starting
    else:
        with pytest.raises(RuntimeError, match="closed"):
            await starting
    assert not listener.sockets


async def test_wait_closed_waits_for_tls_handshakes(server_tls: Any, client_tls: Any) -> None:
    """It waits until they have failed, or until the handler has ended that one of them starts."""
    handled = 0

    async def handler(connection: kaio.Connection) -> None:
        nonlocal handled
        handled += 1
        await echo(connection)

    for end in ("handshake", "rubbish", "end of file", "reset"):
        server = await kaio.serve(handler, "127.0.0.1", 0, ssl=server_tls)
        sock = socket.create_connection(tuple(server.listeners[0].address))  # type: ignore[arg-type]
        await turns(20)  # it is accepted
        server.close()
        closed = asyncio.create_task(server.wait_closed())
        await turns(20)
        assert not closed.done(), end
        if end == "handshake":
            transport, _ = await kaio.create_connection(
                Recorder, sock=sock, ssl=client_tls, server_hostname="localhost"
            )
            await until(lambda: handled == 1)
            await turns(20)
            assert not closed.done()
            transport.abort()
        elif end == "rubbish":
            sock.sendall(b"this is no TLS\n" * 10)
        elif end == "reset":
            reset(sock)
        if end != "rubbish":
            sock.close()
        async with asyncio.timeout(5):
            await closed
        sock.close()
    assert handled == 1


async def test_leaving_does_not_wait_for_handlers_that_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """One second after the close timeout it is logged by name, and no longer waited for."""
    loop = asyncio.get_running_loop()
    started = asyncio.Event()
    released = False

    async def stubborn(connection: kaio.Connection) -> None:
        started.set()
        while not released:
            with contextlib.suppress(asyncio.CancelledError, kaio.DeadPeerError):
                await asyncio.Event().wait()

    server = await kaio.serve(stubborn, "127.0.0.1", 0, close_timeout=0.2)
    with socket.create_connection(tuple(server.listeners[0].address)) as client:  # type: ignore[arg-type]
        await started.wait()  # what is cancelled before its first step ends
        began = loop.time()
        async with server:
            pass
        assert 1 < loop.time() - began < 3
        (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
        assert "stubborn" in record.getMessage()
        assert "Connection to {}:{}".format(*client.getsockname()) in record.getMessage()
        assert client.recv(1) == b""
    released = True
    server.abort_clients()
    await server.wait_closed()


async def test_leaving_ends_a_protocol_whose_transport_was_given_away() -> None:
    """The loop does not call its connection_lost; kaio does."""
    lost: list[Exception | None] = []

    class Elsewhere(kaio.KeepaliveProtocol):
        def connection_made(self, transport: Any) -> None:
            transport.inner.set_protocol(asyncio.Protocol())

        def connection_lost(self, exc: Exception | None) -> None:
            lost.append(exc)

    loop = asyncio.get_running_loop()
    server = await kaio.serve(Elsewhere, "127.0.0.1", 0, close_timeout=0.2)
    with socket.create_connection(tuple(server.listeners[0].address)) as client:  # type: ignore[arg-type]
        await until(lambda: server.connections)
        began = loop.time()
        async with server:
            pass
        assert loop.time() - began < 3
        assert not server.connections
        assert lost == [None]
        assert client.recv(1) == b""


async def test_every_failure_of_a_handler_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it raises, but CancelledError, in its task or before; its connection is closed."""

    class Base(BaseException):
        pass

    def failing(exc: BaseException, *, at_once: bool) -> Any:
        async def handler(connection: kaio.Connection) -> None:
            raise exc

        def no_coroutine(connection: kaio.Connection) -> Any:
            raise exc

        return no_coroutine if at_once else handler

    for at_once in (False, True):
        for exc in (ValueError("x"), Base("x"), BaseExceptionGroup("x", [Base("y")]), asyncio.CancelledError()):
            caplog.clear()
            async with kaio.serve(failing(exc, at_once=at_once), "127.0.0.1", 0) as server:
                async with kaio.connect(server.listeners[0].address) as client:
                    assert [data async for data in client] == []
                await until(lambda server=server: not server.connections)  # type: ignore[misc]
            records = [record for record in caplog.records if record.levelno == logging.ERROR]
            if isinstance(exc, asyncio.CancelledError):
                assert not records
            else:
                (record,) = records
                assert record.exc_info is not None
                assert record.exc_info[1] is exc


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_exits_leave_the_loop(loop: str, kind: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    """When a handler raises them they are not logged as its failure."""

    async def handler(connection: kaio.Connection) -> None:
        raise kind

    async def main() -> None:
        async with kaio.serve(handler, "127.0.0.1", 0) as server, kaio.connect(server.listeners[0].address) as client:
            await client.receive()

    with pytest.raises(kind), asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())
    assert not [record for record in caplog.records if record.name == "kaio"]


async def test_no_handler_starts_once_wait_closed_has_returned() -> None:
    """Also when the server is closed in any iteration of accepting a connection."""
    handled = 0

    async def handler(connection: kaio.Connection) -> None:
        nonlocal handled
        handled += 1
        await echo(connection)

    for number in range(8):
        server = await kaio.serve(handler, "127.0.0.1", 0)
        sock = socket.create_connection(tuple(server.listeners[0].address))  # type: ignore[arg-type]
        await turns(number)
        server.close()
        sock.close()
        async with asyncio.timeout(5):
            await server.wait_closed()
        before = handled
        await asyncio.sleep(0.02)
        assert handled == before, number


# -- the policy argument

TOLD = "7s:3s:2"


async def test_an_argument_is_taken_although_the_environment_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is read only where no policy was given."""
    monkeypatch.setenv("KAIO_KEEPALIVE", "20x")
    expected = kaio.Keepalive.parse(TOLD)
    listener = kaio.Listener("127.0.0.1:0", keepalive=TOLD)
    assert listener.keepalive == expected
    async with (
        kaio.serve(echo, "127.0.0.1", 0, keepalive=TOLD) as handler_server,
        kaio.serve(echo, listeners=[kaio.Listener("127.0.0.1:0")], keepalive=TOLD) as listener_server,
        await kaio.create_server(Recorder, "127.0.0.1", 0, keepalive=TOLD) as protocol_server,
        await kaio.start_server(_close, "127.0.0.1", 0, keepalive=TOLD) as stream_server,
    ):
        for server in (handler_server, listener_server, protocol_server, stream_server):
            (sock,) = server.sockets
            assert options(sock) == (1, 7, 3, 2)
        where = handler_server.sockets[0].getsockname()
        async with kaio.connect(*where, keepalive=TOLD) as connection:
            assert kaio.inspect(connection).times == (7, 3, 2)
        transport, _ = await kaio.create_connection(Recorder, *where, keepalive=TOLD)
        assert kaio.inspect(transport).times == (7, 3, 2)
        transport.abort()
        _, writer = await kaio.open_connection(*where, keepalive=TOLD)
        assert kaio.inspect(writer).times == (7, 3, 2)
        assert kaio.apply(writer, TOLD).times == (7, 3, 2)
        writer.close()
    kaio.loop_factory(TOLD)().close()


async def _close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def test_an_invalid_environment_is_refused_at_once_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read where no policy was given."""
    monkeypatch.setenv("KAIO_KEEPALIVE", "20x")
    listener = kaio.Listener("127.0.0.1:0")
    with pytest.raises(kaio.PolicyError, match="KAIO_KEEPALIVE"):
        kaio.serve(echo, "127.0.0.1", 0)
    with pytest.raises(kaio.PolicyError, match="KAIO_KEEPALIVE"):
        kaio.serve(echo, listeners=[listener])
    with pytest.raises(kaio.PolicyError, match="KAIO_KEEPALIVE"):
        kaio.connect("127.0.0.1", 1)
    with pytest.raises(kaio.PolicyError, match="KAIO_KEEPALIVE"):
        await kaio.create_server(Recorder, "127.0.0.1", 0)
    with pytest.raises(kaio.PolicyError, match="KAIO_KEEPALIVE"):
        _ = listener.keepalive
    assert not listener.sockets
    assert "invalid" in repr(listener)
    told = kaio.Listener("127.0.0.1:0", keepalive=TOLD)
    with pytest.raises(kaio.PolicyError, match="KAIO_KEEPALIVE"):
        kaio.Server([told, listener], Recorder)
    async with kaio.serve(echo, listeners=[told, listener], keepalive=TOLD) as server:
        assert [each.keepalive for each in server.listeners] == [kaio.Keepalive.parse(TOLD)] * 2


async def test_an_argument_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes a policy where it enters. The environment is read once where there is no argument, else never."""
    made: list[str] = []
    parse, from_env, check = kaio.Keepalive.parse, kaio.Keepalive.from_env, kaio.Keepalive.__post_init__

    def counted_parse(text: str) -> kaio.Keepalive:
        made.append("parsed")
        return parse(text)

    def counted_from_env() -> kaio.Keepalive:
        made.append("environment")
        return from_env()

    def counted_check(policy: kaio.Keepalive) -> None:
        made.append("made")
        check(policy)

    monkeypatch.setattr(kaio.Keepalive, "parse", counted_parse)
    monkeypatch.setattr(kaio.Keepalive, "from_env", counted_from_env)
    monkeypatch.setattr(kaio.Keepalive, "__post_init__", counted_check)
    for keepalive, expected in ((TOLD, ["parsed", "made"]), (None, ["environment", "made"])):
        made.clear()
        async with kaio.serve(echo, "127.0.0.1", 0, keepalive=keepalive) as server:
            assert made == expected
            made.clear()
            async with kaio.connect(*server.sockets[0].getsockname(), keepalive=keepalive):
                await until(lambda server=server: server.connections)  # type: ignore[misc]
                assert made == expected
        made.clear()
        async with await kaio.create_server(Recorder, "127.0.0.1", 0, keepalive=keepalive) as created:
            assert made == expected
            made.clear()
            where = created.sockets[0].getsockname()
            transport, _ = await kaio.create_connection(Recorder, *where, keepalive=keepalive)
            assert made == expected
            transport.abort()
        made.clear()
        kaio.Listener("127.0.0.1:0", keepalive=keepalive)
        assert made == (expected if keepalive else [])
