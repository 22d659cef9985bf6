"""Draining: handlers finish what they have begun, nobody is cut off, and the end is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

import kaio

from .conftest import until


async def ask(port: int, ssl: ssl.SSLContext | None = None) -> bytes:
    """Ask, and return the whole answer."""
    async with kaio.connect("localhost" if ssl else "127.0.0.1", port, ssl=ssl) as connection:
        await connection.send(b"question\n")
        answer = b""
        async for data in connection:
            answer += data
        return answer


@pytest.mark.parametrize("tls", [False, True])
async def test_requests_in_flight_are_answered_and_the_queue_is_served(
    tls: bool, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """Also those of connections that the kernel had accepted and kaio had not."""
    going = asyncio.Event()
    told: list[bool] = []

    async def handler(connection: kaio.Connection) -> None:
        await connection.receive_until(b"\n", 100)
        await connection.draining.wait()
        told.append(bool(connection.draining))
        await going.wait()
        await connection.send(b"answer" * 1000)

    async with kaio.serve(handler, "localhost", 0, ssl=server_tls if tls else None) as server:
        port = server.sockets[0].getsockname()[1]
        questions = [asyncio.create_task(ask(port, client_tls if tls else None)) for _ in range(50)]
        await until(lambda: len(server.connections) == 50)
        assert server.ready
        # These wait in the queue: the loop has had no turn since.
        with contextlib.ExitStack() as stack:
            late = [stack.enter_context(socket.create_connection(("localhost", port))) for _ in range(20)]
            draining = asyncio.create_task(server.drain(20))
            if not tls:
                for each in late:
                    each.sendall(b"question\n")
                await until(lambda: len(told) == 70)
            else:
                await until(lambda: len(told) == 50)
                for each in late:
                    each.close()
            assert not server.ready
            await until(lambda: not server.is_serving())
            assert not draining.done()
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("localhost", port))
            going.set()
            assert await asyncio.gather(*questions) == [b"answer" * 1000] * 50
            for each in () if tls else late:
                each.setblocking(True)
                answer = b""
                while data := await asyncio.to_thread(each.recv, 65536):
                    answer += data
                assert answer == b"answer" * 1000
            await draining
    assert not server.connections


@pytest.mark.parametrize("how", ["idle", "stubborn"])
async def test_what_has_not_ended_by_the_grace_is_ended(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Cancelled, then aborted; a handler that swallows cancellation is logged and left behind."""
    started: list[kaio.Connection] = []
    released = False

    async def handler(connection: kaio.Connection) -> None:
        started.append(connection)
        if how == "idle":
            await connection.receive()
        while not released:
            with contextlib.suppress(asyncio.CancelledError, kaio.DeadPeerError):
                await asyncio.Event().wait()

    server = await kaio.serve(handler, "127.0.0.1", 0, close_timeout=0.2)
    with socket.create_connection(server.sockets[0].getsockname()) as client:
        await until(lambda: started)
        async with asyncio.timeout(10):
            await server.drain(0.1)
        assert client.recv(1) == b""
    assert ("has not ended" in caplog.text) == (how == "stubborn")
    released = True
    server.abort_clients()
    await server.wait_closed()


class Service(kaio.KeepaliveProtocol):
    """Closes when it is told to, or fails."""

    told: ClassVar[list[Any]] = []

    def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
        self.transport = transport

    def draining(self) -> None:
        self.told.append(self.transport)
        if len(self.told) == 2:
            raise LookupError
        if len(self.told) < 4:
            self.transport.close()


async def test_protocols_are_told_once_and_the_rest_is_closed() -> None:
    """One that raises does not keep the others from being told; one that does nothing is closed after the grace."""
    Service.told.clear()
    exceptions: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: exceptions.append(context))
    server = await kaio.create_server(Service, "127.0.0.1", 0)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(server.sockets[0].getsockname())) for _ in range(5)]
        await until(lambda: len(server.connections) == 5)
        await server.drain(0.3)
        assert len(set(Service.told)) == len(Service.told) == 5
        for each in clients:
            assert each.recv(1) == b""
    (context,) = exceptions
    assert isinstance(context["exception"], LookupError)


