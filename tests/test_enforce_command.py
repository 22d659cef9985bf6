"""`kaio enforce`: the command line, as root in mount namespaces of the test's own, and without the rights."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final

import pytest

from kaio.tools.cgroups import processes
from kaio.tools.processes import sockets

from . import own_cgroup
from .own_cgroup import inside
from .programs import Puppet, puppet
from .test_enforce import HAS_POLICY, PAIR, connections, ids, made, until

_lacking = own_cgroup.lacking()
pytestmark = pytest.mark.skipif(_lacking is not None, reason=str(_lacking))

KAIO: Final = (sys.executable, "-m", "kaio")


@pytest.fixture
def group() -> Iterator[str]:
    """A cgroup."""
    with own_cgroup.cgroup() as path:
        yield path


class Shell:
    """A shell in a mount namespace of its own: /sys/fs/bpf is empty in it, /etc/systemd a directory of the test's."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.etc = directory / "systemd"
        (self.etc / "system").mkdir(parents=True)
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        mounted = f"mkdir -p /etc/systemd && mount --bind {self.etc} /etc/systemd && mount -t tmpfs none /sys/fs/bpf"
        assert self(mounted) == (0, "")

    def __call__(self, command: str) -> tuple[int, str]:
        """Run a command. Returns its exit code and what it prints."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f'{command}\necho "\n=$?"\n')
        self._process.stdin.flush()
        lines: list[str] = []
        while not (line := self._process.stdout.readline()).startswith("="):
            assert line, "".join(lines)
            lines.append(line)
        return int(line[1:]), "".join(lines)[:-1]

    def kaio(self, *words: str) -> tuple[int, str]:
        """Run kaio."""
        return self(" ".join([*KAIO, *words]))

    def close(self) -> None:
        """End the shell, and with it its namespace."""
        self._process.communicate()


@pytest.fixture
def shell(tmp_path: pathlib.Path) -> Iterator[Shell]:
    """A shell in a mount namespace of its own."""
    with contextlib.closing(Shell(tmp_path)) as shell:
        yield shell


@pytest.fixture
def member(group: str) -> Iterator[Puppet]:
    """A process in the cgroup."""
    with puppet(*inside(group)) as process:
        yield process


def test_from_the_policy_to_the_end(shell: Shell, group: str, member: Puppet) -> None:
    """A BPF file system is mounted; sockets that exist are set; status, another policy, off."""
    made(member)
    code, text = shell.kaio("enforce", "--cgroup", group, "20s:10s:4")
    assert code == 0
    assert f"20s:10s:4 is enforced on cgroup {group}" in text
    assert "Sockets that existed: 1 kept, 2 set" in text
    assert "stalled=keep cannot be had in the kernel alone" in text
    assert [found.state for found in connections(member.pid)] == [HAS_POLICY] * 2
    assert made(member)[1:] == (HAS_POLICY, HAS_POLICY)
    code, text = shell.kaio("enforce", "status", "--json")
    assert code == 0
    (found,) = json.loads(text)["enforced"]
    assert found["counters"] == {"connected": 1, "accepted": 1, "own": 0, "later": 0, "excepted": 0, "failed": 0}
    assert (found["attached"], found["policy"], found["except"]) == (True, "20s:10s:4", [])
    code, text = shell.kaio(
        "enforce", "--cgroup", group, "30s:10s:4,stalled=drop", "--except", "22,80-90", "--new-only"
    )
    assert code == 0
    assert "stalled=keep" not in text
    code, text = shell.kaio("enforce")
    assert code == 0
    assert "30s:10s:4,stalled=drop  22,80-90  enforced" in text
    assert made(member)[1].idle == 30
    code, text = shell.kaio("enforce", "--cgroup", group, "off")
    assert (code, ids(group)) == (0, [])
    assert "any more; its sockets keep the options they have" in text
    assert shell.kaio("enforce", "--cgroup", group, "off") == (0, f"Nothing was enforced on cgroup {group}.\n")
    assert shell.kaio("enforce", "status") == (1, "No policy is enforced.\n")
    assert shell("ls -A /sys/fs/bpf | grep -v debug") == (1, "")


def options(member: Puppet, port: int) -> list[tuple[int, bool, float | None, float | None]]:
    """Both ends of the connections of a service: descriptor, and what matters of their options."""
    return [
        (found.fd, found.state.enabled, found.state.idle, found.state.user_timeout)
        for found in connections(member.pid)
        if found.peer is not None and port in (found.local[1], found.peer[1])
    ]


def test_sockets_that_exist(shell: Shell, group: str, member: Puppet) -> None:
    """Connections get the policy, also in place of an earlier one; services that are excepted do not.

    A listening socket is left alone: what it accepts has the policy from the kernel, and none when that is lifted.
    """
    member("""
