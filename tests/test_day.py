"""A day of a client that stays connected, in a few minutes: whatever happens to its server, it is back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

import kaio
from kaio.net import dialing
from kaio.testing import blackhole

from .conftest import reset, until

NAME: Final = "broker.test"
DETECTION: Final = 3.0  # of the policy
SLACK: Final = 5.0  # seconds for a busy machine
DOWN: Final = 3.0  # how long a fault lasts
RETRY: Final = kaio.Retry(initial_delay=0.2, max_delay=1.0, lasting=1.0)

pytestmark = pytest.mark.heavy


class Names:
    """A name service of the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.address = "127.0.0.1"
        self.asked = 0
        look_up = dialing.resolve

        async def resolve(loop: Any, host: Any, port: Any, **options: Any) -> Any:
            if host == NAME:
                self.asked += 1
                host = self.address
            return await look_up(loop, host, port, **options)

        monkeypatch.setattr(dialing, "resolve", resolve)


class Broker:
    """A server that stores numbered messages, each once, and acknowledges them."""

    def __init__(self, authority: trustme.CA) -> None:
        self.good = self._context(authority)
        self.bad = self._context(trustme.CA())
        self.stored: Counter[int] = Counter()
        self.received = 0
        self.connections: set[kaio.Connection] = set()
        self.port = 0
        self._server: contextlib.AsyncExitStack | None = None
        self.listener: kaio.Listener | None = None

    @staticmethod
    def _context(authority: trustme.CA) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(NAME).configure_cert(context)
        return context

    async def __call__(self, connection: kaio.Connection) -> None:
        self.connections.add(connection)
        try:
            while True:
                number = int(await connection.receive_until(b"\n", 100))
                self.received += 1
                if number not in self.stored:
                    self.stored[number] += 1
                await connection.send(b"%d\n" % number)
        except kaio.ConnectionEnded:
            pass
        finally:
            self.connections.discard(connection)

    async def start(self, host: str = "127.0.0.1") -> None:
        self.listener = kaio.Listener(f"{host}:{self.port}", ssl=self.good)
        self._server = contextlib.AsyncExitStack()
        await self._server.enter_async_context(kaio.serve(self, listeners=[self.listener], close_timeout=0))
        address: Any = self.listener.address
        self.port = address.port

    async def stop(self, *, kill: bool = False) -> None:
        if kill:
            for connection in self.connections:
                reset(connection.transport.get_extra_info("socket"))
                connection.abort()
        if self._server is not None:
            await self._server.aclose()
            self._server = None


class Client:
    """Sends messages without end, and keeps each until it is acknowledged."""

    def __init__(self, port: int, tls: ssl.SSLContext) -> None:
        self.port = port
        self.tls = tls
        self.unacknowledged: dict[int, None] = {}
        self.acknowledged: set[int] = set()
        self.next = 0
        self.ends: Counter[str] = Counter()
        self.progress = asyncio.Event()
        self.connection: kaio.Connection | None = None

    async def run(self) -> None:
        connecting = kaio.connect(
            NAME, self.port, keepalive="1s:1s:2", ssl=self.tls, ssl_handshake_timeout=1.0, retry=RETRY
        )
        async for connection in connecting:
            self.connection = connection
            async with connection:
                await connection.send(b"".join(b"%d\n" % number for number in self.unacknowledged))
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.produce(connection))
                    group.create_task(self.hear(connection))

    async def produce(self, connection: kaio.Connection) -> None:
        while True:
            self.unacknowledged[self.next] = None
            self.next += 1
            await connection.send(b"%d\n" % (self.next - 1))
            await asyncio.sleep(0.02)

    async def hear(self, connection: kaio.Connection) -> None:
        while True:
            number = int(await connection.receive_until(b"\n", 100))
            self.unacknowledged.pop(number, None)
            self.acknowledged.add(number)
            self.progress.set()

    async def is_served(self) -> None:
        """Wait for an acknowledgment that comes from now on."""
        self.progress.clear()
        await self.progress.wait()


@contextlib.contextmanager
def listening(host: str, port: int, on_connect: Callable[[socket.socket], None]) -> Iterator[None]:
    """Accept on a port without TLS, and do something with each connection."""
    loop = asyncio.get_running_loop()
    with socket.create_server((host, port)) as sock:
        sock.setblocking(False)

        def accept() -> None:
            with contextlib.suppress(BlockingIOError):
                on_connect(sock.accept()[0])

        loop.add_reader(sock.fileno(), accept)
        try:
            yield
        finally:
            loop.remove_reader(sock.fileno())


