"""The monitor: a death is detected in every state, a live peer is never reported, and suspicion comes first."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

import kaio
from kaio.testing import blackhole

from .conftest import Recorder, reset, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("dead_peers")]

KEEP = kaio.Keepalive(1, 1, 2)
DROP = kaio.Keepalive(1, 1, 2, stalled="drop")
BOUND = 3.0


class Watcher(Recorder):
    """A recorder of all callbacks, suspicion included, whose reading can be paused from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[str, float] = {}

    def peer_suspect(self, health: kaio.Health) -> None:
        self.note("suspect", health)

    def peer_recovered(self, health: kaio.Health) -> None:
        self.note("recovered", health)

    def peer_dead(self, error: kaio.DeadPeerError) -> None:
        self.note("dead", error)

    def note(self, name: str, argument: Any) -> None:
        self.at.setdefault(name, asyncio.get_running_loop().time())
        self.events.append((name, argument))

    def eof_received(self) -> bool:  # type: ignore[override]
        self.events.append(("eof", None))
        return self.transport.get_extra_info("sslcontext") is None


@contextlib.asynccontextmanager
async def pair(
    policy: Any, server_tls: ssl.SSLContext | None = None, client_tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Watcher, asyncio.StreamReader, asyncio.StreamWriter]]:
    """Our end of a connection that kaio made, and the other end as asyncio's streams."""
    accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda *ends: accepted.set_result(ends), "127.0.0.1", 0, ssl=server_tls)
    transport, ours = await kaio.create_connection(
        Watcher, *server.sockets[0].getsockname(), keepalive=policy, ssl=client_tls
    )
    reader, writer = await accepted
    try:
        yield ours, reader, writer
    finally:
        transport.abort()
        writer.transport.abort()
        server.close()