web, ssh = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
kept = []
def connect(listener):
    kept.append(socket.create_connection(listener.getsockname()))
    kept.append(listener.accept()[0])
connect(web); connect(ssh)
""")
    web, ssh = member("it = web.getsockname()[1], ssh.getsockname()[1]")
    for idle in (20, 30):
        code, text = shell.kaio("enforce", "--cgroup", group, f"{idle}s:10s:4", "--except", str(ssh))
        assert (code, f"{'4' if idle == 30 else '2'} set" in text) == (0, True), text
        member("connect(web); connect(ssh)")
        assert {each[1:] for each in options(member, web)} == {(True, idle, idle + 40)}
        assert {each[1:] for each in options(member, ssh)} == {(False, 7200, None)}
    assert shell.kaio("enforce", "--cgroup", group, "OFF")[0] == 0
    before = options(member, web)
    member("connect(web)")
    assert {each[1:] for each in options(member, web) if each not in before} == {(False, 7200, None)}


@pytest.mark.slow
def test_watching_ends_when_the_policy_is_lifted(shell: Shell, group: str) -> None:
    """Nothing is left to be looked after."""
    words = ["enforce", "--cgroup", group, "1s:1s:2", "--watch", "100ms", ">/dev/null", "2>&1", "&", "watch=$!"]
    assert shell.kaio(*words)[0] == 0
    until(lambda: len(ids(group)) == 2)
    assert shell.kaio("enforce", "--cgroup", group, "off")[0] == 0
    assert shell("wait $watch") == (0, "")


def test_the_policy_of_a_cgroup_that_is_gone_can_be_lifted(shell: Shell) -> None:
    """By the same words as before."""
    with own_cgroup.cgroup() as gone:
        assert shell.kaio("enforce", "--cgroup", gone, "--new-only", "20s:10s:4")[0] == 0
    code, text = shell.kaio("enforce", "--cgroup", gone, "status")
    assert (code, "not running" in text) == (0, True), text
    code, text = shell.kaio("enforce", "--cgroup", gone, "off")
    assert (code, "any more" in text) == (0, True), text
    assert shell.kaio("enforce", "--cgroup", gone, "off")[0] == 2
    assert shell.kaio("enforce", "status") == (1, "No policy is enforced.\n")


def test_the_sysctls_are_needed_for_a_policy_that_leaves_times_to_them(shell: Shell, group: str) -> None:
    """Only for such a one; a program is started all the same."""
    assert shell("mount -t tmpfs none /proc/sys") == (0, "")
    code, text = shell.kaio("enforce", "--cgroup", group, "20s:10s:4", "--dry-run", ">/dev/null")
    assert (code, text) == (0, "")
    code, text = shell.kaio("enforce", "--cgroup", group, "20s::4", "--dry-run")
    assert (code, text.count("\n")) == (3, 1), text
    assert "tcp_keepalive_time: the kernel does not provide it, or procfs is not mounted" in text
    code, text = shell.kaio("exec", "--keepalive", "20s::4", "sh", "-c", "'exit 7'")
    assert code == 7, text
    assert "looks for new sockets; the kernel cannot set the policy by itself: /proc/sys" in text


def test_files_that_cannot_be_written_are_a_failure(shell: Shell) -> None:
    """The policy is enforced until the next boot, and that is said."""
    unit = f"kaio-test-unwritten-{os.getpid()}.service"
    with own_cgroup.cgroup(unit) as path:
        assert shell("mount -o remount,ro,bind /etc/systemd") == (0, "")
        code, text = shell.kaio("enforce", "--unit", unit, "--boot", "20s:10s:4", ">/dev/null")
        assert (code, text.count("\n")) == (3, 1), text
        assert "Read-only file system: 20s:10s:4 is enforced on unit" in text
        assert len(ids(path)) == 2
        assert shell.kaio("enforce", "--unit", unit, "off")[0] == 0
        assert shell("mount -o remount,rw,bind /etc/systemd") == (0, "")
        assert shell.kaio("enforce", "--unit", unit, "--boot", "20s:10s:4")[0] == 0
        assert shell("mount -o remount,ro,bind /etc/systemd") == (0, "")
        code, text = shell.kaio("enforce", "--unit", unit, "off")
        assert (code, text.count("\n")) == (3, 1), text
        assert f"Read-only file system: nothing is enforced on unit {unit} now, but will be again" in text
        assert ids(path) == []


def test_after_a_reboot_the_unit_does_it_again(shell: Shell) -> None:
    """--boot writes files; the reboot is a new BPF file system, and the service's own command line."""
    unit = f"kaio-test-boot-{os.getpid()}.service"
    with own_cgroup.cgroup(unit) as path, puppet(*inside(path)) as member:
        code, text = shell.kaio("enforce", "--unit", unit, "--boot", "20s:10s:4", "--except", "22")
        assert code == 0, text
        written = [line.removeprefix("Written: ") for line in text.splitlines() if line.startswith("Written: ")]
        assert len(written) == 2
        assert made(member)[1:] == (HAS_POLICY, HAS_POLICY)
        assert shell("umount /sys/fs/bpf; mount -t tmpfs none /sys/fs/bpf; ls -A /sys/fs/bpf") == (0, "")
        assert made(member)[1].enabled is False
        service = next(path for path in written if path.startswith("/etc/systemd/system/kaio-enforce-"))
        code, text = shell(f"sed -n s/^ExecStart=//p {service}")
        code, text = shell(text.strip())
        assert code == 0, text
        assert "The next boot brings back the policy in" in text
        assert made(member)[1:] == (HAS_POLICY, HAS_POLICY)
        assert ',"except"' not in text
        code, text = shell.kaio("enforce", "--unit", unit, "off")
        assert text.count("Removed: ") == 2
        assert shell("find /etc/systemd -type f -o -type l") == (0, "")
        assert ids(path) == []


