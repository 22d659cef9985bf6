"""Sockets that are handed over by systemd or a parent, and what systemd is told (sd_notify)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kaio

from . import servers
from .conftest import echo, until

ROOT = Path(__file__).parent.parent
UNITS = ROOT / "docs" / "systemd"
PROGRAM = ROOT / "tests" / "programs" / "systemd_echo.py"


@contextlib.contextmanager
def listening(family: int = socket.AF_INET, where: Any = ("127.0.0.1", 0)) -> Iterator[socket.socket]:
    """A listening socket of somebody else's."""
    with socket.socket(family) as sock:
        sock.bind(where)
        sock.listen()
        yield sock


async def answers(address: Any) -> bool:
    """Whether a server is there."""
    async with kaio.connect(address) as connection:
        await connection.send(b"x")
        return await connection.receive() == b"x"


def moved(sock: socket.socket, to: int) -> int:
    """Duplicate a socket to a descriptor of a given number or above."""
    import fcntl

    return fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, to)


@pytest.fixture
def systemds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what systemd sets, for as many sockets as there are names; they begin at a descriptor of ours."""

    def hand_over(names: str | None, first: int, count: int, pid: int | str | None = None) -> None:
        monkeypatch.setattr("kaio.net.handed_over._FIRST", first)
        monkeypatch.setenv("LISTEN_FDS", str(count))
        monkeypatch.setenv("LISTEN_PID", str(os.getpid() if pid is None else pid))
        if names is None:
            monkeypatch.delenv("LISTEN_FDNAMES", raising=False)
        else:
            monkeypatch.setenv("LISTEN_FDNAMES", names)

    return hand_over


_numbers = itertools.count()


@contextlib.contextmanager
def row(*sockets: socket.socket) -> Iterator[int]:
    """Duplicates of sockets at descriptors that follow one another; the number of the first."""
    first = next(_numbers) * 10 + 300
    for at, sock in enumerate(sockets):
        os.dup2(sock.fileno(), first + at)
    try:
        yield first
    finally:
        for at in range(len(sockets)):
            with contextlib.suppress(OSError):
                os.close(first + at)


@pytest.mark.parametrize("family", ["IPv4", "IPv6", "unix"])
async def test_a_descriptor_is_served_and_goes_on_listening_elsewhere(family: str, tmp_path: Path) -> None:
    """With the policy; and after the end nobody is refused, and a Unix socket's path is still there."""
    places: dict[str, Any] = {
        "IPv4": (socket.AF_INET, ("127.0.0.1", 0)),
        "IPv6": (socket.AF_INET6, ("::1", 0)),
        "unix": (socket.AF_UNIX, f"{tmp_path}/s"),
    }
    with listening(*places[family]) as parents:
        ours = moved(parents, 100)
        listener = kaio.Listener(f"fd:{ours}")
        address = listener.address
        async with kaio.serve(echo, listeners=[listener], keepalive=None if family == "unix" else "7s:3s:2") as server:
            assert await answers(address)
            assert not os.get_inheritable(ours)
            if family != "unix":
                async with kaio.connect(address):
                    await until(lambda: server.connections)
                    (connection,) = server.connections
                    assert kaio.inspect(connection).idle == 7
            with pytest.raises(kaio.AddressError, match=f"fd:{ours}.*in use by another listener"):
                async with kaio.serve(echo, listeners=[kaio.Listener(f"fd:{ours}")]):
                    pass
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(ours)
        with pytest.raises(kaio.AddressError, match="not open"):
            kaio.Listener(f"fd:{ours}")
        with socket.socket(parents.family) as client:
            client.connect(parents.getsockname())
        again = moved(parents, 100)
        async with kaio.serve(echo, listeners=[kaio.Listener(f"fd:{again}")]):
            assert await answers(address)


