"""`kaio.tools.processes`: the TCP sockets of a running process, and what is said when they may not be looked at."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from kaio import SocketState, TcpState
from kaio.tools.processes import ProcessError, ProcessSocket, lacking, sockets, uncovered
from kaio.tools.processes._access import Process, _restricted, _yama_scope
from kaio.tools.sysctls import Defaults, read

from . import namespaces
from .programs import MPTCP, Puppet, puppet, run_alone

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))


@pytest.fixture
def other() -> Iterator[Puppet]:
    """Another process."""
    with puppet() as process:
        yield process


# -- reading


def test_every_kind_of_tcp_socket_is_listed(other: Puppet) -> None:
    """Listening, connected, unconnected; IPv4, IPv6, MPTCP; each once; nothing that is not TCP."""
    other(f"MPTCP = {MPTCP}")
    fds = other("""
v4 = socket.create_server(("127.0.0.1", 0)); v6 = socket.create_server(("::1", 0), family=socket.AF_INET6)
client = socket.create_connection(v6.getsockname()[:2]); accepted = v6.accept()[0]
fresh = socket.socket(); mptcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP)
again = os.dup(client.fileno())
others = [socket.socket(type=socket.SOCK_DGRAM), *socket.socketpair(), os.pipe(), open("/dev/null")]
it = {name: globals()[name].fileno() for name in ("v4", "v6", "client", "accepted", "fresh", "mptcp")}
it["address"] = client.getsockname()
""")
    found = {one.fd: one for one in sockets(other.pid)}
    address = tuple(fds.pop("address"))
    assert set(found) == set(fds.values())
    assert {one.pid for one in found.values()} == {other.pid}
    v4, v6, client, accepted, fresh, mptcp = (
        found[fds[name]] for name in ("v4", "v6", "client", "accepted", "fresh", "mptcp")
    )
    assert (v4.family, v4.listening, v4.peer, v4.tcp_state) == (socket.AF_INET, True, None, TcpState.LISTEN)
    assert (v6.family, v6.listening, v6.local[0]) == (socket.AF_INET6, True, "::1")
    assert (client.local, client.peer, client.tcp_state) == (address, v6.local, TcpState.ESTABLISHED)
    assert (accepted.local, accepted.peer, accepted.listening) == (v6.local, address, False)
    assert (fresh.peer, fresh.listening, fresh.tcp_state) == (None, False, TcpState.CLOSE)
    assert (mptcp.mptcp, client.mptcp) == (MPTCP != 0, False)
    assert client.info is not None
    assert client.info.state == TcpState.ESTABLISHED
    assert client.inode == os.stat(f"/proc/{other.pid}/fd/{client.fd}").st_ino


def test_options_are_read_from_the_kernel(other: Puppet) -> None:
    """All five options, and the detection times that follow from them."""
    other("""
def make(*options):
    made.append(socket.socket())
    for level, option, value in options: made[-1].setsockopt(level, option, value)
