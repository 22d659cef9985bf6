"""What attach and audit withstand: processes that vanish, change or are many, other namespaces, sockets that close."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from click.testing import CliRunner, Result

from kaio import SocketState
from kaio.cli import cli
from kaio.tools.processes import Attachment, Change, Outcome, attach, find, lacking, program_name, sockets, uncovered
from kaio.tools.processes._access import Process
from kaio.tools.processes._records import Record, Records, start_of

from . import namespaces, programs
from .programs import Puppet, puppet

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

POLICY: Final = SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=60)
OFF: Final = SocketState(enabled=False, idle=7200, interval=75, count=9)

LISTENER: Final = 'listener = socket.create_server(("127.0.0.1", 0)); it = listener.fileno()'
PAIR: Final = f"{LISTENER}; client = socket.create_connection(listener.getsockname()); accepted, _ = listener.accept()"


@pytest.fixture
def other() -> Iterator[Puppet]:
    """Another process."""
    with puppet() as process:
        yield process


@pytest.fixture
def elsewhere() -> Iterator[namespaces.Namespace]:
    """A network namespace."""
    reason = namespaces.lacking()
    if reason is not None:
        pytest.skip(reason)
    network = namespaces.Namespace("elsewhere")
    try:
        yield network
    finally:
        network.close()


@pytest.fixture
def directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where kaio remembers what it has set."""
    monkeypatch.setenv("KAIO_RUNTIME_DIR", str(tmp_path / "kaio"))
    return tmp_path / "kaio"


def kaio(*arguments: str) -> Result:
    """Run the command line, in this process."""
    return CliRunner().invoke(cli, arguments, prog_name="kaio")


def states(pid: int) -> dict[int, SocketState]:
    """What each descriptor has."""
    return {found.fd: found.state for found in sockets(pid)}


def outcomes(changes: list[Change]) -> list[tuple[Outcome, str]]:
    """What was done, and why."""
    return [(change.outcome, change.why) for change in changes]


def until(condition: Callable[[], object]) -> None:
    """Wait for what no event announces."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- what is remembered


def test_an_attachment_undoes_what_it_has_set_itself(other: Puppet, directory: pathlib.Path) -> None:
    """Not only what earlier commands have set; connections that have inherited it, too."""
    other(PAIR)
    before = states(other.pid)
    with Attachment(other.pid) as attachment:
        attachment.look()
        other("more = socket.create_connection(listener.getsockname()); later, _ = listener.accept()")
        attachment.look()
        assert {outcome for outcome, _ in outcomes(attachment.undo())} == {Outcome.UNDONE}
    assert {state for fd, state in states(other.pid).items() if fd in before} == {OFF}
    assert set(states(other.pid).values()) == {OFF}
    assert json.loads((directory / "attached.json").read_text())["sockets"] == {}


def test_closed_sockets_are_forgotten(other: Puppet, directory: pathlib.Path) -> None:
    """By an attachment that keeps looking, and by commands that follow each other; or the file would only grow."""

    def remembered() -> int:
        return len(json.loads((directory / "attached.json").read_text())["sockets"])

    other(PAIR)
    with Attachment(other.pid) as attachment:
        attachment.look()
        for _ in range(5):
            other("more = socket.create_connection(listener.getsockname()); later, _ = listener.accept()")
            attachment.look()
            assert remembered() > 3
            other("more.close(); later.close()")
            attachment.look()
            assert remembered() == 3
    for _ in range(5):
        other("client = socket.create_connection(listener.getsockname()); accepted, _ = listener.accept()")
        attach(other.pid)
        assert remembered() <= 3


def test_a_closed_listening_socket_is_remembered_for_its_connections(other: Puppet, directory: pathlib.Path) -> None:
    """They have inherited its options, which are still kaio's."""
    other(LISTENER)
    attach(other.pid)
    other("client = socket.create_connection(listener.getsockname()); accepted, _ = listener.accept()")
    fd = other("listener.close(); it = accepted.fileno()")
    attach(other.pid, "30s:10s:4")
    assert states(other.pid)[fd].times == (30, 10, 4)
    attach(other.pid, "40s:10s:4")
    assert states(other.pid)[fd].times == (40, 10, 4)


