"""Ends that the loops do not report, or not fully: each is reported once, with the right error."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import pathlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Literal

import pytest

import kaio
from kaio.kernel.queues import unread
from kaio.net.ending import BEFORE_VERDICT, ENDED, TABLE, Stage, Trigger, next_stage
from kaio.testing import blackhole

from .conftest import LOOPS, Recorder, reset, until
from .namespaces import Routed

QUICK = kaio.Keepalive(1, 1, 2)
DROP = kaio.Keepalive(1, 1, 2, stalled="drop")
BOUND = 3.0


async def raised(awaitable: Awaitable[object]) -> BaseException | None:
    """Return what an awaitable raises."""
    try:
        await awaitable
    except Exception as exc:
        return exc
    return None


# -- the table


def test_table_has_every_stage_and_ignores_other_triggers() -> None:
    """All stages are in the table; a trigger that a stage does not name does not change it."""
    assert set(TABLE) == set(Stage)
    for stage in Stage:
        for trigger in Trigger:
            assert next_stage(stage, trigger) is TABLE[stage].get(trigger, stage)


def test_every_stage_is_reachable_and_no_cycle_exists() -> None:
    """All stages can be reached from OPEN, none can be entered twice, and final stages are final."""
    rank: dict[Stage, int] = {}

    def walk(stage: Stage, depth: int) -> None:
        assert depth < len(Stage)
        rank[stage] = max(depth, rank.get(stage, 0))
        for following in TABLE[stage].values():
            assert following is not stage
            walk(following, depth + 1)

    walk(Stage.OPEN, 0)
    assert set(rank) == set(Stage)
    assert all(following in ENDED for stage in ENDED for following in TABLE[stage].values())


def test_verdict_and_connection_lost_are_possible_once() -> None:
    """VERDICT only leads out of stages before the verdict, LOST only out of stages that are not final."""
    assert {stage for stage in Stage if Trigger.VERDICT in TABLE[stage]} == BEFORE_VERDICT
    assert not any(next_stage(stage, Trigger.VERDICT) in BEFORE_VERDICT for stage in BEFORE_VERDICT)
    assert {stage for stage in Stage if next_stage(stage, Trigger.LOST) is Stage.LOST} == set(Stage) - ENDED | {
        Stage.LOST
    }


# -- TLS over a connection that stood


class Upgrading(Recorder):
    """A protocol that starts TLS in connection_made, by `loop.start_tls` on the inner transport."""

    context: ssl.SSLContext
    server_side = True
    timeout = 30.0

    def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
        super().connection_made(transport)
        self.upgrade = asyncio.create_task(self._upgrade())

    async def _upgrade(self) -> BaseException | None:
        loop = asyncio.get_running_loop()
        name = None if self.server_side else "localhost"
        inner = self.transport.inner
        return await raised(
            loop.start_tls(
                inner,
                self,
                self.context,
                server_side=self.server_side,
                server_hostname=name,
                ssl_handshake_timeout=self.timeout,
            )
        )


@contextlib.asynccontextmanager
async def upgrading(
    context: ssl.SSLContext, policy: kaio.Keepalive | str | None, *, server_side: bool, timeout: float = 30.0
) -> AsyncIterator[tuple[Upgrading, socket.socket]]:
    """A connection during a TLS handshake, and its peer, which has sent nothing. Check that it is freed."""
    loop = asyncio.get_running_loop()
    made: list[Upgrading] = []

    def factory() -> Upgrading:
        protocol = Upgrading()
        protocol.context, protocol.server_side, protocol.timeout = context, server_side, timeout
        made.append(protocol)
        return protocol

    if server_side:
        async with await kaio.create_server(factory, "127.0.0.1", 0, keepalive=policy) as server:
            with socket.create_connection(server.sockets[0].getsockname()) as their:
                await until(lambda: made and made[0].made.done())
                yield made[0], their
            await until(lambda: not server.connections)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            connecting = kaio.create_connection(factory, *listener.getsockname(), keepalive=policy)
            task = asyncio.create_task(connecting)
            their, _ = await loop.run_in_executor(None, listener.accept)
            with their:
                await task
                yield made[0], their
    assert kaio.get_monitor().counters.watched == 0


SIDES = pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])


@pytest.fixture
def contexts(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> Callable[[bool], ssl.SSLContext]:
    """A function that returns the context of a side."""
    return lambda server_side: server_tls if server_side else client_tls


@SIDES
async def test_reset_during_start_tls_ends_the_connection(
    contexts: Callable[[bool], ssl.SSLContext], server_side: bool
) -> None:
    """connection_lost(ConnectionResetError) is called once, and start_tls raises."""
    async with upgrading(contexts(server_side), None, server_side=server_side) as (ours, their):
        await asyncio.sleep(0.05)
        reset(their)
        their.close()
        error = await asyncio.wait_for(ours.lost, 2)
        assert isinstance(error, ConnectionResetError)
        assert isinstance(await ours.upgrade, OSError)
        await asyncio.sleep(0.1)
    assert ours.names == ["made", "lost"]


@SIDES
@pytest.mark.parametrize("policy", [None, "off"])
async def test_timeout_of_start_tls_ends_the_connection(
    contexts: Callable[[bool], ssl.SSLContext], server_side: bool, policy: kaio.Keepalive | str | None, loop_name: str
) -> None:
    """connection_lost once, soon after the loop has closed it; also of a connection that nobody watches.

    Were the loop to call it after all, that would not be passed on.
    """
    async with upgrading(contexts(server_side), policy, server_side=server_side, timeout=0.3) as (ours, _):
        await asyncio.wait_for(ours.lost, 20)
        assert isinstance(await ours.upgrade, OSError)
        await asyncio.sleep(0.1)
        if loop_name == "asyncio":  # uvloop calls it, in this case
            ours.connection_lost(None)
    assert ours.names == ["made", "lost"]


@SIDES
@pytest.mark.complains  # asyncio says that the handshake failed
async def test_failure_of_start_tls_ends_the_connection(
    contexts: Callable[[bool], ssl.SSLContext], server_side: bool
) -> None:
    """The peer sends something that is not TLS."""
    async with upgrading(contexts(server_side), None, server_side=server_side) as (ours, their):
        their.sendall(b"this is no TLS\r\n\r\n" * 10)
        await asyncio.wait_for(ours.lost, 20)
        assert isinstance(await ours.upgrade, (OSError, ssl.SSLError))
        await asyncio.sleep(0.1)
    assert ours.names == ["made", "lost"]


@SIDES
async def test_cancellation_of_start_tls_ends_the_connection(
    contexts: Callable[[bool], ssl.SSLContext], server_side: bool
) -> None:
    """The task that awaits start_tls is cancelled; the peer sends nothing."""
    async with upgrading(contexts(server_side), None, server_side=server_side) as (ours, _):
        await asyncio.sleep(0.05)
        ours.upgrade.cancel()
        await asyncio.wait_for(ours.lost, 20)
        await asyncio.sleep(0.1)
    assert ours.names == ["made", "lost"]


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@SIDES
@pytest.mark.parametrize("policy", [QUICK, DROP], ids=["keep", "drop"])
async def test_dead_peer_during_start_tls_is_reported(
    contexts: Callable[[bool], ssl.SSLContext], server_side: bool, policy: kaio.Keepalive
) -> None:
    """peer_dead and connection_lost get one error in time, a server when idle, a client with a hello in flight."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        async with upgrading(contexts(server_side), policy, server_side=server_side) as (ours, their):
            stack.enter_context(blackhole(their))
            began = loop.time()
            error = await asyncio.wait_for(ours.lost, BOUND + 1.5)
            assert isinstance(error, kaio.DeadPeerError)
            assert loop.time() - began > BOUND - 1.2
            if server_side:
                assert error.cause is kaio.Cause.KEEPALIVE
            assert isinstance(await ours.upgrade, OSError)
            await asyncio.sleep(0.1)
            assert kaio.get_monitor().counters.deaths[error.cause] == 1
    assert ours.names == ["made", "dead", "lost"]
    assert ours.events[-2][1] is error


