"""A policy for a whole cgroup, set by the kernel: `kaio.tools.enforcing`, `kaio enforce`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

import pytest

from kaio import Keepalive, PolicyError, SocketState, TcpState
from kaio.testing import blackhole
from kaio.tools import cgroups
from kaio.tools.bpf import (
    SETSOCKOPT,
    SOCK_OPS,
    Assembler,
    Bpf,
    BpfError,
    Register,
    attached,
    field_offsets,
    is_bpffs,
)
from kaio.tools.cgroups import CgroupError
from kaio.tools.enforcing import (
    EnforceError,
    Enforcement,
    Kind,
    Ports,
    Target,
    boot_files,
    enforce,
    enforced_on,
    enforcements,
    kept_at_boot,
    lift,
    linked,
    parse_ports,
    plan,
    remove_files,
    runtime_files,
    write_files,
)
from kaio.tools.processes import ProcessSocket, sockets

from . import own_cgroup, programs
from .namespaces import Namespace
from .own_cgroup import inside
from .programs import Puppet, puppet

_lacking = own_cgroup.lacking()
pytestmark = pytest.mark.skipif(_lacking is not None, reason=str(_lacking))

QUICK: Final = Keepalive(1, 1, 2)
HAS_QUICK: Final = SocketState(enabled=True, idle=1, interval=1, count=2, user_timeout=3)
POLICY: Final = Keepalive(20, 10, 4)
HAS_POLICY: Final = SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=60)


@pytest.fixture
def group() -> Iterator[str]:
    """A cgroup."""
    with own_cgroup.cgroup() as path:
        yield path


@pytest.fixture
def bpffs(tmp_path: pathlib.Path) -> Iterator[str]:
    """A BPF file system."""
    with own_cgroup.file_system(tmp_path) as path:
        yield path


@pytest.fixture
def member(group: str) -> Iterator[Puppet]:
    """A process in the cgroup."""
    with puppet(*inside(group)) as process:
        yield process


@pytest.fixture
def installed() -> None:
    """The test runs programs in several languages."""
    missing = programs.tell_of_missing()
    if missing is not None:
        pytest.skip(missing)


def until(condition: Callable[[], object]) -> None:
    """Wait for what no event announces."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def connections(pid: int) -> list[ProcessSocket]:
    """A process's connections."""
    return [found for found in sockets(pid) if found.peer is not None]


def ids(group: str) -> list[int]:
    """The numbers of kaio's programs that are attached to a cgroup."""
    descriptor = os.open(group, os.O_RDONLY)
    try:
        return attached(SOCK_OPS, descriptor, "kaio_giver") + attached(SETSOCKOPT, descriptor, "kaio_guard")
    finally:
        os.close(descriptor)


# -- every connection, whatever makes it

PAIR: Final = """
def pair(family=socket.AF_INET, host="127.0.0.1", to=None, listening=(), connecting=(), protocol=0):
    listener = socket.socket(family, socket.SOCK_STREAM, protocol)
    for option in listening:
        listener.setsockopt(*option)
    listener.bind((host, 0))
    listener.listen()
    client = socket.socket(socket.AF_INET if to else family, socket.SOCK_STREAM, protocol)
    for option in connecting:
        client.setsockopt(*option)
    client.connect((to or host, listener.getsockname()[1]))
    accepted, _ = listener.accept()
    keep.append((listener, client, accepted))
    return [each.fileno() for each in (listener, client, accepted)]
keep = globals().get("keep", [])
"""


def made(member: Puppet, arguments: str = "") -> tuple[SocketState, SocketState, SocketState]:
    """Make a connection in the process. Returns the options of its listener and of both ends."""
    listener, client, accepted = member(f"{PAIR}\nit = pair({arguments})")
    found = {each.fd: each.state for each in sockets(member.pid)}
    return found[listener], found[client], found[accepted]


@pytest.mark.parametrize(
    "arguments",
    ["", 'socket.AF_INET6, "::1"', 'socket.AF_INET6, "::", "127.0.0.1"'],
    ids=["IPv4", "IPv6", "mapped"],
)
def test_connections_made_and_accepted_have_the_policy(member: Puppet, group: str, arguments: str) -> None:
    """The listening socket itself is not changed; the policy ends with the link, and sockets keep what they have."""
    with linked(group, POLICY):
        assert made(member, arguments) == (
            SocketState(enabled=False, idle=7200, interval=75, count=9),
            HAS_POLICY,
            HAS_POLICY,
        )
    assert {state.enabled for state in made(member, arguments)} == {False}
    assert [found.state for found in connections(member.pid)].count(HAS_POLICY) == 2


def test_subflows_of_multipath_tcp_have_the_policy(member: Puppet, group: str) -> None:
    """The connection works, and the programs refuse nothing."""
    if not programs.MPTCP:
        pytest.skip("no Multipath TCP in this kernel")
    with linked(group, POLICY):
        member(f"{PAIR}\nit = pair(protocol=262)\nkeep[-1][1].sendall(b'x')\nassert keep[-1][2].recv(1) == b'x'")


def test_sockets_outside_are_left_alone(group: str) -> None:
    """The cgroup's processes are what counts, not their peers."""
    with linked(group, POLICY), puppet() as other:
        assert {state.enabled for state in made(other)} == {False}


