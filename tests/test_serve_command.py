"""`kaio serve`: real processes, what they serve, how they end, and what a reload costs its clients: nothing."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import os
import pty
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization as forms

from kaio.cli import main
from kaio.tools.workers.backoff import Backoff
from kaio.tools.workers.channel import Channel
from kaio.tools.workers.logs import LineFormatter
from kaio.tools.workers.settings import Settings

from .serve_command import APP, PATIENCE, ROOT, Client, ask, eventually, gone, serve

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("app.py").write_text(APP)


def write_certificate(authority: trustme.CA, name: str = "server") -> tuple[str, str]:
    """A certificate for 127.0.0.1: its file, and that of its key."""
    made = authority.issue_cert("127.0.0.1", common_name=name)
    Path(f"{name}.crt").write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
    Path(f"{name}.key").write_bytes(made.private_key_pem.bytes())
    return f"{name}.crt", f"{name}.key"


# -- what is served


@LOOPS
def test_a_handler_is_served_by_all_workers(loop: str) -> None:
    """Over TCP and a Unix socket, whose path is gone at the end."""
    with serve("app:handler", "--workers", "2", "--loop", loop, "--bind", "unix:app.sock") as served:
        port = served.serving()
        answers = {ask(port) for _ in range(40)} | {ask("app.sock") for _ in range(3)}
        assert {pid for pid, _ in answers} == served.workers()
        assert {version for _, version in answers} == {"one"}
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
        assert not Path("app.sock").exists()
        with pytest.raises(ConnectionRefusedError):
            ask(port)


@LOOPS
def test_a_worker_that_ends_leaves_the_path_of_a_unix_socket(loop: str) -> None:
    """It is the supervisor's."""
    with serve("app:handler", "--loop", loop, bind="unix:app.sock") as served:
        served.serving()
        (pid,) = served.workers()
        served.signal(signal.SIGHUP)
        served.line("reloaded")
        eventually(lambda: gone(pid))
        assert ask("app.sock")[0] != pid


KINDS = {
    "class KeepaliveProtocol": (
        """
        import kaio
        class Echo(kaio.KeepaliveProtocol):
            def connection_made(self, transport):
                self.transport = transport
            def data_received(self, data):
                self.transport.write(b"1 echo\\n")
        """,
        "kinds:Echo",
        (),
    ),
    "class of asyncio": (
        """
        import asyncio
        class Echo(asyncio.Protocol):
            def connection_made(self, transport):
                self.transport = transport
            def data_received(self, data):
                self.transport.write(b"1 echo\\n")
        """,
        "kinds:Echo",
        (),
    ),
    "buffered, in a namespace": (
        """
        import asyncio
        class Place:
            class Echo(asyncio.BufferedProtocol):
                def connection_made(self, transport):
                    self.transport = transport
                def get_buffer(self, size):
                    return bytearray(100)
                def buffer_updated(self, count):
                    self.transport.write(b"1 echo\\n")
        """,
        "kinds:Place.Echo",
        (),
    ),
    "factory": (
        """
        import asyncio
        def make():
            asyncio.get_running_loop()
            async def handler(connection):
                await connection.receive()
                await connection.send(b"1 echo\\n")
            return handler
        """,
        "kinds:make",
        ("--factory",),
    ),
    "async factory": (
        """
        import asyncio, functools
        async def echo(answer, connection):
            await connection.receive()
            await connection.send(answer)
        async def make():
            await asyncio.sleep(0)
            return functools.partial(echo, b"1 echo\\n")
        """,
        "kinds:make",
        ("--factory",),
    ),
}


@LOOPS
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_applications(kind: str, loop: str) -> None:
    source, name, options = KINDS[kind]
    Path("kinds.py").write_text("if True:\n" + source)
    with serve(name, *options, "--loop", loop) as served:
        port = served.serving()
        assert ask(port) == (1, "echo")
        served.signal(signal.SIGTERM)
        assert served.wait() == 0


@LOOPS
def test_a_context_is_entered_before_and_left_after_all_connections(loop: str) -> None:
    Path("pool.py").write_text(
        "import contextlib, sys\n"
        "@contextlib.asynccontextmanager\n"
        "async def make():\n"
        "    pool = ['open']\n"
        "    async def handler(connection):\n"
        "        await connection.receive()\n"
        "        await connection.draining.wait()\n"
        "        await connection.send(b'1 %s\\n' % pool[0].encode())\n"
        "    yield handler\n"
        "    pool[0] = 'closed'\n"
        "    print('the pool is closed', file=sys.stderr, flush=True)\n"
    )
    with serve("pool:make", "--factory", "--loop", loop) as served, Client(served.serving()) as client:
        client.send("what")
        served.signal(signal.SIGTERM)
        assert client.line() == "1 open"
        served.line("the pool is closed")
        assert served.wait() == 0