class Day:
    """What happens, and what it does to the client."""

    def __init__(self, broker: Broker, client: Client, names: Names) -> None:
        self.broker = broker
        self.client = client
        self.names = names
        self.rows: list[tuple[str, float, int, float]] = []

    @contextlib.asynccontextmanager
    async def fault(self, what: str, possible: float = 0.0) -> AsyncIterator[None]:
        """Something happens in the block; at its end it is mended, and `possible` seconds later it can be known."""
        loop, asked = asyncio.get_running_loop(), self.names.asked
        began = loop.time()
        yield
        mended = loop.time()
        await asyncio.wait_for(self.client.is_served(), possible + 30)
        back, attempts = loop.time() - mended, self.names.asked - asked
        self.rows.append((what, mended - began, attempts, back))
        assert back <= possible + 1.0 + SLACK, what
        # A delay is half a second on average; a row of a hundred in three seconds would be a spin.
        assert 1 <= attempts <= 10 + 8 * (mended - began), what
        await asyncio.sleep(1.5)  # it lasts

    async def go_by(self) -> None:
        broker = self.broker
        async with self.fault("restarted, closed in good order"):
            await broker.stop()
            await asyncio.sleep(DOWN)
            await broker.start()
        async with self.fault("killed, and back at once"):
            await broker.stop(kill=True)
            await broker.start()
        async with self.fault("killed"):
            await broker.stop(kill=True)
            await asyncio.sleep(DOWN)
            await broker.start()
        (there,) = broker.connections
        assert self.client.connection is not None
        # Both ends are in this process: the one would keep the other's kernel content by sending again and again.
        with blackhole(there.transport), blackhole(self.client.connection.transport):
            async with self.fault("blackholed", DETECTION):
                pass
        there.abort()
        await until(lambda: len(broker.connections) == 1)
        async with self.fault("reset"):
            (there,) = broker.connections
            reset(there.transport.get_extra_info("socket"))
            there.abort()
        async with self.fault("moved to another address"):
            await broker.stop()
            await broker.start("127.0.0.2")
            await asyncio.sleep(DOWN)
            self.names.address = "127.0.0.2"
        async with self.fault("accepts, and closes at once"):
            await broker.stop()
            with listening("127.0.0.2", broker.port, socket.socket.close):
                await asyncio.sleep(DOWN)
            await broker.start("127.0.0.2")
        async with self.fault("accepts, and says nothing", 1.0):
            await broker.stop()
            mute: list[socket.socket] = []
            with listening("127.0.0.2", broker.port, mute.append):
                await asyncio.sleep(DOWN)
            await broker.start("127.0.0.2")
        for sock in mute:
            sock.close()
        assert broker.listener is not None
        async with self.fault("certificate broken, and mended"):
            broker.listener.ssl = broker.bad
            for there in list(broker.connections):
                there.abort()
            await asyncio.sleep(DOWN)
            broker.listener.ssl = broker.good


