"""`kaio.tools.sysctls` and `kaio system`, on real kernels: each test has a network namespace, and files, of its own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import pty
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

import kaio
import kaio.tools.sysctls
from kaio.cli import cli
from kaio.testing import blackhole
from kaio.tools.plans import duration
from kaio.tools.sysctls import (
    FILE,
    SETTINGS,
    Defaults,
    SysctlError,
    at_boot,
    change,
    overriding,
    parse,
    persist,
    persisted,
)

from .namespaces import Namespace, lacking

PYTHON = (sys.executable, "-W", "error")
KAIO = (*PYTHON, "-m", "kaio")
KEEPALIVE = ("tcp_keepalive_time", "tcp_keepalive_intvl", "tcp_keepalive_probes")
NOBODY = 65534


@pytest.fixture(scope="module")
def _networks() -> str | None:
    return lacking()


@pytest.fixture
def host(_networks: str | None) -> Iterator[Namespace]:
    """A host whose kernel parameters are the test's own."""
    if _networks is not None:
        pytest.skip(_networks)
    host = Namespace("host")
    yield host
    host.close()


def by_sysctl(host: Namespace) -> list[int]:
    """The three keepalive values as sysctl(8) has them."""
    return [int(host.run("sysctl", "-n", f"net.ipv4.{name}")) for name in KEEPALIVE]


def by_procfs(host: Namespace) -> list[int]:
    """The three keepalive values as procfs has them."""
    return [int(host.run("cat", f"/proc/sys/net/ipv4/{name}")) for name in KEEPALIVE]


def kaio_system(host: Namespace, *arguments: str) -> Result:
    """`kaio system` on a host, in this process."""
    with host.entered():
        return CliRunner().invoke(cli, ["system", *arguments])


def own_file() -> str | None:
    """What the machine's own file holds, which no test may touch; None when there is none."""
    with contextlib.suppress(FileNotFoundError), open(f"/{FILE}") as file:
        return file.read()
    return None


def process(host: Namespace, setup: str, *command: str) -> subprocess.CompletedProcess[str]:
    """A program on a host, in a mount namespace of its own which the lines of the setup have changed."""
    with host.entered():
        return subprocess.run(
            ["unshare", "-m", "sh", "-ec", f'{setup}\nexec "$@"', "sh", *command],
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )


# -- the numbers


def test_what_the_defaults_of_linux_mean() -> None:
    """tcp(7) and the kernel's ip-sysctl document: 2 h 11 min 15 s, 924.6 s, 131 s."""
    defaults = Defaults()
    assert defaults.detection_time == 2 * 3600 + 11 * 60 + 15
    assert defaults.unacknowledged_time == pytest.approx(924.6)
    assert defaults.connecting_time == 131
    assert len(defaults.syn_waits) == 11


@pytest.mark.parametrize(
    ("linear", "retries", "seconds"),
    [(0, 1, 3), (0, 2, 7), (0, 6, 127), (4, 1, 3), (4, 2, 7), (4, 3, 19), (8, 2, 7), (8, 3, 15), (0, 7, 247)],
)
def test_when_a_connection_attempt_fails(linear: int, retries: int, seconds: int) -> None:
    """As measured on Linux 6.18, where it was 20 s or less."""
    assert Defaults(syn_linear_timeouts=linear, syn_retries=retries).connecting_time == seconds


def test_a_lower_longest_wait_shortens_it() -> None:
    """tcp_rto_max_ms caps each wait."""
    assert Defaults(retries2=5, rto_max=1.0).unacknowledged_time == pytest.approx(0.2 + 0.4 + 0.8 + 3 * 1.0)


@pytest.mark.slow
def test_the_kernel_keeps_the_calculated_times(host: Namespace, dead_peers: None) -> None:
    """Unanswered SYNs and unacknowledged data end when `Defaults` says; data at the first look after that."""
    with host.entered():
        defaults = change({"syn_retries": 1, "retries2": 2})
        listener = socket.create_server(("127.0.0.1", 0))
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        attempt = socket.socket()
    with listener, ours, theirs, attempt, blackhole(listener, theirs):
        began = time.monotonic()
        ours.send(b"into the void")
        attempt.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            attempt.connect(listener.getsockname())
        ended = {fd: time.monotonic() - began for fd in endings([ours, attempt], within=15)}
        assert [sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for sock in (ours, attempt)] == [
            errno.ETIMEDOUT
        ] * 2
        assert defaults.connecting_time - 0.1 < ended[attempt.fileno()] < defaults.connecting_time * 9 / 8 + 1
        assert defaults.unacknowledged_time < ended[ours.fileno()] < 2 * defaults.unacknowledged_time + 1