@LOOPS
def test_tls_with_certificates_of_clients(loop: str, authority: trustme.CA, client_tls: ssl.SSLContext) -> None:
    """A client without one is refused."""
    cert, key = write_certificate(authority)
    authority.cert_pem.write_to_path("ca.crt")
    known = ssl.create_default_context()
    authority.configure_trust(known)
    authority.issue_cert("client@example.org").configure_cert(known)
    with serve("app:handler", "--cert", cert, "--key", key, "--client-ca", "ca.crt", "--loop", loop) as served:
        port = served.serving()
        assert ask(port, known)[1] == "one"
        with contextlib.suppress(OSError), Client(port, client_tls) as client:
            client.send("what")
            assert client.line() == ""


@LOOPS
def test_the_policy_is_that_of_the_option(loop: str) -> None:
    Path("times.py").write_text(
        "async def handler(connection):\n"
        "    await connection.receive()\n"
        "    await connection.send(b'1 %s\\n' % str(connection.keepalive).encode())\n"
    )
    with serve("times:handler", "--keepalive", "7s:3s:5", "--loop", loop) as served:
        assert ask(served.serving())[1].startswith("7s:3s:5")


@LOOPS
def test_limits_and_timeouts_are_those_of_the_options(loop: str) -> None:
    """Who is beyond the limit waits; who is silent is let go, and makes room."""
    with serve("app:handler", "--loop", loop, "--max-connections", "1", "--idle-timeout", "1s") as served:
        port = served.serving()
        with Client(port) as first:
            first.ask()
            assert ask(port)[1] == "one"  # once the first was idle for long enough
            assert first.line() == ""
    with serve("app:handler", "--loop", loop, "--max-connections-per-peer", "1") as served:
        port = served.serving()
        with Client(port) as first:
            first.ask()
            with contextlib.suppress(ConnectionError), Client(port) as second:
                second.send("what")
                assert second.line() == ""


@LOOPS
def test_a_proxy_says_who_the_client_is(loop: str) -> None:
    """On TCP and on a Unix socket."""
    Path("who.py").write_text("async def handler(c):\n    await c.send(f'{c.peername[0]}\\n'.encode())\n")
    proxies = ["--proxy-protocol", "127.0.0.0/8", "--proxy-protocol", "unix"]
    with serve("who:handler", "--loop", loop, *proxies, "--bind", "unix:app.sock") as served:
        for where in (served.serving(), "app.sock"):
            with Client(where) as client:
                client.sock.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.2 50000 443\r\n")
                assert client.line() == "192.0.2.7"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sockets_that_are_handed_over_are_served_by_all_workers(workers: str) -> None:
    """By number; they go on listening elsewhere when it stops, and a reload refuses nobody."""
    with socket.create_server(("127.0.0.1", 0)) as parents:
        parents.set_inheritable(True)
        port = parents.getsockname()[1]
        with serve(
            "app:handler", "--workers", workers, bind=f"fd:{parents.fileno()}", pass_fds=(parents.fileno(),)
        ) as served:
            assert served.serving() == port
            seen = {ask(port)[0] for _ in range(20)}
            assert seen <= served.workers()
            served.signal(signal.SIGHUP)
            served.line("reloaded")
            eventually(lambda: ask(port)[0] not in seen)  # the old ones accept until they have heard of it
            served.signal(signal.SIGTERM)
            assert served.wait() == 0
        with socket.create_connection(("127.0.0.1", port)):
            pass


def test_systemd_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready, reloading, ready again, stopping; and that it lives. The workers say nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("notify")
        manager.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", os.path.abspath("notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        said: list[str] = []

        def hear(what: str) -> str:
            while not (heard := manager.recv(4096).decode()).startswith(what):
                said.append(heard)
            return heard

        with serve("app:handler", "--workers", "2", "--grace", "3s") as served:
            hear("READY=1")
            served.signal(signal.SIGHUP)
            assert "\nMONOTONIC_USEC=" in hear("RELOADING=1")
            hear("READY=1")
            hear("WATCHDOG=1")
            served.signal(signal.SIGTERM)
            assert "\nEXTEND_TIMEOUT_USEC=21000000" in hear("STOPPING=1")
            assert served.wait() == 0
        assert set(said) == {"WATCHDOG=1"}