def descriptors() -> int:
    """Sockets of this process; libuv keeps a descriptor of /dev/null once it has listened."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(link.startswith("socket:") for link in links)


async def test_a_client_is_back_after_whatever_happens_to_its_server(
    dead_peers: None, authority: trustme.CA, client_tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, loop_name: str
) -> None:
    """Within a second of the possible, without a spin; no acknowledged message is lost, and nothing is left behind."""
    random.seed(1)
    await asyncio.to_thread(int)  # the thread of getaddrinfo
    names, broker, tasks, before = Names(monkeypatch), Broker(authority), asyncio.all_tasks(), descriptors()
    await broker.start()
    client = Client(broker.port, client_tls)
    running = asyncio.ensure_future(client.run())
    await asyncio.wait_for(client.is_served(), 30)
    day = Day(broker, client, names)
    try:
        async with asyncio.timeout(200):
            await day.go_by()
    finally:
        print(f"\n{loop_name}: a server's day, seconds\n{'':34}lasted  attempts  back after it was mended")
        for what, lasted, attempts, back in day.rows:
            print(f"{what:34}{lasted:6.1f}  {attempts:8}  {back:6.2f}")
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    print(f"{client.next} messages, {broker.received} received, {len(broker.stored)} stored; {names.asked} attempts")
    assert len(day.rows) == 9
    assert client.acknowledged <= broker.stored.keys()
    assert set(range(client.next)) - client.acknowledged == set(client.unacknowledged)
    assert set(broker.stored.values()) == {1}
    await broker.stop()
    await until(lambda: asyncio.all_tasks() == tasks)
    await until(lambda: descriptors() <= before)


@pytest.mark.alone
async def test_ten_thousand_connections_leave_nothing(loop_name: str) -> None:
    """No task, no descriptor, no memory."""
    cycles = 10_000

    async def handler(connection: kaio.Connection) -> None:
        await connection.send(b"x")

    async with kaio.serve(handler, "127.0.0.1", 0) as server:
        seen, marks = 0, list[tuple[int, int, int]]()
        async for connection in kaio.connect(server.listeners[0].address, retry=kaio.Retry(lasting=0)):
            async with connection:
                while True:
                    await connection.receive()
            seen += 1
            if seen in (cycles // 10, cycles):
                await asyncio.sleep(0.2)
                gc.collect()
                marks.append((len(gc.get_objects()), descriptors(), len(asyncio.all_tasks())))
            if seen == cycles:
                break
    print(f"\n{loop_name}: objects, descriptors and tasks after {cycles // 10} and {cycles} connections: {marks}")
    (objects, files, tasks), (objects_then, files_then, tasks_then) = marks
    assert objects_then - objects < cycles / 50
    assert (files_then, tasks_then) == (files, tasks)


# -- a thousand of them


SERVER: Final = """
import asyncio, signal, sys
import kaio

async def handler(connection):
    async for data in connection:
        await connection.send(data)

async def main():
    async with kaio.serve(handler, "127.0.0.1", int(sys.argv[1])) as server:
        print(server.listeners[0].address.port, flush=True)
        await server.serve_forever()

kaio.run(main())
"""


def start_server(port: int) -> tuple[subprocess.Popen[str], int]:
    """Start a server in a process of its own; return it and its port."""
    root = Path(__file__).parent.parent
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def histogram(times: list[float], width: float) -> str:
    """Bars."""
    buckets = Counter(int(at / width) for at in times)
    return "\n".join(
        f"{bucket * width:6.1f} s {buckets[bucket]:5} {'#' * -(-buckets[bucket] // 10)}"
        for bucket in range(min(buckets, default=0), max(buckets, default=-1) + 1)
    )


@pytest.mark.alone
@pytest.mark.parametrize("down", [3.0, 0.0], ids=["back after 3 s", "replaced at once"])
async def test_a_thousand_clients_do_not_stampede(down: float, loop_name: str) -> None:
    """Their attempts are spread; a server that is replaced at once is spared by `at_once=0`."""
    count = 1000
    loop = asyncio.get_running_loop()
    process, port = start_server(0)
    began, failed, back = 0.0, list[float](), list[float]()

    def note(error: Exception) -> bool:
        if began and not isinstance(error, kaio.ConnectionEnded):
            failed.append(loop.time() - began)
        return False

    retry = kaio.Retry(at_once=1 if down else 0, initial_delay=1.0, max_delay=4.0, lasting=1.0, final=note)
    standing = 0

    async def client() -> None:
        nonlocal standing
        async for connection in kaio.connect("127.0.0.1", port, keepalive="detect=10s", retry=retry):
            async with connection:
                await connection.send(b"x")
                await connection.receive()
                standing += 1
                if began:
                    back.append(loop.time() - began)
                try:
                    await connection.receive()
                finally:
                    standing -= 1

    tasks = [asyncio.ensure_future(client()) for _ in range(count)]
    try:
        await until(lambda: standing == count, within=60)
        await asyncio.sleep(1.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        began = loop.time()
        await asyncio.sleep(down)
        assert process.stdout is not None
        process.stdout.close()
        process, port = await asyncio.to_thread(start_server, port)
        await until(lambda: len(back) == count, within=60)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    width = 0.2
    print(f"\n{loop_name}: {count} clients lose their server; {len(failed)} attempts that failed")
    print(f"{histogram(failed, width)}\nconnected again\n{histogram(back, width)}")
    assert len(back) == count
    assert len(failed) <= count * (8 + down)
    # When an attempt fails is known when this process, which has all the clients, comes to it; so of those the number
    # counts, and of the spread what arrives at the server.
    assert max(Counter(int(at / width) for at in back).values()) <= count * 0.4
