"""What all tests share: both event loops, ends of connections, and privileges that must not be missing in CI."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import inspect
import itertools
import os
import socket
import ssl
import struct
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import pytest
import trustme
import uvloop

import kaio
from kaio.testing import lacking

from . import namespaces

_numbers = itertools.count()
CI = bool(os.environ.get("CI"))

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


TIME, SLOW_TIME = 45.0, 110.0  # seconds that an asynchronous test may take

COMPLAINTS = pytest.StashKey[list[dict[str, Any]]]()
FAILED = pytest.StashKey[bool]()


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every asynchronous test on both loops, or on those that its marker `loops` names."""
    marker = item.get_closest_marker("loops")
    factories: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = LOOPS if marker is None else marker.args[0]
    return factories


@pytest.fixture
def loop_name(request: pytest.FixtureRequest) -> str:
    """The name of the loop that an asynchronous test runs on."""
    factories = pytest_asyncio_loop_factories(request.config, request.node)
    parameters = request.node.callspec.params.values()
    return next(name for name, factory in factories.items() if any(factory is each for each in parameters))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Bound an asynchronous test's time, and fail it for whatever its loop's exception handler is told."""
    if not (isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj)):
        return (yield)
    test = item.obj
    limit = TIME if item.get_closest_marker("slow") is None else SLOW_TIME
    item.stash[COMPLAINTS] = complaints = []
    item.stash[FAILED] = True

    @functools.wraps(test)
    async def bounded(**arguments: Any) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(limit):
            await test(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item, "obj", bounded)
        yield
    _no_complaints(item)
    item.stash[FAILED] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Fail a test for what the exception handler is told while its loop is closed, too."""
    with warnings.catch_warnings():
        if item.stash.get(FAILED, False):
            # Of what a failed test leaves open. uvloop's close() does not return where that warning is an error.
            warnings.simplefilter("ignore", ResourceWarning)
        yield
    if not item.stash.get(FAILED, True):
        _no_complaints(item)


def _no_complaints(item: pytest.Item) -> None:
    if item.stash[COMPLAINTS] and item.get_closest_marker("complains") is None:
        raise AssertionError(f"the loop's exception handler was told: {item.stash[COMPLAINTS]}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first, as many with each worker: they wait side by side. Those that run alone come last."""
    parts: dict[str, list[pytest.Item]] = {"slow": [], "fast": [], "alone": []}
    for item in items:
        parts[next((name for name in ("alone", "slow") if item.get_closest_marker(name) is not None), "fast")].append(
            item
        )
    # pytest-xdist gives each worker as long a row of them, one behind the other.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    rows = [parts[name][worker::workers] for worker in range(workers) for name in ("slow", "fast")]
    items[:] = [item for row in (*rows, parts["alone"]) for item in row]


@pytest.hookimpl(wrapper=True, tryfirst=True)  # faulthandler_timeout does not count the time of waiting
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Run a test that is marked `alone` while no other worker runs one.

    Any other test holds a lock with others, and this one holds it for itself. It waits for a moment in which nothing
    else runs, and so for the end of the run; hence the order above.
    """
    if not hasattr(item.config, "workerinput"):  # without pytest-xdist every test is alone
        return (yield)
    with open(__file__, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH if item.get_closest_marker("alone") is None else fcntl.LOCK_EX)
        try:
            return (yield)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # also of a process that a test forked and that has not ended


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """In CI a test that is skipped for want of something is a failure."""
    report: Any = yield
    if CI and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("may_skip"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _no_policy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("KAIO_KEEPALIVE", "KEEPALIVE", "KEEPIDLE", "KEEPINTVL", "KEEPCNT"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def _filters() -> str | None:
    return lacking()


@pytest.fixture(autouse=True)
def _records_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kaio sets on other processes' sockets is remembered for one test, and not on the machine."""
    monkeypatch.setenv("KAIO_RUNTIME_DIR", os.path.join(tmp_path_factory.getbasetemp(), f"kaio-{next(_numbers)}"))


@pytest.fixture
def dead_peers(_filters: str | None) -> None:
    """The test lets peers play dead."""
    if _filters is not None:
        pytest.skip(_filters)


@pytest.fixture(scope="session")
def _networks() -> str | None:
    return namespaces.lacking()


@pytest.fixture
def network(_networks: str | None) -> Iterator[namespaces.Routed]:
    """A client, a router and a server of the test's own."""
    if _networks is not None:
        pytest.skip(_networks)
    with namespaces.routed() as network:
        yield network


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """A certificate authority for the tests' TLS."""
    return trustme.CA()


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    """A TLS context for servers at localhost."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1", "::1").configure_cert(context)
    return context


@pytest.fixture(scope="session")
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    """A TLS context for clients that trust it."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


class Recorder(kaio.KeepaliveProtocol):
    """A protocol that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.made = asyncio.get_running_loop().create_future()
        self.lost = asyncio.get_running_loop().create_future()
        self.lost_at = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport: kaio.KeepaliveTransport = transport
        self.events.append(("made", transport))
        self.made.set_result(transport)

    def data_received(self, data: bytes) -> None:
        self.events.append(("data", data))

    def eof_received(self) -> None:
        self.events.append(("eof", None))

    def peer_dead(self, error: kaio.DeadPeerError) -> None:
        self.events.append(("dead", error))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_at = asyncio.get_running_loop().time()
        self.events.append(("lost", exc))
        self.lost.set_result(exc)

    @property
    def names(self) -> list[str]:
        """The callbacks that came, without their arguments."""
        return [name for name, _ in self.events]


def reset(sock: Any) -> None:
    """Let closing this socket send a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def echo(connection: kaio.Connection) -> None:
    """A handler that sends back what comes."""
    async for data in connection:
        await connection.send(data)


async def until(condition: Callable[[], object], *, within: float = 5.0) -> None:
    """Wait for a condition that no event announces."""
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def base(loop_name: str) -> str:
    """The name of the base under kaio's loop."""
    return loop_name