def test_only_workers_import_the_application() -> None:
    """In a Python with the options of the command, and with nothing of kaio's in its arguments and environment."""
    Path("folder").mkdir()
    Path("folder", "seen.py").write_text(
        "import os, sys\n"
        "with open('imported', 'a') as file:\n"
        "    print(os.getpid(), sys.flags.optimize, sys.flags.dev_mode, sys.argv[1:], sys.path[0], file=file)\n"
        "    print(*(name for name in os.environ if 'KAIO' in name and name != 'KAIO_RUNTIME_DIR'), file=file)\n"
        "async def handler(connection): ...\n"
    )
    options = ("--workers", "2", "--app-dir", "folder")
    with serve("seen:handler", *options, python=("-O", "-X", "dev")) as served:
        served.serving()
        expected = {f"{pid} 1 True [] {Path('folder').absolute()}" for pid in served.workers()}
        assert set(Path("imported").read_text().splitlines()) == expected | {""}


def test_children_of_a_worker_have_no_listening_socket() -> None:
    """One that outlives its worker would keep the port."""
    Path("parent.py").write_text(
        "import os, subprocess\n"
        "async def handler(connection):\n"
        "    child = subprocess.run(['ls', '-l', '/proc/self/fd'], close_fds=False, capture_output=True)\n"
        "    await connection.send(b'%d sockets' % child.stdout.count(b'socket:'))\n"
    )
    with serve("parent:handler") as served, Client(served.serving()) as client:
        assert client.line() == "0 sockets"


# -- what cannot be served

BROKEN = {
    "broken.py": "def",
    "needs.py": "import app\nimport nothing_of_the_kind\n",
    "fails.py": "def f():\n    return {}['key\\nwith a line']\nf()\n",
    "leaves.py": "import sys\nsys.exit('no')\n",
    "kinds.py": (
        "import asyncio\nasync def none(): ...\nasync def two(a, b): ...\ndef plain(c): ...\n"
        "class Thing: ...\nclass Datagrams(asyncio.DatagramProtocol): ...\nnumber = 5\n"
        "class Often(asyncio.Protocol):\n    keepalive = 'often'\nclass Sleeps(asyncio.Protocol): ...\n"
        "def fails():\n    raise LookupError('no pool')\ndef nothing(): ...\n"
    ),
}