def test_without_a_place_for_the_file_memory_does_not_grow(tmp_path: pathlib.Path) -> None:
    """Nor where the file cannot be written."""
    (tmp_path / "file").touch()
    records = Records(str(tmp_path / "file" / "kaio"))
    for number in range(1, 100):
        records.put(number, Record(os.getpid(), start_of(os.getpid()), 0, OFF, POLICY))
        with contextlib.suppress(OSError):
            records.save()
        records.keep({number}, {os.getpid()})
    assert [records.find(number) is not None for number in (98, 99)] == [False, True]
    assert len(records._changed) == 1  # this is what would grow


def test_records_of_processes_that_had_ended_already_are_dropped(tmp_path: pathlib.Path) -> None:
    """Such a process has no start; a record without a cookie is none."""
    records = Records(str(tmp_path))
    records.put(0, Record(os.getpid(), start_of(os.getpid()), 0, OFF, POLICY))
    records.put(1, Record(2**22 + 1, start_of(2**22 + 1), 0, OFF, POLICY))
    records.save()
    found = Records(str(tmp_path))
    assert (found.find(0), found.find(1)) == (None, None)


def test_undo_gives_back_the_programs_own_choice(other: Puppet, directory: pathlib.Path) -> None:
    """Which it has made after kaio had set a policy first, and which --force has replaced."""
    fd = other("s = socket.socket(); it = s.fileno()")
    attach(other.pid)
    other("s.setsockopt(TCP, socket.TCP_KEEPIDLE, 300); s.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 0)")
    chosen = states(other.pid)[fd]
    attach(other.pid, force=True)
    assert states(other.pid)[fd] == POLICY
    assert kaio("attach", str(other.pid), "--undo").exit_code == 0
    assert states(other.pid)[fd] == chosen


@pytest.mark.parametrize(("time", "nearest"), [(0, 1), (-1, 1), (86400, 32767)])
def test_times_that_only_the_system_can_have_are_no_obstacle_to_undoing(
    other: Puppet, elsewhere: namespaces.Namespace, directory: pathlib.Path, time: int, nearest: int
) -> None:
    """The system's limits are wider than a socket's. Nor do they cost the records of other sockets."""
    elsewhere.sysctl("net.ipv4.tcp_keepalive_time", time)
    other(LISTENER)
    attach(other.pid)
    with elsewhere.entered(), puppet() as there:
        fd = there(LISTENER)
        attach(there.pid)
        (change,) = json.loads(kaio("attach", str(there.pid), "--undo", "--json").stdout)["sockets"]
        assert (change["outcome"], change["why"]) == (
            "undone",
            "the nearest to the system's times that a socket can have",
        )
        assert states(there.pid)[fd] == SocketState(enabled=False, idle=nearest, interval=75, count=9)
    assert kaio("attach", str(other.pid), "--undo").exit_code == 0
    assert set(states(other.pid).values()) == {OFF}


def test_a_record_without_sense_costs_itself_only(tmp_path: pathlib.Path) -> None:
    """Its file is kaio's own, but a newer kaio's may have been here."""
    written = Records(str(tmp_path))
    for cookie in (1, 2):
        written.put(cookie, Record(os.getpid(), start_of(os.getpid()), 0, OFF, POLICY))
    written.save()
    document = json.loads((tmp_path / "attached.json").read_text())
    document["sockets"]["1"]["before"]["new"] = 1
    (tmp_path / "attached.json").write_text(json.dumps(document))
    found = Records(str(tmp_path))
    assert [found.find(cookie) is not None for cookie in (1, 2)] == [False, True]


