"""Whose options a socket has that kaio sets from outside: the program's, its environment's, an earlier command's."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from click.testing import CliRunner, Result

from kaio import Keepalive, SocketState
from kaio.cli import cli
from kaio.tools.processes import (
    Attachment,
    Outcome,
    ProcessError,
    attach,
    descendants,
    find,
    lacking,
    note,
    sets_own_times,
    sockets,
    survey,
)
from kaio.tools.processes._environment import choice
from kaio.tools.processes._records import Record, Records, start_of

from . import own_cgroup, programs
from .own_cgroup import inside
from .programs import Puppet, puppet

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

POLICY: Final = SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=60)
LISTENING: Final = SocketState(enabled=True, idle=20, interval=10, count=4)
OTHER: Final = SocketState(enabled=True, idle=30, interval=10, count=4, user_timeout=70)
OFF: Final = SocketState(enabled=False, idle=7200, interval=75, count=9)

PAIR: Final = """
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname()); accepted, _ = listener.accept()
it = [listener.fileno(), client.fileno(), accepted.fileno()]
"""
AGAIN: Final = """
more = socket.create_connection(listener.getsockname()); later, _ = listener.accept()
it = [later.fileno(), more.fileno()]
"""


@pytest.fixture
def other() -> Iterator[Puppet]:
    """Another process."""
    with puppet() as process:
        yield process


@pytest.fixture
def redis(tmp_path: pathlib.Path) -> Iterator[programs.Program]:
    """A Redis without a client."""
    missing = programs.tell_of_missing()
    if missing is not None:
        pytest.skip(missing)
    with programs.redis(tmp_path) as program:
        yield program


def kaio(*arguments: str) -> Result:
    """Run the command line, in this process."""
    return CliRunner().invoke(cli, arguments, prog_name="kaio")


def states(pid: int) -> dict[int, SocketState]:
    """What each descriptor has."""
    return {found.fd: found.state for found in sockets(pid)}


def until(condition: Callable[[], object]) -> None:
    """Wait for what no event announces."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- earlier commands


def test_another_policy_replaces_kaio_s_own_and_undo_takes_it_back(other: Puppet) -> None:
    """On listening sockets, connections, and those accepted in between, which have inherited the policy."""
    listener, client, accepted = other(PAIR)
    assert {change.outcome for change in attach(other.pid)} == {Outcome.SET}
    assert states(other.pid) == {listener: POLICY, client: POLICY, accepted: POLICY}
    later, more = other(AGAIN)
    assert states(other.pid)[later] == POLICY
    assert {change.outcome for change in attach(other.pid, "30s:10s:4")} == {Outcome.SET}
    assert set(states(other.pid).values()) == {OTHER}
    assert {change.outcome for change in attach(other.pid, "30s:10s:4")} == {Outcome.SAME}
    last, more = other(AGAIN)  # which closes those of before
    planned = kaio("attach", str(other.pid), "--undo", "--dry-run")
    assert planned.output.count("would be undone") == 4
    assert set(states(other.pid).values()) == {OTHER, OFF}
    undone = kaio("attach", str(other.pid), "--undo", "--json")
    assert undone.exit_code == 0
    assert {row["fd"]: row["outcome"] for row in json.loads(undone.output)["sockets"]} == {
        **dict.fromkeys((listener, client, accepted, last), "undone"),
        more: "kept",
    }
    assert set(states(other.pid).values()) == {OFF}
    again = kaio("attach", str(other.pid), "--undo")
    assert again.output.count("kept: attach has set none here") == 5


def test_what_the_program_has_changed_since_is_its_own(other: Puppet) -> None:
    """Neither another policy nor undo touches it."""
    _, client, accepted = other(PAIR)
    attach(other.pid)
    other("client.setsockopt(TCP, socket.TCP_KEEPIDLE, 99)")
    outcomes = {change.socket.fd: change.outcome for change in attach(other.pid, "30s:10s:4")}
    assert (outcomes[client], outcomes[accepted]) == (Outcome.KEPT, Outcome.SET)
    with Attachment(other.pid) as attachment:
        whys = {change.socket.fd: change.why for change in attachment.undo()}
    assert whys[client] == "the program has changed its options since"
    assert states(other.pid)[client].idle == 99
    assert states(other.pid)[accepted] == OFF


def test_undo_gives_back_what_was_there_first(other: Puppet) -> None:
    """Also what --force has overwritten, and after several policies."""
    other("s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)")
    other("s.setsockopt(TCP, socket.TCP_KEEPIDLE, 99)")
    before = states(other.pid)
    for policy in ("20s:10s:4", "off", "30s:10s:4"):
        attach(other.pid, policy, force=True)
    assert set(states(other.pid).values()) == {OTHER}
    assert kaio("attach", str(other.pid), "--undo").exit_code == 0
    assert states(other.pid) == before