async def test_systemds_sockets_by_name(systemds: Any, tmp_path: Path) -> None:
    """One, several under one name, and all."""
    with (
        listening() as web,
        listening() as api,
        listening(socket.AF_INET6, ("::1", 0)) as more,
        row(web, api, more) as first,
    ):
        systemds("web:api:api", first, 3)
        one, two = kaio.Listener("systemd:web"), kaio.Listener("systemd:api")
        async with kaio.serve(echo, listeners=[one, two]) as server:
            assert len(two.sockets) == 2
            assert len(server.sockets) == 3
            for sock in (web, api, more):
                assert await answers(kaio.TcpAddress(*sock.getsockname()[:2]))
        # Its number may stand for anything by now.
        with pytest.raises(kaio.AddressError, match="in use by another listener, or was"):
            kaio.Listener("systemd:web")
    with listening() as web, listening() as api, row(web, api) as first:
        systemds("web:api", first, 2)
        os.set_inheritable(first + 1, True)
        async with kaio.serve(echo, "systemd:web") as server:
            assert len(server.sockets) == 1
            assert not os.get_inheritable(first + 1)
            async with kaio.serve(echo, "systemd:api"):
                assert await answers(kaio.TcpAddress(*api.getsockname()))
    with listening() as web, listening() as api, row(web, api) as first:
        systemds("web:api", first, 2)
        async with kaio.serve(echo, listeners=[kaio.Listener("systemd:")]) as server:
            assert len(server.sockets) == 2


@pytest.mark.parametrize(
    ("names", "count", "pid", "asked", "text"),
    [
        ("web", 1, 1, "systemd:web", "not handed over|no sockets were handed over"),
        ("web", 1, "", "systemd:web", "no sockets were handed over"),
        ("web", "x", None, "systemd:web", "no sockets were handed over"),
        ("web", "-1", None, "systemd:web", "no sockets were handed over"),
        ("web", 0, None, "systemd:web", "there are: none"),
        ("web", 1, None, "systemd:api", "there are: 'web'"),
        (None, 1, None, "systemd:api", "there are: 'unknown'"),
        ("a\nb", 1, None, "systemd:api", r"there are: 'a\\nb'"),
    ],
)
def test_what_systemd_has_not_handed_over(
    names: str | None, count: Any, pid: Any, asked: str, text: str, systemds: Any
) -> None:
    """An error when the listener is made, in one line, that says what there is."""
    with listening() as sock, row(sock) as first:
        systemds(names, first, count, pid)
        with pytest.raises(kaio.AddressError, match=text) as caught:
            kaio.Listener(asked)
        assert str(caught.value).isprintable()


def test_names_may_be_missing(systemds: Any) -> None:
    """An old systemd, or fewer names than sockets: they are called unknown, as by sd_listen_fds_with_names."""
    with listening() as web, listening() as api, row(web, api) as first:
        systemds("web", first, 2)
        assert kaio.Listener("systemd:unknown").address.port == api.getsockname()[1]  # type: ignore[union-attr]
        systemds(None, first, 2)
        assert kaio.Listener("systemd:unknown").address.port == web.getsockname()[1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("fd:", "number"),
        ("fd:x", "number"),
        ("fd:-1", "number"),
        ("fd:٣", "number"),
        ("fd:99999999999", "number"),
        ("fd:9999", "not open"),
        ("pipe", "not a socket"),
        ("datagram", "stream"),
        ("connected", "is a connection"),
    ],
)
def test_what_is_no_listening_socket(what: str, text: str) -> None:
    """A clear error, and nothing is closed."""
    with contextlib.ExitStack() as stack:
        if what == "pipe":
            ends = os.pipe()
            for each in ends:
                stack.callback(os.close, each)
            what = f"fd:{ends[0]}"
        elif what == "datagram":
            what = f"fd:{stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)).fileno()}"
        elif what == "connected":
            one, two = socket.socketpair()
            stack.enter_context(two)
            what = f"fd:{stack.enter_context(one).fileno()}"
        with pytest.raises(kaio.AddressError, match=text):
            kaio.Listener(what)


def test_a_mixture_is_refused(systemds: Any, tmp_path: Path) -> None:
    """TCP and Unix under one name would have a policy and none."""
    with listening() as web, listening(socket.AF_UNIX, f"{tmp_path}/s") as other, row(web, other) as first:
        systemds("web:web", first, 2)
        with pytest.raises(kaio.AddressError, match="all TCP, or all Unix"):
            kaio.Listener("systemd:web")


# -- sd_notify