@pytest.mark.parametrize("server_side", [True, False], ids=["start_server", "open_connection"])
async def test_reset_during_start_tls_of_a_stream_writer_ends_the_connection(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, server_side: bool
) -> None:
    """With kaio's open_connection and start_server, StreamWriter.start_tls raises, and the server ends."""
    loop = asyncio.get_running_loop()
    errors: list[BaseException | None] = []

    async def upgrade(writer: asyncio.StreamWriter) -> None:
        name = None if server_side else "localhost"
        context = server_tls if server_side else client_tls
        errors.append(await raised(writer.start_tls(context, server_hostname=name)))
        assert isinstance(errors[-1], OSError)

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(writer)

    if server_side:
        async with await kaio.start_server(serve_one, "127.0.0.1", 0) as server:
            with socket.create_connection(server.sockets[0].getsockname()) as their:
                await until(lambda: server.connections)
                await asyncio.sleep(0.05)
                reset(their)
            await until(lambda: errors)
            async with asyncio.timeout(3):
                while server.connections:
                    await asyncio.sleep(0.01)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            connecting = asyncio.create_task(kaio.open_connection(*listener.getsockname()))
            their, _ = await loop.run_in_executor(None, listener.accept)
            reader, writer = await connecting
            upgrading = asyncio.create_task(upgrade(writer))
            await asyncio.sleep(0.05)
            reset(their)
            their.close()
            await upgrading
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 3)
    assert kaio.get_monitor().counters.watched == 0