def test_records_that_cannot_be_trusted_are_ignored(tmp_path: pathlib.Path) -> None:
    """Another boot, other owners, nonsense; each as if there were none."""
    record = Record(os.getpid(), start_of(os.getpid()), 0, OFF, POLICY)
    directory = tmp_path / "kaio"
    written = Records(str(directory))
    written.put(5, record)
    written.save()
    file = directory / "attached.json"
    assert (directory.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    assert Records(str(directory)).find(5) == record
    good = file.read_text()
    document = json.loads(good)
    for content in (
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({**document, "boot": "another"}),
        json.dumps({**document, "sockets": {"x": {}}}),
        json.dumps({**document, "sockets": {"5": {"pid": 1}}}),
        json.dumps({**document, "sockets": [1]}),
    ):
        file.write_text(content)
        assert Records(str(directory)).find(5) is None
    file.write_text(good)
    for path in (file, directory):
        mode = path.stat().st_mode
        path.chmod(0o777)
        assert Records(str(directory)).find(5) is None
        path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(file, 65534, 65534)
        assert Records(str(directory)).find(5) is None
        os.chown(file, 0, 0)
    assert Records(str(directory)).find(5) == record


def test_records_of_two_commands_at_once_are_both_kept(tmp_path: pathlib.Path) -> None:
    """And those of processes that are gone are dropped."""
    mine = Record(os.getpid(), start_of(os.getpid()), 0, OFF, POLICY)
    first, second = Records(str(tmp_path)), Records(str(tmp_path))
    first.put(1, mine)
    second.put(2, mine)
    second.put(3, Record(os.getpid(), 1, 0, OFF, POLICY))
    first.save()
    second.save()
    found = Records(str(tmp_path))
    assert [found.find(number) is not None for number in (1, 2, 3)] == [True, True, False]


# -- a listening socket's user timeout


def test_an_idle_redis_is_not_made_a_hybrid(redis: programs.Program) -> None:
    """With its own 300/100/3, a user timeout of 60 s would let one lost probe end a live client."""
    for force in ((), ("--force",)):
        done = kaio("attach", str(redis.pid), *force)
        assert done.exit_code == 0
        assert "no user timeout: the program may set times on accepted connections" in done.output
        with redis.connect() as client:
            until(lambda: any(found.peer for found in sockets(redis.pid)))
            client.sendall(b"PING\r\n")
            assert client.recv(7) == b"+PONG\r\n"
            (accepted,) = (found for found in sockets(redis.pid) if found.peer)
            assert accepted.state == SocketState(enabled=True, idle=300, interval=100, count=3)
            assert not any(found.one_lost_probe_kills for found in sockets(redis.pid))
        until(lambda: not any(found.peer for found in sockets(redis.pid)))


def test_an_idle_redis_is_not_uncovered(redis: programs.Program) -> None:
    """It sets its own times on what it accepts; the setting to change is named."""
    done = kaio("audit", str(redis.pid))
    assert done.exit_code == 0, done.output
    assert "accepted connections get the program's own times" in done.output
    assert "redis-server sets keepalive by `tcp-keepalive`" in done.output
    document = json.loads(kaio("audit", str(redis.pid), "--json").output)
    assert document["uncovered"] == 0
    assert list(document["notes"]) == ["redis-server"]


@pytest.mark.parametrize(
    ("name", "own"), [("redis-server", True), ("nginx", False), ("postgres", False), ("mongod", False)]
)
def test_what_is_known_of_programs(name: str, own: bool) -> None:
    assert sets_own_times(name) is own
    assert note(name)
    assert note("unknown") is None
    assert not sets_own_times("unknown")


# -- a program's environment


def _with(environment: dict[str, str]) -> contextlib.AbstractContextManager[Puppet]:
    return puppet("env", *(f"{name}={value}" for name, value in environment.items()))


@pytest.mark.parametrize(
    ("environment", "expected", "outcome"),
    [
        ({"KEEPALIVE": "off"}, OFF, "kept: its environment has KEEPALIVE=off"),
        ({"KAIO_KEEPALIVE": "off"}, OFF, "kept: its environment has KAIO_KEEPALIVE=off"),
        ({"KEEPIDLE": "30"}, OTHER, "set: its environment has KEEPIDLE=30"),
        ({"KAIO_KEEPALIVE": "30s:10s:4"}, OTHER, "set: its environment has KAIO_KEEPALIVE=30s:10s:4"),
        ({"KEEPALIVE": ""}, POLICY, "set"),
        ({"KEEPALIVES": "off", "XKEEPALIVE": "off"}, POLICY, "set"),
        ({"KEEPIDLE": "soon"}, POLICY, "set"),
        ({"KEEPIDLE": "1\x1b]0;x\n"}, POLICY, "set"),
    ],
)
def test_the_environment_of_a_program_decides(environment: dict[str, str], expected: SocketState, outcome: str) -> None:
    """libkeepalive's variables, which opt out or give times; an invalid value is said once, and the policy used."""
    with _with(environment) as process:
        process("s = socket.socket()")
        done = kaio("attach", str(process.pid), "--keepalive", "20s:10s:4")
        assert done.exit_code == 0
        assert done.stdout.rstrip().endswith(outcome)
        assert set(states(process.pid).values()) == {expected}
        misread = "KEEPIDLE" in environment and expected == POLICY
        assert done.stderr.count("\n") == misread
        assert ("20s:10s:4 is used" in done.stderr) is misread
        assert "\x1b" not in done.output
        assert kaio("attach", str(process.pid), "--force", "--keepalive", "30s:10s:4").exit_code == 0
        assert set(states(process.pid).values()) == {OTHER}


def test_inherited_variables_are_no_choice_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that this command has with the same values are its own, and give way to its options."""
    monkeypatch.setenv("KEEPIDLE", "30")
    with puppet() as process:
        assert choice(process.pid) is None
        process("s = socket.socket()")
        attach(process.pid, "20s:10s:4")
        assert set(states(process.pid).values()) == {POLICY}
    monkeypatch.delenv("KEEPIDLE")
    assert choice(os.getpid(), {"KEEPIDLE": "30"}) is None
    assert choice(999_999_999) is None


# -- which processes


def test_processes_by_name(tmp_path: pathlib.Path) -> None:
    """As pgrep -x: the kernel's fifteen bytes, or the whole name of the program; this process never."""
    long = tmp_path / "a-program-with-a-long-name"
    long.symlink_to("/bin/sleep")
    copy = tmp_path / "another-with-a-long-name"
    copy.write_bytes(pathlib.Path("/bin/sleep").read_bytes())
    copy.chmod(0o755)
    with contextlib.ExitStack() as stack:
        for command in (long, copy):
            process = stack.enter_context(subprocess.Popen([str(command), "60"]))
            stack.callback(process.kill)
            file = pathlib.Path(f"/proc/{process.pid}/comm")
            until(lambda file=file: file.read_text().startswith("a"))  # type: ignore[misc]
            assert process.pid in find(command.name[:15])
        assert find("another-with-a-long-name") == [process.pid]
        for word in ("another-with-a", "no-such-program", "a\nb", "", "x.service"):
            with pytest.raises(ProcessError, match="there is no process"):
                find(word)
        (comm,) = pathlib.Path("/proc/self/comm").read_text().splitlines()
        with contextlib.suppress(ProcessError):
            assert os.getpid() not in find(comm)
    with pytest.raises(ProcessError, match="there is no such process"):
        find("9" * 5000)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a cgroup needs root")
def test_processes_by_unit() -> None:
    """By the cgroup that bears the unit's name; processes in cgroups below are the unit's too."""
    reason = own_cgroup.lacking()
    if reason is not None:
        pytest.skip(reason)
    unit = f"kaio-test-by-unit-{os.getpid()}.service"
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(own_cgroup.cgroup(unit))
        below = stack.enter_context(own_cgroup.cgroup("below", path))
        with puppet(*inside(path)) as first, puppet(*inside(below)) as second, puppet() as third:
            for process in (first, second, third):
                process("s = socket.socket()")
            assert find(unit) == sorted((first.pid, second.pid))
            done = kaio("attach", unit, "--json")
            assert done.exit_code == 0
            assert {row["pid"] for row in json.loads(done.output)["sockets"]} == {first.pid, second.pid}
            done = kaio("audit", unit, str(third.pid))
            assert done.output.splitlines()[-1].startswith("processes: 3, TCP sockets: 3,")


FORK: Final = """
read, write = os.pipe()
if os.fork() == 0:
    more = socket.create_connection(listener.getsockname())
    os.write(write, b".")
    os.read(read2, 1)
    os._exit(0)
os.read(read, 1)
"""


@pytest.mark.parametrize("command", ["audit", "attach"])
def test_children_with_sockets_are_told_of(other: Puppet, command: str) -> None:
    """nginx's first process shows its listening sockets only; --children includes its workers."""
    other(f"{PAIR}\nread2, write2 = os.pipe()")
    other(FORK)
    assert len(descendants([other.pid])) == 1
    done = kaio(command, str(other.pid))
    assert f"process {other.pid} has 1 child process with 4 TCP sockets; --children includes them" in done.stderr
    done = kaio(command, str(other.pid), "--children", "--json")
    assert done.stderr == ""
    assert len({row["pid"] for row in json.loads(done.output)["sockets"]}) == 2
    other("os.write(write2, b'.')")


# -- whatever kinds of sockets there are

ALL_KINDS: Final = """
made = []
for family in range(1, 46):
    for kind in (1, 2, 3, 4, 5, 6, 10):
        try: made.append(socket.socket(family, kind))
        except OSError: pass
made.append(socket.socket(socket.AF_UNIX)); made[-1].bind("\\0\\x1b]0;x\\x07\\n")
made += socket.socketpair()
it = len(made)
"""


def test_no_socket_of_any_kind_is_an_obstacle(other: Puppet) -> None:
    """A socket of a family that Python does not know, such as AF_XDP, must not switch an audit off."""
    other(ALL_KINDS)
    if os.geteuid() == 0:
        assert other("it = any(each.family == 44 for each in made)"), "this kernel has no AF_XDP"
    other("tcp = socket.socket()")
    before = len(os.listdir("/proc/self/fd"))
    found = sockets(other.pid)
    assert {each.family for each in found} <= {socket.AF_INET, socket.AF_INET6}
    assert len(found) >= 3
    result = survey([other.pid])
    assert (result.processes, result.refused, result.unreadable) == (1, [], [])
    for command in (["audit", str(other.pid)], ["attach", str(other.pid)]):
        done = kaio(*command)
        assert done.exception is None or isinstance(done.exception, SystemExit)
        assert done.stderr == ""
    assert len(os.listdir("/proc/self/fd")) == before


MAIN_ENDS: Final = """
import ctypes, socket, sys, threading
def serve():
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname()), listener.accept()[0]
    print("ready", flush=True)
    sys.stdin.read()
threading.Thread(target=serve).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_main_thread_has_ended_is_read() -> None:
    """Its descriptors are found by way of another thread."""
    command = [sys.executable, "-c", MAIN_ENDS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == "ready\n"
            until(lambda: "Z" in pathlib.Path(f"/proc/{process.pid}/status").read_text().split("State:")[1][:6])
            found = sockets(process.pid)
            assert len(found) == 3
            assert process.pid in {each.pid for each in survey().sockets}
            assert {change.outcome for change in attach(process.pid)} == {Outcome.SET}
            assert {each.state.times for each in sockets(process.pid)} == {POLICY.times}
        finally:
            process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_where_nothing_can_be_read_the_answer_is_not_yes(other: Puppet) -> None:
    """Exit code 3; of several processes some of which are refused, the others' answer is given."""
    other("s = socket.socket()")
    code = f"""
import os, sys
from click.testing import CliRunner
from kaio.cli import cli
os.setgid(65534); os.setuid(65534)
for words in (["audit", "{other.pid}"], ["audit", "{other.pid}", str(os.getpid())], ["attach", "{other.pid}"]):
    done = CliRunner().invoke(cli, words, prog_name="kaio")
    print(done.exit_code, len(done.stderr.splitlines()), len(done.stdout.splitlines()))
sys.stdout.flush()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["3 1 0", "0 1 1", "3 1 0"]
    assert kaio("audit", "999999999", "999999998").exit_code == 3


def test_names_that_lie_are_shown_and_not_obeyed(other: Puppet) -> None:
    """In the table, in the lines of --watch and in JSON."""
    other("open('/proc/self/comm', 'wb').write(b'a\\x1b]0;\\n\\xff\\xe2\\x80\\xae')")
    other("s = socket.socket()")
    for words in (["audit"], ["attach"], ["attach", "--dry-run", "--watch", "1s"], ["audit", "--json"]):
        done = kaio(words[0], str(other.pid), *words[1:])
        assert "\x1b" not in done.output
        assert "\u202e" not in done.output or "--json" in words
    document = json.loads(kaio("attach", str(other.pid), "--json").output)
    assert document["sockets"][0]["process"].startswith("a\x1b]0;\n")


def test_a_policy_that_is_off_turns_keepalive_off_everywhere(other: Puppet) -> None:
    """On listening sockets, too, which get another policy than connections otherwise."""
    other(PAIR)
    attach(other.pid)
    attach(other.pid, Keepalive.OFF)
    assert {state.enabled for state in states(other.pid).values()} == {False}


def test_a_socket_that_processes_share_is_undone_once(other: Puppet) -> None:
    """As the listening socket of a server and its workers: the second process has nothing to say of it."""
    other(f"{PAIR}\nread2, write2 = os.pipe()")
    other(FORK)
    assert kaio("attach", str(other.pid), "--children").exit_code == 0
    done = kaio("attach", str(other.pid), "--children", "--undo", "--json")
    outcomes = [row["outcome"] for row in json.loads(done.output)["sockets"]]
    assert outcomes == ["undone"] * 4
    other("os.write(write2, b'.')")