@contextlib.contextmanager
def service_manager(monkeypatch: pytest.MonkeyPatch, where: str) -> Iterator[socket.socket]:
    """A socket as systemd has one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + where[1:] if where.startswith("@") else where)
        sock.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", where)
        yield sock


@pytest.mark.parametrize("kind", ["path", "abstract"])
async def test_systemd_is_told(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ready, alive, stopping: in this order, with the time that stopping may take."""
    where = f"{tmp_path}/n" if kind == "path" else f"@kaio-{os.getpid()}-{time.monotonic_ns()}"
    with service_manager(monkeypatch, where) as manager:
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        async with kaio.serve(echo, "127.0.0.1", 0, close_timeout=3) as server:
            serving = asyncio.create_task(server.serve_until(signal.SIGUSR1, grace=5, delay=0.2))
            said: list[str] = []
            while "READY=1" not in said or said.count("WATCHDOG=1") < 3:
                said.append((await asyncio.to_thread(manager.recv, 4096)).decode())
            os.kill(os.getpid(), signal.SIGUSR1)
            assert await serving == signal.SIGUSR1
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                said.append(manager.recv(4096).decode())
    assert said.count("READY=1") == 1
    (stopping,) = [each for each in said if each.startswith("STOPPING=1")]
    assert stopping == "STOPPING=1\nEXTEND_TIMEOUT_USEC=10200000"
    assert said.index(stopping) > said.index("READY=1")
    assert {each for each in said if each != stopping} == {"READY=1", "WATCHDOG=1"}


async def test_a_loop_that_hangs_does_not_say_that_it_lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That is what a watchdog is for."""
    with service_manager(monkeypatch, f"{tmp_path}/n") as manager:
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        async with kaio.serve(echo, "127.0.0.1", 0) as server:
            serving = asyncio.create_task(server.serve_until(signal.SIGUSR1))
            while await asyncio.to_thread(manager.recv, 4096) != b"READY=1":
                pass
            manager.setblocking(False)
            await asyncio.sleep(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    manager.recv(4096)
            time.sleep(0.5)  # noqa: ASYNC251 - it hangs
            with pytest.raises(BlockingIOError):
                manager.recv(4096)
            os.kill(os.getpid(), signal.SIGUSR1)
            await serving


@pytest.mark.parametrize("where", ["", "relative", "/nobody/there", "@nobody-there", "vsock:2:1234"])
def test_nobody_listens(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then notify says so, and nothing else happens."""
    monkeypatch.setenv("NOTIFY_SOCKET", where)
    assert kaio.notify("READY=1") is False
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert kaio.notify("READY=1") is False


def test_a_full_socket_does_not_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A manager that does not read."""
    with service_manager(monkeypatch, f"{tmp_path}/n"):
        assert False in [kaio.notify(f"STATUS={'x' * 1000}") for _ in range(5000)]


def test_reloading_has_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Type=notify-reload wants it."""
    with service_manager(monkeypatch, f"{tmp_path}/n") as manager:
        before = time.monotonic_ns() // 1000
        assert kaio.notify("RELOADING=1", "STATUS=new certificates") is True
        first, second, third = manager.recv(4096).decode().split("\n")
    assert (first, second) == ("RELOADING=1", "STATUS=new certificates")
    assert before <= int(third.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("bad", ["READY", "=1", "STATUS=a\nREADY=1", "", "A B=1"])
def test_bad_assignments_are_refused(bad: str) -> None:
    """None is sent, and none slips in by a newline."""
    with pytest.raises(ValueError, match="NAME=value"):
        kaio.notify(bad)


# -- the real ones


def systemds_program(name: str) -> str:
    """A program of systemd's, which scripts/install-system-packages installs."""
    found = shutil.which(name)
    assert found is not None, f"{name} is missing: run scripts/install-system-packages"
    return found


def test_the_units_are_valid(tmp_path: Path) -> None:
    """systemd's own judgement on those in docs/systemd."""
    for unit in UNITS.iterdir():
        shutil.copy(unit, tmp_path)
    service = tmp_path / "kaio-echo.service"
    service.write_text(service.read_text().replace("/usr/bin/python3", sys.executable))
    done = subprocess.run(
        [systemds_program("systemd-analyze"), "verify", "--man=no", str(service), str(tmp_path / "kaio-echo.socket")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kaio-echo" not in done.stderr, done.stderr


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_socket_activation(loop: str) -> None:
    """systemd-socket-activate hands over a port under a name; the first client starts the service."""
    port = servers.free_port()
    command = [systemds_program("systemd-socket-activate"), "-l", f"127.0.0.1:{port}", "--fdname=web"]
    command += ["-E", f"PYTHONPATH={ROOT}", sys.executable, str(PROGRAM), loop]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "Listening on" in process.stderr.readline()
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                client.sendall(b"hello")
                assert client.recv(100) == b"hello"
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert "Traceback" not in said