def test_containers_do_not_share_their_ports(
    other: Puppet, elsewhere: namespaces.Namespace, directory: pathlib.Path
) -> None:
    """A program that chooses the same times as kaio set at that port in another namespace has chosen them itself."""
    port = other(f"{LISTENER}; it = listener.getsockname()[1]")
    attach(other.pid)
    with elsewhere.entered(), puppet() as there:
        there(f"""
listener = socket.create_server(("127.0.0.1", {port})); client = socket.create_connection(("127.0.0.1", {port}))
accepted, _ = listener.accept()
accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4)):
    accepted.setsockopt(TCP, option, value)
""")
        fd = there("it = accepted.fileno()")
        changes = {change.socket.fd: change for change in attach(there.pid, "30s:10s:4")}
        assert changes[fd].outcome is Outcome.KEPT
        assert changes[fd].why == "the program has set its own times"


# -- what others choose


@pytest.mark.parametrize("way", ["option", "environment"])
def test_the_defaults_of_another_namespace_cost_its_sockets_only(
    other: Puppet, elsewhere: namespaces.Namespace, way: str
) -> None:
    """Any user can have a namespace with defaults with which a policy without an idle time is invalid."""
    elsewhere.sysctl("net.ipv4.tcp_keepalive_time", 32767)
    policy = "::4,user_timeout=3h"
    with elsewhere.entered(), puppet(*(("env", f"KAIO_KEEPALIVE={policy}") if way == "environment" else ())) as there:
        there(LISTENER)
        other(LISTENER)
        option = ("--keepalive", policy) if way == "option" else ()
        done = kaio("attach", str(there.pid), str(other.pid), "--json", *option)
        assert done.exit_code == 3, done.output
        theirs, ours = json.loads(done.stdout)["sockets"]
        assert (theirs["outcome"], ours["outcome"]) == ("failed", "set")
        assert "must be at least idle + 2 * interval = 32917 s" in theirs["why"]
        assert set(states(there.pid).values()) == {SocketState(enabled=False, idle=32767, interval=75, count=9)}
        with Attachment(there.pid, policy) as attachment:
            assert [outcome for outcome, _ in outcomes(attachment.look())] == [Outcome.FAILED]
            assert attachment.look() == []


@pytest.mark.parametrize(("time", "interval"), [(0, 0), (-1, 75), (20, -1), (20, 0), (2**31 - 1, 2**31 - 1)])
def test_no_defaults_of_another_namespace_end_the_audit(
    other: Puppet, elsewhere: namespaces.Namespace, time: int, interval: int
) -> None:
    """The kernel takes what no socket can have, up to what its timers can count: 0 and negative times."""
    for name, value in (("time", time), ("intvl", interval)):
        with contextlib.suppress(OSError):
            elsewhere.sysctl(f"net.ipv4.tcp_keepalive_{name}", value)
    with elsewhere.entered(), puppet() as there:
        there(f"{PAIR}\nfor s in (client, accepted): s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)")
        there("client.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 60_000)")
        other(LISTENER)
        for command in ("audit", "attach"):
            done = kaio(command, str(there.pid), str(other.pid), "--json")
            assert isinstance(done.exception, SystemExit | None), done.exception
            rows = json.loads(done.stdout)["sockets"]
            assert len(rows) == 4
            assert all((row.get("found_after", {}).get("idle") or 0) >= 0 for row in rows)