# -- streams that are paused by their limit


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_paused_asyncio_stream_gets_all_data_before_the_error(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, tls: bool
) -> None:
    """With stalled="keep" and data in flight: all data that a dead peer had sent is read before the error is raised."""
    pieces = 10_000, 50_000  # read at once, and left in the socket
    their: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()

    async def serve_one(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"d" * pieces[0])
        their.set_result(writer)

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0, ssl=server_tls if tls else None)
    async with server:
        reader, writer = await kaio.open_connection(
            *server.sockets[0].getsockname(),
            keepalive=QUICK,
            limit=1024,
            ssl=client_tls if tls else None,
            server_hostname="localhost" if tls else None,
        )
        peer = await their
        await asyncio.sleep(0.1)
        peer.write(b"d" * pieces[1])
        await asyncio.sleep(0.1)
        await until(lambda: not kaio.health(peer).unacked)
        with blackhole(peer):
            writer.write(b"x")
            monitor = kaio.get_monitor()
            async with asyncio.timeout(BOUND + 2):
                while not sum(monitor.counters.deaths.values()):
                    await asyncio.sleep(0.05)
            got = 0

            async def read() -> None:
                nonlocal got
                while data := await asyncio.wait_for(reader.read(65536), 8):
                    got += len(data)

            with pytest.raises(kaio.DeadPeerError):
                await read()
            assert got == sum(pieces)
            assert monitor.counters.watched == 0
        peer.transport.abort()


# -- loop.sendfile


