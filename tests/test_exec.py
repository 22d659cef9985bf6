"""`kaio exec`: a program whose sockets get a policy from outside, by the kernel or by looking."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from kaio import SocketState
from kaio.tools import cgroups
from kaio.tools.processes import lacking, sockets

from . import own_cgroup, programs
from .programs import Puppet

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

KAIO: Final = (sys.executable, "-W", "error", "-m", "kaio", "exec")
WAYS: Final = ["kernel", "looking"]
HAS_QUICK: Final = SocketState(enabled=True, idle=1, interval=1, count=2, user_timeout=3)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> list[str]:
    """Options for who sets the policy."""
    reason = own_cgroup.lacking()
    if request.param == "kernel" and reason is not None:
        pytest.skip(reason)
    return ["--by", request.param, "--quiet"]


def until(condition: Callable[[], object]) -> None:
    """Wait for what no event announces."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def states(pid: int) -> dict[int, SocketState]:
    """What each descriptor has."""
    return {found.fd: found.state for found in sockets(pid)}


# -- as if the program had been started without it


def execute(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `kaio exec`."""
    return subprocess.run([*KAIO, *arguments], capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["sh", "-c", "exit 7"], 7, ""),
        (["--", "sh", "-c", "kill -TERM $$"], -signal.SIGTERM, ""),
        (["--", "sh", "-c", "kill -SEGV $$"], -signal.SIGSEGV, ""),
        (["--", "sh", "-c", "kill -KILL $$"], -signal.SIGKILL, ""),
        (["--", "sh", "-c", "kill -34 $$"], -34, ""),
        (["--", "no such program", "--version"], 127, "kaio: no such program: No such file or directory\n"),
        (["--", ""], 127, "kaio: '': No such file or directory\n"),
        (["--", "/dev/null"], 126, "kaio: /dev/null: Permission denied\n"),
        (["--", "/"], 126, "kaio: /: Permission denied\n"),
        (["--", "/dev/null/x"], 127, "kaio: /dev/null/x: Not a directory\n"),
        (["--keepalive", "1s", "--", "true"], 2, "kaio: keepalive='1s': must be"),
        (["--keepalve", "20s", "true"], 2, "kaio exec: No such option '--keepalve'"),
        (["--by", "magic", "true"], 2, "kaio exec: Invalid value for '--by'"),
        ([], 2, "kaio exec: Missing argument 'PROGRAM'"),
    ],
)
def test_it_exits_as_the_program_does(arguments: list[str], code: int, complaint: str, way: list[str]) -> None:
    """Exit code or signal."""
    done = execute(*way, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(complaint)
    assert len(done.stderr.splitlines()) == bool(complaint)


def test_a_script_without_an_interpreter_s_line(tmp_path: pathlib.Path, way: list[str]) -> None:
    """As env(1) says: not in an executable format."""
    script = tmp_path / "script"
    script.write_text("exit 3\n")
    script.chmod(0o755)
    done = execute(*way, str(script))
    assert (done.returncode, done.stderr) == (126, f"kaio: {script}: Exec format error\n")


def test_the_program_has_its_input_output_arguments_and_signals(way: list[str]) -> None:
    """The mask and the dispositions of the caller, too."""
    look = (
        "import os, signal, sys; names = [each for each in signal.valid_signals() if signal.getsignal(each) is"
        " signal.SIG_IGN]; print(sys.stdin.read(), sys.argv[1:], sorted(map(int, signal.pthread_sigmask(0, []))),"
        " sorted(map(int, names)))"
    )
    done = execute(*way, "--", sys.executable, "-c", look, "--json", "--", "-x", input="in")
    assert done.stdout == "in ['--json', '--', '-x'] [] [13, 25]\n"  # SIGPIPE and SIGXFSZ: Python itself
    caller = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [10]); signal.signal(1, signal.SIG_IGN);"
        " signal.signal(17, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", caller, *KAIO, *way, "--", sys.executable, "-c", look]
    done = subprocess.run(command, capture_output=True, text=True, input="", check=True)
    assert done.stdout == " [] [10] [1, 13, 17, 25]\n"


def test_it_says_who_sets_the_policy() -> None:
    """The kernel where it is permitted; elsewhere by looking, and why."""
    done = execute("true")
    if own_cgroup.lacking() is None:
        assert re.fullmatch(r"kaio: the kernel gives 20s:10s:4 to each connection in /.*/kaio-exec-\d+\n", done.stderr)
    if os.geteuid() != 0:
        return
    done = execute("true", user=65534, env={**os.environ, "HOME": "/"}) if _readable() else done
    if _readable():
        assert done.stderr.startswith("kaio: looks for new sockets; the kernel cannot set the policy by itself: ")
        assert done.returncode == 0
        done = execute("--by", "kernel", "true", user=65534)
        assert (done.returncode, done.stderr.count("\n")) == (3, 1)


def _readable() -> bool:
    """Whether another user may run this Python."""
    done = subprocess.run([sys.executable, "-c", "import kaio.cli"], user=65534, capture_output=True, check=False)
    return done.returncode == 0


# -- signals

COUNT: Final = """
import os, signal, sys, time
count = []
numbers = set(signal.valid_signals()) - {9, 19, 17, 18, 20, 21, 22, 11, 4, 8, 7}
for each in numbers:
    signal.signal(each, lambda number, _: count.append(int(number)))
if "own group" in sys.argv:
    os.setpgid(0, 0)
print("ready", os.getpid(), flush=True)
for line in sys.stdin:
    if line == "kill 0\\n":
        os.kill(0, signal.SIGUSR1)
    time.sleep(0.3)
    seen = sorted(count)
    count.clear()  # before the answer, to which the next signal may be the reaction
    print(*seen, flush=True)
"""
PASSED: Final = sorted({*signal.valid_signals()} - {9, 19, 17, 18, 20, 21, 22, 11, 4, 8, 7})


@contextlib.contextmanager
def counting(way: list[str], *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Callable[..., list[int]]]]:
    """A program that counts its signals, under `kaio exec` in a process group of their own."""
    command = [*KAIO, *way, "--", sys.executable, "-c", COUNT, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        until(lambda: len(_children(process.pid)) == 2)  # the witness, too

        def received(line: str = "") -> list[int]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return [int(word) for word in process.stdout.readline().split()]

        yield process, received
        process.stdin.close()
        assert process.wait(20) == 0


def _children(pid: int) -> list[int]:
    return list(map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_each_signal_is_passed_on_once(way: list[str]) -> None:
    """All that can be: those that end a process by default, SIGWINCH and the real-time ones among them."""
    with counting(way) as (process, received):
        for number in PASSED:
            process.send_signal(number)
        assert received() == PASSED
        assert received() == []


def test_signals_to_the_process_group_arrive_once(way: list[str]) -> None:
    """By kill(2) with the group's number, again and again, and between signals to the command alone."""
    with counting(way) as (process, received):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGRTMIN):
            os.killpg(process.pid, number)
        assert received() == sorted((signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGRTMIN))
        process.send_signal(signal.SIGTERM)
        assert received() == [signal.SIGTERM]
        os.killpg(process.pid, signal.SIGTERM)
        assert received() == [signal.SIGTERM]
        assert received("kill 0") == [signal.SIGUSR1]
        assert received() == []