ERRORS = [
    (2, ["app"], "'app' must be MODULE:NAME, such as app:handler"),
    (2, ["app:"], "'app:' must be MODULE:NAME"),
    (2, ["a-b:c"], "'a-b:c' must be MODULE:NAME"),
    (1, ["nowhere:handler"], "cannot serve nowhere:handler: there is no module nowhere in "),
    (1, ["app.sub:handler"], "cannot serve app.sub:handler: there is no module app.sub in"),
    (1, ["app:nothing"], "cannot serve app:nothing: app has no nothing"),
    (1, ["app:handler.deep"], "cannot serve app:handler.deep: app.handler has no deep"),
    (1, ["kinds:number"], "kinds:number is of type int: neither an async function nor a protocol class"),
    (1, ["kinds:none"], "kinds:none is called with one argument, the connection: too many positional arguments"),
    (1, ["kinds:two"], "kinds:two is called with one argument, the connection: missing a required argument: 'b'"),
    (1, ["kinds:plain"], "kinds:plain is not an async function; to call it for one, use --factory"),
    (1, ["kinds:Thing"], "kinds:Thing is a class, but not of asyncio protocols"),
    (1, ["kinds:Datagrams"], "kinds:Datagrams is a class of protocols that have no streams"),
    (1, ["kinds:plain", "--factory"], "--factory calls kinds:plain without arguments: missing a required argument"),
    (1, ["kinds:number", "--factory"], "kinds:number is of type int, which --factory cannot call"),
    (1, ["kinds:Often"], "cannot serve kinds:Often: keepalive='often': "),
    (1, ["kinds:nothing", "--factory"], "what kinds:nothing makes is of type NoneType: neither an async function"),
    (2, ["app:handler", "--bind", "nowhere"], "--bind: address 'nowhere': has no port"),
    (2, ["app:handler", "--bind", "127.0.0.1:99999"], "the port is '99999', but must be"),
    (1, ["app:handler", "--bind", "192.0.2.1:0"], "--bind 192.0.2.1:0: cannot bind 192.0.2.1:0: Cannot assign"),
    (1, ["app:handler", "--bind", "unix:no/where.sock"], "--bind unix:no/where.sock: cannot bind unix:no/where.sock"),
    (2, ["app:handler", "--workers", "none"], "--workers='none': must be a number from 1 to 1000, or auto"),
    (2, ["app:handler", "--keepalive", "often"], "'often'"),
    (2, ["app:handler", "--grace", "soon"], "--grace='soon': must be a time such as 20s"),
    (2, ["app:handler", "--grace", "1s", "--spread", "2s"], "--spread must not be longer than --grace"),
    (2, ["app:handler", "--app-dir", "nowhere"], "--app-dir nowhere: is no folder"),
    (
        2,
        ["app:handler", "--proxy-protocol", "here"],
        "--proxy-protocol: trusted='here': must be a network such as '10.0",
    ),
    (2, ["app:handler", "--idle-timeout", "0s"], "--idle-timeout: must be more than 0"),
    (2, ["app:handler", "--max-connections", "0"], "--max-connections"),
    (
        2,
        ["app:handler", "--max-connections-per-peer", "3", "--bind", "unix:app.sock"],
        "--max-connections-per-peer: clients of unix:app.sock have no address",
    ),
    (
        1,
        ["kinds:Sleeps", "--idle-timeout", "3s", "--bind", "unix:app.sock"],
        "cannot serve kinds:Sleeps: idle_timeout=3.0: of a protocol on unix:app.sock nobody tells when data came",
    ),
    (1, ["app:handler", "--bind", "systemd:web"], "--bind: address 'systemd:web': no sockets were handed over to this"),
    (1, ["app:handler", "--bind", "fd:77"], "--bind: address 'fd:77': file descriptor 77 is not open"),
    (2, ["app:handler", "--cert", "no.crt"], "--cert no.crt: cannot be read: No such file or directory"),
    (2, ["app:handler", "--cert", "app.py"], "--cert app.py: is no certificate in PEM format"),
    (2, ["app:handler", "--cert", "one.crt"], "--cert one.crt: has no private key in PEM format"),
    (2, ["app:handler", "--cert", "one.crt", "--key", "two.key"], "--key two.key: the private key does not match"),
    (2, ["app:handler", "--cert", "one.crt", "--key", "secret.key"], "--key secret.key: the private key has a passphr"),
    (2, ["app:handler", "--cert", "one.crt", "--key", "app.py"], "--key app.py: has no private key in PEM format"),
    (2, ["app:handler", "--key", "one.key"], "--key one.key: needs --cert"),
    (
        2,
        ["app:handler", "--cert", "one.crt", "--key", "one.key", "--client-ca", "app.py"],
        "--client-ca app.py: is no certificate in PEM format",
    ),
]


def refused(*arguments: str) -> tuple[int, list[str]]:
    """Start it, and return its exit code and the lines of its standard error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "kaio", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(("code", "arguments", "message"), ERRORS, ids=[" ".join(each[1]) for each in ERRORS])
def test_mistakes_are_one_line(
    code: int,
    arguments: list[str],
    message: str,
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those of the command line alone are found before anything is started: here, in this process."""
    for name, source in BROKEN.items():
        Path(name).write_text(source)
    if any(name.endswith((".crt", ".key")) for name in arguments):
        write_certificate(authority, "one")
        write_certificate(authority, "two")
        key = forms.load_pem_private_key(Path("one.key").read_bytes(), None)
        locked = forms.BestAvailableEncryption(b"secret")
        Path("secret.key").write_bytes(
            key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.TraditionalOpenSSL, locked)
        )
    bind = () if "--bind" in arguments else ("--bind", "127.0.0.1:0")
    if code == 2:
        monkeypatch.setattr(sys, "argv", ["kaio", "serve", *arguments, *bind])
        with pytest.raises(SystemExit) as ended:
            main()
        returned, lines = ended.value.code, capsys.readouterr().err.splitlines()
    else:
        returned, lines = refused(*arguments, *bind)
    assert returned == code
    (line,) = lines
    assert message in line
    assert line.startswith("kaio")