def endings(sockets: list[socket.socket], within: float) -> Iterator[int]:
    """The descriptors of the sockets, each when its connection has ended."""
    poll = select.poll()
    for sock in sockets:
        poll.register(sock, 0)
    waiting = {sock.fileno() for sock in sockets}
    deadline = time.monotonic() + within
    while waiting:
        assert time.monotonic() < deadline, f"{len(waiting)} have not ended"
        for fd, _ in poll.poll(200):
            poll.unregister(fd)
            waiting.remove(fd)
            yield fd


# -- what may be asked for


@pytest.mark.parametrize(
    "name", ["idle", "tcp_keepalive_time", "net.ipv4.tcp_keepalive_time", "net/ipv4/tcp_keepalive_time"]
)
def test_a_setting_can_be_given_by_any_of_its_names(name: str) -> None:
    """kaio's, the kernel's, and sysctl's with dots or slashes."""
    assert parse([f"{name}=600", "retries2=8"]) == {"idle": 600, "retries2": 8}
    assert parse([f"/proc/sys/net/ipv4/tcp_syn_retries = {3}"]) == {"syn_retries": 3}


@pytest.mark.parametrize(
    ("text", "field", "value", "limit"),
    [
        ("idle=0", "idle", 0, "from 1 to 32767"),
        ("interval=32768", "interval", 32768, "from 1 to 32767"),
        ("count=128", "count", 128, "from 1 to 127"),
        ("retries2=256", "retries2", 256, "from 0 to 255"),
        ("retries2=-1", "retries2", -1, "from 0 to 255"),
        ("syn_retries=0", "syn_retries", 0, "from 1 to 127"),
        ("idle=10h", "idle", 36000, "whole seconds from 1 to 32767"),
        ("count=10m", "count", "10m", "whole number"),
        ("idle=", "idle", "", "whole seconds"),
        ("idle=1.5", "idle", "1.5", "whole seconds"),
        ("idle=1500ms", "idle", "1500ms", "whole seconds"),
        ("idle=1e3", "idle", "1e3", "whole seconds"),
        ("idle=\u0666", "idle", "\u0666", "whole seconds"),
        ("idle=" + "9" * 5000, "idle", "9" * 5000, "whole seconds"),
        ("tcp_mem=1", "tcp_mem", "1", "the settings are idle, interval, count, retries2, syn_retries"),
        ("net.ipv6.tcp_keepalive_time=1", "net.ipv6.tcp_keepalive_time", "1", "is not a setting"),
        ("idle", "setting", "idle", "name=value"),
        ("", "setting", "", "name=value"),
    ],
)
def test_invalid_settings_are_rejected_first(text: str, field: str, value: object, limit: str) -> None:
    """By a PolicyError with field, value and limit; nothing was written."""
    with pytest.raises(kaio.PolicyError) as caught:
        parse(["count=5", text] if not text.startswith("count") else [text])
    assert (caught.value.field, caught.value.value) == (field, value)
    assert limit in caught.value.limit


def test_a_setting_cannot_be_given_twice() -> None:
    """Not even under two names."""
    with pytest.raises(kaio.PolicyError, match="is given twice"):
        parse(["idle=5", "tcp_keepalive_time=6"])


def test_the_limits_are_such_that_kernel_and_sockets_keep_them(host: Namespace) -> None:
    """Each end of each range is kept; beyond it the kernel refuses, if not the sysctl then a socket that is told it."""
    with host.entered():
        for field, setting in SETTINGS.items():
            for value in (setting.least, setting.most):
                assert getattr(change({field: value}), field) == value
            for beyond in (setting.least - 1, setting.most + 1):
                with pytest.raises(OSError, match="Invalid argument"):
                    take(setting.path, beyond)
            change({field: setting.most})


def take(path: str, value: int) -> None:
    """Let the kernel have a value, whatever kaio thinks of it; then a socket."""
    with open(f"/proc/sys/{path}", "w") as file:
        file.write(str(value))
    with socket.socket() as fresh:
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
            fresh.setsockopt(socket.IPPROTO_TCP, option, fresh.getsockopt(socket.IPPROTO_TCP, option))


# -- setting, on a real kernel


def test_what_is_set_is_what_sysctl_and_procfs_and_sockets_show(host: Namespace) -> None:
    """The HOWTO's example; in this namespace alone."""
    outside = kaio.tools.sysctls.read()
    done = kaio_system(host, "set", "idle=600", "tcp_keepalive_intvl=60", "net.ipv4.tcp_keepalive_probes=20")
    assert (done.exit_code, done.stderr) == (0, "")
    assert by_sysctl(host) == by_procfs(host) == [600, 60, 20]
    with host.entered(), socket.socket() as fresh:
        state = kaio.inspect(fresh)
    assert (state.enabled, state.idle, state.interval, state.count) == (False, 600, 60, 20)
    assert "detected after 30 min: 600 s idle, then 20 probes, 60 s apart" in done.stdout
    assert kaio.tools.sysctls.read() == outside