@pytest.mark.parametrize("stalled", ["keep", "drop"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20s:10s:4", HAS_POLICY),
        ("detect=30s", None),
        ("20s:10s:4,user_timeout=90s", SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=90)),
        ("32767s:32767s:1", None),
        ("20s:10s:4,user_timeout=none", SocketState(enabled=True, idle=20, interval=10, count=4)),
        ("on", SocketState(enabled=True, idle=7200, interval=75, count=9)),
    ],
)
def test_each_policy_arrives_whole(
    member: Puppet, group: str, text: str, expected: SocketState | None, stalled: Literal["keep", "drop"]
) -> None:
    """Both modes alike: the kernel alone enforces the user timeout."""
    policy = dataclasses.replace(Keepalive.parse(text), stalled=stalled)
    with linked(group, policy):
        _, client, accepted = made(member)
    wanted = expected or SocketState(
        enabled=True,
        idle=policy.idle,
        interval=policy.interval,
        count=policy.count,
        user_timeout=policy.effective_user_timeout,
    )
    assert client == accepted == wanted


# -- what the application chooses

IDLE, INTERVAL, COUNT = "(TCP, 4, 300)", "(TCP, 5, 100)", "(TCP, 6, 3)"
ON: Final = "(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)"
SHORT, LONG = "(TCP, 18, 30000)", "(TCP, 18, 90000)"
CHOICES: Final = {
    "idle": (IDLE, SocketState(enabled=False, idle=300, interval=75, count=9)),
    "interval": (INTERVAL, SocketState(enabled=False, idle=7200, interval=100, count=9)),
    "count": (COUNT, SocketState(enabled=False, idle=7200, interval=75, count=3)),
    "all": (f"{ON}, {IDLE}, {INTERVAL}, {COUNT}", SocketState(enabled=True, idle=300, interval=100, count=3)),
    "the default, explicitly": ("(TCP, 4, 7200)", SocketState(enabled=False, idle=7200, interval=75, count=9)),
    "a short user timeout": (SHORT, SocketState(enabled=False, idle=7200, interval=75, count=9, user_timeout=30)),
    "a long user timeout": (LONG, SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=90)),
    "the policy's user timeout": ("(TCP, 18, 60000)", HAS_POLICY),
    "SO_KEEPALIVE alone": (ON, HAS_POLICY),
    "nothing": ("", HAS_POLICY),
    "the policy's times": (
        "(TCP, 4, 20), (TCP, 5, 10), (TCP, 6, 4)",
        SocketState(enabled=False, idle=20, interval=10, count=4),
    ),
}
LATER: Final = {
    **CHOICES,
    "idle": (IDLE, SocketState(enabled=True, idle=300, interval=10, count=4)),
    "interval": (INTERVAL, SocketState(enabled=True, idle=20, interval=100, count=4)),
    "count": (COUNT, SocketState(enabled=True, idle=20, interval=10, count=3)),
    "the default, explicitly": ("(TCP, 4, 7200)", SocketState(enabled=True, idle=7200, interval=10, count=4)),
    "a short user timeout": (SHORT, SocketState(enabled=False, idle=20, interval=10, count=4, user_timeout=30)),
    "the policy's times": (
        "(TCP, 4, 20), (TCP, 5, 10), (TCP, 6, 4)",
        SocketState(enabled=True, idle=20, interval=10, count=4),
    ),
    "keepalive off": (
        "(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)",
        SocketState(enabled=False, idle=20, interval=10, count=4, user_timeout=60),
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("on_listener", [False, True], ids=["connecting", "listening"])
def test_what_the_application_has_chosen_before_stands(
    member: Puppet, group: str, choice: str, on_listener: bool
) -> None:
    """Before connect(), and on the listening socket for all that it accepts; the other end gets the policy."""
    options, expected = CHOICES[choice]
    with linked(group, POLICY):
        where = "listening" if on_listener else "connecting"
        _, client, accepted = made(member, f"{where}=[{options}]")
    assert (client, accepted) == ((HAS_POLICY, expected) if on_listener else (expected, HAS_POLICY))


@pytest.mark.parametrize("choice", LATER)
def test_what_the_application_sets_later_wins(member: Puppet, group: str, choice: str) -> None:
    """And nothing of the policy stays beside it that could let one lost probe end the connection."""
    options, expected = LATER[choice]
    with linked(group, POLICY):
        fds = member(
            f"{PAIR}\nit = pair()\nfor end in keep[-1][1:]:\n for option in [{options}]: end.setsockopt(*option)"
        )
    found = {each.fd: each for each in sockets(member.pid)}
    for fd in fds[1:]:
        assert found[fd].state == expected
        assert not found[fd].one_lost_probe_kills


ALL_OWN: Final = f"{ON}, (TCP, 4, 20), (TCP, 5, 10), (TCP, 6, 4)"
SEVERAL: Final = {
    "a user timeout as the policy's, then a time": (
        f"(TCP, 18, 60000), {IDLE}",
        SocketState(enabled=False, idle=300, interval=75, count=9, user_timeout=60),
    ),
    "everything as the policy's": (f"(TCP, 18, 60000), {ALL_OWN}", HAS_POLICY),
    "times as the policy's, then a short user timeout": (
        f"{ALL_OWN}, {SHORT}",
        SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=30),
    ),
    "one time as the policy's, then a short user timeout": (
        f"{ON}, (TCP, 4, 20), (TCP, 5, 5), (TCP, 6, 1), (TCP, 18, 25000)",
        SocketState(enabled=True, idle=20, interval=5, count=1, user_timeout=25),
    ),
}


@pytest.mark.parametrize("on_listener", [False, True], ids=["connecting", "listening"])
@pytest.mark.parametrize("choice", SEVERAL)
def test_several_choices_before_stand_in_whatever_order(
    member: Puppet, group: str, choice: str, on_listener: bool
) -> None:
    """The guard takes none of them for the policy's, which the socket does not have yet."""
    options, expected = SEVERAL[choice]
    with linked(group, POLICY):
        _, client, accepted = made(member, f"{'listening' if on_listener else 'connecting'}=[{options}]")
    assert (client, accepted) == ((HAS_POLICY, expected) if on_listener else (expected, HAS_POLICY))


def test_a_policy_with_the_system_s_times_is_told_from_the_application_s_choice(member: Puppet, group: str) -> None:
    """SO_KEEPALIVE and a short user timeout, on a socket that has no policy yet."""
    with linked(group, Keepalive.SYSTEM):
        _, client, _ = made(member, f"connecting=[{ON}, {SHORT}]")
    assert client == SocketState(enabled=True, idle=7200, interval=75, count=9, user_timeout=30)


def test_times_of_its_own_on_a_connection_stand_with_a_short_user_timeout(member: Puppet, group: str) -> None:
    """Though one of them is as the policy's."""
    with linked(group, POLICY):
        fds = member(
            f"{PAIR}\nit = pair()\nfor end in keep[-1][1:]:\n"
            f" for option in [{ON}, (TCP, 4, 20), (TCP, 5, 5), (TCP, 6, 3), (TCP, 18, 28000)]: end.setsockopt(*option)"
        )
    found = {each.fd: each.state for each in sockets(member.pid)}
    expected = SocketState(enabled=True, idle=20, interval=5, count=3, user_timeout=28)
    assert {found[fd] for fd in fds[1:]} == {expected}


def test_the_sysctls_of_another_network_namespace_are_no_choice(member: Puppet, group: str) -> None:
    """Nor are those that change afterwards."""
    network = Namespace("own")
    try:
        network.sysctl("net.ipv4.tcp_keepalive_time", 600)
        with linked(group, POLICY):
            member(f"fd = os.open({network.path!r}, os.O_RDONLY)\nimport ctypes\nctypes.CDLL(None).setns(fd, 0)")
            assert made(member)[1:] == (HAS_POLICY, HAS_POLICY)
            network.sysctl("net.ipv4.tcp_keepalive_time", 500)
            network.sysctl("net.ipv4.tcp_keepalive_probes", 5)
            assert made(member)[1:] == (HAS_POLICY, HAS_POLICY)
    finally:
        network.close()


def test_other_calls_of_setsockopt_work(member: Puppet, group: str) -> None:
    """Short, empty and long values, other levels: the kernel answers as without the guard."""
    calls = """
it = []
s, u = socket.socket(), socket.socket(socket.AF_UNIX)
for sock, level, name, value in (
    (s, TCP, 4, b""), (s, TCP, 18, b"ab"), (s, TCP, 18, b""), (s, TCP, 4, b"\\x05\\0\\0\\0" + bytes(9000)),
    (s, TCP, 18, b"\\x05\\0\\0\\0" + bytes(100000)), (s, TCP, 9999, 1), (u, TCP, 4, 1), (u, socket.SOL_SOCKET, 9, 1),
    (s, socket.SOL_SOCKET, socket.SO_RCVBUF, 5000), (s, socket.SOL_SOCKET, 26, bytes(16)), (s, TCP, 18, -5),
    (s, TCP, 4, 40000), (s, TCP, 31, b"x" * 300), (s, TCP, 13, b"cubic"),
):
    try:
        sock.setsockopt(level, name, value)
        it.append(0)
    except OSError as exc:
        it.append(exc.errno)
it.append([s.getsockopt(TCP, n) for n in (4, 5, 6, 18)])
"""
    expected = member(calls)
    with linked(group, POLICY):
        assert member(calls) == expected


# -- the whole of a program's connections


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers", "installed")
def test_dead_peers_are_detected_whatever_the_program_is_written_in(tmp_path: pathlib.Path, group: str) -> None:
    """Static C, JavaScript, redis-server, Python, a shell's /dev/tcp, which connects; idle and with data in flight."""
    within = inside(group)
    with contextlib.ExitStack() as stack:
        stack.enter_context(linked(group, QUICK))
        servers = {
            "C": stack.enter_context(programs.static(tmp_path, *within)),
            "JavaScript": stack.enter_context(programs.node(*within)),
            "redis": stack.enter_context(programs.redis(tmp_path, "--tcp-keepalive", "0", before=within)),
            "Python": stack.enter_context(programs.python(*within)),
        }
        clients = {name: [stack.enter_context(each.connect()) for _ in range(3)] for name, each in servers.items()}
        for name, (_, busy, _) in clients.items():
            busy.sendall(b"MONITOR\r\n" if name == "redis" else b"feed me")
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        script = f'exec 3<>/dev/tcp/127.0.0.1/{listener.getsockname()[1]}; read -r line <&3; echo "ended $?"'
        shell = stack.enter_context(
            subprocess.Popen([*within, "bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        stack.callback(shell.kill)
        end = stack.enter_context(listener.accept()[0])
        for name, server in servers.items():
            until(lambda server=server: len(connections(server.pid)) == 3)  # type: ignore[misc]
            assert {found.state for found in connections(server.pid)} == {HAS_QUICK}, name
        assert [found.state for found in connections(shell.pid)] == [HAS_QUICK]
        dying = [client for three in clients.values() for client in three[:2]]
        stack.enter_context(blackhole(*dying, end))
        began = time.monotonic()
        if clients["redis"][2].send(b"PING\r\n"):  # which the monitoring client is told
            for server in servers.values():
                until(lambda server=server: len(alive(server.pid)) == 1)  # type: ignore[misc]
        assert shell.wait(30) == 0
        assert shell.stdout is not None
        assert shell.stderr is not None
        assert "timed out" in shell.stderr.read()
        print(f"all dead after {time.monotonic() - began:.1f} s, of 3 s")


def alive(pid: int) -> list[ProcessSocket]:
    """A process's connections that have not ended."""
    return [found for found in connections(pid) if found.tcp_state != TcpState.CLOSE]


STORM: Final = """
import resource, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (min(20000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
accepted, made, odd = [], [], []
def first_byte(sock):
    sock.setblocking(True)
    values = sock.getsockopt(socket.SOL_SOCKET, 9), *(sock.getsockopt(TCP, n) for n in (4, 5, 6, 18))
    if values != EXPECTED: odd.append(values)
def accept():
    while len(accepted) < COUNT:
        sock, _ = listener.accept()
        first_byte(sock)
        accepted.append(sock)
EXPECTED = (1, 20, 10, 4, 60000)
COUNT = 5000
thread = threading.Thread(target=accept)
thread.start()
for _ in range(COUNT):
    sock = socket.socket()
    sock.setblocking(False)
    try: sock.connect(listener.getsockname())
    except BlockingIOError: pass
    first_byte(sock)
    made.append(sock)
thread.join()
it = [len(accepted), len(made), odd[:5]]
"""


@pytest.mark.slow
def test_no_connection_of_a_storm_is_without_the_policy(member: Puppet, group: str) -> None:
    """5,000 connects: both ends have it when they first can be used, and so says every look from outside meanwhile."""
    with linked(group, POLICY):
        assert member.process.stdin is not None
        assert member.process.stdout is not None
        member.process.stdin.write(json.dumps(STORM) + "\n")
        member.process.stdin.flush()
        seen, looks = 0, 0
        os.set_blocking(member.process.stdout.fileno(), False)
        while not (line := member.process.stdout.readline()):
            found = connections(member.pid)
            assert {each.state for each in found} <= {HAS_POLICY}
            seen, looks = max(seen, len(found)), looks + 1
        assert json.loads(line) == [5000, 5000, []]
        found = connections(member.pid)
        assert len(found) == 10_000
        assert {each.state for each in found} == {HAS_POLICY}
    print(f"{looks} looks from outside during the storm, at up to {seen} connections")


# -- nesting, replacing, lifting


def test_the_nearest_policy_wins(group: str) -> None:
    """The program of the cgroup itself runs before those above it."""
    with own_cgroup.cgroup("below", group) as below, linked(group, "30s:10s:4"), linked(below, POLICY):
        with puppet(*inside(below)) as member:
            assert made(member)[1:] == (HAS_POLICY, HAS_POLICY)
        with puppet(*inside(group)) as member:
            assert made(member)[1].idle == 30


def test_exceptions_by_port(member: Puppet, group: str) -> None:
    """By the service's port: the peer's when connecting, the own one when accepting; ends of ranges included."""
    port = member("s = socket.create_server(('127.0.0.1', 0)); it = s.getsockname()[1]")
    connect = "c = socket.create_connection(s.getsockname()); a, _ = s.accept(); it = [c.fileno(), a.fileno()]"

    def have(ports: Sequence[Ports]) -> list[bool]:
        with own_cgroup.file_system(pathlib.Path(directory)) as bpffs:
            enforce(target, POLICY, ports=ports, bpffs=bpffs)
            try:
                fds = member(connect)
                found = {each.fd: each.state.enabled for each in sockets(member.pid)}
                return [found[fd] for fd in fds]
            finally:
                assert lift(target, bpffs=bpffs)

    target = Target.cgroup(group)
    with contextlib.ExitStack() as stack:
        for ports, expected in (
            ([], True),
            ([Ports(port, port)], False),
            ([Ports(1, port)], False),
            ([Ports(port, 65535)], False),
            ([Ports(1, port - 1), Ports(port + 1, 65535)], True),
            ([Ports(number, number) for number in range(1, 64)] + [Ports(port, port)], False),
        ):
            directory = stack.enter_context(_temporary())
            assert have(ports) == [expected, expected], ports


@contextlib.contextmanager
def _temporary() -> Iterator[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        yield path


# -- replacing and lifting


def test_a_policy_is_replaced_with_nothing_in_between(member: Puppet, group: str, bpffs: str) -> None:
    """While connections are made all the time, each has one policy or the other."""
    target = Target.cgroup(group)
    enforce(target, POLICY, bpffs=bpffs)
    member("""
import threading
listener = socket.create_server(("127.0.0.1", 0), backlog=100)
stop, seen = threading.Event(), set()
def run():
    while not stop.is_set():
        with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as accepted:
            for end in client, accepted:
                seen.add((end.getsockopt(socket.SOL_SOCKET, 9), *(end.getsockopt(TCP, n) for n in (4, 5, 6, 18))))
thread = threading.Thread(target=run)
thread.start()
""")
    for idle in (30, 20) * 20:
        enforce(target, Keepalive(idle, 10, 4), ports=[Ports(1, 2)] if idle == 30 else [], bpffs=bpffs)
    seen = member("stop.set(); thread.join(); it = sorted(seen)")
    assert seen == [[1, 20, 10, 4, 60000], [1, 30, 10, 4, 70000]]
    assert len(ids(group)) == 2
    lift(target, bpffs=bpffs)


def test_lifting_leaves_nothing(member: Puppet, group: str, bpffs: str) -> None:
    """Neither programs nor pins; connections keep the options that they have, and new ones get none."""
    target = Target.cgroup(group)
    assert lift(target, bpffs=bpffs) is False
    done = enforce(target, POLICY, bpffs=bpffs)
    assert done == dataclasses.replace(
        done,
        target=target,
        policy="20s:10s:4",
        ports=(),
        directory=group,
        attached=True,
        counters=done.counters._replace(connected=0, accepted=0),
    )
    numbers = ids(group)
    assert len(numbers) == 2
    made(member)
    (found,) = enforcements(bpffs=bpffs)
    assert (found.counters.connected, found.counters.accepted) == (1, 1)
    assert found.counters == found.counters._replace(own=0, later=0, excepted=0, failed=0)
    assert lift(target, bpffs=bpffs) is True
    assert ids(group) == []
    assert [name for name in os.listdir(bpffs) if not name.endswith(".debug")] == []
    assert enforcements(bpffs=bpffs) == []
    until(lambda: not any(_exists(number) for number in numbers))
    assert {state.enabled for state in made(member)} == {False}
    assert [found.state for found in connections(member.pid)].count(HAS_POLICY) == 2


def _exists(program: int) -> bool:
    """Whether the kernel still has a program of that number."""
    listed = subprocess.run(["bpftool", "prog", "show", "id", str(program)], capture_output=True, check=False)
    return listed.returncode == 0


def test_what_systemd_attaches_is_replaced_and_lifted_as_well(group: str, bpffs: str) -> None:
    """It attaches the pinned programs without a link, when it starts a unit whose drop-in says BPFProgram=."""
    target = Target.cgroup(group)
    done = enforce(target, POLICY, bpffs=bpffs)
    _attach_as_systemd(done, group)
    assert len(ids(group)) == 4
    enforce(target, "30s:10s:4", bpffs=bpffs)
    assert len(ids(group)) == 2
    _attach_as_systemd(done, group)
    lift(target, bpffs=bpffs)
    assert ids(group) == []


def _attach_as_systemd(done: Enforcement, group: str) -> None:
    """bpf(2), BPF_PROG_ATTACH, BPF_F_ALLOW_MULTI: see src/core/bpf-foreign.c of systemd."""
    for kind, name in (("sock_ops", "giver"), ("setsockopt", "guard")):
        kind = {"setsockopt": "cgroup_setsockopt", "sock_ops": "cgroup_sock_ops"}[kind]
        command = ["bpftool", "cgroup", "attach", group, kind, "pinned", f"{done.pins}/{name}", "multi"]
        subprocess.run(command, check=True)


def test_a_cgroup_has_one_policy(bpffs: str) -> None:
    """A cgroup that is named twice is refused the second time, with the first name."""
    unit = f"kaio-test-{os.getpid()}.service"
    with own_cgroup.cgroup(unit) as path:
        assert Target.cgroup(path) == Target.unit(unit)
        enforce(Target.unit(unit), POLICY, bpffs=bpffs)
        with pytest.raises(EnforceError, match=f"has a policy already, as unit {unit}: lift that first"):
            enforce(Target(Kind.CGROUP, path), POLICY, bpffs=bpffs)
        assert len(enforcements(bpffs=bpffs)) == 1
        lift(Target.unit(unit), bpffs=bpffs)


def test_a_unit_that_is_started_again_gets_its_policy_again(bpffs: str) -> None:
    """Its new cgroup has none until systemd attaches the programs, or the policy is enforced again."""
    unit = Target.unit(f"kaio-test-again-{os.getpid()}")
    assert enforce(unit, POLICY, bpffs=bpffs).directory is None
    for _ in range(2):
        with own_cgroup.cgroup(unit.name) as path:
            (found,) = enforcements(bpffs=bpffs)
            assert (found.directory, found.attached) == (path, False)
            assert enforce(unit, POLICY, bpffs=bpffs).attached
            with puppet(*inside(path)) as member:
                assert made(member)[1:] == (HAS_POLICY, HAS_POLICY)
        assert enforcements(bpffs=bpffs)[0].directory is None
    assert lift(unit, bpffs=bpffs)


def test_the_status_is_whole_while_others_enforce_and_lift(group: str, bpffs: str) -> None:
    """No enforcement is seen half made, half replaced or half removed."""
    target, stop = Target.cgroup(group), threading.Event()

    def change() -> None:
        while not stop.is_set():
            for policy in (POLICY, Keepalive(30, 10, 4)):
                enforce(target, policy, bpffs=bpffs)
                time.sleep(0.03)  # longer than between two attempts to lock, so that the others have it, too
            lift(target, bpffs=bpffs)
            time.sleep(0.03)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        changing = pool.submit(change)
        try:
            end, seen = time.monotonic() + 30, 0
            while seen < 10 and time.monotonic() < end and not changing.done():
                found = enforcements(bpffs=bpffs)
                assert all(each.attached for each in found)
                seen += bool(found)
                time.sleep(0.03)
        finally:
            stop.set()
        changing.result()
    assert seen == 10


def test_a_file_system_is_mounted_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first of several commands: the pins in one below another could not be found."""
    directory = tmp_path / "bpf"
    directory.mkdir()
    both = threading.Barrier(2)

    def meeting(path: str, real: Callable[[str], bool] = is_bpffs) -> bool:
        found = real(path)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return found

    monkeypatch.setattr("kaio.tools.enforcing._enforcement.is_bpffs", meeting)
    with own_cgroup.cgroup() as one, own_cgroup.cgroup() as two, concurrent.futures.ThreadPoolExecutor() as pool:
        targets = [Target.cgroup(one), Target.cgroup(two)]
        try:
            list(pool.map(lambda target: enforce(target, POLICY, bpffs=str(directory)), targets))
            mounts = pathlib.Path("/proc/self/mountinfo").read_text()
            assert mounts.count(f" {directory} ") == 1
            assert len(enforcements(bpffs=str(directory))) == 2
            assert all(lift(target, bpffs=str(directory)) for target in targets)
        finally:
            while is_bpffs(str(directory)):
                subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.mark.parametrize(
    "settings",
    [
        b"",
        b"[]",
        b"{}",
        b'{"kind": [], "name": 1}',
        b'{"kind": "unit", "name": "x.service", "policy": 1, "except": [1]}',
    ],
)
def test_pins_that_kaio_has_not_made(group: str, bpffs: str, settings: bytes) -> None:
    """Or another version of it: an error that names them; lifting and enforcing work."""
    target = Target.cgroup(group)
    path = pathlib.Path(enforce(target, POLICY, bpffs=bpffs).pins) / "settings"

    def spoil(size: int) -> None:
        path.unlink()
        with Bpf.array("foreign", size) as foreign:
            foreign.write(settings.ljust(size, b"\0"))
            foreign.pin(str(path))

    spoil(4096)
    with pytest.raises(EnforceError, match=f"{target.key}: pins that kaio has not made, or another version of it"):
        enforcements(bpffs=bpffs)
    assert enforce(target, POLICY, bpffs=bpffs).attached
    spoil(1 << 20)  # which the kernel would write over whatever is behind a shorter buffer
    with pytest.raises(EnforceError, match="not one whose value has 4096 bytes"):
        enforcements(bpffs=bpffs)
    assert lift(target, bpffs=bpffs)
    assert enforcements(bpffs=bpffs) == []


def test_what_a_killed_command_has_left_is_no_obstacle(group: str, bpffs: str) -> None:
    """Directories without pins, pins under their first names, a lock that nobody holds any more."""
    target = Target.cgroup(group)
    pins = pathlib.Path(bpffs) / "kaio" / target.key
    pins.mkdir(parents=True)
    (pins.parent / "other").mkdir()
    pins.parent.chmod(0o700)
    with Bpf.array("left", 8) as left:
        left.pin(str(pins / "new-giver"))
        left.pin(str(pins / "new-settings"))
    assert enforcements(bpffs=bpffs) == []
    assert enforce(target, POLICY, bpffs=bpffs).attached
    assert sorted(os.listdir(pins)) == ["counters", "giver", "giver-link", "guard", "guard-link", "settings"]
    assert len(enforcements(bpffs=bpffs)) == 1
    assert lift(target, bpffs=bpffs)


def test_a_failure_changes_nothing(group: str, bpffs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step fails, the earlier policy is in force, and no pins are added."""
    target = Target.cgroup(group)
    for earlier in (False, True):
        if earlier:
            enforce(target, POLICY, bpffs=bpffs)
        before, attached_before = _pins(bpffs), ids(group)
        for step in range(1, 7):
            with monkeypatch.context() as patch:
                pin, calls = Bpf.pin, iter(range(1, 100))

                def failing(self: Bpf, path: str, pin: object = pin, calls: object = calls, step: int = step) -> None:
                    if next(calls) == step:  # type: ignore[call-overload]
                        raise BpfError(28, "no space")
                    pin(self, path)  # type: ignore[operator]

                patch.setattr(Bpf, "pin", failing)
                if step > (4 if earlier else 6):
                    continue
                with pytest.raises(EnforceError, match="no space"):
                    enforce(target, "30s:10s:4", bpffs=bpffs)
            assert _pins(bpffs) == before
            assert ids(group) == attached_before
    assert enforcements(bpffs=bpffs)[0].policy == "20s:10s:4"
    lift(target, bpffs=bpffs)


def _pins(bpffs: str) -> set[str]:
    return {os.path.join(each, name) for each, _, names in os.walk(bpffs) for name in names}


def test_a_directory_of_another_user_is_refused(group: str, bpffs: str) -> None:
    """BPF file systems may be writable by everyone; nothing of kaio's is then put where another may replace it."""
    directory = pathlib.Path(bpffs) / "kaio"
    directory.mkdir(mode=0o700)
    os.chown(directory, 65534, 65534)
    with pytest.raises(EnforceError, match="belongs to another user"):
        enforce(Target.cgroup(group), POLICY, bpffs=bpffs)
    os.chown(directory, 0, 0)
    directory.chmod(0o777)
    with pytest.raises(EnforceError, match="others may write"):
        enforce(Target.cgroup(group), POLICY, bpffs=bpffs)
    assert ids(group) == []


# -- the programs


def test_the_verifier_s_log_is_in_the_error() -> None:
    """A program that does not return."""
    asm = Assembler()
    asm.load_word(Register.R0, Register.R1, 4096, "beyond the event")
    asm.exit()
    with pytest.raises(BpfError, match="the verifier refused it") as refused:
        Bpf.program(SOCK_OPS, "refused", asm.assemble())
    assert "invalid bpf_context access" in refused.value.log


def test_the_listing_has_each_instruction_once() -> None:
    """Each jump has its label, and each place is an instruction's."""
    for name, asm in plan(POLICY, parse_ports("22,8000-8010")).items():
        lines = asm.listing()
        labels = {line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")}
        targets = {line.split("goto ")[1].split()[0] for line in lines if "goto " in line}
        assert targets <= labels, name
        places = [int(line[:5]) for line in lines if line.startswith(" ")]
        assert places == sorted(set(places))
        assert len(asm.assemble()) == 8 * len(asm)


def test_fields_that_the_kernel_does_not_have(tmp_path: pathlib.Path) -> None:
    """And no type information, or nonsense in its place."""
    with pytest.raises(BpfError, match="struct tcp_sock does not have keepalive_tim"):
        field_offsets("tcp_sock", ["keepalive_tim"])
    with pytest.raises(BpfError, match="struct tcp_soc does not have"):
        field_offsets("tcp_soc", ["keepalive_time"])
    with pytest.raises(BpfError, match="no type information"):
        field_offsets("tcp_sock", ["keepalive_time"], str(tmp_path / "none"))
    for number, content in enumerate((b"", b"nonsense", b"\x9f\xeb" + bytes(100), os.urandom(5000))):
        path = tmp_path / str(number)
        path.write_bytes(content)
        with pytest.raises(BpfError, match="does not have"):
            field_offsets("tcp_sock", ["keepalive_time"], str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("22", [(22, 22)]), ("22,8000-8010", [(22, 22), (8000, 8010)]), (" 1 - 65535 ", [(1, 65535)])],
)
def test_ports(text: str, expected: list[tuple[int, int]]) -> None:
    assert parse_ports(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "65536", "1-", "-1", "a", "2-1", "1,,2", "٣", "1" * 5000, ",".join(["1"] * 65), "1-2-3", "+1"]
)
def test_invalid_ports(text: str) -> None:
    with pytest.raises(PolicyError):
        parse_ports(text)


# -- targets


@pytest.mark.parametrize(
    "name",
    ["", "a b", "../x.service", "x.mount", "a/b.service", "x\n.service", ".service", "a" * 300, "x@", "x@.socket"],
)
def test_names_that_no_unit_has(name: str) -> None:
    with pytest.raises(CgroupError, match="must be the name of"):
        Target.unit(name)


@pytest.mark.parametrize("path", ["", "/", "/proc", "/nonexistent", "relative", "/sys/fs/cgroup/x\0y", "/../../etc"])
def test_paths_that_are_no_cgroups(path: str) -> None:
    if path == "/":  # as in /proc/PID/cgroup: the topmost
        assert Target.cgroup(path) == Target.machine()
        return
    with pytest.raises(CgroupError):
        Target.cgroup(path)


def test_units_of_the_same_name(bpffs: str) -> None:
    """The system's own comes first, a user's next, a container's last; each can be given by its path."""
    name = f"kaio-test-same-{os.getpid()}.service"
    with (
        own_cgroup.cgroup() as group,
        own_cgroup.cgroup("user.slice", group) as user,
        own_cgroup.cgroup("user@1.service", user) as manager,
        own_cgroup.cgroup(name, group) as container,
    ):
        assert Target.cgroup(container) == Target.unit(name)
        with own_cgroup.cgroup(name, manager) as another:
            with pytest.raises(CgroupError, match="several cgroups bear the name"):
                cgroups.of_unit(name)
            for path in (container, another):
                assert Target.cgroup(path) == Target(Kind.CGROUP, path)
                assert enforce(Target.cgroup(path), POLICY, bpffs=bpffs).attached
                assert len(ids(path)) == 2
            assert enforced_on(another, bpffs=bpffs) == Target(Kind.CGROUP, another)
            assert lift(Target(Kind.CGROUP, another), bpffs=bpffs)
            with own_cgroup.cgroup(name) as system:
                assert cgroups.of_unit(name) == system
                assert enforced_on(system, bpffs=bpffs) is None
        assert lift(Target(Kind.CGROUP, container), bpffs=bpffs)


def test_a_unit_that_several_run_by_now(bpffs: str) -> None:
    """Its policy is still shown, and can be lifted."""
    name = f"kaio-test-several-{os.getpid()}.service"
    with own_cgroup.cgroup() as group, own_cgroup.cgroup(name, group) as first:
        enforce(Target.unit(name), POLICY, bpffs=bpffs)
        with own_cgroup.cgroup("second.scope", group) as scope, own_cgroup.cgroup(name, scope):
            (found,) = enforcements(bpffs=bpffs)
            assert (found.directory, found.attached) == (None, True)
            with pytest.raises(EnforceError, match="several cgroups bear the name"):
                enforce(Target.unit(name), POLICY, bpffs=bpffs)
            assert lift(Target.unit(name), bpffs=bpffs)
            assert ids(first) == []


def test_the_policy_of_a_cgroup_that_is_gone(bpffs: str) -> None:
    """It is found by its path, as a unit's is."""
    name = f"kaio-test-gone-{os.getpid()}.scope"
    with own_cgroup.cgroup() as group, own_cgroup.cgroup(name) as unit:
        enforce(Target.cgroup(group), POLICY, bpffs=bpffs)
        enforce(Target.cgroup(unit), POLICY, bpffs=bpffs)
    assert enforced_on(group, bpffs=bpffs) == Target(Kind.CGROUP, group)
    assert enforced_on(unit, bpffs=bpffs) == Target.unit(name)
    assert enforced_on(f"{group}-other", bpffs=bpffs) is None
    assert lift(Target(Kind.CGROUP, group), bpffs=bpffs)
    assert lift(Target.unit(name), bpffs=bpffs)


def test_the_slice_above_all_others_is_the_machine() -> None:
    """Nothing else is in its cgroup's place."""
    assert Target.unit("-.slice") == Target.machine()


def test_keys_differ_and_have_no_dots() -> None:
    """A BPF file system refuses names with dots; long names are no obstacle."""
    names = ["a-b.service", "a_b.service", "a.b.service", "a_2eb.service", "a@b.service"]
    targets = [Target.machine(), *map(Target.unit, names)]
    targets += [Target(Kind.CGROUP, "/x/" + "é" * count) for count in (1, 2, 100, 101)]
    keys = [target.key for target in targets]
    assert len(set(keys)) == len(keys)
    assert all("." not in key and "/" not in key and len(os.fsencode(key)) < 255 for key in keys)


# -- systemd


def _verified(root: pathlib.Path, *units: str, recursive: str = "no") -> str:
    """What systemd-analyze complains about."""
    command = ["systemd-analyze", "verify", "--man=no", f"--recursive-errors={recursive}", f"--root={root}", *units]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("web-app@1\\x2d2.service", "[Service]\nExecStart=/bin/true\n", ""),
        ("web.socket", "[Socket]\nListenStream=1\n", "web.service not loaded"),
        ("web.slice", "[Slice]\n", ""),
        ("web.scope", None, ""),
    ],
)
def test_systemd_reads_the_files_for_a_unit(
    tmp_path: pathlib.Path, name: str, content: str | None, complaint: str
) -> None:
    """Written, verified by systemd's own tool, and removed without a trace."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here: run scripts/install-system-packages")
    target = Target.unit(name)
    assert kept_at_boot(target, str(tmp_path)) is None
    files = boot_files(target, ["--unit", target.name, "20s:10s:4"])
    write_files(files, str(tmp_path))
    write_files(files, str(tmp_path))
    assert kept_at_boot(target, str(tmp_path)) is not None
    units = tmp_path / "etc/systemd/system"
    if content is not None:
        (units / name).write_text(content)
    for program in ("/bin/true", sys.executable):
        copy = tmp_path / program.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch(0o755)
    complaints = _verified(tmp_path, *(path.name for path in units.iterdir() if path.is_file()))
    assert complaint in complaints
    assert complaints.count("\n") == bool(complaint), complaints
    (units / name).unlink(missing_ok=True)
    assert len(remove_files(target, str(tmp_path))) == 2
    assert list(units.iterdir()) == []
    assert remove_files(target, str(tmp_path)) == []


BOOT: Final = {
    "sysinit.target": "[Unit]\nWants=local-fs.target\nAfter=local-fs.target\n",
    "local-fs.target": "[Unit]\nWants=boot.mount\nAfter=boot.mount\n",
    "boot.mount": "[Mount]\nWhat=none\nWhere=/boot\n",
}


@pytest.mark.parametrize("name", ["system.slice", "init.scope", "user.slice", "web.slice", "web.service", "-.slice"])
def test_the_order_at_boot_has_no_cycle(tmp_path: pathlib.Path, name: str) -> None:
    """Mounts and services are in system.slice themselves, the service that enforces the policy as well."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here: run scripts/install-system-packages")
    target = Target.unit(name)
    write_files(boot_files(target, ["--unit", name, "20s:10s:4"]), str(tmp_path))
    units = tmp_path / "etc/systemd/system"
    for file, content in {**BOOT, "web.service": "[Service]\nExecStart=/bin/true\n"}.items():
        (units / file).write_text(content)
    for program in ("/bin/true", sys.executable):
        copy = tmp_path / program.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch(0o755)
    assert "cycl" not in _verified(
        tmp_path, *(path.name for path in units.iterdir() if path.is_file()), recursive="yes"
    )
    wanted = os.path.lexists(units / "sysinit.target.wants")
    assert wanted or (units / f"{name}.d").is_dir()
    remove_files(target, str(tmp_path))
    assert not [path for path in units.rglob("*") if "kaio" in path.name]


def test_files_that_cannot_be_written_leave_nothing_half(tmp_path: pathlib.Path) -> None:
    """A directory is in the place of a file: the error names it, and what was written beside it is gone."""
    (tmp_path / "etc/x.conf/y").mkdir(parents=True)
    with pytest.raises(EnforceError, match=r"^/etc/x\.conf: Is a directory$"):
        write_files({"etc/x.conf": "content"}, str(tmp_path))
    assert os.listdir(tmp_path / "etc") == ["x.conf"]


def test_files_for_a_running_systemd(tmp_path: pathlib.Path) -> None:
    """A drop-in until the next boot; none where there is no systemd, or where one for each boot is."""
    unit = Target.unit("web")
    assert runtime_files(unit, root=str(tmp_path)) == {}
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    (path,) = runtime_files(unit, root=str(tmp_path))
    assert path == "run/systemd/system/web.service.d/60-kaio.conf"
    assert runtime_files(Target.machine(), root=str(tmp_path)) == {}
    write_files(boot_files(unit, ["--unit", "web.service"]), str(tmp_path))
    assert runtime_files(unit, root=str(tmp_path)) == {}