@pytest.mark.parametrize(
    ("name", "message", "frames"),
    [
        ("broken:f", "importing broken failed: SyntaxError: ", []),
        ("needs:f", "importing needs failed: ModuleNotFoundError: No module named 'nothing_of_the_kind'", ["needs.py"]),
        ("fails:f", "importing fails failed: KeyError: ", ["fails.py", "fails.py"]),
        ("leaves:f", "importing leaves failed: SystemExit: no", ["leaves.py"]),
        ("kinds:fails", "kinds:fails failed: LookupError: no pool", ["kinds.py"]),
    ],
)
@pytest.mark.parametrize("workers", ["1", "3"])
def test_errors_of_the_application_have_its_frames(name: str, message: str, frames: list[str], workers: str) -> None:
    """One line, and a traceback without frames of kaio or of the import; once, however many workers fail."""
    for file, source in BROKEN.items():
        Path(file).write_text(source)
    factory = ("--factory",) if name == "kinds:fails" else ()
    code, (first, *rest) = refused(name, "--bind", "127.0.0.1:0", "--workers", workers, *factory)
    assert code == 1
    assert first.startswith(f"kaio serve: cannot serve {name}: {message}")
    found = [Path(file).name for file in re.findall(r'File "([^"]+)", line \d+, in ', "\n".join(rest))]
    assert found == frames
    assert rest[-1].startswith(message.partition("failed: ")[2].partition(":")[0])
    assert "kaio" not in "".join(rest)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_in_use_is_an_error_also_when_it_may_be_shared(workers: str) -> None:
    """Another server with SO_REUSEPORT would be joined without a word."""
    with serve("app:handler", "--workers", "2") as served:
        port = served.serving()
        code, (line,) = refused("app:handler", "--bind", f"127.0.0.1:{port}", "--workers", workers)
        assert code == 1
        assert line == f"kaio: --bind 127.0.0.1:{port}: cannot bind 127.0.0.1:{port}: Address already in use"


# -- how it ends


@LOOPS
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_request_in_flight_is_answered(loop: str, number: int, code: int) -> None:
    with serve("app:handler", "--workers", "2", "--loop", loop) as served:
        port = served.serving()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(port)) for _ in range(20)]
            for client in clients:
                client.send("hold")
                assert client.line() == "held"
            served.signal(number)
            eventually(lambda: refuses(port))
            for client in clients:
                client.send("go on")
                assert client.line().endswith(" one")
                assert client.line() == ""
        assert served.wait() == code