def test_signals_to_the_group_reach_a_program_that_has_left_it(way: list[str]) -> None:
    """They are passed on, since it does not receive them by itself."""
    with counting(way, "own group") as (process, received):
        os.killpg(process.pid, signal.SIGTERM)
        assert received() == [signal.SIGTERM]
        process.send_signal(signal.SIGTERM)
        assert received() == [signal.SIGTERM]


def _witness(process: subprocess.Popen[str]) -> int:
    """The child that receives the group's signals: the one that has executed nothing."""
    own = pathlib.Path(f"/proc/{process.pid}/cmdline").read_bytes()
    until(lambda: len(_children(process.pid)) >= 2)
    (found,) = [pid for pid in _children(process.pid) if pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() == own]
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_signals_are_passed_on_without_the_witness(way: list[str], number: signal.Signals) -> None:
    """Somebody has killed or stopped it: the program may have signals twice, and ends as it would."""
    with counting(way) as (process, received):
        os.kill(_witness(process), number)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGUSR1)
            assert signal.SIGUSR1 in received()
        process.send_signal(signal.SIGTERM)
        until(lambda: signal.SIGTERM in received())


def test_a_key_on_the_terminal_reaches_the_program_once(way: list[str]) -> None:
    """The terminal signals both; only signals from other processes are passed on."""
    terminal, line = pty.openpty()
    command = [*KAIO, *way, "--", sys.executable, "-c", COUNT]
    with subprocess.Popen(["setsid", "--ctty", *command], stdin=line, stdout=line, stderr=line) as process:
        os.close(line)
        with open(terminal, "r+b", buffering=0) as keyboard:
            _expect(keyboard, b"ready")
            keyboard.write(b"\x03")
            keyboard.write(b"\x1c")
            time.sleep(0.2)  # so that what might come twice has come
            keyboard.write(b"\n")
            assert _expect(keyboard, b"2 3\r\n").endswith(b"\r\n2 3\r\n")
            keyboard.write(b"\x04")
            assert process.wait(20) == 0