@pytest.mark.slow
@pytest.mark.may_skip  # uvloop has no sendfile
@pytest.mark.usefixtures("dead_peers")
@pytest.mark.parametrize("policy", [QUICK, DROP], ids=["keep", "drop"])
@pytest.mark.parametrize("said", [b"", b"before" * 1000], ids=["silent", "with data"])
async def test_sendfile_to_a_dead_peer_raises(
    policy: kaio.Keepalive, said: bytes, tmp_path: pathlib.Path, loop_name: str
) -> None:
    """loop.sendfile raises, received data is delivered, peer_dead and connection_lost get one error."""
    if loop_name == "uvloop":
        pytest.skip("uvloop has no sendfile")
    loop = asyncio.get_running_loop()
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(kaio.create_connection(Recorder, *listener.getsockname(), keepalive=policy))
        their, _ = await loop.run_in_executor(None, listener.accept)
        transport, ours = await task
        assert isinstance(transport, kaio.KeepaliveTransport)
        with their, path.open("rb") as file:
            sending = asyncio.create_task(loop.sendfile(transport.inner, file, fallback=False))
            their.sendall(said)
            await asyncio.sleep(0.1)
            with blackhole(their):
                assert isinstance(await raised(asyncio.wait_for(sending, BOUND + 2)), OSError)
                error = await asyncio.wait_for(ours.lost, 2)
    assert isinstance(error, kaio.DeadPeerError)
    assert b"".join(data for name, data in ours.events if name == "data") == said
    assert [name for name in ours.names if name != "data"] == ["made", "dead", "lost"]


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@pytest.mark.parametrize("stalled", ["keep", "drop"])
def test_sendfile_of_a_library_to_a_dead_peer_raises(stalled: Literal["keep", "drop"], tmp_path: pathlib.Path) -> None:
    """On kaio's loop over asyncio, sendfile raises, and any protocol gets one connection_lost(OSError)."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    complaints: list[dict[str, Any]] = []
    lost: list[BaseException | None] = []

    class Plain(asyncio.Protocol):
        def connection_lost(self, exc: BaseException | None) -> None:
            lost.append(exc)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            task = asyncio.create_task(loop.create_connection(Plain, *listener.getsockname()))
            their, _ = await loop.run_in_executor(None, listener.accept)
            transport, _ = await task
            await until(lambda: kaio.get_monitor().counters.watched)
            with their, path.open("rb") as file:
                sending = asyncio.create_task(loop.sendfile(transport, file, fallback=False))
                await asyncio.sleep(0.1)
                with blackhole(their):
                    assert isinstance(await raised(asyncio.wait_for(sending, BOUND + 2)), OSError)
                    await until(lambda: lost)
            await asyncio.sleep(0.05)
            assert kaio.get_monitor().counters.watched == 0

    policy = kaio.Keepalive(1, 1, 2, stalled=stalled)
    with asyncio.Runner(loop_factory=kaio.loop_factory(keepalive=policy, base=asyncio.SelectorEventLoop)) as runner:
        runner.run(main())
    assert not complaints
    assert len(lost) == 1
    assert isinstance(lost[0], OSError)


# -- a reset while reading is paused


@pytest.mark.parametrize("writes", ["nothing", "afterwards", "before"])
async def test_data_received_before_a_reset_is_delivered(writes: str) -> None:
    """With reading paused: the data, then one connection_lost(ConnectionResetError), whatever is written meanwhile."""
    loop = asyncio.get_running_loop()
    size = 50_000
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(kaio.create_connection(Recorder, *listener.getsockname()))
        their, _ = await loop.run_in_executor(None, listener.accept)
        transport, ours = await task
        transport.pause_reading()
        if writes == "before":
            transport.write(bytes(32 << 20))  # more than leaves
        their.sendall(b"d" * size)
        await until(lambda: unread(transport.get_extra_info("socket")) == size)
        reset(their)
        their.close()
        await asyncio.sleep(0.1)
        if writes == "afterwards":
            transport.write(b"x" * 1000)
            transport.writelines([b"y"])
            transport.write_eof()
            await asyncio.sleep(0.1)
        if not ours.lost.done():
            transport.resume_reading()
        error = await asyncio.wait_for(ours.lost, 20)
    assert isinstance(error, ConnectionResetError)
    assert sum(len(data) for name, data in ours.events if name == "data") == size
    assert [name for name in ours.names if name != "data"] == ["made", "lost"]


# -- no way to the peer

# What becomes of the client's own route to the server, and what its kernel says then.
OWN_ROUTES = {"blackhole": errno.EINVAL, "prohibit": errno.EACCES, "unreachable": errno.EHOSTUNREACH}


def hosts_of(network: Routed, names: Iterable[str]) -> dict[str, str]:
    """An address of the server for each name, with routes from the client and the router."""
    hosts = {name: f"198.51.100.{last}" for last, name in enumerate(names, 10)}
    network.server.ip(*(f"address add {host}/24 dev router" for host in hosts.values()))
    network.router.ip(
        *(f"neighbour replace {host} lladdr 02:00:00:00:02:02 nud permanent dev server" for host in hosts.values())
    )
    return hosts


def drop_output(network: Routed, host: str) -> None:
    """Drop the client's packets to a host in its own packet filter: sending fails with EPERM."""
    network.client.run(
        "nft",
        "-f",
        "-",
        stdin=f"table ip own {{\nchain out {{\ntype filter hook output priority 0;\nip daddr {host} drop\n}}\n}}\n",
    )


