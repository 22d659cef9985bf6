"""The drop-in loop: deaths of libraries' connections are heard in every state, and nobody alive is taken for dead."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import kaio
from kaio.testing import blackhole

from .conftest import echo, reset, until
from .on_loops import (
    BOUND,
    DROP,
    HAS_POLICY,
    LATEST,
    POLICY,
    QUICK,
    SO_RCVBUFFORCE,
    TCP,
    Accepted,
    Plain,
    choose,
    connected_to,
    has,
    listening,
    on_kaio,
)

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
        peers = ["{}:{}".format(*case.peer.getsockname()) for case in cases]  # two may have the same
        for record in records:
            extra = record.__dict__
            assert extra["event"] == "peer_dead"
            assert extra["policy"] == str(QUICK)
            assert extra["errno"] == errno.ETIMEDOUT
            assert BOUND - 1 < extra["silence"] < LATEST
            peers.remove(extra["peer"])
        assert peers == []
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
    """Stalled and answering, reset, closed by both sides and kept, or chosen otherwise."""
    loop = asyncio.get_running_loop()

    async def stalled(how: str, tls: bool) -> Case:
        case: Case = await getattr(connections, how)(tls)
        await shut_window(case)
        return case

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
        living = await asyncio.gather(
            *(stalled(how, tls) for how in ("accepted", "connected") for tls in (False, True)),
            *(another_choice(delay, after, socket.TCP_KEEPIDLE, 30) for delay in (0, 1) for after in (idle, in_flight)),
            another_choice(0, idle, socket.TCP_KEEPCNT, 30),
            *(without(delay) for delay in (0, 1)),
            *(closed_by_both(count) for count in (2, 1)),
            *(connections.accepted(tls) for tls in (False, True)),
        )
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
@pytest.mark.usefixtures("dead_peers")
@on_kaio("1s:1s:5")  # so that a busy machine lets them come back in time
async def test_peers_that_were_away_for_a_moment_are_not_reported_dead(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Until each has lost a probe or a retransmission; then the detection time passes once more."""
    cases: list[Case] = []
    async with Connections(server_tls, client_tls) as connections:
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
        await asyncio.sleep(6.5)
        for case in cases:
            assert "lost" not in case.protocol.events, cases.index(case)
            assert kaio.health(case.transport).state is not kaio.State.SUSPECT
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