def _expect(keyboard: Any, wanted: bytes) -> bytes:
    """Read from a terminal until something has been printed."""
    seen = b""
    while wanted not in seen:
        assert select.select([keyboard], [], [], 30)[0], seen
        more = keyboard.read(1000)
        assert more, seen
        seen += more
    return seen


def _press(keyboard: Any, keys: bytes, wanted: bytes) -> bytes:
    """Press keys until something has been printed: a terminal that changes hands, or is sent a signal, drops keys."""
    seen: bytes = b""
    for _ in range(6):
        keyboard.write(keys)
        while select.select([keyboard], [], [], 8)[0]:
            more: bytes = keyboard.read(1000)
            assert more, seen
            seen += more
            if wanted in seen:
                return seen
    raise AssertionError(seen)


def test_job_control_of_a_shell(way: list[str]) -> None:
    """^Z stops both, fg lets both go on, and the program has the terminal all the time."""
    terminal, line = pty.openpty()
    environment = {**os.environ, "PS1": "prompt> ", "TERM": "dumb"}
    shell = ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(shell, stdin=line, stdout=line, stderr=line, env=environment) as process:
        os.close(line)
        with open(terminal, "r+b", buffering=0) as keyboard:
            _expect(keyboard, b"prompt> ")
            words = " ".join([*KAIO, *way, "--", "sh", "-c"])
            keyboard.write(f"{words} \"echo u''p; exec cat\"\n".encode())
            _expect(keyboard, b"\r\nup\r\n")
            _press(keyboard, b"first\n", b"first\r\nfirst\r\n")
            assert b"Stopped" in _press(keyboard, b"\x1a", b"prompt> ")
            _press(keyboard, b"fg\n", b'exec cat"\r\n')
            time.sleep(0.5)  # nothing tells that the terminal is the program's again
            _press(keyboard, b"second\n", b"second\r\nsecond\r\n")
            _press(keyboard, b"\x03", b"prompt> ")
            _press(keyboard, b"echo still here\n", b"\r\nstill here\r\n")
            keyboard.write(b"exit\n")
            with contextlib.suppress(OSError):  # EIO: it has ended
                while keyboard.read(1000):
                    pass
        process.wait(20)


# -- sockets