def test_a_dry_run_does_nothing(shell: Shell, group: str) -> None:
    """The files and both programs are shown; without rights, too."""
    for before in ("", "setpriv --reuid 65534 --clear-groups "):
        code, text = shell(f"{before}{' '.join(KAIO)} enforce --cgroup {group} --dry-run 20s:10s:4")
        assert code == 0, text
        assert f"20s:10s:4 would be enforced on cgroup {group}" in text
        for part in (
            "kaio_giver",
            "kaio_guard",
            "TCP_KEEPIDLE = 20",
            "counter connected",
            "; BPF_SOCK_OPS_TCP_CONNECT",
        ):
            assert part in text
    code, text = shell.kaio("enforce", "--machine", "--boot", "--dry-run", "20s:10s:4", "--json")
    document = json.loads(text)
    assert sorted(document["programs"]) == ["giver", "guard"]
    assert any("WantedBy=sysinit.target" in content for content in document["files"].values())
    assert ids(group) == []
    assert shell("ls -A /sys/fs/bpf; find /etc/systemd -type f") == (0, "")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("20s:10s:4", 2, "on what? Give --unit, --cgroup or --machine"),
        ("--unit a --machine 20s:10s:4", 2, "give one of --unit, --cgroup and --machine"),
        ("--unit a/b 20s:10s:4", 2, "unit 'a/b.service': must be the name of"),
        ("--unit kaio-none 20s:10s:4", 3, "it does not run, and no systemd runs here"),
        ("--cgroup /nonexistent 20s:10s:4", 2, "/nonexistent is not a cgroup of version 2"),
        ("--cgroup {group} nonsense", 2, "such as `kaio enforce"),
        ("--cgroup {group} 20s:10s", 2, ""),
        ("--cgroup {group} --boot 20s:10s:4", 2, "--boot needs --unit or --machine"),
        ("--cgroup {group} --except 0 20s:10s:4", 2, "must be ports from 1 to 65535"),
        ("--cgroup {group} 20s:10s:4,user_timeout=1s", 2, "user_timeout"),
        ("--cgroup {group} off --dry-run", 2, "--dry-run goes with a policy"),
        ("--cgroup {group} 20s:10s:4 more", 2, "more"),
    ],
)
def test_mistakes_are_one_line(shell: Shell, group: str, words: str, code: int, message: str) -> None:
    """And nothing is enforced."""
    found, text = shell(f"{' '.join(KAIO)} enforce {words.format(group=group)}")
    assert (found, text.count("\n")) == (code, 1), text
    assert message in text
    assert ids(group) == []
    assert shell("ls -A /sys/fs/bpf") == (0, "")