async def test_connections_are_told_one_after_the_other_over_the_spread() -> None:
    """And each of them once."""
    moments: list[float] = []
    loop = asyncio.get_running_loop()

    async def handler(connection: kaio.Connection) -> None:
        await connection.draining.wait()
        moments.append(loop.time())

    async with kaio.serve(handler, "127.0.0.1", 0) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(socket.create_connection(server.sockets[0].getsockname()))
            await until(lambda: len(server.connections) == 20)
            began = loop.time()
            await server.drain(30, spread=1)
    assert len(moments) == 20
    assert moments[0] - began < moments[-1] - began
    assert moments[-1] - began >= 0.9
    assert len({round(each, 2) for each in moments}) > 2


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"grace": -1}, "grace=-1"), ({"grace": float("nan")}, "grace=nan"), ({"grace": 1, "spread": 2}, "spread=2")],
)
async def test_invalid_times_change_nothing(arguments: dict[str, float], field: str) -> None:
    async def handler(connection: kaio.Connection) -> None: ...

    async with kaio.serve(handler, "127.0.0.1", 0) as server:
        with pytest.raises(ValueError, match=field):
            await server.drain(**arguments)
        with pytest.raises(ValueError, match=field):
            await server.serve_until(signal.SIGUSR1, **arguments)
        with pytest.raises(TypeError, match="at least one signal"):
            await server.serve_until()
        assert server.ready


async def test_a_cancelled_drain_aborts_the_connections() -> None:
    async def handler(connection: kaio.Connection) -> None:
        await asyncio.Event().wait()

    async with kaio.serve(handler, "127.0.0.1", 0) as server:
        with socket.create_connection(server.sockets[0].getsockname()) as client:
            await until(lambda: server.connections)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await server.drain(60)
            client.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.to_thread(client.recv, 1) == b""


async def test_serve_until_ends_when_the_server_is_closed_elsewhere() -> None:
    async def handler(connection: kaio.Connection) -> None: ...

    before = signal.getsignal(signal.SIGUSR1)
    async with kaio.serve(handler, "127.0.0.1", 0) as server:
        serving = asyncio.create_task(server.serve_until(signal.SIGUSR1))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already"):
            await server.serve_until(signal.SIGUSR1)
        server.close()
        assert await serving is None
    assert signal.getsignal(signal.SIGUSR1) is before


async def test_a_draining_event_of_a_client_is_never_set() -> None:
    async def handler(connection: kaio.Connection) -> None:
        await connection.send(b"x")

    async with (
        kaio.serve(handler, "127.0.0.1", 0) as server,
        kaio.connect(*server.sockets[0].getsockname()) as connection,
    ):
        assert not connection.draining
        assert connection.draining is connection.draining
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await connection.draining.wait()


# -- signals

SERVICE = """
import asyncio, signal, sys
import kaio, uvloop

async def handler(connection):
    await connection.send(b"hello\\n")
    await connection.receive_until(b"\\n", 100)
    await connection.draining.wait()
    while sys.argv[2] == "stubborn":
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
    await asyncio.sleep(0.3)
    await connection.send(b"answer")

async def main():
    async with kaio.serve(handler, "127.0.0.1", 0, close_timeout=0.2) as server:
        # Printed in the next iteration, when serve_until() waits.
        asyncio.get_running_loop().call_soon(print, server.sockets[0].getsockname()[1])
        got = await server.serve_until(signal.SIGTERM, signal.SIGINT, grace=60, delay=float(sys.argv[3]))
        print(got.name, server.ready)

sys.stdout.reconfigure(line_buffering=True)
kaio.run(main(), base=uvloop.new_event_loop if sys.argv[1] == "uvloop" else asyncio.SelectorEventLoop)
"""