def test_shows_values_paths_names_and_meaning(host: Namespace) -> None:
    """In words as the HOWTO's 7200, 75 and 9 mean them."""
    done = kaio_system(host)
    assert (done.exit_code, done.stderr) == (0, "")
    for setting in SETTINGS.values():
        assert setting.sysctl in done.stdout
        assert f"/proc/sys/{setting.path}" in done.stdout
    assert "detected after 2 h 11 min 15 s: 7200 s idle, then 9 probes, 75 s apart" in done.stdout
    assert "about 15 min 24.6 s: 15 retransmissions" in done.stdout
    with host.entered():
        defaults = kaio.tools.sysctls.read()  # the SYN's waits are not those of every kernel
    given_up = f"attempt fails after {duration(defaults.connecting_time)}: the first segment is resent"
    assert given_up in done.stdout
    host.sysctl("net.ipv4.tcp_retries2", 8)
    shown = json.loads(kaio_system(host, "--json").stdout)
    assert shown["settings"]["retries2"]["value"] == 8
    assert shown["settings"]["idle"]["procfs"] == "/proc/sys/net/ipv4/tcp_keepalive_time"
    assert (shown["detection_time"], shown["unacknowledged_time"]) == (7875, 102.2)
    assert shown["connecting_time"] == defaults.connecting_time


