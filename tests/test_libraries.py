"""Real libraries against real servers: their sockets have the policy, and they hear of a peer that has died.

All of it runs in programs of its own (programs/lib_*.py), whose libraries know nothing of kaio; their sockets are read
from outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kaio import TcpState
from kaio.tools.processes import ProcessSocket, sockets
from kaio.tools.processes import lacking as no_looking

from . import servers
from .conftest import reset
from .namespaces import Routed
from .servers import Running

ROOT: Final = Path(__file__).parent.parent
KAIO_RUN: Final = ("-m", "kaio", "run", "--keepalive", "1:1:2", "--sweep", "1s")
POLICY: Final = (True, 1, 1, 2)
REDIS_OWN: Final = (True, 30, 5, 3)  # redis/_defaults.py
BOUND: Final = 3.0 + 3  # the detection time, and a busy machine
CLIENTS: Final = ("asyncpg", "psycopg", "redis.asyncio", "aiohttp", "httpx", "websockets", "grpc.aio")
SERVERS: Final = ("aiohttp", "uvicorn", "websockets", "grpc.aio")
ENDED: Final = (TcpState.CLOSE, TcpState.TIME_WAIT)
CROWD: Final = 5000

pytestmark = pytest.mark.skipif(no_looking() is not None, reason=str(no_looking()))
both_bases = pytest.mark.parametrize("base", ["asyncio", "uvloop"])


# -- programs


class Program:
    """A Python program that is told lines, and tells lines of JSON."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "no_proxy": "*"},
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.complaints: list[str] = []
        self._lines: list[dict[str, Any]] = []
        self._more = threading.Condition()
        self._readers = [threading.Thread(target=read) for read in (self._read, self._read_complaints)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self._lines.append(json.loads(line))
                self._more.notify()

    def _read_complaints(self) -> None:
        assert self.process.stderr is not None
        self.complaints.extend(self.process.stderr)

    def say(self, line: str) -> None:
        """Tell it something."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def first(self) -> dict[str, Any]:
        """Its first line."""
        with self._more:
            assert self._more.wait_for(lambda: self._lines, 20), self.complaints
            return self._lines[0]

    def said(self, step: str) -> dict[str, dict[str, Any]]:
        """What libraries have said of a step so far."""
        return {line["library"]: line for line in list(self._lines) if line.get("step") == step}

    def answers(self, step: str, libraries: Iterable[str] = CLIENTS) -> dict[str, dict[str, Any]]:
        """What each library says of a step."""
        with self._more:
            self._more.wait_for(lambda: self.said(step).keys() >= set(libraries), 20)
            answers = self.said(step)
        assert answers.keys() == set(libraries), (step, answers, self.complaints)
        return answers

    def end(self) -> None:
        """End it and its children, and wait until they have."""
        os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[Program]:
    """A program for the block, which has nothing to complain of."""
    running = Program(*arguments)
    try:
        yield running
    finally:
        running.end()
    assert "Traceback" not in "".join(running.complaints), "".join(running.complaints)


def until(condition: Callable[[], object], within: float = 20) -> None:
    """Wait for what no event announces."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# -- sockets, from outside


def times(found: ProcessSocket) -> tuple[object, ...]:
    """What says when an idle connection ends."""
    state = found.state
    return state.enabled, state.idle, state.interval, state.count


def standing(pid: int) -> list[ProcessSocket]:
    """The sockets of a process that have a peer, or accept."""
    return [found for found in sockets(pid) if found.listening or found.tcp_state == TcpState.ESTABLISHED]


def uncovered(pid: int, own: Iterable[int] = ()) -> list[ProcessSocket]:
    """The sockets that have not what they ought to: redis's own times where the local port is one of those."""
    return [found for found in standing(pid) if times(found) != (REDIS_OWN if found.local[1] in own else POLICY)]


def wait_until_covered(own: Iterable[int], *programs: Program) -> None:
    """A sweep finds the C core's sockets within a second."""
    until(lambda: not any(uncovered(each.pid, own) for each in programs), within=10)


# -- libraries and what they talk to


@dataclasses.dataclass
class Party:
    """Clients, and the servers that are libraries; each client has done some work."""

    clients: Program
    servers: Program
    idle: dict[str, list[int]]
    """The local ports of each client's connections that do nothing from now on."""
    own: list[int]
    """That of the connection for which redis-py chose."""


@contextlib.contextmanager
def party(
    base: str,
    databases: dict[str, Running],
    network: Routed | None = None,
    runner: tuple[str, ...] = KAIO_RUN,
    policy: tuple[str, ...] = (),
) -> Iterator[Party]:
    """Both by a runner; or, given a policy, the clients on a loop of kaio's factory."""
    host = "127.0.0.1" if network is None else network.SERVER
    with contextlib.ExitStack() as stack:
        with contextlib.nullcontext() if network is None else network.server.entered():
            serving = stack.enter_context(program(*runner, "tests/programs/lib_servers.py", base, host))
        ports = {name: server.port for name, server in databases.items()}
        where = json.dumps({"host": host, **ports, **serving.first()})
        command = (*(() if policy else runner), "-m", "tests.programs.lib_clients", base, where, *policy)
        with contextlib.nullcontext() if network is None else network.client.entered():
            clients = stack.enter_context(program(*command))
        clients.say("open")
        answers = clients.answers("open")
        assert [answer for answer in answers.values() if answer["error"]] == []
        idle = {name: answer["result"]["idle"] for name, answer in answers.items()}
        yield Party(clients, serving, idle, answers["redis.asyncio"]["result"]["own"])


@pytest.fixture(scope="module")
def databases() -> Iterator[dict[str, Running]]:
    """PostgreSQL, redis-server and nginx on loopback."""
    missing = servers.lacking()
    if missing is not None:
        pytest.skip(missing)
    with servers.all_servers() as running:
        yield running


@both_bases
@pytest.mark.parametrize("policy", [(), ("1:1:2",)], ids=["kaio run", "loop_factory"])
def test_the_sockets_of_each_library_have_the_policy(
    policy: tuple[str, ...], base: str, databases: dict[str, Running]
) -> None:
    """Whatever made them; redis-py's own choice stands where it chose."""
    with party(base, databases, policy=policy) as here:
        if policy:
            here.clients.say("sweep")  # kaio run does it by itself
        wait_until_covered(here.own, here.clients, here.servers)
        connected = standing(here.clients.pid)
        assert {found.local[1] for found in connected} > {port for ports in here.idle.values() for port in ports}
        libraries = here.servers.first().values()
        accepted = {found.peer[1] for found in standing(here.servers.pid) if found.peer}
        assert accepted == {found.local[1] for found in connected if found.peer and found.peer[1] in libraries}


# -- crowds


@pytest.fixture
def _descriptors() -> Iterator[None]:
    """Enough of them for a crowd."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CROWD + 1000:
        pytest.skip(f"needs {CROWD + 1000} file descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CROWD + 1000), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def crowd(port: int) -> Iterator[None]:
    """Thousands of clients, as fast as they can be.

    Each says something: a server whose queue is full answers with SYN cookies, and forgets a client who then is silent.
    """
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(CROWD)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        for client in clients:
            client.settimeout(20)
            client.send(b"G")
            reset(client)
        yield


def family(pid: int) -> list[int]:
    """A process and its children."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [pid, *map(int, file.read().split())]


@pytest.mark.usefixtures("_descriptors")
@pytest.mark.parametrize("options", ["--loop auto", "--loop asyncio", "--workers 2"])
def test_every_connection_of_a_busy_uvicorn_has_the_policy(options: str) -> None:
    """Thousands at once, each covered from its first moment: no sweep helps.

    Their times are long: thousands of probes in the same millisecond are more than loopback's queue takes
    (net.core.netdev_max_backlog), and the crowd was born in the same second.
    """
    kaio_run = ("-m", "kaio", "run", "--keepalive", "20s:10s:4", "--sweep", "off")
    uvicorn = ("-m", "uvicorn", "tests.programs.lib_asgi:application", "--port", "0", "--log-level", "error")
    with program(*kaio_run, *uvicorn, *options.split()) as server:

        def found(*, listening: bool) -> list[ProcessSocket]:
            return [one for pid in family(server.pid) for one in standing(pid) if one.listening is listening]

        until(lambda: found(listening=True))
        with crowd(found(listening=True)[0].local[1]):
            until(lambda: len(found(listening=False)) == CROWD)
            assert {times(one) for one in found(listening=False) + found(listening=True)} == {(True, 20, 10, 4)}


# -- death


@pytest.fixture
def far_databases(network: Routed) -> Iterator[dict[str, Running]]:
    """PostgreSQL, redis-server and nginx on the network's server."""
    missing = servers.lacking()
    if missing is not None:
        pytest.skip(missing)
    with contextlib.ExitStack() as stack:
        with network.server.entered():
            running = stack.enter_context(servers.all_servers(network.SERVER))
        yield running


@contextlib.contextmanager
def silence(network: Routed) -> Iterator[float]:
    """For the block, the router throws away all that it should forward; yields when it began to."""
    network.rules("""
        table ip silence {
            chain everything {
                type filter hook forward priority filter; policy drop;
            }
        }
    """)
    yield time.monotonic()
    network.rules("delete table ip silence")


def ends(clients: Program, ports: Iterable[int], since: float) -> dict[int, float]:
    """After how long the connections from each of the ports ended: closed by the library, or by the kernel."""
    ended: dict[int, float] = {}
    wanted = set(ports)
    while wanted - ended.keys():
        still = {found.local[1]: found for found in sockets(clients.pid) if found.tcp_state not in ENDED}
        after = time.monotonic() - since
        assert after < BOUND, [still[port] for port in wanted & still.keys()]
        ended |= dict.fromkeys(wanted - still.keys() - ended.keys(), after)
        time.sleep(0.05)
    return ended


@pytest.mark.slow
@both_bases
def test_each_library_reports_a_dead_peer(base: str, network: Routed, far_databases: dict[str, Running]) -> None:
    """Idle, in the middle of a request, and with a request under way; and pools are well again when the peer is."""
    with party(base, far_databases, network) as here:
        here.clients.say("request")
        here.clients.answers("begun")
        wait_until_covered(here.own, here.clients, here.servers)
        ports = {found.local[1] for found in standing(here.clients.pid)} - set(here.own)
        with silence(network) as began:
            here.clients.say("send")
            over = ends(here.clients, ports, began)
            asked, sent = here.clients.answers("request"), here.clients.answers("send")
            gone = here.servers.answers("gone", SERVERS)
        back = time.monotonic()
        here.clients.say("use")
        used = here.clients.answers("use")
        here.clients.say("again")
        again = here.clients.answers("again")
        wait_until_covered(here.own, here.clients)

    print(f"\n| client, on {base} | idle: over after | its next use | mid-request | sent into silence | back after |")
    print("|---|---|---|---|---|---|")
    for name in CLIENTS:
        idle = f"{max(over[port] for port in here.idle[name]):.1f} s | {used[name]['error'] or 'connects anew'}"
        heard = f"{told(asked[name], began)} | {told(sent[name], began)}"
        print(f"| {name} | {idle} | {heard} | {again[name]['at'] - back:.1f} s |")
    print(f"\n| server, on {base} | its handler hears |\n|---|---|")
    for name in SERVERS:
        print(f"| {name} | {told(gone[name], began)} |")

    for answers in (asked, sent, gone):
        assert all(line["error"] and 1 < line["at"] - began < BOUND for line in answers.values()), answers
    assert all(line["error"] is None and line["at"] - back < BOUND for line in again.values()), again


def told(line: dict[str, Any], began: float) -> str:
    """What a library's caller was told, and when."""
    return f"{line['error']}, {line['at'] - began:.1f} s"


@pytest.mark.slow
def test_without_kaio_no_library_reports_it(network: Routed, far_databases: dict[str, Running]) -> None:
    """The same programs, by the same Python: what the other test sees is kaio's doing."""
    with party("asyncio", far_databases, network, runner=()) as here:
        here.clients.say("request")
        here.clients.answers("begun")
        with silence(network):
            here.clients.say("send")
            time.sleep(BOUND)
            assert not any(here.clients.said(step) for step in ("request", "send"))
            assert not here.servers.said("gone")