made, ON = [], (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
times = [(TCP, socket.TCP_KEEPIDLE, 30), (TCP, socket.TCP_KEEPINTVL, 5), (TCP, socket.TCP_KEEPCNT, 3)]
make(); make(ON); make(*times); make(ON, *times); make(ON, *times, (TCP, socket.TCP_USER_TIMEOUT, 40_500))
make(ON, *times, (TCP, socket.TCP_USER_TIMEOUT, 3_000)); make((TCP, socket.TCP_USER_TIMEOUT, 3_000))
""")
    off, on, times, both, bounded, hybrid, data = sockets(other.pid)
    system = off.system
    assert off.state == SocketState(enabled=False, idle=system.idle, interval=system.interval, count=system.count)
    assert both.state == SocketState(enabled=True, idle=30, interval=5, count=3)
    assert bounded.state.user_timeout == 40.5
    assert [one.chosen for one in (off, on, times, both, bounded, data)] == [False, False, False, True, True, False]
    assert [one.covered for one in (off, on, times, both, bounded, data)] == [False, False, False, True, True, False]
    assert [one.idle_detection for one in (off, both, data)] == [math.inf, 45, math.inf]
    assert on.idle_detection == system.detection_time
    assert bounded.idle_detection == 45  # the first probe that is due after 40.5 s
    assert (hybrid.idle_detection, hybrid.one_lost_probe_kills, both.one_lost_probe_kills) == (35, True, False)
    assert (data.in_flight_detection, data.window_shut_detection) == (3, 3)
    assert both.in_flight_detection == system.unacknowledged_time


def test_defaults_are_read_in_the_sockets_network_namespace(other: Puppet) -> None:
    """A container may have other defaults; only times that differ from those count as chosen."""
    reason = namespaces.lacking()
    if reason is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        network = namespaces.Namespace("elsewhere")
        stack.callback(network.close)
        network.sysctl("net.ipv4.tcp_keepalive_time", 100)
        network.sysctl("net.ipv4.tcp_retries2", 3)
        with network.entered():
            inside = stack.enter_context(puppet())
        inside("""
a, b = socket.socket(), socket.socket()
for each in (a, b): each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
b.setsockopt(TCP, socket.TCP_KEEPIDLE, 7200)
""")
        plain, chosen = sockets(inside.pid)
    assert (plain.system.idle, plain.system.retries2) == (100, 3)
    assert [plain.chosen, chosen.chosen] == [False, True]
    assert [plain.covered, chosen.covered] == [True, False]
    assert plain.in_flight_detection < 5
    other("s = socket.socket()")
    assert sockets(other.pid)[0].system == read()


def test_reading_changes_nothing_in_the_process(other: Puppet) -> None:
    """Its sockets remain blocking under any default timeout; when it closes one, the peer gets the FIN at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other(f"client = socket.create_connection({listener.getsockname()!r})")
        accepted = listener.accept()[0]
    open_before = set(os.listdir("/proc/self/fd"))
    socket.setdefaulttimeout(5)
    try:
        assert len(sockets(other.pid)) == 1
    finally:
        socket.setdefaulttimeout(None)
    assert set(os.listdir("/proc/self/fd")) == open_before
    assert other("it = os.get_blocking(client.fileno())")
    with accepted:
        other("client.close()")
        accepted.settimeout(10)
        assert accepted.recv(1) == b""
    assert sockets(other.pid) == []


def test_a_reused_descriptor_is_not_mistaken_for_the_socket(other: Puppet) -> None:
    """The process may close the socket and reuse the number before it is duplicated."""
    fd = other("s = socket.socket(); it = s.fileno()")
    inode = os.stat(f"/proc/{other.pid}/fd/{fd}").st_ino
    with Process(other.pid) as process:
        assert process.sockets() == {inode: fd}
        other("s.close(); s = socket.socket(); it = s.fileno()")
        assert process.duplicate(fd, inode) is None
        other("s.close()")
        assert process.duplicate(fd, inode) is None


ALL = """
from kaio.tools.processes import processes, survey
from tests.programs import puppet

with puppet() as one, puppet() as two:
    assert processes() == []
    one("s = socket.socket(), socket.socket()")
    two("s = socket.socket(type=socket.SOCK_DGRAM)")
    assert processes() == [one.pid]
    found, _, refused, _ = survey()
    assert [each.pid for each in found] == [one.pid] * 2
    assert refused == []
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="making a namespace of processes needs root")
def test_all_processes_with_tcp_sockets_are_found() -> None:
    """And only those. No other processes exist in the pid namespace of this test."""
    done = run_alone(ALL)
    assert done.returncode == 0, done.stderr


def made_up(port: int, *, peer: bool = False, listening: bool = False, idle: int | None = None) -> ProcessSocket:
    """A socket as it might be read."""
    enabled = idle is not None
    return ProcessSocket(
        pid=1,
        fd=port,
        inode=port,
        family=socket.AF_INET,
        mptcp=False,
        local=("192.0.2.1", port),
        peer=("192.0.2.2", 9) if peer else None,
        listening=listening,
        state=SocketState(enabled=enabled, idle=idle or 7200, interval=75, count=9),
        tcp_state=TcpState.LISTEN if listening else TcpState.ESTABLISHED if peer else TcpState.CLOSE,
        info=None,
        system=Defaults(),
    )


def test_a_listening_socket_is_uncovered_unless_the_program_covers_accepted_connections() -> None:
    """And a socket without a peer does not count."""
    listener, good, bad = made_up(1, listening=True), made_up(1, peer=True, idle=60), made_up(1, peer=True)
    assert uncovered([listener]) == [listener]
    assert uncovered([listener, good]) == []
    assert uncovered([listener, good, bad]) == [listener, bad]
    assert uncovered([listener, made_up(2, peer=True, idle=60)]) == [listener]
    assert uncovered([made_up(3), made_up(4, listening=True, idle=60)]) == []


# -- what is said when it cannot be


def test_a_process_that_does_not_exist() -> None:
    """Exited, a zombie, a thread, and a number that is no valid pid."""
    with subprocess.Popen(["true"]) as ended:
        with open(f"/proc/{ended.pid}/stat") as stat:
            while " Z " not in stat.read():
                stat.seek(0)
                time.sleep(0.005)
        with pytest.raises(ProcessError, match=f"process {ended.pid}: it has exited"):
            sockets(ended.pid)
    for pid in (ended.pid, -1, 0, 10**30):
        with pytest.raises(ProcessError, match=f"process {pid}: there is no such process") as caught:
            sockets(pid)
        assert (caught.value.errno, caught.value.pid) == (errno.ESRCH, pid)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.errno, again.pid) == (str(caught.value), caught.value.errno, caught.value.pid)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(ProcessError, match=f"that is a thread of process {os.getpid()}"):
            sockets(thread.native_id or 0)
    finally:
        done.set()
        thread.join()


LOOK = """
import locale, os, sys, kaio.tools.processes, kaio.cli.attach
pid, uid = map(int, sys.argv[1:3])
from kaio.cli import cli
import pwd
os.setgroups([]); os.setgid(uid); os.setuid(uid)
try:
    print(len(kaio.tools.processes.sockets(pid)))
except kaio.tools.processes.ProcessError as exc:
    print(exc.errno, exc)
sys.argv[1:] = ["attach", str(pid)]
cli(prog_name="kaio")
"""


def become(uid: int, dumpable: int) -> str:
    """What makes a process another user's."""
    return (
        f"import ctypes; os.setgroups([]); os.setgid({uid}); os.setuid({uid});"
        f" ctypes.CDLL(None).prctl(4, {dumpable}, 0, 0, 0)"
    )


def look_as(uid: int, pid: int, script: str = LOOK) -> subprocess.CompletedProcess[str]:
    """Look at a process as another user, with the library and with the command."""
    command = [sys.executable, "-c", script, str(pid), str(uid)]
    return subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users needs root")
@pytest.mark.parametrize(
    ("theirs", "dumpable", "ours", "sentence"),
    [
        (65533, 1, 65533, None),
        (65534, 1, 65533, "it belongs to another user (nobody): run as that user, or as root (CAP_SYS_PTRACE)"),
        (65533, 0, 65533, "it is not dumpable (it changed its user, "),
        (0, 1, 65533, "it belongs to another user (root): run as that user, or as root (CAP_SYS_PTRACE)"),
    ],
)
def test_the_missing_permission_is_named(
    other: Puppet, theirs: int, dumpable: int, ours: int, sentence: str | None
) -> None:
    """Without privileges, one's own processes can be had, and of the others it is said why not, and what to do."""
    other("s = socket.socket()")
    if theirs:
        other(become(theirs, dumpable))
    done = look_as(ours, other.pid)
    if sentence is None:
        assert done.stdout.splitlines()[0] == "1", done.stderr
        assert done.returncode == 0
        assert other("it = s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)") == 1
    else:
        assert f"process {other.pid}: {sentence}" in done.stdout
        assert done.stdout.startswith((f"{errno.EPERM} ", f"{errno.EACCES} "))
        assert done.stderr.startswith(f"kaio: process {other.pid}: {sentence}")
        assert len(done.stderr.splitlines()) == 1
        assert done.returncode == 3
        assert other("it = s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)") == 0


WITHOUT_GETFD = """
import ctypes, os, struct, sys, kaio.tools.processes
# Linux before 5.6, or a container: a filter that answers the system call with an errno (seccomp(2))
load, equal, give = 0x20, 0x15, 0x06
code = [(load, 0, 0, 0), (equal, 0, 1, 438), (give, 0, 0, 0x50000 | int(sys.argv[2])), (give, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
filter = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(program)))
assert libc.prctl(22, 2, filter) == 0
print(kaio.tools.processes.lacking())
try:
    kaio.tools.processes.sockets(int(sys.argv[1]))
except kaio.tools.processes.ProcessError as exc:
    print(exc)
"""


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (
            errno.ENOSYS,
            "pidfd_getfd(2) is missing: the kernel is older than Linux 5.6, or a container's seccomp filter hides",
        ),
        (errno.EPERM, "a seccomp filter forbids pidfd_getfd(2): with Docker, run with --cap-add SYS_PTRACE"),
    ],
)
def test_missing_or_forbidden_pidfd_getfd(other: Puppet, number: int, sentence: str) -> None:
    """The error is not that of a missing permission."""
    other("s = socket.socket()")
    done = look_as(number, other.pid, WITHOUT_GETFD)
    general, particular = done.stdout.splitlines()
    assert general.startswith(sentence)
    assert particular.startswith(f"process {other.pid}: {sentence}")


def test_yama_scopes_are_explained(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ubuntu's kernels permit only parent processes and root."""
    scope = os.path.join(tmp_path, "ptrace_scope")
    monkeypatch.setattr("kaio.tools.processes._access._YAMA", scope)
    said = []
    for value in ("0", "1", "2", "3"):
        with open(scope, "w") as file:
            file.write(value + "\n")
        said.append(_restricted(_yama_scope()))
    assert said[0] == "a security module forbids it: run as root (CAP_SYS_PTRACE)"
    assert "only its parent processes may inspect it (kernel.yama.ptrace_scope is 1)" in said[1]
    assert "`kaio exec`" in said[1]
    assert "only root may" in said[2]
    assert "nobody may inspect processes until the next boot" in said[3]
    os.unlink(scope)
    assert _yama_scope() == 0