@contextlib.contextmanager
def running(*arguments: str, **options: Any) -> Iterator[Puppet]:
    """A program under `kaio exec` that does what it is told."""
    command = [*KAIO, "--watch", "50ms", "--keepalive", "1s:1s:2", *arguments]
    command += ["--", sys.executable, str(programs.HERE / "puppet.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options) as process:
        inside = Puppet(process)
        inside.pid = inside("it = os.getpid()")
        assert inside.pid != process.pid
        try:
            yield inside
        finally:
            os.kill(inside.pid, signal.SIGKILL)
            assert process.wait(20) == -signal.SIGKILL


PAIR: Final = """
def pair(*options):
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.socket()
    for option in options: client.setsockopt(*option)
    client.connect(listener.getsockname())
    kept.append((listener, client, listener.accept()[0]))
    return [each.fileno() for each in kept[-1][1:]]
kept = []
"""


def test_the_programs_sockets_and_its_childrens_get_the_policy(way: list[str]) -> None:
    """Connections made and accepted, also later and by children; times set by the program are kept."""
    with running(*way) as inside:
        inside(PAIR)
        own, accepted = inside(
            "it = pair((TCP, socket.TCP_KEEPIDLE, 300), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))"
        )
        until(lambda: states(inside.pid)[accepted] == HAS_QUICK)
        assert states(inside.pid)[own].idle == 300
        inside("""
read, write = os.pipe()
if os.fork() == 0:
    pair()
    os.read(read, 1)
    os._exit(0)
""")
        (child,) = _children(inside.pid)
        until(lambda: list(states(child).values()).count(HAS_QUICK) >= 3)
        inside("os.write(write, b'.')")


def test_in_the_kernel_s_cgroup_there_is_no_gap() -> None:
    """Each connection has the policy when it can be used."""
    reason = own_cgroup.lacking()
    if reason is not None:
        pytest.skip(reason)
    with running("--by", "kernel", "--watch", "1h", "--quiet") as inside:
        inside(PAIR)
        for _ in range(20):
            fds = inside("it = pair()")
            assert {states(inside.pid)[fd] for fd in fds} == {HAS_QUICK}


def test_what_a_listening_socket_accepts_has_all_of_the_policy_at_once() -> None:
    """Times set on it from outside would come without the user timeout, and count as the program's choice."""
    reason = own_cgroup.lacking()
    if reason is not None:
        pytest.skip(reason)
    with (
        socket.create_server(("127.0.0.1", 0)) as inherited,
        running("--by", "kernel", "--quiet", pass_fds=[inherited.fileno()]) as inside,
    ):
        number = inside("listener = socket.create_server(('127.0.0.1', 0)); it = listener.fileno()")
        # The inherited one is not of the program's cgroup. What it has accepted is set by a look at all sockets.
        inside(f"inherited = socket.socket(fileno={inherited.fileno()})")
        with socket.create_connection(inherited.getsockname()):
            fd = inside("it = inherited.accept()[0].detach()")
            until(lambda: states(inside.pid)[fd] == HAS_QUICK)
        until(lambda: states(inside.pid)[inherited.fileno()].enabled)
        assert not states(inside.pid)[number].enabled
        accepted = inside("""
client = socket.create_connection(listener.getsockname())
accepted, _ = listener.accept()
it = [accepted.getsockopt(socket.SOL_SOCKET, 9), *(accepted.getsockopt(TCP, n) for n in (4, 5, 6, 18))]
""")
        assert accepted == [1, 1, 1, 2, 3000]


@pytest.mark.parametrize("environment", ["KEEPALIVE=off", "KEEPIDLE=30"])
def test_the_environment_of_a_child_program_decides(way: list[str], environment: str) -> None:
    """`kaio exec` of a script whose programs opt out, or have times of their own."""
    command = [*KAIO, *way, "--watch", "50ms", "--keepalive", "1s:1s:2", "env", environment]
    command += [sys.executable, str(programs.HERE / "puppet.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        inside = Puppet(process)
        pid = inside("it = os.getpid()")
        inside(PAIR)
        fds = inside("it = pair()")
        time.sleep(0.3)  # some looks
        idle = {"KEEPALIVE=off": (False, 7200), "KEEPIDLE=30": (True, 30)}[environment]
        until(lambda: {(states(pid)[fd].enabled, states(pid)[fd].idle) for fd in fds} == {idle})
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


def test_the_caller_s_environment_opts_out(way: list[str]) -> None:
    """KEEPALIVE=off is the policy of this command too."""
    environment = {**os.environ, "KEEPALIVE": "off"}
    command = [*KAIO, "--quiet", "--watch", "50ms", sys.executable, str(programs.HERE / "puppet.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        inside = Puppet(process)
        pid = inside("it = os.getpid()")
        inside(PAIR)
        inside("it = pair()")
        time.sleep(0.3)
        assert {state.enabled for state in states(pid).values()} == {False}
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(20) == 0


# -- daemons

DAEMON: Final = """
import os, socket, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname()); accepted, _ = listener.accept()
        with open(sys.argv[1] + ".new", "w") as file: print(os.getpid(), file=file)
        os.rename(sys.argv[1] + ".new", sys.argv[1])
        time.sleep(60)
    os._exit(0)
os._exit(4)
"""


def test_a_daemon_has_the_policy(tmp_path: pathlib.Path, way: list[str]) -> None:
    """Forked twice, in a session of its own; the exit code is the first program's.

    Where the kernel sets the policy, the command ends with the program; where it is looked for, with the daemon.
    """
    file = tmp_path / "pid"
    command = [*KAIO, *way, "--watch", "50ms", "--keepalive", "1s:1s:2", sys.executable, "-c", DAEMON, str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(file.exists)
        pid = int(file.read_text())
        try:
            until(lambda: list(states(pid).values()).count(HAS_QUICK) >= 2)
            if "kernel" in way:
                assert process.wait(20) == 4
                assert list(states(pid).values()).count(HAS_QUICK) >= 2
        finally:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(20) == 4
        assert process.stderr is not None
        said = process.stderr.read()
        assert ("the processes that it left behind are watched until they end" in said) is ("looking" in way)


@contextlib.contextmanager
def _left_behind(file: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """The command, when its program has ended and the daemon that it left behind has written its number to a file."""
    command = [*KAIO, "--by", "looking", sys.executable, "-c", DAEMON, str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "has ended" in process.stderr.readline()
        until(file.exists)
        yield process


def test_a_daemon_s_end_is_noticed_without_the_witness(tmp_path: pathlib.Path) -> None:
    """A dead child that is no process of the program's does not hide those that are."""
    file = tmp_path / "pid"
    with _left_behind(file) as process:
        os.kill(_witness(process), signal.SIGKILL)
        os.kill(int(file.read_text()), signal.SIGKILL)
        assert process.wait(20) == 4


def test_signals_reach_a_daemon_when_the_program_has_ended(tmp_path: pathlib.Path) -> None:
    """SIGTERM to the command ends what the program left behind."""
    file = tmp_path / "pid"
    with _left_behind(file) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 4
        until(lambda: not os.path.exists(f"/proc/{file.read_text().strip()}"))


def test_nginx_as_a_daemon(tmp_path: pathlib.Path, way: list[str]) -> None:
    """Its first process exits at once; the workers' connections have the policy."""
    if shutil.which("nginx") is None:
        pytest.skip("no nginx here: run scripts/install-system-packages")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(
        f"{user} daemon on; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log off; server {{ listen 127.0.0.1:{port}; }} }}\n"
    )
    command = [*KAIO, *way, "--watch", "50ms", "--keepalive", "1s:1s:2"]
    command += ["nginx", "-p", str(tmp_path), "-e", f"{tmp_path}/error.log", "-c", f"{tmp_path}/nginx.conf"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        pid_file = tmp_path / "nginx.pid"
        until(lambda: pid_file.exists() and pid_file.read_text().strip())
        master = int(pid_file.read_text())
        try:
            until(lambda: _children(master))
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(9) == b"HTTP/1.1 "
                until(
                    lambda: (
                        [found.state for pid in _children(master) for found in sockets(pid) if found.peer is not None]
                        == [HAS_QUICK]
                    )
                )
        finally:
            os.kill(master, signal.SIGTERM)
        assert process.wait(20) == 0


# -- socket activation

LISTEN: Final = """
import os, socket
sock = socket.socket(fileno=3)
print(os.environ["LISTEN_PID"] == str(os.getpid()), os.environ["LISTEN_FDS"], sock.getsockname()[1] > 0, flush=True)
connection, _ = sock.accept()
connection.sendall(b"served")
"""


def test_a_program_that_is_activated_by_a_socket_knows_it_is_meant(way: list[str]) -> None:
    """LISTEN_PID is its number, and the listening socket is inherited."""
    if shutil.which("systemd-socket-activate") is None:
        pytest.skip("no systemd-socket-activate here: run scripts/install-system-packages")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # The tool hands on a few variables only.
    variables = [f"--setenv={name}" for name in ("PATH", "PYTHONPATH", "KAIO_RUNTIME_DIR") if name in os.environ]
    command = ["systemd-socket-activate", f"--listen=127.0.0.1:{port}", *variables]
    command += [*KAIO, *way, sys.executable, "-c", LISTEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:

        def served() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                return client.recv(10) == b"served"
            return False

        until(served)
        assert process.stdout is not None
        assert process.stdout.readline() == "True 1 True\n"
        assert process.wait(20) == 0


def test_variables_for_another_process_are_left_alone(way: list[str]) -> None:
    """LISTEN_PID of some other process is not the program's."""
    done = execute(*way, "sh", "-c", "echo $LISTEN_PID", env={**os.environ, "LISTEN_PID": "1"})
    assert done.stdout == "1\n"


# -- when looking is refused


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users needs root")
def test_a_program_that_cannot_be_inspected_still_runs() -> None:
    """The reason is printed once, on standard error; the exit code is the program's."""
    become = (
        "import locale, os, sys, pwd, kaio.cli.exec\n"
        "from kaio.cli import cli\n"
        "os.setgroups([]); os.setgid(65533); os.setuid(65533)\n"
        "cli(['exec', '-q', '--watch', '50ms', '--', sys.argv[1], '-c', 'sleep 0.5; exit 9'], prog_name='kaio')"
    )
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        shell = shutil.copy(os.path.realpath(str(shutil.which("sh"))), directory)
        os.chmod(shell, 0o711)  # who may not read a program may not look into it
        command = [sys.executable, "-c", become, shell]
        done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 9
    assert re.fullmatch(r"kaio: process \d+: it is not dumpable \(.*\n", done.stderr)


def test_a_failure_of_looking_costs_the_program_nothing() -> None:
    """Whatever it is: one line, and the program's exit code."""
    failing = (
        "import sys, kaio.cli.exec as command\n"
        "from kaio.cli import cli\n"
        "def look(self): raise RuntimeError('broken')\n"
        "command.Attachment.look = look\n"
        "cli(['exec', '-q', '--by', 'looking', 'sh', '-c', 'sleep 0.3; exit 9'], prog_name='kaio')"
    )
    done = subprocess.run([sys.executable, "-c", failing], capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stderr) == (9, "kaio: new sockets do not get the policy any more: broken\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="cgroups need root")
def test_cgroups_of_killed_commands_are_removed_by_the_next(tmp_path: pathlib.Path) -> None:
    """As long as a process is in one, it stays, with its policy."""
    reason = own_cgroup.lacking()
    if reason is not None:
        pytest.skip(reason)
    with own_cgroup.cgroup() as group:
        command = [*own_cgroup.inside(group), *KAIO, "--by", "kernel", "--quiet", "sleep", "60"]
        with subprocess.Popen(command) as process:
            until(lambda: [pid for pid in cgroups.processes(group) if pid != process.pid])
            until(lambda: len(_children(process.pid)) == 2)
            process.kill()
        (left,) = [name for name in os.listdir(group) if name.startswith("kaio-exec-")]
        (sleep,) = cgroups.processes(os.path.join(group, left))
        another = [*own_cgroup.inside(group), *KAIO, "--by", "kernel", "--quiet", "true"]
        subprocess.run(another, check=True)
        assert [name for name in os.listdir(group) if name.startswith("kaio-exec-")] == [left]
        os.kill(sleep, signal.SIGKILL)
        until(lambda: not os.path.exists(f"/proc/{sleep}") or not cgroups.processes(group))
        subprocess.run(another, check=True)
        assert [name for name in os.listdir(group) if name.startswith("kaio-exec-")] == []


def test_a_cgroup_of_an_earlier_command_with_the_same_number() -> None:
    """A process is left in it: another name is taken."""
    reason = own_cgroup.lacking()
    if reason is not None:
        pytest.skip(reason)
    earlier = 'echo 0 >"$0/cgroup.procs" && mkdir "$0/kaio-exec-$$" && echo ready && read -r line && exec "$@"'
    with own_cgroup.cgroup() as group:
        command = ["sh", "-c", earlier, group, *KAIO, "--by", "kernel", "cat", "/proc/self/cgroup"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with subprocess.Popen([*own_cgroup.inside(f"{group}/kaio-exec-{process.pid}"), "sleep", "60"]) as left:
                until(lambda: cgroups.processes(f"{group}/kaio-exec-{process.pid}"))
                output, _ = process.communicate("\n", timeout=40)
                left.kill()
        assert process.returncode == 0
        assert f"/kaio-exec-{process.pid}-2\n" in output
        until(lambda: not cgroups.processes(group))
        os.rmdir(f"{group}/kaio-exec-{process.pid}")