@pytest.mark.parametrize(
    "rights",
    [
        "setpriv --reuid 65534 --clear-groups",
        "setpriv --bounding-set -bpf,-sys_admin --inh-caps -bpf,-sys_admin",
        "setpriv --bounding-set -net_admin,-sys_admin",
        "unshare --user --map-root-user",
    ],
)
def test_without_the_rights_it_says_what_is_missing(shell: Shell, group: str, rights: str) -> None:
    """One line, exit code 3; so in a cgroup delegated to the user, since the kernel asks for capabilities."""
    os.chown(group, 65534, 65534)
    code, text = shell(f"{rights} {' '.join(KAIO)} enforce --cgroup {group} 20s:10s:4")
    assert (code, text.count("\n")) == (3, 1), text
    assert "run as root (CAP_" in text
    assert ids(group) == []


def test_a_user_with_the_capabilities_may(shell: Shell, group: str) -> None:
    """CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and a BPF file system of the user's: the kernel does not ask for root."""
    assert shell("mount -t bpf -o uid=65534,gid=65534,mode=0700 bpf /sys/fs/bpf; chmod a+rx /root")[0] == 0
    rights = "+bpf,+net_admin,+perfmon"
    start = f"setpriv --reuid 65534 --clear-groups --inh-caps {rights} --ambient-caps {rights} --"
    code, text = shell(f"{start} {' '.join(KAIO)} enforce --cgroup {group} --new-only 20s:10s:4")
    assert code == 0, text
    with puppet(*inside(group)) as member:
        assert made(member)[1:] == (HAS_POLICY, HAS_POLICY)
        assert processes(group) == [member.pid]
    code, text = shell(f"{start} {' '.join(KAIO)} enforce status")
    assert (code, "  enforced  " in text) == (0, True), text
    code, text = shell(f"{start} {' '.join(KAIO)} enforce --cgroup {group} off")
    assert (code, ids(group)) == (0, []), text


def test_exceptions_hold_for_sockets_that_exist_too(shell: Shell, group: str, member: Puppet) -> None:
    """Whichever end the port is at."""
    listener, client, accepted = member(f"{PAIR}\nit = pair()")
    port = member("it = keep[-1][0].getsockname()[1]")
    made(member)
    code, text = shell.kaio("enforce", "--cgroup", group, "20s:10s:4", "--except", str(port))
    assert code == 0
    assert "4 kept, 2 set" in text
    found = {each.fd: each.state for each in sockets(member.pid)}
    assert {found[fd].enabled for fd in (listener, client, accepted)} == {False}
    assert list(found.values()).count(HAS_POLICY) == 2


STALLED: Final = """
listener = socket.create_server(("127.0.0.1", 0))
it = listener.getsockname()[1]
"""


@pytest.mark.slow
def test_watching_spares_a_live_peer_that_accepts_no_data(group: str, member: Puppet) -> None:
    """The kernel alone would drop it after the user timeout; the connection is there after twice that time."""
    port = member(STALLED)
    command = [*KAIO, "enforce", "--cgroup", group, "1s:1s:2", "--watch", "200ms"]
    start = 'mount -t bpf bpf /sys/fs/bpf; exec "$@"'
    own_mount = ["unshare", "--mount", "--propagation", "private", "sh", "-c", start, "sh"]
    with subprocess.Popen([*own_mount, *command], stdout=subprocess.PIPE, text=True) as watcher:
        try:
            assert watcher.stdout is not None
            assert watcher.stdout.readline().startswith("1s:1s:2 is enforced on")
            with socket.create_connection(("127.0.0.1", port)):  # made after the policy, and never read from
                member("accepted, _ = listener.accept(); accepted.setblocking(False)")
                member("try:\n while True: accepted.send(bytes(100000))\nexcept BlockingIOError: pass")
                line = ""
                while "user timeout lifted: the peer is stalled, and answers" not in line:
                    line = watcher.stdout.readline()
                    assert line
                time.sleep(6)  # twice the user timeout
                assert member("it = accepted.getsockopt(TCP, socket.TCP_INFO, 1)[0]") == 1  # established
        finally:
            watcher.terminate()