def test_on_a_terminal_of_80_columns_all_names_are_whole(host: Namespace) -> None:
    """The table is drawn, without the files; nothing is cut off."""
    ours, theirs = pty.openpty()
    with host.entered(), open(ours, "rb", buffering=0) as terminal:
        environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
        with subprocess.Popen([*KAIO, "system"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as child:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # EIO: it has ended
                while more := terminal.read(65536):
                    shown += more
        assert child.returncode == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    for setting in SETTINGS.values():
        assert f" {setting.sysctl} " in text
    assert max(len(line.rstrip()) for line in text.splitlines() if "│" in line) <= 80


def test_a_third_value_that_the_kernel_refuses_leaves_the_first_two_as_they_were(host: Namespace) -> None:
    """The entry is mounted read-only, so that the value passes every check before."""
    entry = "/proc/sys/net/ipv4/tcp_keepalive_probes"
    done = process(
        host,
        f"mount --bind {entry} {entry}; mount -o remount,bind,ro {entry}",
        *KAIO,
        *("system", "set", "idle=600", "interval=60", "count=20"),
    )
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kaio: {entry}: count=20: Read-only file system")
    assert by_procfs(host) == [7200, 75, 9]
    assert by_procfs(host) == by_sysctl(host)


def test_a_kernel_that_keeps_another_value_is_an_error(tmp_path: pathlib.Path) -> None:
    """An entry that reads back in another base than it was written in; nor can it be put back, and that is said."""
    entries = tmp_path / "net/ipv4"
    entries.mkdir(parents=True)
    (entries / "tcp_keepalive_time").write_text("7200\n")
    filtered = pathlib.Path("/proc/self/coredump_filter")
    (entries / "tcp_keepalive_probes").symlink_to(filtered)
    before = filtered.read_text()
    try:
        filtered.write_text("0x33")
        with pytest.raises(SysctlError) as caught:
            change({"idle": 600, "count": 20}, proc=str(tmp_path))
    finally:
        filtered.write_text(f"0x{before.strip()}")
    assert caught.value.strerror == "count=20: the kernel reads back 14; count could not be restored"
    assert caught.value.filename == str(entries / "tcp_keepalive_probes")
    assert (entries / "tcp_keepalive_time").read_text().split() == ["7200"]


def test_a_dry_run_changes_nothing(host: Namespace) -> None:
    """It shows both values, and needs no right."""
    before = own_file()
    done = kaio_system(host, "set", "idle=600", "count=20", "--persist", "--dry-run")
    assert done.exit_code == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["net.ipv4.tcp_keepalive_time", "7200", "600"] in rows
    assert ["net.ipv4.tcp_keepalive_probes", "9", "20"] in rows
    assert "Would be kept" in done.stdout
    assert by_procfs(host) == [7200, 75, 9]
    assert own_file() == before


@pytest.mark.slow
def test_connections_follow_a_changed_interval_at_their_next_probe(host: Namespace, dead_peers: None) -> None:
    """Those without times of their own; they also wait as long as a longer idle time says."""
    with host.entered(), contextlib.ExitStack() as ends:
        change({"idle": 2, "interval": 60, "count": 3})
        listener = ends.enter_context(socket.create_server(("127.0.0.1", 0)))
        ours = [ends.enter_context(socket.create_connection(listener.getsockname())) for _ in range(2)]
        theirs = [ends.enter_context(listener.accept()[0]) for _ in ours]
        follows, own = ours
        for sock in ours:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 60)
        began = time.monotonic()
        with blackhole(*theirs):
            done = CliRunner().invoke(cli, ["system", "set", "idle=3", "interval=1"])
            assert done.exit_code == 0, done.stderr
            assert list(endings([follows], within=20)) == [follows.fileno()]
            took = time.monotonic() - began
            assert follows.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ETIMEDOUT
            assert 5.9 < took < 8.0  # 3 + 3 * 1
            health = kaio.health(own)
            assert (health.state, health.probes) == (kaio.State.SUSPECT, 1)


# -- the next boot


def write(root: pathlib.Path, path: str, content: str) -> str:
    """A file below a root directory; returns its path."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode())
    return str(file)


def test_persisted_values_come_back_after_a_change_by_hand(host: Namespace, tmp_path: pathlib.Path) -> None:
    """`set --persist`, somebody's change, `load`: with a directory of the test's in the place of /etc/sysctl.d."""
    bind, before = f"mount --bind {tmp_path} /etc/sysctl.d", own_file()
    done = process(host, bind, *KAIO, "system", "set", "idle=600", "interval=60", "count=20", "--persist")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Kept across reboots in /etc/sysctl.d/60-kaio.conf." in done.stdout
    assert own_file() == before
    for name in KEEPALIVE:
        host.sysctl(f"net.ipv4.{name}", 5)
    assert by_sysctl(host) == [5, 5, 5]

    write(tmp_path, "60-kaio.conf", (tmp_path / "60-kaio.conf").read_text() + "net.core.somaxconn = 1\n")
    done = process(host, bind, *KAIO, "system", "load")
    assert (done.returncode, done.stderr) == (0, "")
    assert by_sysctl(host) == by_procfs(host) == [600, 60, 20]
    assert "Not set, because they are not kaio's settings: net/core/somaxconn" in done.stdout
    assert int(host.run("cat", "/proc/sys/net/core/somaxconn")) > 1

    host.sysctl("net.ipv4.tcp_keepalive_time", 5)
    host.run("sysctl", "-p", str(tmp_path / "60-kaio.conf"))  # sysctl(8) reads it the same
    assert by_sysctl(host) == [600, 60, 20]


def test_values_that_cannot_be_persisted_are_not_set(host: Namespace) -> None:
    """The directory is read-only: the kernel's values do not change."""
    readonly = "mount -t tmpfs -o ro none /etc/sysctl.d"
    done = process(host, readonly, *KAIO, "system", "set", "idle=600", "--persist")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "kaio: /etc/sysctl.d/60-kaio.conf: Read-only file system\n"
    assert by_procfs(host) == [7200, 75, 9]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "{}"),
        (
            "# mine\n\n net/ipv4/tcp_keepalive_time=5 \r\nvm.swappiness = 1\n-net.ipv4.tcp_retries2=9",
            "# mine\n\nnet.ipv4.tcp_keepalive_time = 600\nvm.swappiness = 1\nnet.ipv4.tcp_retries2 = 8\n",
        ),
        (
            "net.ipv4.tcp_retries2 = 1\nkernel.domainname = \u00fc \f\r\nnet.ipv4.tcp_retries2 = 2\n",
            "net.ipv4.tcp_retries2 = 8\nkernel.domainname = \u00fc \f\r\nnet.ipv4.tcp_keepalive_time = 600\n",
        ),
        (
            "#net.ipv4.tcp_retries2 = 1\nnet.ipv4.tcp_keepalive_intvl = 7\n",
            "#net.ipv4.tcp_retries2 = 1\nnet.ipv4.tcp_keepalive_intvl = 7\n{}",
        ),
    ],
    ids=["empty", "in their places", "twice", "appended"],
)
def test_other_lines_of_the_file_are_kept(tmp_path: pathlib.Path, before: str, after: str) -> None:
    """Comments, other keys, their line ends; what is persisted a second time is in its place already."""
    path = write(tmp_path, FILE, before)
    both = "net.ipv4.tcp_keepalive_time = 600\nnet.ipv4.tcp_retries2 = 8\n"
    for _ in range(2):
        assert persist({"idle": 600, "retries2": 8}, root=str(tmp_path)) == path
        assert pathlib.Path(path).read_bytes().decode() == after.replace("{}", both)
    assert os.stat(path).st_mode & 0o777 == 0o644
    assert os.listdir(os.path.dirname(path)) == ["60-kaio.conf"]