def test_an_environment_counts_from_when_the_program_is_executed() -> None:
    """A shell that becomes the program has another environment, with the same pid."""
    script = f"import sys, socket\n{LISTENER}\nprint(flush=True)\nsys.stdin.read()"
    command = ["sh", "-c", 'read line; KEEPALIVE=off exec "$0" -c "$1"', sys.executable, script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with Attachment(process.pid) as attachment:
                assert attachment.look() == []
                process.stdin.write("\n")
                process.stdin.flush()
                process.stdout.readline()
                assert outcomes(attachment.look()) == [(Outcome.KEPT, "its environment has KEEPALIVE=off")]
        finally:
            process.kill()


def test_the_pace_is_that_of_the_shortest_user_timeout() -> None:
    """Also of one that a program's environment asks for, so that a stalled peer is noticed before it expires."""
    with puppet("env", "KAIO_KEEPALIVE=1s:1s:2") as process:
        process(LISTENER)
        with Attachment(process.pid, "20s:10s:4") as attachment:
            assert attachment.pace(600) == 20
            attachment.look()
            assert attachment.pace(600) == 1


# -- processes that vanish, or are many


@pytest.mark.parametrize("command", ["attach", "audit"])
def test_a_zombie_of_that_name_is_no_obstacle(tmp_path: pathlib.Path, command: str) -> None:
    """A server's worker that has just ended has its name."""
    name = f"kaio-{os.getpid()}-{command[:2]}"
    sleep = shutil.copy(shutil.which("sleep") or "", tmp_path / name)
    with subprocess.Popen([sleep, "0"]) as ended, subprocess.Popen([sleep, "60"]) as lives:
        try:
            until(lambda: "\nState:\tZ" in pathlib.Path(f"/proc/{ended.pid}/status").read_text())
            until(lambda: pathlib.Path(f"/proc/{lives.pid}/comm").read_text() == f"{name}\n")
            assert find(name) == [lives.pid]
            done = kaio(command, name)
            assert (done.exit_code, done.stderr) == (0, "")
        finally:
            lives.kill()


def test_zombies_among_the_children_are_not_told_of(other: Puppet) -> None:
    """They have no sockets, and are nobody's fault but their parent's."""
    child = other(f"{LISTENER}\nit = os.fork()\nif not it: os._exit(0)")
    until(lambda: "\nState:\tZ" in pathlib.Path(f"/proc/{child}/status").read_text())
    for command in ("audit", "attach"):
        assert kaio(command, str(other.pid), "--children").stderr == ""
    other(f"os.waitpid({child}, 0)")


def test_a_process_that_does_not_exist_costs_itself_only(other: Puppet) -> None:
    """It is told, and the exit code says that something could not be done."""
    fd = other(LISTENER)
    done = kaio("attach", str(2**22 + 1), str(other.pid))
    assert done.exit_code == 3
    assert done.stderr == f"kaio: process {2**22 + 1}: there is no such process\n"
    assert states(other.pid)[fd].enabled
    done = kaio("attach", str(2**22 + 1), str(2**22 + 2))
    assert (done.exit_code, done.stderr) == (3, f"kaio: process {2**22 + 1}: there is no such process\n")


LINGERING: Final = """
import struct
listener = socket.create_server(("127.0.0.1", 0))
s = socket.create_connection(listener.getsockname()); peer, _ = listener.accept()
s.setblocking(False)
try:
    while True: s.send(bytes(1 << 20))
except BlockingIOError: pass
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
it = s.fileno()
"""


def test_a_process_cannot_make_others_wait_at_close(other: Puppet) -> None:
    """It may leave it to the duplicate of its socket to wait until all data is acknowledged (SO_LINGER)."""
    fd = other(LINGERING)
    inode = os.stat(f"/proc/{other.pid}/fd/{fd}").st_ino
    before = set(os.listdir("/proc/self/fd"))
    with Process(other.pid) as process:
        sock = process.duplicate(fd, inode)
        assert sock is not None
        other("s.close()")
        began = time.monotonic()
        with sock:
            pass
        assert sock.fileno() == -1
        assert time.monotonic() - began < 60
    other("peer.close()")  # with unread data: the connection is reset
    until(lambda: not any(thread.name == "kaio-close" for thread in threading.enumerate()))
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_number_that_is_used_for_a_file_is_no_socket(other: Puppet, tmp_path: pathlib.Path) -> None:
    """Closing some files asks a process that serves them, so this is not waited for."""
    fd = other("s = socket.socket(); it = s.fileno()")
    inode = os.stat(f"/proc/{other.pid}/fd/{fd}").st_ino
    with Process(other.pid) as process:
        other(f"file = open({str(tmp_path / 'file')!r}, 'w'); os.dup2(file.fileno(), {fd})")
        assert process.duplicate(fd, inode) is None
    until(lambda: not any(thread.name == "kaio-close" for thread in threading.enumerate()))


CHILDREN: Final = """
import signal
children = []
for _ in range(40):
    ready, told = os.pipe()
    children.append(os.fork())
    if not children[-1]:
        s = socket.create_server(("127.0.0.1", 0)); os.write(told, b"."); signal.pause()
    os.read(ready, 1); os.close(ready); os.close(told)
"""
END: Final = "for child in children: os.kill(child, signal.SIGKILL); os.waitpid(child, 0)"


@contextlib.contextmanager
def few_descriptors(soft: int) -> Iterator[None]:
    """Allow this process that many descriptors for the block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_processes_beyond_the_limit_of_descriptors_are_told_of(other: Puppet) -> None:
    """Each process takes one. The command raises its limit; an attachment says which it cannot follow."""
    other(CHILDREN)
    try:
        used = max(map(int, os.listdir("/proc/self/fd")))
        with Attachment(other.pid, children=True) as attachment:
            with few_descriptors(used + 15):
                attachment.look()
                assert len(attachment.refused) >= 20
                assert "Too many open files" in str(attachment.refused.popitem()[1])
            attachment.look()
            assert attachment.refused == {}
        with few_descriptors(used + 15):
            done = kaio("attach", str(other.pid), "--children", "--json")
        assert (done.exit_code, done.stderr) == (0, "")
        assert len(json.loads(done.stdout)["sockets"]) == 40
    finally:
        other(END)


def test_shared_sockets_of_children_are_counted_once(other: Puppet) -> None:
    """Workers share their listening sockets."""
    other(LISTENER)
    other(CHILDREN.replace("range(40)", "range(2)").replace('s = socket.create_server(("127.0.0.1", 0)); ', ""))
    try:
        done = kaio("audit", str(other.pid))
        assert f"process {other.pid} has 2 child processes with 1 TCP socket; --children includes them" in done.stderr
    finally:
        other(END)


# -- what is known of programs


def test_redis_without_keepalive_is_uncovered(tmp_path: pathlib.Path) -> None:
    """A listening socket is judged by the connections that it has accepted, and by what is known only without any."""
    missing = programs.tell_of_missing()
    if missing is not None:
        pytest.skip(missing)
    with programs.redis(tmp_path, "--tcp-keepalive", "0") as redis:
        until(lambda: not any(found.peer for found in sockets(redis.pid)))
        assert kaio("audit", str(redis.pid)).exit_code == 0
        with redis.connect():
            until(lambda: any(found.peer for found in sockets(redis.pid)))
            document = json.loads(kaio("audit", str(redis.pid), "--json").stdout)
            assert [row["uncovered"] for row in document["sockets"]] == [True, True]
            found = sockets(redis.pid)
            assert len(uncovered(found, sets_own_times=True)) == 2
            assert [one.listening for one in uncovered(found[:1], sets_own_times=False)] == [True]
            assert uncovered(found[:1], sets_own_times=True) == []


def test_node_is_known_by_whatever_name_it_gives_itself() -> None:
    """Newer releases name their first thread, which is the process's name."""
    missing = programs.tell_of_missing()
    if missing is not None:
        pytest.skip(missing)
    code = "process.title = 'node-MainThread'; console.log(1); setInterval(() => {}, 1000)"
    with subprocess.Popen(["node", "-e", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert pathlib.Path(f"/proc/{process.pid}/comm").read_text() == "node-MainThread\n"
            assert program_name(process.pid) == "node"
            assert process.pid in find("node")
        finally:
            process.kill()