def refuses(port: int) -> bool:
    """Whether nobody listens."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


def test_ctrl_c_reaches_the_supervisor_only() -> None:
    """The terminal sends it to the whole group: a worker that got it, too, would abort."""
    with serve("app:handler") as served, Client(served.serving()) as client:
        client.send("hold")
        assert client.line() == "held"
        os.killpg(served.process.pid, signal.SIGINT)
        served.line("SIGINT: stopping")
        client.send("go on")
        assert client.line().endswith(" one")
        assert served.wait() == 130


def test_a_service_manager_may_send_sigterm_to_all_processes() -> None:
    """As systemd does. What a worker hears twice it does once."""
    with serve("app:handler", "--workers", "2") as served, Client(served.serving()) as client:
        client.send("hold")
        assert client.line() == "held"
        for pid in (served.process.pid, *served.workers()):
            os.kill(pid, signal.SIGTERM)
        served.line("SIGTERM: stopping")
        client.send("go on")
        assert client.line().endswith(" one")
        assert served.wait() == 0


@LOOPS
@pytest.mark.parametrize("request_", ["hold", "forever"])
def test_a_second_signal_aborts(loop: str, request_: str) -> None:
    """Also a handler that swallows cancellation."""
    with serve("app:handler", "--loop", loop, "--grace", "1h") as served, Client(served.serving()) as client:
        client.send(request_)
        assert client.line() == "held"
        served.signal(signal.SIGTERM)
        served.line("SIGTERM: stopping")
        served.signal(signal.SIGTERM)
        served.line("SIGTERM: aborting")
        with contextlib.suppress(ConnectionResetError):
            assert client.line() == ""
        assert served.wait() == 0
        assert ("have not ended: handler" in "".join(served.lines)) == (request_ == "forever")


@pytest.mark.slow
@LOOPS
def test_a_handler_that_swallows_cancellation_does_not_keep_it(loop: str) -> None:
    with serve("app:handler", "--loop", loop, "--grace", "200ms") as served, Client(served.serving()) as client:
        client.send("forever")
        assert client.line() == "held"
        served.signal(signal.SIGTERM)
        served.line("handler .* has not ended")
        assert served.wait() == 0


@pytest.mark.slow
def test_a_worker_that_is_blocked_is_killed() -> None:
    """A handler that does not give the loop back cannot be told anything."""
    Path("blocked.py").write_text(
        "import time\nasync def handler(connection):\n    await connection.send(b'held\\n')\n    time.sleep(3600)\n"
    )
    with serve("blocked:handler", "--grace", "0s") as served, Client(served.serving()) as client:
        assert client.line() == "held"
        (pid,) = served.workers()
        served.signal(signal.SIGTERM)
        served.line("stopping")
        served.signal(signal.SIGTERM)
        served.line(f"worker {pid} did not end in time and was killed")
        assert served.wait() == 0


def test_connections_are_accepted_during_the_delay() -> None:
    with serve("app:handler", "--delay", "1h", "--workers", "2", "--bind", "unix:app.sock") as served:
        port = served.serving()
        served.signal(signal.SIGTERM)
        served.line("stopping")
        assert ask(port)[1] == "one"
        assert ask("app.sock")[1] == "one"
        served.signal(signal.SIGTERM)
        assert served.wait() == 0


def test_workers_drain_when_the_supervisor_is_killed() -> None:
    with serve("app:handler", "--workers", "2") as served, Client(served.serving()) as client:
        workers = served.workers()
        client.send("hold")
        assert client.line() == "held"
        served.process.kill()
        served.process.wait()
        port = client.sock.getpeername()[1]
        eventually(lambda: refuses(port))
        client.send("go on")
        assert client.line().endswith(" one")
        eventually(lambda: all(gone(pid) for pid in workers))


def test_closing_the_terminal_stops_it() -> None:
    """The kernel sends SIGHUP then, which is no wish for a reload."""
    ours, theirs = pty.openpty()
    with serve("app:handler", terminal=os.ttyname(theirs)) as served:
        os.close(theirs)
        served.serving()
        served.signal(signal.SIGHUP)
        served.line("reloaded")
        os.close(ours)
        served.line("SIGHUP: stopping")
        assert served.wait() == 0


def test_it_can_be_stopped_before_it_serves() -> None:
    Path("late.py").write_text("import sys, time\nprint('imported', file=sys.stderr, flush=True)\ntime.sleep(3600)\n")
    with serve("late:handler") as served:
        served.line("imported")
        served.signal(signal.SIGTERM)
        assert served.wait() == 0


def test_a_worker_that_is_not_ready_in_time_is_an_error() -> None:
    Path("late.py").write_text("import time\ntime.sleep(3600)\n")
    code, (line,) = refused("late:handler", "--bind", "127.0.0.1:0", "--start-timeout", "500ms")
    assert code == 1
    assert re.fullmatch(r"kaio serve: cannot serve late:handler: worker \d+ was not ready within 0.5 s", line)


# -- workers that die


def test_a_handler_that_exits_ends_its_worker() -> None:
    """By SystemExit, which asyncio lets through."""
    Path("leave.py").write_text("import sys\nasync def handler(connection):\n    sys.exit(3)\n")
    with serve("leave:handler") as served:
        with contextlib.suppress(ConnectionResetError), Client(served.serving()) as client:
            assert client.line() == ""
        served.line("died: exit code 3")
        served.line("is ready")


@LOOPS
def test_a_worker_that_is_killed_costs_its_own_connections_only(loop: str) -> None:
    """And is replaced within a second."""
    with serve("app:handler", "--workers", "2", "--loop", loop) as served, contextlib.ExitStack() as stack:
        port = served.serving()
        clients = [stack.enter_context(Client(port)) for _ in range(20)]
        homes = [client.ask()[0] for client in clients]
        assert len(set(homes)) == 2
        victim = homes[0]
        os.kill(victim, signal.SIGKILL)
        served.line(f"worker {victim} died: SIGKILL")
        began = time.monotonic()
        fresh = int(served.line(r"worker (\d+) is ready")[1])
        print(f"replaced after {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < (1.0 if os.getloadavg()[0] < 2 else PATIENCE)
        for client, home in zip(clients, homes, strict=True):
            if home != victim:
                assert client.ask() == (home, "one")
        eventually(lambda: ask(port)[0] == fresh)


def test_connections_wait_for_the_replacement() -> None:
    """With one worker, a connection that comes when there is none."""
    with serve("app:handler") as served:
        port = served.serving()
        (pid,) = served.workers()
        os.kill(pid, signal.SIGSTOP)
        with Client(port) as client:
            client.send("what")
            os.kill(pid, signal.SIGKILL)
            home, version = int(client.line().split()[0]), "one"
            assert home != pid
            assert version == "one"


def test_a_worker_that_is_told_to_end_is_replaced_before_it_has() -> None:
    """By whomever: while it drains, nobody would accept the connections of its slot."""
    with serve("app:handler") as served, Client(port := served.serving()) as client:
        pid = client.ask()[0]
        client.send("hold")
        assert client.line() == "held"
        os.kill(pid, signal.SIGTERM)
        served.line("drains by itself")
        eventually(lambda: ask(port)[0] != pid)
        client.send("go on")
        assert client.line() == f"{pid} one"


def test_a_crash_loop_is_slowed_down() -> None:
    """A worker that dies soon after its start, again and again."""
    Path("crash.py").write_text(
        "import os, asyncio\n"
        "async def handler(connection): ...\n"
        "def make():\n"
        "    if not os.path.exists('fine'):\n"
        "        asyncio.get_running_loop().call_later(0.05, os._exit, 3)\n"
        "    return handler\n"
    )
    with serve("crash:make", "--factory") as served:
        served.serving()
        served.line("died: exit code 3")
        delays = [float(served.line(r"the next worker starts in ([\d.]+) s")[1]) for _ in range(5)]
        assert delays == [0.1, 0.2, 0.4, 0.8, 1.6]
        Path("fine").touch()
        served.line("is ready")
        served.signal(signal.SIGTERM)
        assert served.wait() == 0


def test_delays_of_replacements() -> None:
    """At once, then doubled from 0.1 s to 30 s; from the start again after 30 s of life."""
    backoff = Backoff()
    assert [backoff.delay(1) for _ in range(12)] == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30]
    assert [backoff.delay(lived) for lived in (30, 1, 31)] == [0, 0.1, 0]
    for _ in range(2000):
        assert backoff.delay(0) <= 30


# -- reloading


@LOOPS
def test_a_reload_runs_new_code_and_new_certificates(loop: str) -> None:
    """And an old connection is still served by the old code."""
    old, new = trustme.CA(), trustme.CA()
    contexts = [ssl.create_default_context(), ssl.create_default_context()]
    for authority, context in zip((old, new), contexts, strict=True):
        authority.configure_trust(context)
    cert, key = write_certificate(old)
    with serve("app:handler", "--cert", cert, "--key", key, "--workers", "2", "--loop", loop) as served:
        port = served.serving()
        with Client(port, contexts[0]) as client:
            pid = client.ask()[0]
            client.send("hold")
            assert client.line() == "held"
            Path("app.py").write_text(APP.replace('b"one"', 'b"the second"'))
            write_certificate(new)
            served.signal(signal.SIGHUP)
            served.line("reloaded")
            eventually(lambda: ask_or_not(port, contexts[1]) == "the second")
            client.send("go on")
            assert client.line() == f"{pid} one"
            assert client.line() == ""
        assert {ask(port, contexts[1])[1] for _ in range(10)} == {"the second"}


def ask_or_not(port: int, tls: ssl.SSLContext) -> str:
    """The version; empty from a server whose certificate is not known: an old worker may still accept."""
    try:
        return ask(port, tls)[1]
    except ssl.SSLError:
        return ""


@pytest.mark.parametrize("wrong", ["def", "raise LookupError", "import time; time.sleep(3600)"])
def test_a_reload_that_fails_keeps_the_old_workers(wrong: str) -> None:
    with serve("app:handler", "--workers", "2", "--start-timeout", "5s") as served:
        port = served.serving()
        workers = served.workers()
        Path("app.py").write_text(wrong)
        served.signal(signal.SIGHUP)
        served.line("reload failed, kept the old workers: ")
        assert {ask(port)[0] for _ in range(40)} == workers
        eventually(lambda: served.workers() == workers)
        Path("app.py").write_text(APP)
        served.signal(signal.SIGHUP)
        served.line("reloaded")
        eventually(lambda: not served.workers() & workers)


def test_a_reload_with_wrong_certificates_keeps_the_old_workers(
    authority: trustme.CA, client_tls: ssl.SSLContext
) -> None:
    cert, key = write_certificate(authority)
    with serve("app:handler", "--cert", cert, "--key", key) as served:
        port = served.serving()
        Path(cert).unlink()
        served.signal(signal.SIGHUP)
        served.line(rf"kept the old workers: --cert {cert}: cannot be read")
        assert ask(port, client_tls)[1] == "one"


async def one_after_the_other(
    port: int, tls: ssl.SSLContext | None, until: asyncio.Event, counts: collections.Counter[str]
) -> None:
    """Connect, ask, read to the end, close; and count what came of it."""
    while not until.is_set():
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        except OSError as exc:
            counts[f"connect: {type(exc).__name__}"] += 1
            continue
        try:
            writer.write(b"what\n")
            async with asyncio.timeout(PATIENCE):
                answer = await reader.readline()
            counts["answered" if answer.endswith(b" one\n") else f"not answered: {answer!r}"] += 1
        except (OSError, TimeoutError) as exc:
            counts[f"{type(exc).__name__}"] += 1
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@pytest.mark.heavy
@LOOPS
@pytest.mark.parametrize(("workers", "tls"), [(1, False), (2, False), (2, True)])
def test_reloads_under_load_lose_no_connection(
    loop: str, workers: int, tls: bool, authority: trustme.CA, client_tls: ssl.SSLContext
) -> None:
    """Ten in ten seconds."""
    counts: collections.Counter[str] = collections.Counter()
    cert, key = write_certificate(authority)
    options = ("--cert", cert, "--key", key) if tls else ()

    async def load(port: int, reload: signal.Signals) -> None:
        until = asyncio.Event()
        context = client_tls if tls else None
        tasks = [asyncio.create_task(one_after_the_other(port, context, until, counts)) for _ in range(8)]
        for _ in range(10):
            await asyncio.sleep(1)
            served.signal(reload)
        await asyncio.to_thread(served.line, "reloaded")
        await asyncio.sleep(2)
        until.set()
        await asyncio.gather(*tasks)

    with serve("app:handler", "--workers", str(workers), "--loop", loop, *options) as served:
        port = served.serving()
        asyncio.run(load(port, signal.SIGHUP))
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
    reloads = sum("reloaded" in line for line in served.lines)
    print(f"{workers} workers on {loop}{', TLS' * tls}: {dict(counts)} over {reloads} reloads")
    assert reloads >= 3  # one that is asked for during another is done once
    assert counts.keys() == {"answered"}
    assert counts["answered"] > 500


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("at_once", [False, True])
def test_connections_are_spread_evenly(workers: int, at_once: bool) -> None:
    """2,000 of them, one by one and at once, within 20 % of even."""

    async def count(port: int) -> collections.Counter[bytes]:
        free = asyncio.Semaphore(100 if at_once else 1)

        async def one() -> bytes:
            async with free:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"what\n")
                answer = await reader.readline()
                writer.close()
                await writer.wait_closed()
            return answer.split()[0]

        return collections.Counter(await asyncio.gather(*(one() for _ in range(2000))))

    with serve("app:handler", "--workers", str(workers)) as served:
        counts = asyncio.run(count(served.serving()))
    even = 2000 / workers
    print(f"{workers} workers, {'at once' if at_once else 'one by one'}: {sorted(counts.values())}, even: {even:g}")
    assert len(counts) == workers
    assert all(abs(each - even) <= 0.2 * even for each in counts.values())


# -- plain data


def test_settings_survive_json() -> None:
    """Also tuples, and text of any kind."""
    settings = Settings(
        app="a:b", binds=("[::1]:1", "unix:/ä\n"), limits={"idle_timeout": 1.5}, proxies=("10.0.0.0/8",)
    )
    line = json.dumps(dataclasses.asdict(settings))
    assert Settings.from_message(json.loads(line)) == settings
    assert "\n" not in line


def test_a_channel_carries_messages_of_any_size_until_its_end() -> None:
    """Also what the other process said last; and its end is no error."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        near, far = Channel(ours), Channel(theirs)
        assert near.received() == []
        far.send({"trace": "ä\n" * 9_000})
        far.send([1])
        far.send([2])
        assert near.receive() == {"trace": "ä\n" * 9_000}
        far.close()
        assert near.received() == [[1], [2]]
        assert near.received() is None
        near.send("lost")
        with pytest.raises(EOFError):
            near.receive()


def test_a_record_is_one_line() -> None:
    record = logging.LogRecord("kaio", logging.INFO, "", 0, "from %s", ("a\nb\x1b[1m",), None)
    line = LineFormatter().format(record)
    assert line.endswith(rf"[{os.getpid()}] info: from a\nb\x1b[1m")