def test_a_new_file_and_its_directory_are_made(tmp_path: pathlib.Path) -> None:
    """And what was persisted is what is read; bytes that are no UTF-8 survive."""
    persist({"idle": 600, "count": 20}, root=str(tmp_path))
    assert persisted(str(tmp_path)) == ({"idle": 600, "count": 20}, [])
    with open(tmp_path / FILE, "ab") as file:
        file.write(b"# caf\xe9\n-net.ipv4.tcp_keepalive_probes\nnet.ipv4.tcp_retries2 = 8 # eight\nvm.swappiness=1\n")
    persist({"idle": 700}, root=str(tmp_path))
    assert b"# caf\xe9\n" in (tmp_path / FILE).read_bytes()
    assert persisted(str(tmp_path)) == ({"idle": 700, "retries2": 8}, ["vm/swappiness"])


def test_a_masked_file_is_not_written(tmp_path: pathlib.Path) -> None:
    """A link to /dev/null is how an administrator says no (sysctl.d(5))."""
    file = tmp_path / FILE
    file.parent.mkdir(parents=True)
    file.symlink_to("/dev/null")
    with pytest.raises(SysctlError, match="symbolic link"):
        persist({"idle": 600}, root=str(tmp_path))
    assert file.is_symlink()


def test_an_invalid_persisted_value_is_named_with_its_line(tmp_path: pathlib.Path) -> None:
    """Field, value, limit, file and line."""
    path = write(tmp_path, FILE, "# by hand\nnet.ipv4.tcp_keepalive_time = soon\n")
    with pytest.raises(kaio.PolicyError) as caught:
        persisted(str(tmp_path))
    assert (caught.value.field, caught.value.value) == ("idle", "soon")
    assert caught.value.limit.endswith(f"in {path} line 2")


# Children persist two contents by turns, and are killed at random moments; the file is looked at all the while.
# How long a write takes depends on the disk (fsync), so the moments are spread over three writes of this machine;
# the turns go on until both contents have been seen, and on a slow disk there are fewer.
NURSERY = """
import os, random, signal, sys, time
import kaio.tools.sysctls

root, rounds, careless = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "careless"
path = os.path.join(root, kaio.tools.sysctls.FILE)
rest = "".join(f"# line {number}\\n" for number in range(4000))
first, last = "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_retries2"
choices = [dict(idle=600, retries2=8), dict(idle=30000, retries2=15)]
whole = [f"{first} = {each['idle']}\\n{rest}{last} = {each['retries2']}\\n" for each in choices]

def write(number):
    if not careless:
        kaio.tools.sysctls.persist(choices[number], root)
    else:
        with open(path, "w") as file:
            file.write(whole[number])

os.makedirs(os.path.dirname(path))
with open(path, "w") as file:
    file.write(whole[0])
started = time.monotonic()
write(1)
write(0)
longest = max(0.02, 1.5 * (time.monotonic() - started))
torn = looks = turns = 0
seen = set()
while len(seen) < 2 or turns < rounds and (turns < 20 or time.monotonic() < started + 15):
    turns += 1
    child = os.fork()
    while not child:
        write(1)
        write(0)
    end = time.monotonic() + random.uniform(0, longest)
    over = False
    while not over:
        over = time.monotonic() > end
        if over:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with open(path) as file:
            now = file.read()
        looks += 1
        torn += now not in whole
        seen.add(now)
left = set(os.listdir(os.path.dirname(path)))
assert left <= {"60-kaio.conf", ".60-kaio.conf.new"}, left
kaio.tools.sysctls.persist(choices[0], root)
assert os.listdir(os.path.dirname(path)) == ["60-kaio.conf"]
print(torn, looks, turns)
"""


