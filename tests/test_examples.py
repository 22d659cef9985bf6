"""The examples, run as they are and used by real clients; some of them play dead."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from kaio.testing import blackhole

from .lines import Lines

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = "idle=1s,interval=1s,count=2,stalled=drop"  # dead after 3 s, in whatever state
BOUND = 3.0 + 1.0


class Program:
    """An example that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self._printed = Lines(process.stdout)

    def find(self, pattern: str, within: float = 10.0) -> re.Match[str]:
        """The next line that has a pattern."""
        return self._printed.find(pattern, within)

    def connect(self, port: int | None = None) -> socket.socket:
        """A client's socket."""
        sock = socket.create_connection(("127.0.0.1", self.port if port is None else port), timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    @property
    def port(self) -> int:
        """Where it listens; its first line says so."""
        if not self._printed.seen:
            self.find("")
        first = self._printed.seen[0]
        found = re.match(r"listening on 0\.0\.0\.0:(\d+)", first)
        assert found, first
        return int(found[1])


@contextlib.contextmanager
def running(name: str, *arguments: str) -> Iterator[Program]:
    """Run an example; in the end it is interrupted as by Ctrl-C, and must end quietly and have complained of nothing.

    `-W error` makes it complain of a socket that was not closed.
    """
    command = (sys.executable, "-W", "error", str(EXAMPLES / name), *arguments)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Program(process)
            process.send_signal(signal.SIGINT)
            process.wait(10)
            assert process.stderr is not None
            said = [line for line in process.stderr if not DEATH.match(line)]
            assert (process.returncode, said) == (0, [])
        finally:
            process.kill()


DEATH = re.compile(r"peer \S+ is dead \(")  # kaio's own log, which nobody has configured


def exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def exchange(sock: socket.socket, words: bytes) -> None:
    """Send, and have the echo."""
    sock.sendall(words)
    assert exactly(sock, len(words)) == words


def ended(sock: socket.socket) -> bool:
    """Whether the other side has closed the connection, gently or not."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


# -- the echo servers


@pytest.mark.parametrize("name", ["echo_handler.py", "echo_protocol.py"])
def test_echo(name: str) -> None:
    with running(name, "--port", "0") as program, program.connect() as one, program.connect() as two:
        exchange(one, b"one")
        exchange(two, b"two" * 100_000)
        one.shutdown(socket.SHUT_WR)
        assert ended(one)
        exchange(two, b"two")


def test_echo_handler_listens_twice() -> None:
    with running("echo_handler.py", "--port", "0") as program:
        assert program.find(r"listening on .*, keepalive (.*)")[1] == "6s:1s:4"
        port, policy = program.find(r"listening on 0\.0\.0\.0:(\d+), keepalive (.*)").groups()
        assert policy == "175s:87s:4"
        with program.connect(int(port)) as client:
            exchange(client, b"far")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["echo_handler.py", "echo_protocol.py"])
@pytest.mark.parametrize("cause", ["keepalive", "unacknowledged"])
def test_echo_says_of_what_a_client_died(name: str, cause: str, dead_peers: None) -> None:
    with running(name, "--port", "0", "--keepalive", SHORT) as program, program.connect() as doomed:
        with program.connect() as other:
            exchange(doomed, b"here")
            port = doomed.getsockname()[1]
            with blackhole(doomed):
                silence = "[34]"
                if cause == "unacknowledged":
                    doomed.sendall(b"the echo of this is never acknowledged")
                    silence = "[0-4]"  # its kernel does not hear that this arrived, and sends it again and again
                program.find(rf"127\.0\.0\.1:{port} is dead \({cause}\): silent for {silence}\.\d s", within=BOUND)
                exchange(other, b"still served")
        if name == "echo_protocol.py":
            program.find(rf"closed: DeadPeerError.*{cause}", within=1)


# -- the client


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(10)
        yield sock


def accept(listening: socket.socket) -> socket.socket:
    """An accepted connection."""
    sock, _ = listening.accept()
    sock.settimeout(10)
    return sock


def answer(sock: socket.socket, count: int) -> None:
    """Echo so many lines."""
    with sock.makefile("rb") as lines:
        for _ in range(count):
            sock.sendall(lines.readline())


def port_of(sock: socket.socket) -> str:
    return str(sock.getsockname()[1])


@pytest.mark.slow
def test_client_notices_that_its_server_died_and_comes_back(listening: socket.socket, dead_peers: None) -> None:
    options = ("--port", port_of(listening), "--keepalive", SHORT, "--every", "0.1")
    with running("client.py", *options) as program:
        program.find("connected to 127.0.0.1:")
        with accept(listening) as first:
            answer(first, 3)
            program.find("echoed: hello 3")
            with blackhole(first):
                program.find(r"is dead \(unacknowledged\)", within=BOUND + 1)
                program.find("connected to 127.0.0.1:")
                with accept(listening) as second:
                    answer(second, 2)
                    program.find("echoed: hello 2")


@pytest.mark.slow
def test_client_finds_an_idle_server_dead(listening: socket.socket, dead_peers: None) -> None:
    options = ("--port", port_of(listening), "--keepalive", SHORT)
    with running("client.py", *options) as program, accept(listening) as server:
        assert server.recv(100)  # acknowledged, and not answered: the client waits
        with blackhole(server):
            program.find(r"is dead \(keepalive\)", within=BOUND + 1)


def test_client_waits_for_a_server_that_is_not_there_yet() -> None:
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        late.settimeout(10)
        with running("client.py", "--port", port_of(late)) as program:
            program.find(r"connecting to 127\.0\.0\.1:\d+ again in \d+\.\d+ s: .*(refused|failed)")
            late.listen()
            with accept(late) as server:
                answer(server, 1)
                program.find("echoed: hello 1")


def test_client_comes_back_when_its_server_closes(listening: socket.socket) -> None:
    with running("client.py", "--port", port_of(listening)) as program:
        accept(listening).close()
        program.find("connecting to .* again in ")
        with accept(listening) as server:
            answer(server, 1)
            program.find("echoed: hello 1")


def test_client_speaks_tls(
    listening: socket.socket, server_tls: ssl.SSLContext, authority: trustme.CA, tmp_path: Path
) -> None:
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    options = ("--port", port_of(listening), "--tls", "--cafile", str(trusted), "--every", "0.05")
    with running("client.py", *options) as program:
        for _ in range(2):  # it comes back to a server that has closed
            with accept(listening) as raw, server_tls.wrap_socket(raw, server_side=True) as server:
                for number in (1, 2):
                    server.sendall(server.recv(100))
                    program.find(f"echoed: hello {number}")
                server.unwrap().close()  # with TLS's own farewell, as a server should


# -- the chat


class Member:
    """Somebody in the chat."""

    def __init__(self, program: Program, name: str) -> None:
        self.sock = program.connect()
        self._lines = self.sock.makefile("r", encoding="utf-8", newline="\n")
        assert self.hear() == "Your name?"
        self.say(name)

    def hear(self) -> str:
        """The next line; nothing when there will be none."""
        return self._lines.readline().rstrip("\n")

    def say(self, line: str) -> None:
        self.sock.sendall(f"{line}\n".encode())

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.close()
        self.sock.close()


def test_chat_passes_lines_on_and_says_who_comes_and_goes() -> None:
    with running("chat.py", "--port", "0") as program, Member(program, "ann") as ann:
        assert ann.hear() == "* ann has come"
        with Member(program, "bob") as bob:
            assert ann.hear() == bob.hear() == "* bob has come"
            bob.say("good morning")
            ann.say("grüß dich")
            assert {ann.hear(), ann.hear()} == {"bob: good morning", "ann: grüß dich"}
            assert {bob.hear(), bob.hear()} == {"bob: good morning", "ann: grüß dich"}
            with Member(program, "bob") as other:
                assert other.hear() == "That one is taken."
                assert other.hear() == ""
        assert ann.hear() == "* bob has left"


def test_chat_shows_out_whose_line_does_not_end() -> None:
    with running("chat.py", "--port", "0") as program, Member(program, "ann") as ann:
        assert ann.hear() == "* ann has come"
        with Member(program, "bob") as bob:
            assert ann.hear() == "* bob has come"
            bob.sock.sendall(b"x" * 5000)
            assert ann.hear() == "* bob was shown out: too long a line"


def test_chat_is_not_disturbed_by_who_only_looks_in() -> None:
    with running("chat.py", "--port", "0") as program:
        program.connect().close()
        with program.connect() as noisy:
            assert exactly(noisy, len(b"Your name?\n"))
            noisy.sendall(b"x" * 1000)
            assert ended(noisy)
        with Member(program, "ann") as ann:
            assert ann.hear() == "* ann has come"


@pytest.mark.slow
@pytest.mark.parametrize("state", ["idle", "while others talk"])
def test_chat_is_told_when_a_member_is_gone(state: str, dead_peers: None) -> None:
    with (
        running("chat.py", "--port", "0", "--keepalive", SHORT) as program,
        Member(program, "ann") as ann,
        Member(program, "bob") as bob,
    ):
        assert [ann.hear(), ann.hear()] == ["* ann has come", "* bob has come"]
        assert bob.hear() == "* bob has come"
        with blackhole(bob.sock):
            began = time.monotonic()
            if state != "idle":
                ann.say("anybody there?")
                assert ann.hear() == "ann: anybody there?"
            assert re.fullmatch(r"\* bob is gone: nothing heard for [34] s", ann.hear())
            assert time.monotonic() - began < BOUND


def test_chat_is_not_held_up_by_who_does_not_read() -> None:
    lines = 3000
    with running("chat.py", "--port", "0") as program, Member(program, "ann") as ann, Member(program, "bob") as bob:
        assert [ann.hear(), ann.hear()] == ["* ann has come", "* bob has come"]
        bob.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

        def flood() -> None:
            for number in range(lines):
                ann.say(f"{number:04} {'x' * 4000}")

        talking = threading.Thread(target=flood)
        talking.start()
        for number in range(lines):
            assert ann.hear().startswith(f"ann: {number:04} ")
        talking.join()
        assert program.process.poll() is None


# -- the gateway


@contextlib.contextmanager
def through_gateway(listening: socket.socket, *more: str) -> Iterator[tuple[Program, socket.socket, socket.socket]]:
    """The gateway, a device at it, and the backend's end of the connection behind it."""
    backend = f"127.0.0.1:{port_of(listening)}"
    with (
        running("gateway.py", "--port", "0", "--backend", backend, *more) as program,
        program.connect() as device,
        accept(listening) as server,
    ):
        yield program, device, server


def test_gateway_forwards_and_the_device_may_end_first(listening: socket.socket) -> None:
    with through_gateway(listening) as (_, device, server):
        device.sendall(b"question")
        device.shutdown(socket.SHUT_WR)
        assert exactly(server, 100) == b"question"
        server.sendall(b"answer")
        server.shutdown(socket.SHUT_WR)
        assert exactly(device, 100) == b"answer"


def test_gateway_forwards_and_the_backend_may_end_first(listening: socket.socket) -> None:
    with through_gateway(listening) as (_, device, server):
        server.sendall(b"greeting")
        server.shutdown(socket.SHUT_WR)
        assert exactly(device, 100) == b"greeting"
        device.sendall(b"report")
        device.shutdown(socket.SHUT_WR)
        assert exactly(server, 100) == b"report"


def test_gateway_forwards_much(listening: socket.socket) -> None:
    much = os.urandom(1 << 20) * 16
    with through_gateway(listening) as (_, device, server):
        sending = threading.Thread(target=device.sendall, args=(much,))
        sending.start()
        assert exactly(server, len(much)) == much
        sending.join()


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["keepalive", "unacknowledged"])
def test_gateway_tells_the_backend_of_a_dead_device(cause: str, listening: socket.socket, dead_peers: None) -> None:
    with through_gateway(listening, "--device-keepalive", SHORT) as (program, device, server):
        exchange_through(device, server)
        with blackhole(device):
            began = time.monotonic()
            if cause == "unacknowledged":
                server.sendall(b"order")
            assert ended(server)
            assert time.monotonic() - began < BOUND
            program.find(rf"is dead \({cause}\)", within=1)


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["keepalive", "unacknowledged"])
def test_gateway_tells_the_device_of_a_dead_backend(cause: str, listening: socket.socket, dead_peers: None) -> None:
    with through_gateway(listening, "--backend-keepalive", SHORT) as (program, device, server):
        exchange_through(device, server)
        with blackhole(server):
            began = time.monotonic()
            if cause == "unacknowledged":
                device.sendall(b"report")
            assert ended(device)
            assert time.monotonic() - began < BOUND
            program.find(rf"is dead \({cause}\)", within=1)