@pytest.mark.slow
async def test_missing_route_on_this_host_is_reported_for_a_connection(
    network: Routed, caplog: pytest.LogCaptureFixture
) -> None:
    """Writing after this host's route or filter has changed: UNREACHABLE with the errno, and a message that says so."""
    hosts = hosts_of(network, [*OWN_ROUTES, "filter"])
    with network.server.entered():
        listener = socket.create_server(("", 9000))
    with listener:
        ends = {}
        for name, host in hosts.items():
            with network.client.entered():
                _, ends[name] = await kaio.create_connection(Recorder, host, 9000, keepalive=DROP)
        network.client.ip(*(f"route add {kind} {hosts[kind]}/32" for kind in OWN_ROUTES))
        drop_output(network, hosts["filter"])
        for end in ends.values():
            end.transport.write(b"into the void")
        async with asyncio.timeout(8):
            errors = {name: await end.lost for name, end in ends.items()}
    for name, error in errors.items():
        assert isinstance(error, kaio.DeadPeerError), name
        assert ends[name].names == ["made", "dead", "lost"]
        assert error.cause is kaio.Cause.UNREACHABLE
        # The kernel keeps the number where it looks the route up anew, which is not at every attempt.
        assert error.errno in (OWN_ROUTES.get(name, errno.EPERM), errno.ETIMEDOUT)
        assert error.this_host
        assert str(error).startswith(f"this host cannot reach peer {hosts[name]}:9000 (unreachable): ")
        assert str(error) in caplog.text


async def test_errno_of_a_misused_socket_is_no_dead_peer() -> None:
    """Such an errno without a dead connection is passed on unchanged."""
    for number in (errno.EPERM, errno.EINVAL, errno.EACCES):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            _, ours = await kaio.create_connection(Recorder, *listener.getsockname())
            error = OSError(number, "a mistake")
            inner: Any = ours.transport.inner
            inner._force_close(error)
            assert await ours.lost is error
            assert ours.names == ["made", "lost"]


@pytest.mark.slow
async def test_verdict_of_the_monitor_has_the_errno_from_the_network(network: Routed) -> None:
    """With stalled="keep" and data in flight, the errno is from the router, and `this_host` is false."""
    kinds = {"prohibit": errno.EHOSTUNREACH, "unreachable": errno.EHOSTUNREACH, "throw": errno.ENETUNREACH}
    network.answer_everybody()
    hosts = hosts_of(network, [*kinds, "blackhole"])
    with network.server.entered():
        listener = socket.create_server(("", 9000))
    with listener:
        ends = {}
        for name, host in hosts.items():
            with network.client.entered():
                _, ends[name] = await kaio.create_connection(Recorder, host, 9000, keepalive=QUICK)
        network.router.ip(*(f"route add {kind} {host}/32" for kind, host in hosts.items()))
        for end in ends.values():
            end.transport.write(b"into the void")
        async with asyncio.timeout(8):
            errors = {name: await end.lost for name, end in ends.items()}
    for name, error in errors.items():
        assert isinstance(error, kaio.DeadPeerError), name
        expected = kaio.Cause.UNREACHABLE if name in kinds else kaio.Cause.UNACKNOWLEDGED
        assert (error.cause, error.errno) == (expected, kinds.get(name, errno.ETIMEDOUT)), name
        assert not error.this_host
        assert str(error).startswith(f"peer {hosts[name]}:9000 is dead")