def nursery(root: pathlib.Path, rounds: int, how: str) -> tuple[int, int, int]:
    """How often the file was neither content, how often it was looked at, and how many children were killed."""
    done = subprocess.run(
        [*PYTHON, "-c", NURSERY, str(root), str(rounds), how], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    torn, looks, turns = map(int, done.stdout.split())
    return torn, looks, turns


def test_the_file_is_never_half_written(tmp_path: pathlib.Path) -> None:
    """Whoever persists is killed (-9) at random moments, up to 150 times: the file is always one of two contents."""
    torn, looks, turns = nursery(tmp_path / "kaio", 150, "kaio")
    assert torn == 0
    assert looks > turns >= 20
    torn, _, _ = nursery(tmp_path / "careless", 60, "careless")
    assert torn > 0  # the nursery would have noticed


def test_concurrent_persists_lose_nothing(tmp_path: pathlib.Path) -> None:
    """Each waits for the other: the file has the values of both."""
    script = (
        "import sys; from kaio.tools.sysctls import persist\n"
        "for n in range(1, 31): persist({sys.argv[2]: n}, root=sys.argv[1])"
    )
    processes = [
        subprocess.Popen([*PYTHON, "-c", script, str(tmp_path), field]) for field in ("idle", "count", "retries2")
    ]
    assert [each.wait(30) for each in processes] == [0, 0, 0]
    assert persisted(str(tmp_path)).values == {"idle": 30, "count": 30, "retries2": 30}


# -- which file has the last word


@pytest.mark.parametrize(
    ("files", "decides"),
    [
        ({}, None),
        ({"etc/sysctl.d/50-a.conf": "net.ipv4.tcp_keepalive_time=1"}, None),
        ({"usr/lib/sysctl.d/99-a.conf": "net.ipv4.tcp_keepalive_time=1"}, "usr/lib/sysctl.d/99-a.conf"),
        ({"usr/lib/sysctl.d/50-a.conf": "net.ipv4.tcp_keepalive_time=1"}, None),
        ({"run/sysctl.d/7-a.conf": "net/ipv4/tcp_keepalive_time = 1"}, "run/sysctl.d/7-a.conf"),  # "7-" is after "60"
        (
            {"etc/sysctl.d/99-a.conf": "", "usr/lib/sysctl.d/99-a.conf": "net.ipv4.tcp_keepalive_time=1"},
            None,  # hidden by its namesake
        ),
        ({"usr/lib/sysctl.d/60-kaio.conf": "net.ipv4.tcp_keepalive_time=1"}, None),  # hidden by kaio's
        ({"etc/sysctl.conf": "\tnet.ipv4.tcp_keepalive_time = 1"}, "etc/sysctl.conf"),
        ({"etc/sysctl.d/99-a.conf": "net.ipv4.tcp_keepalive_*=1"}, None),  # a plain key wins over patterns
        ({"etc/sysctl.d/99-a.conf": "; net.ipv4.tcp_keepalive_time=1\n#net.ipv4.tcp_keepalive_time=2"}, None),
        ({"etc/sysctl.d/99-a.conf": "net.ipv4.tcp_keepalive_intvl=1"}, None),
        ({"etc/sysctl.d/99-a.conf": "-net.ipv4.tcp_keepalive_time=1"}, "etc/sysctl.d/99-a.conf"),
        ({"etc/sysctl.d/99-a.conf": "-net.ipv4.tcp_keepalive_time"}, "etc/sysctl.d/99-a.conf"),
        ({"etc/sysctl.d/99-a.conf.bak": "net.ipv4.tcp_keepalive_time=1"}, None),
        ({"etc/sysctl.d/99-a.conf": "net.ipv4/tcp_keepalive_time=1"}, None),  # net/ipv4.tcp_keepalive_time
        (
            {"run/sysctl.d/99-a.conf": "net.ipv4.tcp_keepalive_time=1", "etc/sysctl.conf": "vm.swappiness=1"},
            "run/sysctl.d/99-a.conf",
        ),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_the_file_that_overrides_is_named(
    tmp_path: pathlib.Path, files: dict[str, str], decides: str | None, there: bool
) -> None:
    """By the order of sysctl.d(5), then sysctl.conf; whether kaio's own file is there yet or not."""
    for path, content in files.items():
        write(tmp_path, path, f"# first\n{content}\n")
    if there:
        persist({"idle": 600}, root=str(tmp_path))
    found = overriding(["idle", "count"], root=str(tmp_path))
    assert list(found) == ([] if decides is None else ["idle"])
    if decides is not None:
        assert (found["idle"].path, found["idle"].line) == (str(tmp_path / decides), 2)


# Random files in all directories; sysctl(8) applies them, and what the kernel has then is what was foretold.
ORACLE = """
import os, random, subprocess, sys
import kaio.tools.sysctls

assert os.readlink("/proc/self/ns/mnt") != sys.argv[1], "these are the machine's own directories"
random.seed(int(sys.argv[2]))
fresh = kaio.tools.sysctls.read()
places = [f"/{each}" for each in kaio.tools.sysctls._boot.DIRECTORIES]
places = [each for each in places if os.path.ismount(each) or os.path.ismount(os.path.dirname(each))]
assert "/etc/sysctl.d" in places
names = ["10-a.conf", "50-b.conf", "60-kaio.conf", "7-c.conf", "99-z.conf", "99-z.bak", "x.conf"]
keys = ["net.ipv4.tcp_keepalive_time", "net/ipv4/tcp_keepalive_time", "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4/tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_*", "net.ipv4.tcp_*_intvl", "net.ipv4.tcp_retries2"]
value = 0
for turn in range(25):
    for place in places:
        os.makedirs(place, exist_ok=True)
        for each in os.scandir(place):
            os.unlink(each.path)
    open("/etc/sysctl.conf", "w").close()
    kaio.tools.sysctls.change({field: getattr(fresh, field) for field in kaio.tools.sysctls.SETTINGS})
    for _ in range(random.randrange(1, 9)):
        place = random.choice([*places, None])
        path = "/etc/sysctl.conf" if place is None else f"{place}/{random.choice(names)}"
        with open(path, "a") as file:
            for _ in range(random.randrange(3)):
                value = value % 120 + 1
                file.write(f"{random.choice(keys)} = {value}\\n")
            if random.random() < 0.2:
                file.write("# net.ipv4.tcp_keepalive_time = 121\\n")
    foretold = {field: int(line.value) for field, line in kaio.tools.sysctls.at_boot().items()}
    subprocess.run(["sysctl", "--system"], check=True, capture_output=True)
    now = kaio.tools.sysctls.read()
    for field in kaio.tools.sysctls.SETTINGS:
        assert getattr(now, field) == foretold.get(field, getattr(fresh, field)), (field, now, foretold)
print("foretold")
"""


def test_sysctl_agrees_on_the_deciding_line(host: Namespace) -> None:
    """Against `sysctl --system` on random files, with empty directories mounted over the machine's own."""
    over = """
        for each in /etc /run /usr/local/lib /usr/lib/sysctl.d /lib/sysctl.d; do
            [ ! -d "$each" ] || mountpoint -q "$each" || mount -t tmpfs none "$each"
        done
    """
    ours, seed = os.readlink("/proc/self/ns/mnt"), str(time.time_ns())
    done = process(host, over, *PYTHON, "-W", "ignore::ResourceWarning", "-c", ORACLE, ours, seed)
    assert (done.returncode, done.stdout) == (0, "foretold\n"), (seed, done.stderr)


def test_says_what_overrides(host: Namespace, tmp_path: pathlib.Path) -> None:
    """After it was kept; and `kaio system` says what comes at boot."""
    write(tmp_path, "99-theirs.conf", "\nnet.ipv4.tcp_keepalive_time = 7200\n")
    bind = f"mount --bind {tmp_path} /etc/sysctl.d"
    done = process(host, bind, *KAIO, "system", "set", "idle=600", "--persist")
    line = "At boot, /etc/sysctl.d/99-theirs.conf line 2 sets net.ipv4.tcp_keepalive_time = 7200."
    assert done.returncode == 0
    assert f"But that file is overridden. {line}" in done.stdout
    assert line in process(host, bind, *KAIO, "system").stdout


def test_an_unreadable_file_is_reported(tmp_path: pathlib.Path) -> None:
    """The values at the next boot are then unknown."""
    write(tmp_path, "etc/sysctl.d/50-a.conf", "net.ipv4.tcp_keepalive_time = 5")
    (tmp_path / "etc/sysctl.d/70-dangling.conf").symlink_to("/nowhere/at/all")
    (tmp_path / "etc/sysctl.d/80-directory.conf").mkdir()
    assert at_boot(str(tmp_path))["idle"].value == "5"
    write(tmp_path, "usr/lib/sysctl.d", "")
    with pytest.raises(SysctlError, match="Not a directory"):
        at_boot(str(tmp_path))


# -- mistakes, and what is missing


def only_line(done: Result, code: int) -> str:
    """The one line that a command which failed has said."""
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("kaio: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["set"], ["nothing to set", "`kaio system set idle=600 interval=60 count=20`"]),
        (["set", "idle=0"], ["idle=0", "from 1 to 32767", "`kaio system set "]),
        (["set", "idle=600", "colour=red"], ["colour='red'", "the settings are idle, interval, count"]),
        (["--json", "set", "idle=600"], ["--json goes after set"]),
    ],
)
def test_a_usage_error_is_one_line_with_a_remedy(arguments: list[str], words: list[str]) -> None:
    """What, why, and a command that works; nothing was changed."""
    line = only_line(CliRunner().invoke(cli, ["system", *arguments]), 2)
    for word in words:
        assert word in line


def test_without_permission_the_sudo_command_is_printed(host: Namespace, tmp_path: pathlib.Path) -> None:
    """With what was asked for; the first value was refused, none is changed."""
    with host.entered():
        os.seteuid(NOBODY)
        try:
            done = CliRunner().invoke(cli, ["system", "set", "idle=600", "count=20", "--persist"])
            looked = CliRunner().invoke(cli, ["system", "set", "idle=600", "--dry-run"])
        finally:
            os.seteuid(0)
    line = only_line(done, 3)
    assert "Permission denied; run: sudo " in line
    assert line.endswith("kaio system set idle=600 count=20 --persist")
    assert looked.exit_code == 0
    assert by_procfs(host) == [7200, 75, 9]


def test_in_a_container_the_docker_options_are_printed(host: Namespace) -> None:
    """There /proc/sys is mounted read-only."""
    readonly = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys"
    done = process(host, readonly, *KAIO, "system", "set", "idle=600")
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert "Read-only file system" in line
    assert "docker run --sysctl net.ipv4.tcp_keepalive_time=600 ..." in line


def test_load_without_a_file(host: Namespace, tmp_path: pathlib.Path) -> None:
    """With the command that makes it."""
    done = process(host, f"mount --bind {tmp_path} /etc/sysctl.d", *KAIO, "system", "load")
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("kaio: /etc/sysctl.d/60-kaio.conf: no values are persisted")
    assert "--persist`" in line


def test_without_procfs_reading_is_an_error(tmp_path: pathlib.Path) -> None:
    """The entry is named."""
    with pytest.raises(SysctlError, match="procfs is not mounted") as caught:
        kaio.tools.sysctls.read(proc=str(tmp_path))
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == f"{tmp_path}/net/ipv4/tcp_keepalive_time"


@pytest.mark.parametrize("arguments", [[], ["set", "idle=600"], ["load"]])
def test_elsewhere_than_on_linux_one_line_says_so(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Other systems have other defaults."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        done = CliRunner().invoke(cli, ["system", *arguments])
    assert "Linux" in only_line(done, 3)


def test_changes_as_json(host: Namespace) -> None:
    """One document, and nothing else."""
    done = kaio_system(host, "set", "idle=600", "syn_retries=3", "--json")
    assert json.loads(done.stdout) == {
        "dry_run": False,
        "changes": {"idle": {"before": 7200, "after": 600}, "syn_retries": {"before": 6, "after": 3}},
        "file": None,
        "overridden_by": {},
        "problem": None,
    }


def test_times_are_written_as_in_a_policy() -> None:
    """Whole seconds in any unit; counts have none."""
    assert parse(["idle=10m", "interval=1m15s", "count=9"]) == {"idle": 600, "interval": 75, "count": 9}


def test_a_lock_that_anybody_may_hold_does_not_hold_root_up(host: Namespace, tmp_path: pathlib.Path) -> None:
    """flock(1) of the directory, and of kaio's file, by another user."""
    (tmp_path / "60-kaio.conf").write_text("net.ipv4.tcp_syncookies = 1\n")
    tmp_path.chmod(0o755)
    os.chmod(tmp_path.parent, 0o755)
    with contextlib.ExitStack() as stack:
        for path in (tmp_path, tmp_path / "60-kaio.conf"):
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        before = f"mount --bind {tmp_path} /etc/sysctl.d"
        done = process(host, before, *KAIO, "system", "set", "idle=600", "--persist")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tcp_keepalive_time = 600" in (tmp_path / "60-kaio.conf").read_text()


def test_another_command_s_lock_is_waited_for_and_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while; the kernel's values are not changed before it is had."""
    monkeypatch.setattr("kaio.tools.sysctls._boot._PATIENCE", 0.2)
    proc = tmp_path / "proc"
    entry = proc / "net/ipv4/tcp_keepalive_time"
    entry.parent.mkdir(parents=True)
    entry.write_text("7200\n")
    (tmp_path / "run/kaio").mkdir(parents=True)
    with open(tmp_path / "run/kaio/sysctl.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SysctlError, match=f"is locked by process {os.getpid()}; nothing was changed"):
            change({"idle": 600}, proc=str(proc), root=str(tmp_path))
    assert entry.read_text() == "7200\n"
    assert not (tmp_path / "etc/sysctl.d/60-kaio.conf").exists()


def test_loading_a_file_without_settings_is_no_success(host: Namespace, tmp_path: pathlib.Path) -> None:
    """Empty, or with lines for others."""
    for content in ("", "# nothing\n", "vm.swappiness = 1\n"):
        (tmp_path / "60-kaio.conf").write_text(content)
        done = process(host, f"mount --bind {tmp_path} /etc/sysctl.d", *KAIO, "system", "load")
        assert (done.returncode, done.stdout) == (3, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("kaio: /etc/sysctl.d/60-kaio.conf: has none of kaio's settings")


def test_why_the_first_segment_is_sent_more_often_than_the_setting_says(host: Namespace) -> None:
    """syn_retries 6 means ten, because of tcp_syn_linear_timeouts."""
    done = process(host, "true", *KAIO, "system")
    assert "4 times each second (tcp_syn_linear_timeouts), then 6 ever later (syn_retries)" in done.stdout