def exchange_through(device: socket.socket, server: socket.socket) -> None:
    device.sendall(b"up")
    assert exactly(server, 2) == b"up"
    server.sendall(b"down")
    assert exactly(device, 4) == b"down"


def test_gateway_survives_a_backend_that_is_not_there() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with running("gateway.py", "--port", "0", "--backend", f"127.0.0.1:{port_of(nobody)}") as program:
            for _ in range(2):
                with program.connect() as device:
                    assert ended(device)
                program.find("refuses connections")


# -- the service


def test_service(authority: trustme.CA, client_tls: ssl.SSLContext, tmp_path: Path) -> None:
    """It serves over TLS, reads its certificate again on SIGHUP, and ends on SIGTERM when what is under way is done."""
    pem = tmp_path / "server.pem"
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(pem))
    command = [sys.executable, "-W", "error", str(EXAMPLES / "service.py"), "--bind", "localhost:0", "--cert", str(pem)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            started = re.search(r"\[-\] serving on localhost:(\d+)", process.stderr.readline())
            assert started
            port = int(started[1])

            def connect() -> ssl.SSLSocket:
                return client_tls.wrap_socket(
                    socket.create_connection(("localhost", port), timeout=20), server_hostname="localhost"
                )

            with connect() as one, connect() as two:
                exchange_line(one, b"SET colour light blue", b"ok")
                exchange_line(two, b"GET colour", b"light blue")
                exchange_line(two, b"GET nothing", b"none")
                exchange_line(two, b"FLY", b"error: GET key, SET key value, STATS or QUIT")
                exchange_line(two, b"STATS", b"keys=1 deaths=0")
                before = one.getpeercert(binary_form=True)
                authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
                process.send_signal(signal.SIGHUP)
                deadline = time.monotonic() + 20
                while True:
                    with connect() as three:
                        if three.getpeercert(binary_form=True) != before:
                            break
                    assert time.monotonic() < deadline
                process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
                exchange_line(one, b"GET colour", b"light blue")  # it drains: this is the last answer
                two.sendall(b"QUIT\n")
                assert ended(two)
                assert ended(one)
            rest = process.stderr.read()
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert "[-] ended with 1 keys" in rest
    assert "Traceback" not in rest


def exchange_line(sock: socket.socket, line: bytes, answer: bytes) -> None:
    """Send a line, and have its answer."""
    sock.sendall(line + b"\n")
    assert exactly(sock, len(answer) + 1) == answer + b"\n"