Prepare = Callable[[Watcher, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def idle(ours: Watcher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Idle: no data in flight."""


async def paused(ours: Watcher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reading is paused, the socket has no data."""
    ours.transport.pause_reading()


async def paused_with_data(ours: Watcher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reading is paused, and the socket has data."""
    ours.transport.pause_reading()
    writer.write(b"read me later")
    await until(lambda: not kaio.health(writer).unacked)


async def they_closed(ours: Watcher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The peer has closed its half, this side has not."""
    writer.write_eof()
    await until(lambda: "eof" in ours.names)


async def we_closed(ours: Watcher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """This side has closed its half, the peer has not."""
    ours.transport.write_eof()
    await reader.read()


async def stalled(ours: Watcher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The peer does not read, and its window is shut."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    ours.transport.write(bytes(16 << 20))
    await until(lambda: ours.transport.health().state is kaio.State.STALLED)


async def write(ours: Watcher) -> None:
    """Send data that will not be acknowledged."""
    ours.transport.write(b"into the dark")


# state, its preparation, what happens once the peer is silent, the cause, with TLS
STATES: list[tuple[str, Prepare, Callable[[Watcher], Awaitable[None]] | None, kaio.Cause, bool]] = [
    ("idle", idle, None, kaio.Cause.KEEPALIVE, False),
    ("unacknowledged", idle, write, kaio.Cause.UNACKNOWLEDGED, False),
    ("zero window, then dead", stalled, None, kaio.Cause.ZERO_WINDOW, False),
    ("paused", paused, None, kaio.Cause.KEEPALIVE, False),
    ("paused, unacknowledged", paused, write, kaio.Cause.UNACKNOWLEDGED, False),
    ("paused with data waiting", paused_with_data, None, kaio.Cause.KEEPALIVE, False),
    ("peer's half closed", they_closed, None, kaio.Cause.KEEPALIVE, False),
    ("peer's half closed, unacked", they_closed, write, kaio.Cause.UNACKNOWLEDGED, False),
    ("our half closed", we_closed, None, kaio.Cause.KEEPALIVE, False),
    ("TLS, idle", idle, None, kaio.Cause.KEEPALIVE, True),
    ("TLS, unacknowledged", idle, write, kaio.Cause.UNACKNOWLEDGED, True),
]


async def test_a_death_is_reported_in_every_state(
    loop_name: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """Every state, both stalled modes: cause right, peer_dead then connection_lost once, in time. Prints the table."""
    loop = asyncio.get_running_loop()
    lines: list[str] = []

    async def case(name: str, prepare: Prepare, act: Any, cause: kaio.Cause, tls: bool, policy: kaio.Keepalive) -> None:
        async with pair(policy, server_tls if tls else None, client_tls if tls else None) as (ours, reader, writer):
            if tls:  # a TLS server sends its tickets when it likes: let them pass
                writer.write(b"hello")
                await until(lambda: "data" in ours.names)
                ours.events.clear()
            await prepare(ours, reader, writer)
            await until(lambda: not kaio.health(writer).unacked)
            with blackhole(writer):
                began = loop.time()
                if act is not None:
                    await act(ours)
                if prepare is paused_with_data:
                    await until(lambda: "dead" in ours.names)
                    assert "lost" not in ours.names
                    assert "data" not in ours.names
                    ours.transport.resume_reading()
                error = await ours.lost
            took = ours.at["dead"] - began
            names = [each for each in ours.names if each not in ("made", "eof")]
            if prepare is paused_with_data:
                assert names.count("data") == 1
                assert ("data", b"read me later") in ours.events
                names.remove("data")
            assert names[-2:] == ["dead", "lost"], (name, names)
            assert names[:-2] in ([], ["suspect"]), (name, names)
            assert isinstance(error, kaio.DeadPeerError)
            assert dict(reversed(ours.events))["dead"] is error
            assert error.cause is cause, (name, policy, error.cause)
            assert error.errno == errno.ETIMEDOUT
            assert error.info is not None
            assert took < BOUND + 1.0 + 1.0, (name, policy, took)
            lines.append(f"{name:28} {loop_name:8} {policy.stalled:5} {took:5.2f} s  {cause.value}")

    cases = [case(*state, policy) for state in STATES for policy in (KEEP, DROP)]
    await asyncio.gather(connecting(loop_name, lines), *cases)
    print(f"detection time {BOUND:g} s; the bound is {BOUND + 2:g} s\n" + "\n".join(sorted(lines)))


async def connecting(loop_name: str, lines: list[str]) -> None:
    """Connecting, the last row of the table."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, blackhole(listener):
        for policy in (KEEP, DROP):
            began = loop.time()
            with pytest.raises(kaio.DeadPeerError) as caught:
                await kaio.connect(*listener.getsockname(), keepalive=policy)
            assert caught.value.cause is kaio.Cause.CONNECTING
            took = loop.time() - began
            assert took < BOUND + 2
            lines.append(f"{'connecting':28} {loop_name:8} {policy.stalled:5} {took:5.2f} s  connecting")


async def test_a_reset_is_reported_while_reading_is_paused() -> None:
    """ERR in the watch is not always death: a reset stays one, with data waiting and without."""
    for prepare in (paused, paused_with_data):
        async with pair(KEEP) as (ours, reader, writer):
            await prepare(ours, reader, writer)
            reset(writer.get_extra_info("socket"))
            writer.transport.abort()
            if prepare is paused_with_data:
                await asyncio.sleep(0.05)
                ours.transport.resume_reading()
            async with asyncio.timeout(5):
                assert isinstance(await ours.lost, ConnectionResetError)
            assert "dead" not in ours.names
            assert "eof" not in ours.names
            assert ("data" in ours.names) is (prepare is paused_with_data)


async def test_a_peer_is_suspect_before_it_is_dead_and_not_afterwards() -> None:
    """Suspect once, after the first unanswered probe, and then dead; or recovered, each time it comes back."""
    policy = kaio.Keepalive(1, 1, 4)
    async with pair(policy) as (dies, _, their), pair(policy) as (lives, _, other):
        loop = asyncio.get_running_loop()

        async def die() -> None:
            with blackhole(their):
                began = loop.time()
                await dies.lost
                assert 1.0 < dies.at["suspect"] - began < 2.5
            assert dies.names == ["made", "suspect", "dead", "lost"]
            health = dies.events[1][1]
            assert health.probes >= 1
            assert health.state is kaio.State.SUSPECT
            assert health.silence > 1

        async def live() -> None:
            for number in range(1, 4):
                with blackhole(other):
                    await until(lambda number=number: lives.names.count("suspect") == number)  # type: ignore[misc]
                await until(lambda number=number: lives.names.count("recovered") == number)  # type: ignore[misc]
            assert lives.names == ["made", *["suspect", "recovered"] * 3]
            assert lives.events[-1][1].state is kaio.State.ALIVE

        await asyncio.gather(die(), live())


async def test_a_path_that_heals_before_the_last_probe_causes_no_death() -> None:
    """Cut until the last probe but one is lost, and healed before the verdict: suspect and recovered each time, and no
    death; twenty connections at once, and one twenty times in a row."""

    async def once() -> None:
        async with pair(kaio.Keepalive(1, 1, 5)) as (ours, _, their):
            with blackhole(their):
                await until(lambda: ours.transport.health().probes == 4, within=8)
            await until(lambda: "recovered" in ours.names)
            assert ours.names == ["made", "suspect", "recovered"]
            their.write(b"x")
            await until(lambda: "data" in ours.names)

    async def in_a_row() -> None:
        async with pair(kaio.Keepalive(1, 1, 3)) as (ours, _, their):
            for number in range(1, 21):
                with blackhole(their):
                    await until(lambda: ours.transport.health().probes == 2, within=8)
                    await until(functools.partial(_told, ours, "suspect", number))
                await until(functools.partial(_told, ours, "recovered", number))
            assert ours.names == ["made", *["suspect", "recovered"] * 20]

    await asyncio.gather(in_a_row(), *(once() for _ in range(20)))


def _told(ours: Watcher, name: str, times: int) -> bool:
    return ours.names.count(name) == times


async def test_stalled_and_stopped_peers_are_alive() -> None:
    """One that does not read for ten detection times, one whose process is stopped for five."""
    await asyncio.gather(stalled_for_long(), frozen_for_long())


async def stalled_for_long() -> None:
    """Stalled, never dead; then it takes all that was sent."""
    policy = kaio.Keepalive(1, 1, 1)
    async with pair(policy) as (ours, reader, writer):
        await stalled(ours, reader, writer)
        for _ in range(20):
            await asyncio.sleep(1)
            assert "dead" not in ours.names
        assert ours.transport.health().state is kaio.State.STALLED
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        while received < 16 << 20:
            received += len(await reader.read(1 << 20))
        assert "dead" not in ours.names


async def test_a_blocked_loop_reports_no_live_peer_dead() -> None:
    """A handler that holds the loop for three detection times: idle, with data in flight, and stalled peers live on."""
    policy = kaio.Keepalive(1, 1, 1)
    async with pair(policy) as (idler, _, _w), pair(policy) as (writer, _, _v), pair(policy) as (full, reader, their):
        await stalled(full, reader, their)
        writer.transport.write(b"x")
        time.sleep(6)  # noqa: ASYNC251 - the point of it
        await asyncio.sleep(1.5)
        for ours in (idler, writer, full):
            assert "dead" not in ours.names
            assert "lost" not in ours.names


async def frozen_for_long() -> None:
    """Stopped with SIGSTOP: its kernel answers, and it is alive when it goes on."""
    script = (
        "import socket\n"
        "s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
        "c, _ = s.accept()\n"
        "while d := c.recv(65536): c.sendall(d)\n"
    )
    process = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = int(await asyncio.to_thread(process.stdout.readline))
        transport, ours = await kaio.create_connection(Watcher, "127.0.0.1", port, keepalive=kaio.Keepalive(1, 1, 1))
        os.kill(process.pid, signal.SIGSTOP)
        transport.write(b"x")
        await asyncio.sleep(10)
        assert ours.names == ["made"]
        os.kill(process.pid, signal.SIGCONT)
        await until(lambda: "data" in ours.names)
        transport.abort()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def test_a_policy_can_be_changed_on_a_live_connection() -> None:
    """A long policy made short finds the death by the short one; made off, the monitor lets go."""
    async with pair("1h:1h:4") as (ours, _, writer), pair(KEEP) as (off, _, other):
        off.transport.keepalive = "off"
        ours.transport.keepalive = KEEP
        loop = asyncio.get_running_loop()
        with blackhole(writer, other):
            began = loop.time()
            ours.transport.write(b"x")
            off.transport.write(b"x")
            await ours.lost
            assert loop.time() - began < BOUND + 2
            assert "suspect" not in off.names
            assert "dead" not in off.names


async def test_all_present_connections_of_a_listener_change_with_one_call() -> None:
    """set_all: new and present ones; a mistake changes none."""
    async with await kaio.create_server(Watcher, "127.0.0.1", 0, keepalive="1h:1h:4") as server:
        writers = [(await asyncio.open_connection(*server.sockets[0].getsockname()))[1] for _ in range(10)]
        await until(lambda: len(server.connections) == 10)
        listener = server.listeners[0]
        with pytest.raises(kaio.PolicyError):
            listener.set_all("rubbish")
        assert listener.set_all(KEEP) == 10
        with blackhole(*writers[:5]):
            await until(lambda: len(server.connections) == 5)
        assert all(each.keepalive == KEEP for each in server.connections)
        for writer in writers:
            writer.transport.abort()


async def test_counters_hook_and_log(caplog: pytest.LogCaptureFixture) -> None:
    """Suspects, recoveries and deaths are counted for the loop and the server; one warning for each death."""
    events: list[kaio.Event] = []
    monitor = kaio.get_monitor()
    monitor.hook = events.append
    async with await kaio.create_server(Watcher, "127.0.0.1", 0, keepalive=kaio.Keepalive(1, 1, 3)) as server:
        dies = (await asyncio.open_connection(*server.sockets[0].getsockname()))[1]
        lives = (await asyncio.open_connection(*server.sockets[0].getsockname()))[1]
        leaves = (await asyncio.open_connection(*server.sockets[0].getsockname()))[1]
        await until(lambda: len(server.connections) == 3)
        assert server.counters.watched == monitor.counters.watched == 3
        leaves.close()
        with blackhole(dies):
            with blackhole(lives):
                await until(lambda: server.counters.suspects == 2)
            await until(lambda: server.counters.recoveries == 1)
            await until(lambda: server.counters.deaths[kaio.Cause.KEEPALIVE] == 1)
        for counters in (server.counters, monitor.counters):
            # On a busy machine the living is suspect again now and then, and recovers.
            assert counters.suspects == counters.recoveries + 1 >= 2
            assert sum(counters.deaths.values()) == 1
            assert sum(counters.silence.values()) == 1
            assert counters.silence[5] == 1
        assert [event.kind for event in events].count("suspect") == monitor.counters.suspects
        assert events[-1].kind == "dead"
        assert events[-1].error is not None
        lives.transport.abort()
        dies.transport.abort()
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(records) == 1
    assert vars(records[0])["cause"] == "keepalive"
    assert vars(records[0])["policy"] == "1s:1s:3"
    assert 3.8 < vars(records[0])["silence"] < 4.5


# -- while_alive


async def test_while_alive_ends_its_block_when_the_peer_dies() -> None:
    """The error is the DeadPeerError that every method raises; the task is not left cancelled."""
    async with pair(KEEP) as (ours, _, writer):
        with blackhole(writer):
            with pytest.raises(kaio.DeadPeerError) as caught:
                async with ours.transport.while_alive():
                    await asyncio.Event().wait()
            assert caught.value is await ours.lost
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        with pytest.raises(kaio.DeadPeerError):
            async with ours.transport.while_alive():
                raise AssertionError("entered with a dead peer")


async def test_while_alive_changes_nothing_while_the_connection_lives() -> None:
    """Results, exceptions, timeouts and cancellations of the block are as without it."""
    async with pair(KEEP) as (ours, _, writer):
        async with ours.transport.while_alive():
            await asyncio.sleep(0)
        with pytest.raises(KeyError):
            async with ours.transport.while_alive():
                raise KeyError
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), ours.transport.while_alive():
                await asyncio.Event().wait()
        with pytest.raises(TimeoutError):
            async with ours.transport.while_alive(), asyncio.timeout(0.01):
                await asyncio.Event().wait()
        with anyio.move_on_after(0.01) as scope:
            async with ours.transport.while_alive():
                await asyncio.Event().wait()
        assert scope.cancelled_caught

        async def block() -> None:
            async with ours.transport.while_alive():
                await asyncio.Event().wait()

        task = asyncio.create_task(block())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        transport: Any = ours.transport
        assert not transport.scopes
        assert writer is not None


async def test_while_alive_raises_what_ended_the_connection() -> None:
    """A reset, the peer's close, this side's close; an end of file alone ends nothing."""

    async def ended_by(act: Callable[[Watcher, asyncio.StreamWriter], Any], error: type[BaseException]) -> None:
        async with pair(KEEP) as (ours, _, writer):
            with pytest.raises(error):  # noqa: PT012 - it is the scope that raises
                async with ours.transport.while_alive():
                    act(ours, writer)
                    await asyncio.Event().wait()

    def reset_it(_: Watcher, writer: asyncio.StreamWriter) -> None:
        reset(writer.get_extra_info("socket"))
        writer.transport.abort()

    await ended_by(reset_it, kaio.ResetError)
    loop = asyncio.get_running_loop()
    await ended_by(lambda ours, _: loop.call_soon(ours.transport.close), anyio.ClosedResourceError)
    async with pair(KEEP) as (ours, _, writer), ours.transport.while_alive():
        ours.transport.close()  # by the block itself: it goes on
        await ours.lost
    async with pair(KEEP) as (ours, _, writer), ours.transport.while_alive():
        writer.write_eof()
        await until(lambda: "eof" in ours.names)
        await asyncio.sleep(0.01)


async def test_while_alive_nests() -> None:
    """In a TaskGroup, in itself, and with a cancellation from outside at the same moment."""
    async with pair(KEEP) as (ours, _, writer):

        async def work() -> None:
            async with ours.transport.while_alive(), ours.transport.while_alive():
                await asyncio.Event().wait()

        async def both() -> None:
            try:
                async with ours.transport.while_alive():
                    await asyncio.Event().wait()
            except kaio.DeadPeerError:
                pass

        outside = asyncio.create_task(both())
        with blackhole(writer), pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(work())
        assert isinstance(caught.value.exceptions[0], kaio.DeadPeerError)
        await outside


async def test_while_alive_cancels_work_that_does_not_use_the_connection() -> None:
    """A handler that does other work is cancelled when the client it works for dies."""
    ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def handler(connection: kaio.Connection) -> None:
        try:
            async with connection.while_alive():
                await asyncio.sleep(30)  # asking a slow model, say
        except BaseException as exc:
            ended.set_result(exc)
            raise

    async with kaio.serve(handler, "127.0.0.1", 0, keepalive=KEEP) as server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        with blackhole(writer):
            assert isinstance(await ended, kaio.DeadPeerError)
        writer.transport.abort()


async def test_a_paused_stream_delivers_what_came_before_the_death() -> None:
    """More than the buffers hold is under way when the peer dies: a sender is told at once, a receiver gets it all."""
    accepted: asyncio.Future[kaio.Connection] = asyncio.get_running_loop().create_future()

    async def handler(connection: kaio.Connection) -> None:
        accepted.set_result(connection)
        await asyncio.Event().wait()

    async with kaio.serve(handler, "127.0.0.1", 0, keepalive=KEEP, close_timeout=0.1) as server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        ours = await accepted
        sock = writer.get_extra_info("socket")
        sent = bytes(range(256)) * 600  # above the high-water mark
        writer.write(sent)
        await until(lambda: ours._protocol._reading_paused)
        writer.write(sent[:20_000])  # stays in our socket
        sent += sent[:20_000]
        await until(lambda: not kaio.health(writer).unsent and not kaio.health(writer).unacked)
        with blackhole(sock):
            await until(lambda: ours._protocol.error is not None, within=8)
            with pytest.raises(kaio.DeadPeerError) as caught:
                await ours.send(b"x")
            got = bytearray()
            with pytest.raises(kaio.DeadPeerError) as again:  # noqa: PT012 - the last of many raises
                while True:
                    got += await ours.receive()
            assert bytes(got) == sent
            assert again.value is caught.value
        writer.transport.abort()


# -- what was once wrong


async def test_long_user_timeouts_hold_under_a_shut_window() -> None:
    """The monitor never shortens the kernel's own patience below the policy's: cut for 20 s of 42, all live on."""
    policy = kaio.Keepalive(2, 1, 40)
    async with pair(policy) as (sends, _, one), pair(policy) as (full, reader, other):
        await stalled(full, reader, other)
        await asyncio.sleep(3)  # the monitor has seen it
        with blackhole(one, other):
            sends.transport.write(b"x")
            await asyncio.sleep(20)
        for ours in (sends, full):
            assert not {"dead", "lost"} & set(ours.names)
        other.transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        while received < 16 << 20:
            received += len(await reader.read(1 << 20))
        sock = full.transport.get_extra_info("socket")
        await until(lambda: sock.getsockopt(socket.IPPROTO_TCP, 44) == 120_000, within=8)  # TCP_RTO_MAX_MS


async def test_a_connection_with_unsent_megabytes_ends_too() -> None:
    """Paused with data waiting, or closing, and more written than goes out: connection_lost comes after peer_dead."""

    async def case(closing: bool) -> None:
        async with pair(KEEP) as (ours, _, writer):
            await paused_with_data(ours, _, writer)
            with blackhole(writer):
                ours.transport.write(bytes(16 << 20))
                if closing:
                    ours.transport.close()
                await until(lambda: "dead" in ours.names, within=6)
                if not closing:
                    ours.transport.resume_reading()
                async with asyncio.timeout(3):
                    assert isinstance(await ours.lost, kaio.DeadPeerError)
            assert ("data", b"read me later") in ours.events or closing

    await asyncio.gather(case(False), case(True))


async def test_a_paused_tls_connection_with_unsent_data_ends_too(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """A TLS layer that will not flush to a dead peer is aborted once reading has resumed."""
    async with pair(KEEP, server_tls, client_tls) as (ours, _, writer):
        # What is not acknowledged when the peer dies (tickets of TLS) it goes on sending, and would be heard.
        writer.write(b"hello")
        await until(lambda: "data" in ours.names)
        ours.transport.pause_reading()
        await until(lambda: not kaio.health(writer).unacked)
        with blackhole(writer):
            ours.transport.write(bytes(8 << 20))
            await until(lambda: "dead" in ours.names, within=8)
            ours.transport.resume_reading()
            async with asyncio.timeout(3):
                assert isinstance(await ours.lost, kaio.DeadPeerError)


async def test_long_silence_before_a_write_does_not_count_against_the_peer() -> None:
    """count=1, a user timeout far below the idle time, quiet for longer than that, then an outage of 0.9 s: alive."""
    policy = kaio.Keepalive(30, 1, 1, user_timeout=3)
    async with pair(policy) as (ours, _, writer):
        await asyncio.sleep(4)
        with blackhole(writer):
            ours.transport.write(b"x")
            await asyncio.sleep(0.9)
        await asyncio.sleep(1.5)
        assert not {"dead", "lost"} & set(ours.names)


async def test_setting_the_policy_repeatedly_does_not_delay_the_death() -> None:
    """A configuration that is reloaded every second, or ten times a second, leaves the bound where it was."""

    async def case(every: float) -> None:
        async with pair("2s:1s:2") as (ours, _, writer):
            with blackhole(writer):
                ours.transport.write(b"x")
                for _ in range(int(6 / every)):
                    await asyncio.sleep(every)
                    if "dead" in ours.names:
                        break
                    ours.transport.keepalive = "2s:1s:2"
                await asyncio.sleep(0.5)
                assert "dead" in ours.names

    await asyncio.gather(case(1), case(0.1))


async def test_while_alive_keeps_the_cause_of_the_error() -> None:
    """__cause__ of what while_alive() raises is the OSError, for whoever else has the same error."""
    async with pair(KEEP) as (ours, _, writer):
        with blackhole(writer), pytest.raises(kaio.DeadPeerError) as caught:
            async with ours.transport.while_alive():
                await asyncio.Event().wait()
        assert isinstance(caught.value.__cause__, OSError)


def test_loops_and_their_monitors_are_collected() -> None:
    """Loop after loop, each with a connection: none is kept alive, and no descriptor stays open."""

    async def main() -> None:
        async with pair(KEEP) as (ours, _, _writer):
            ours.transport.pause_reading()

    refs = []
    for _ in range(5):
        loop = asyncio.SelectorEventLoop()
        refs.append(weakref.ref(loop))
        loop.run_until_complete(main())
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        del loop
    gc.collect()
    assert [ref() for ref in refs] == [None] * 5


async def test_the_monitor_uses_a_policy_set_by_apply() -> None:
    """kaio.apply on a transport of kaio's is the same as setting its keepalive."""
    async with pair("1h:1h:4") as (ours, _, writer):
        kaio.apply(ours.transport, KEEP)
        assert ours.transport.keepalive == KEEP
        with blackhole(writer):
            ours.transport.write(b"x")
            error = await ours.lost
        assert isinstance(error, kaio.DeadPeerError)
        assert error.policy == KEEP


def test_each_thread_s_loop_has_a_monitor_of_its_own() -> None:
    """Loops start and end at the same time, some with connections that were never closed."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(60):
                loop = asyncio.SelectorEventLoop()
                found = kaio.get_monitor(loop)
                for _ in range(20):
                    assert kaio.get_monitor(loop) is found
                loop.close()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