@pytest.fixture(params=["asyncio", "uvloop"])
def service(request: pytest.FixtureRequest) -> Any:
    """Starts the service; returns its process and port."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: object) -> tuple[subprocess.Popen[str], int]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-W", "error", "-c", SERVICE, request.param, *map(str, arguments)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()
            return process, int(line)

        yield start


Start = Callable[..., tuple[subprocess.Popen[str], int]]


def request(port: int) -> socket.socket:
    """Connect, and ask; the greeting says that the handler runs."""
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    client.sendall(b"question\n")
    assert client.recv(100) == b"hello\n"
    return client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_the_process_ends_without_a_traceback(
    service: Start, number: signal.Signals
) -> None:
    process, port = service("polite", 0)
    clients = [request(port) for _ in range(20)]
    process.send_signal(number)
    for each in clients:
        with each:
            assert each.recv(100) == b"answer"
            assert each.recv(100) == b""
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == (f"{number.name} False\n", "", 0)


@pytest.mark.parametrize(("how", "delay"), [("polite", 60), ("polite", 0), ("stubborn", 0)])
def test_a_second_signal_ends_it_at_once(service: Start, how: str, delay: float) -> None:
    """During the delay, in which connections are still accepted, and during the grace; whatever the handler does."""
    process, port = service(how, delay)
    clients = [request(port)]
    process.send_signal(signal.SIGTERM)
    if delay:
        time.sleep(0.3)  # until it has been received, most likely
        clients.append(request(port))
    process.send_signal(signal.SIGINT)
    for each in clients:
        with each, contextlib.suppress(ConnectionResetError):
            assert each.recv(100) == b""
    assert process.stdout is not None
    assert process.stdout.readline() in ("SIGTERM False\n", "SIGINT False\n")  # both at once come in any order
    if how == "polite":
        out, err = process.communicate(timeout=30)
        assert (out, err, process.returncode) == ("", "", 0)
    else:  # asyncio waits for the handler's task
        process.kill()
        process.communicate()


PROGRAM = Path(__file__).with_name("programs") / "draining_server.py"
ANSWER = 20_000  # bytes, as the program has it
MANY = 2_000


@dataclasses.dataclass
class Load:
    """What clients have seen."""

    answered: int = 0
    cut: list[str] = dataclasses.field(default_factory=list)
    refused: int = 0

    async def ask(self, port: int, seconds: float) -> bool:
        """Connect, ask, and count what happens; return whether another may be tried."""
        try:
            connection = await kaio.connect("127.0.0.1", port)
        except ConnectionRefusedError:
            self.refused += 1
            return False
        async with connection:
            try:
                await connection.send(f"{seconds}\n".encode())
                await connection.receive_exactly(ANSWER)
                self.answered += 1
            except Exception as exc:
                self.cut.append(repr(exc))
        return True

    async def go_on(self, port: int) -> None:
        """Ask again and again, until connections are refused."""
        while await self.ask(port, 0.01):
            pass


@pytest.mark.heavy
@pytest.mark.parametrize("handler", ["answering", "stubborn"])
async def test_sigterm_under_load_cuts_nobody_off(handler: str, loop_name: str, tmp_path: Path) -> None:
    """2,000 requests in flight, and new connections all the time: each is answered, or refused before it is made."""
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(PROGRAM), loop_name, handler, stdout=asyncio.subprocess.PIPE, stderr=stderr
        )
    assert process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        old, new = Load(), Load()
        questions = [asyncio.create_task(old.ask(port, 5)) for _ in range(MANY)]
        loads = [asyncio.create_task(new.go_on(port)) for _ in range(20)]
        await until(lambda: new.answered > 100, within=60)
        await asyncio.sleep(1)
        process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        await asyncio.gather(*loads)
        refused_after = time.monotonic() - signalled
        await asyncio.gather(*questions)
        answered_at = time.monotonic()
        assert await process.stdout.readline() == b"<Signals.SIGTERM: 15>\n" or handler == "stubborn"
        took = time.monotonic() - signalled
        await asyncio.wait_for(process.wait(), 30)
        errors = log.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    print(
        f"{loop_name}, {handler}: {old.answered} in flight answered, {len(old.cut)} cut; of others {new.answered}"
        f" answered, {len(new.cut)} cut; refused {refused_after:.1f} s after the signal, last answer after"
        f" {answered_at - signalled:.1f} s, ended after {took:.1f} s"
    )
    assert (old.answered, old.cut, old.refused) == (MANY, [], 0)
    assert new.cut == []
    assert new.refused == 20
    assert refused_after > 1.0  # the delay, in which connections are still accepted
    assert process.returncode == 0, errors
    assert ("has not ended" in errors) == (handler == "stubborn"), errors[-1000:]
    assert took < 1 + 8 + 1 + 1 + 5  # delay, grace, close timeout, abort, and a machine that has other things to do


async def test_cancelling_drain_at_once_closes_the_server() -> None:
    """Nobody is left to wait at a socket that nobody accepts from."""
    async with kaio.serve(ask_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await server.drain(30)
        assert not server.is_serving()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))


async def ask_nothing(connection: kaio.Connection) -> None:
    """Wait for the end."""
    await connection.receive()


async def test_a_connection_that_was_handed_over_is_told_and_closed() -> None:
    """As every protocol: its handler has ended, and the connection has not."""
    told: list[str] = []

    class Taken(kaio.KeepaliveProtocol):
        transport: kaio.KeepaliveTransport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

        def draining(self) -> None:
            told.append("draining")

        def connection_lost(self, exc: Exception | None) -> None:
            told.append("lost")

    async def handler(connection: kaio.Connection) -> None:
        await connection.receive_until(b"\n", 10)
        taken = Taken()
        taken.transport = connection.transport
        connection.transport.set_protocol(taken)

    serving = kaio.serve(handler, "127.0.0.1", 0, close_timeout=20)
    async with serving as server, kaio.connect(server.listeners[0].address) as client:
        await client.send(b"over\n")
        await until(lambda: [type(each) is not kaio.Connection for each in server.connections] == [True])
        await client.send(b"echo")
        assert await client.receive_exactly(4) == b"echo"
        await server.drain(0.5)
        assert not server.connections
    assert told == ["draining", "lost"]
