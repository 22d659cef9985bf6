"""A policy for processes that are running already: `kaio.tools.processes.attach`, `kaio attach`, `kaio exec`."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kaio import Keepalive, PolicyError, SocketState, TcpState
from kaio.cli import cli
from kaio.testing import blackhole
from kaio.tools.processes import Attachment, Change, Outcome, ProcessSocket, attach, lacking, sockets

from . import programs
from .programs import Program, Puppet, puppet

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

QUICK = Keepalive(1, 1, 2)
HAS_QUICK = SocketState(enabled=True, idle=1, interval=1, count=2, user_timeout=3)
HAS_QUICK_LISTENING = SocketState(enabled=True, idle=1, interval=1, count=2)
DEFAULT_LISTENING = SocketState(enabled=True, idle=20, interval=10, count=4)
DEFAULT = SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=60)


@pytest.fixture
def other() -> Iterator[Puppet]:
    """Another process."""
    with puppet() as process:
        yield process


@pytest.fixture
def installed() -> None:
    """The test runs programs in several languages."""
    missing = programs.tell_of_missing()
    if missing is not None:
        pytest.skip(missing)


def until(condition: Callable[[], object], doing: Callable[[], object] = lambda: time.sleep(0.01)) -> None:
    """Wait for what no event announces."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        doing()


def outcomes(changes: Sequence[Change]) -> dict[int, Outcome]:
    """What became of each descriptor."""
    return {change.socket.fd: change.outcome for change in changes}


def states(pid: int) -> dict[int, SocketState]:
    """What each descriptor has."""
    return {found.fd: found.state for found in sockets(pid)}


# -- whatever the program is written in


class Peers:
    """A program under a policy, and its clients: two that will die, and a hundred that will not."""

    def __init__(self, name: str, program: Program, stack: contextlib.ExitStack) -> None:
        self.name = name
        self.program = program
        self._stack = stack
        self.idle = stack.enter_context(program.connect())
        self.fed = stack.enter_context(program.connect())
        if name == "redis":
            self.fed.sendall(b"SUBSCRIBE news\r\n")
            assert self.fed.recv(100)
            self.publisher = stack.enter_context(program.connect())
        else:
            self.fed.sendall(b"feed me")
        until(lambda: len(self.served()) == len(self.ports()))
        self.gone: dict[int, float] = {}

    def ports(self) -> set[int]:
        """Those of the clients that it should have now."""
        publisher = [self.publisher] if self.name == "redis" else []
        return {client.getsockname()[1] for client in (self.idle, self.fed, *publisher)}

    def served(self) -> dict[int, ProcessSocket]:
        """The program's connections, by the port of its client."""
        return {found.peer[1]: found for found in sockets(self.program.pid) if found.peer is not None}

    def attach(self) -> None:
        """All that it has gets the policy; so does what comes then."""
        assert {change.outcome for change in attach(self.program.pid, QUICK)} == {Outcome.SET}
        clients = [self._stack.enter_context(self.program.connect()) for _ in range(100)]
        self.living = {client.getsockname()[1] for client in clients}
        until(lambda: self.living <= self.served().keys())
        assert {found.state for found in sockets(self.program.pid)} == {HAS_QUICK}

    def watch(self, since: float) -> None:
        """Note who is gone."""
        if self.name == "redis":
            self.publisher.sendall(b"PUBLISH news .\r\n")
        there = self.served()
        for name, client in (("idle", self.idle), ("fed", self.fed)):
            port = client.getsockname()[1]
            if port not in there:
                self.gone.setdefault(port, time.monotonic() - since)
                self.told = f"{self.name}, {name}: {self.gone[port]:.1f} s"


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers", "installed")
def test_dead_peers_are_detected_in_time_in_every_language(tmp_path: Path) -> None:
    """redis-server, C that is linked statically, JavaScript, Python: idle, with data in flight, and the living live."""
    with contextlib.ExitStack() as stack:
        running = {
            "redis": programs.redis(tmp_path, "--tcp-keepalive", "0"),
            "C": programs.static(tmp_path),
            "JavaScript": programs.node(),
            "Python": programs.python(),
        }
        all_peers = [Peers(name, stack.enter_context(each), stack) for name, each in running.items()]
        for peers in all_peers:
            peers.attach()
        asked = time.monotonic()
        stack.enter_context(blackhole(*(end for peers in all_peers for end in (peers.idle, peers.fed))))
        began = time.monotonic()
        filtering = began - asked  # they are silent since some moment of it
        while time.monotonic() < began + 10 and any(len(peers.gone) < 2 for peers in all_peers):
            for peers in all_peers:
                peers.watch(began)
            time.sleep(0.1)
        measured = {peers.name: sorted(peers.gone.values()) for peers in all_peers}
        print(measured)
        for peers in all_peers:
            assert [1.0 - filtering < seconds < 6 for seconds in peers.gone.values()] == [True, True], measured
            assert peers.living <= peers.served().keys()
            if peers.name != "redis":
                dead = {f"{client.getsockname()[1]} ETIMEDOUT" for client in (peers.idle, peers.fed)}
                until(lambda peers=peers, dead=dead: set(peers.program.lines) == dead)  # type: ignore[misc]