@pytest.mark.slow
@pytest.mark.parametrize("base", LOOPS)
def test_connection_of_a_library_gets_the_errno_from_the_network(
    base: str, network: Routed, caplog: pytest.LogCaptureFixture
) -> None:
    """On kaio's loop, any protocol gets one connection_lost(OSError) with the errno from the router."""
    kinds = {"prohibit": errno.EHOSTUNREACH, "throw": errno.ENETUNREACH, "blackhole": errno.ETIMEDOUT}
    lost: dict[str, list[BaseException | None]] = {kind: [] for kind in kinds}

    class Plain(asyncio.Protocol):
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def connection_lost(self, exc: BaseException | None) -> None:
            lost[self.kind].append(exc)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        hosts = hosts_of(network, kinds)
        with network.server.entered():
            listener = socket.create_server(("", 9000))
        with listener:
            transports = []
            for kind, host in hosts.items():
                with network.client.entered():
                    transport, _ = await loop.create_connection(functools.partial(Plain, kind), host, 9000)
                transports.append(transport)
            monitor = kaio.get_monitor()
            await until(lambda: monitor.counters.watched == len(kinds))
            network.router.ip(*(f"route add {kind} {host}/32" for kind, host in hosts.items()))
            for transport in transports:
                transport.write(b"into the void")
            await until(lambda: all(lost.values()), within=8)
        await asyncio.sleep(0.1)
        assert monitor.counters.watched == 0
        assert monitor.counters.deaths[kaio.Cause.UNREACHABLE] == 2

    factory = kaio.loop_factory(keepalive=QUICK, base=LOOPS[base])
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
    assert {kind: [getattr(exc, "errno", None) for exc in each] for kind, each in lost.items()} == {
        kind: [number] for kind, number in kinds.items()
    }
    assert len(caplog.records) == len(kinds)


@pytest.mark.slow
async def test_missing_route_on_this_host_is_reported_while_connecting(network: Routed) -> None:
    """What connect() itself refuses is this host's own, and told at once; what a router answers is not.

    (A filter that drops the SYN is silent to connect(): net/ipv4/tcp_output.c, tcp_connect.)
    """
    hosts = hosts_of(network, [*OWN_ROUTES, "router"])
    network.client.ip(*(f"route add {kind} {hosts[kind]}/32" for kind in OWN_ROUTES))
    network.router.ip(f"route add unreachable {hosts['router']}/32")
    nowhere = "203.0.113.1"
    network.client.ip(
        "route add 192.0.2.99/32 dev router", "route delete default", "route add 198.51.100.0/24 via 192.0.2.1"
    )
    with network.client.entered():
        for name, host in {**hosts, "nowhere": nowhere}.items():
            with pytest.raises(kaio.DeadPeerError) as caught:
                await kaio.connect(host, 9000, keepalive=QUICK)
            error = caught.value
            assert error.cause is kaio.Cause.UNREACHABLE, name
            assert error.this_host is (name != "router"), name
            if name == "nowhere":
                assert error.errno == errno.ENETUNREACH
                assert str(error) == f"this host cannot reach peer {nowhere}:9000 (unreachable): Network is unreachable"
            elif name != "router":
                assert error.errno == OWN_ROUTES[name]