@pytest.mark.usefixtures("installed")
def test_a_listening_socket_is_left_alone_if_the_program_sets_times_on_accepted_connections(tmp_path: Path) -> None:
    """Redis sets 300/100/3: its clients' options are never mixed with the policy's, not even inherited ones."""
    own = SocketState(enabled=True, idle=300, interval=100, count=3)
    with programs.redis(tmp_path) as redis, Attachment(redis.pid, QUICK) as attachment:
        assert {change.outcome for change in attachment.look()} == {Outcome.SET}  # a listener, and no client yet
        assert set(states(redis.pid).values()) == {HAS_QUICK_LISTENING}
        with redis.connect() as client:
            until(lambda: any(found.peer for found in sockets(redis.pid)))
            (found,) = (found for found in sockets(redis.pid) if found.peer)
            assert found.state == own
            (change,) = attachment.look()
            assert (change.outcome, change.why) == (Outcome.KEPT, "the program has set its own times")
            assert [found.state for found in sockets(redis.pid) if found.peer] == [own]
            assert attachment.look() == []
            client.sendall(b"PING\r\n")
            assert client.recv(7) == b"+PONG\r\n"
    with programs.redis(tmp_path) as redis, redis.connect():
        until(lambda: any(found.peer for found in sockets(redis.pid)))
        kept = attach(redis.pid, QUICK)
        assert {(change.outcome, change.why) for change in kept} == {
            (Outcome.KEPT, "the program has set its own times"),
            (Outcome.KEPT, "the program sets times on accepted connections"),
        }
        assert {change.outcome for change in attach(redis.pid, QUICK, force=True)} == {Outcome.SET}
        assert set(states(redis.pid).values()) == {HAS_QUICK, HAS_QUICK_LISTENING}


# -- which sockets, and what of them

SEVERAL = """
ON = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
off, on, own = socket.socket(), socket.socket(), socket.socket()
on.setsockopt(*ON); own.setsockopt(*ON); own.setsockopt(TCP, socket.TCP_KEEPCNT, 5)
listener = socket.create_server(("127.0.0.1", 0))
it = [each.fileno() for each in (listener, off, on, own)]
"""


def test_times_set_by_the_program_are_kept_unless_forced(other: Puppet) -> None:
    """SO_KEEPALIVE off, or on without times, gets the policy; own times are kept; a dry run changes nothing."""
    listener, off, on, own = other(SEVERAL)
    before = states(other.pid)
    changes = attach(other.pid, dry_run=True)
    assert changes[0].socket.fd == listener
    expected = {listener: Outcome.SET, off: Outcome.SET, on: Outcome.SET, own: Outcome.KEPT}
    assert outcomes(changes) == expected
    assert changes[0].after == DEFAULT_LISTENING
    assert states(other.pid) == before
    assert outcomes(attach(other.pid)) == expected
    assert states(other.pid) == {listener: DEFAULT_LISTENING, off: DEFAULT, on: DEFAULT, own: before[own]}
    assert outcomes(attach(other.pid, "off")) == expected
    assert [states(other.pid)[fd].enabled for fd in (listener, off, on, own)] == [False, False, False, True]
    assert set(outcomes(attach(other.pid, force=True)).values()) == {Outcome.SET}
    assert set(states(other.pid).values()) == {DEFAULT, DEFAULT_LISTENING}
    attach(other.pid, "off", force=True)
    assert {state.enabled for state in states(other.pid).values()} == {False}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("20s:10s:4,user_timeout=none", SocketState(enabled=True, idle=20, interval=10, count=4)),
        (
            "20s:10s:4,user_timeout=45s,stalled=drop",
            SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=45),
        ),
        ("30s::5", SocketState(enabled=True, idle=30, interval=75, count=5, user_timeout=405)),
        ("on", SocketState(enabled=True, idle=7200, interval=75, count=9)),
    ],
)
def test_the_kernel_enforces_the_user_timeout(other: Puppet, policy: str, expected: SocketState) -> None:
    """Whatever `stalled` says, because no monitor runs there; None in a policy leaves the system's value."""
    other("s = socket.socket()")
    (change,) = attach(other.pid, policy)
    assert (change.after, change.outcome) == (expected, Outcome.SET)
    assert set(states(other.pid).values()) == {expected}


@pytest.mark.skipif(not programs.MPTCP, reason="this kernel has no MPTCP")
def test_multipath_tcp_gets_no_user_timeout(other: Puppet) -> None:
    """The change says that it has none."""
    other(f"s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, {programs.MPTCP})")
    (change,) = attach(other.pid)
    assert change.after == SocketState(enabled=True, idle=20, interval=10, count=4)
    assert (change.outcome, change.why) == (Outcome.SET, "Multipath TCP has no user timeout")


REFUSE = """
import ctypes, struct, sys
from kaio.tools.processes import attach
# A filter that lets setsockopt fail with EACCES: seccomp(2)
load, equal, give = 0x20, 0x15, 0x06
code = [(load, 0, 0, 0), (equal, 0, 1, int(sys.argv[2])), (give, 0, 0, 0x50000 | 13), (give, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(program)))) == 0
for change in attach(int(sys.argv[1])):
    print(change.outcome.value, change.why, change.after)
from kaio.cli import cli
cli(["attach", sys.argv[1]], prog_name="kaio")
"""


def test_a_policy_that_the_kernel_rejects_is_reported(other: Puppet) -> None:
    """For each socket, and by the exit code; the other sockets are still set."""
    other("s, t = socket.socket(), socket.socket()")
    number = {"x86_64": 54, "aarch64": 208}[platform.machine()]
    command = [sys.executable, "-c", REFUSE, str(other.pid), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    for line in lines[:2]:
        assert re.fullmatch(r"failed socket at 0.0.0.0:0: idle: the kernel refused 20: Permission denied off", line)
    assert done.returncode == 3
    assert {state.enabled for state in states(other.pid).values()} == {False}


def test_an_invalid_policy_is_rejected_before_anything_changes(other: Puppet) -> None:
    """Also one whose user timeout is too long for the kernel, but not for the monitor."""
    other("s = socket.socket()")
    with pytest.raises(PolicyError, match="idle"):
        attach(other.pid, "0s:1s:1")
    with pytest.raises(PolicyError, match="user_timeout"):
        attach(other.pid, Keepalive(32767, 32767, 127))
    assert {state.enabled for state in states(other.pid).values()} == {False}


# -- again and again


def test_new_sockets_are_set_and_later_changes_by_the_program_are_kept(other: Puppet) -> None:
    """Each socket is set once; if the program sets times later, kaio's user timeout is removed."""
    fd = other("s = socket.socket(); it = s.fileno()")
    with Attachment(other.pid) as attachment:
        assert outcomes(attachment.look()) == {fd: Outcome.SET}
        assert attachment.look() == []
        other("s.setsockopt(TCP, socket.TCP_KEEPIDLE, 300)")
        later = other("t = socket.socket(); it = t.fileno()")
        assert outcomes(attachment.look()) == {fd: Outcome.LIFTED, later: Outcome.SET}
        assert states(other.pid)[fd] == SocketState(enabled=True, idle=300, interval=10, count=4)
        other("s.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 1000); t.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 0)")
        changed = states(other.pid)
        assert attachment.look() == []
        assert states(other.pid) == changed
        other("t.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)")
        assert attachment.look() == []
        assert not states(other.pid)[later].enabled
        other("s.close(); s = socket.socket()")  # the same number, another socket
        assert outcomes(attachment.look()) == {fd: Outcome.SET}
        assert repr(attachment) == f"<Attachment of 20s:10s:4 to processes [{other.pid}], 2 sockets>"
    assert set(outcomes(attach(other.pid)).values()) == {Outcome.SAME, Outcome.SET}


def test_connections_in_the_accept_queue_are_set_once_accepted(other: Puppet) -> None:
    """They have the options that the listening socket had when they were made."""
    address = other("listener = socket.create_server(('127.0.0.1', 0)); it = listener.getsockname()")
    with socket.create_connection(tuple(address)), Attachment(other.pid) as attachment:
        (change,) = attachment.look()
        assert change.why.startswith("1 connections in the accept queue keep their options; no user timeout: ")
        accepted = other("accepted = listener.accept()[0]; it = accepted.fileno()")
        assert not states(other.pid)[accepted].enabled
        (listening, change) = attachment.look()
        assert (change.socket.fd, change.outcome) == (accepted, Outcome.SET)
        assert listening.why == "the program sets no times on accepted connections"
        assert set(states(other.pid).values()) == {DEFAULT}


FORK = """
import threading
def child():
    if os.fork() == 0:
        global s
        s = socket.socket()
        os.read(pipe[0], 1)
        os._exit(0)
pipe = os.pipe()
child()
"""


def test_child_processes_are_included_on_request(other: Puppet) -> None:
    """And are followed even after their parent has exited."""
    with Attachment(other.pid, QUICK, children=True) as attachment, Attachment(other.pid) as alone:
        assert attachment.look() == []
        other(FORK)
        changes: list[Change] = []
        until(lambda: changes, lambda: changes.extend(attachment.look()))
        assert [change.outcome for change in changes] == [Outcome.SET]
        assert changes[0].socket.pid != other.pid
        assert alone.look() == []
        assert attach(other.pid, children=True)[0].socket.pid == changes[0].socket.pid
        other.process.kill()
        other.process.wait()
        assert not alone.alive
        assert alone.look() == []
        assert attachment.alive
        assert attachment.look() == []
        os.kill(changes[0].socket.pid, signal.SIGKILL)
        attachment.wait(20)
        assert not attachment.alive


MAKE = """
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
s.connect({address}); s.setblocking(False); {name} = s; it = s.fileno()
"""
FILL = """
import contextlib
with contextlib.suppress(BlockingIOError):
    while True: {name}.send(bytes(4096))
"""


def one(pid: int, fd: int) -> ProcessSocket:
    """A socket of a process."""
    return next(found for found in sockets(pid) if found.fd == fd)


def window_is_shut(pid: int, fd: int) -> bool:
    """Whether its peer takes nothing."""
    info = one(pid, fd).info
    return info is not None and info.snd_wnd == 0 and not info.unacked and not info.probes


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
def test_the_user_timeout_is_removed_while_a_peer_is_stalled_and_answers(other: Puppet) -> None:
    """It lives, and has its bound again once it reads; one that no longer answers is dropped all the same.

    Where nobody looks again, who takes nothing for the user timeout is dropped, unless it was stalled at first sight.
    """
    patient = Keepalive(1, 1, 4)
    with contextlib.ExitStack() as stack:
        unwatched = stack.enter_context(puppet())
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def make(process: Puppet, name: str) -> tuple[int, socket.socket]:
            fd = process(MAKE.format(address=listener.getsockname(), name=name))
            return fd, stack.enter_context(listener.accept()[0])

        (stalled, _), (dropped, _) = make(unwatched, "stalled"), make(unwatched, "dropped")
        (spared, reader), (silent, doomed) = make(other, "spared"), make(other, "silent")
        unwatched(FILL.format(name="stalled"))
        until(lambda: window_is_shut(unwatched.pid, stalled))
        first, second = attach(unwatched.pid, QUICK)
        assert (first.socket.fd, first.why) == (stalled, "no user timeout while the peer is stalled")
        assert (second.outcome, second.after) == (Outcome.SET, HAS_QUICK)
        assert first.after == SocketState(enabled=True, idle=1, interval=1, count=2)
        unwatched(FILL.format(name="dropped"))

        attachment = stack.enter_context(Attachment(other.pid, patient))
        assert (attachment.pace(60), attachment.pace(1)) == (5 / 3, 1)
        attachment.look()
        other(FILL.format(name="spared") + FILL.format(name="silent"))
        story: dict[int, list[tuple[Outcome, str]]] = {spared: [], silent: []}

        def look() -> None:
            for change in attachment.look():
                story[change.socket.fd].append((change.outcome, change.why))
            time.sleep(0.2)

        until(lambda: all(story.values()), look)
        stack.enter_context(blackhole(doomed))
        began = time.monotonic()
        until(lambda: one(other.pid, silent).tcp_state == TcpState.CLOSE, look)
        assert 3 < time.monotonic() - began < 10
        until(lambda: time.monotonic() - began > 7, look)
        lifted = (Outcome.LIFTED, "the peer is stalled, and answers")
        assert story[silent] == [lifted, (Outcome.RESTORED, "the peer is stalled, and stopped answering")]
        assert story[spared] == [lifted]
        assert one(other.pid, spared).peer is not None
        assert [one(unwatched.pid, fd).peer is None for fd in (stalled, dropped)] == [False, True]
        reader.setblocking(False)

        def drain() -> None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    reader.recv(1 << 20)
            look()

        until(lambda: len(story[spared]) > 1, drain)
        assert story[spared][1] == (Outcome.RESTORED, "the peer accepts data again")
        assert one(other.pid, spared).state.user_timeout == patient.detection_time


# -- kaio attach


def kaio(*arguments: str) -> Result:
    """Run the command line, in this process."""
    return CliRunner().invoke(cli, arguments, prog_name="kaio")


def test_the_command_prints_the_change_to_each_socket(other: Puppet) -> None:
    """One line each; JSON; a dry run; a process without sockets."""
    result = kaio("attach", str(other.pid))
    assert (result.exit_code, result.output) == (0, f"process {other.pid} has no TCP sockets\n")
    listener, off, on, own = other(SEVERAL)
    planned = kaio("attach", str(other.pid), "--dry-run", "--keepalive", "1s:1s:2")
    assert planned.exit_code == 0
    assert [line.split()[1] for line in planned.output.splitlines()] == ["fd", *map(str, (listener, off, on, own))]
    assert planned.output.count("would be set") == 3
    assert "kept: the program has set its own times" in planned.output
    assert not states(other.pid)[off].enabled
    document = json.loads(kaio("attach", str(other.pid), "--keepalive", "1s:1s:2", "--json").stdout)
    rows = {row["fd"]: row for row in document["sockets"]}
    assert rows[off]["after"] == {"enabled": True, "idle": 1, "interval": 1, "count": 2, "user_timeout": 3.0}
    assert rows[listener]["after"]["user_timeout"] is None
    assert (rows[off]["state"], rows[listener]["state"], rows[off]["process"]) == ("close", "listen", "python")
    assert (rows[own]["outcome"], rows[on]["outcome"], rows[listener]["listening"]) == ("kept", "set", True)
    assert states(other.pid)[off] == HAS_QUICK


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["attach", "999999999"], 3, "kaio: process 999999999: there is no such process\n"),
        (["attach", "1", "--keepalive", "0s:1s:1"], 2, "kaio: idle=0: must be above 0\n"),
        (["attach", "1", "--keepalive", "9h:9h:127"], 2, "kaio: user_timeout=AUTO: is the detection time"),
        (["attach", "1", "--watch", "soon"], 2, "kaio: --watch soon: must be a time such as 1s, 500ms, 2m\n"),
        (["attach", "1", "--watch", "none"], 2, "kaio: --watch none: must be a time such as 1s, 500ms, 2m\n"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], code: int, complaint: str) -> None:
    """And nothing is changed."""
    result = kaio(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(complaint)
    assert len(result.stderr.splitlines()) == 1


def test_watch_runs_until_the_process_exits(other: Puppet) -> None:
    """It prints a line for each new socket, and exits with 0."""
    other("s = socket.socket()")
    command = [sys.executable, "-m", "kaio", "attach", str(other.pid), "--watch", "50ms", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline())["outcome"] == "set"
        fd = other("t = socket.socket(); it = t.fileno()")
        assert json.loads(watcher.stdout.readline())["fd"] == fd
        assert states(other.pid)[fd] == DEFAULT
        other(FORK)
        assert json.loads(watcher.stdout.readline())["pid"] != other.pid  # children are its default
        other("os.write(pipe[1], b'.')")
        other.process.kill()
        assert watcher.wait(20) == 0
