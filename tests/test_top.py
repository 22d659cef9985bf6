"""Connections as the kernel lists them, and `kaio top`, which shows them: real ones, in networks of the tests' own."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

import kaio
from kaio.cli import top
from kaio.liveness.health import State, judge
from kaio.testing import blackhole
from kaio.tools.processes import ProcessError
from kaio.tools.sockdiag import Connections, TcpConnection, Timer, lacking
from kaio.tools.sockdiag._answer import Answer, decode

from .namespaces import Namespace
from .namespaces import lacking as no_networks

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sock_diag is Linux's")

TOP = (sys.executable, "-W", "error", "-m", "kaio", "top")
PID = os.getpid()
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def network() -> Iterator[Namespace]:
    """A network of the test's own, with nothing in it but loopback."""
    reason = no_networks()
    if reason is not None:
        pytest.skip(reason)
    made = Namespace("top")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def pairs(network: Namespace) -> Iterator[Callable[..., list[Pair]]]:
    """Makes connections in the network: our end, which has a policy, and the peer's, which sends no probes."""
    with contextlib.ExitStack() as stack:

        def make(count: int, host: str = "127.0.0.1", policy: str = "1s:1s:4") -> list[Pair]:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with network.entered():
                listener = stack.enter_context(socket.create_server((host, 0), family=family))
                kaio.apply(listener, policy)
                made = []
                for _ in range(count):
                    peer = stack.enter_context(socket.create_connection(listener.getsockname()[:2]))
                    made.append((stack.enter_context(listener.accept()[0]), peer))
                return made

        yield make


def seen(network: Namespace, *pids: int) -> list[TcpConnection]:
    """What there is in the network."""
    with network.entered(), Connections(pids) as connections:
        return connections.sample()


def of(found: Sequence[TcpConnection], sock: socket.socket) -> TcpConnection:
    """The one that is a socket of ours."""
    (one,) = [each for each in found if each.inode == os.fstat(sock.fileno()).st_ino]
    return one


def run(*arguments: object, network: Namespace | None = None) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    with network.entered() if network is not None else contextlib.nullcontext():
        return subprocess.run(
            [*TOP, *map(str, arguments)], capture_output=True, text=True, timeout=40, stdin=subprocess.DEVNULL
        )


# -- what the kernel lists


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1:{}"), ("::1", "[::1]:{}")])
def test_a_connection_has_the_values_of_its_socket(
    network: Namespace, pairs: Callable[..., list[Pair]], host: str, shown: str
) -> None:
    ((ours, peer),) = pairs(1, host, "20s:10s:4")
    found = seen(network)
    assert len(found) == 2
    one = of(found, ours)
    info = kaio.health(ours).info
    assert one.local == shown.format(ours.getsockname()[1])
    assert one.peer == shown.format(peer.getsockname()[1])
    assert (one.state, one.uid) == (kaio.TcpState.ESTABLISHED, os.geteuid())
    assert [holder.pid for holder in one.holders] == [PID]
    assert one.holders[0].name == Path("/proc/self/comm").read_text().strip()
    assert one.timer is Timer.KEEPALIVE
    assert one.expires is not None
    assert 0 < one.expires <= 20
    assert (one.health.state, one.health.probes, one.health.rtt) == (State.ALIVE, 0, info.rtt)
    assert one.silence is not None
    assert one.silence <= (kaio.health(ours).silence or 0) + 0.01
    assert of(found, peer).timer is None


def test_an_ipv4_peer_of_a_dual_stack_listener_has_its_ipv4_address(network: Namespace) -> None:
    with (
        network.entered(),
        socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener,
        socket.create_connection(("127.0.0.1", listener.getsockname()[1])) as peer,
        listener.accept()[0] as ours,
        Connections() as connections,
    ):
        assert of(connections.sample(), ours).peer == f"127.0.0.1:{peer.getsockname()[1]}"


def test_bytes_that_a_peer_does_not_accept_are_unsent_and_it_is_stalled(
    network: Namespace, pairs: Callable[..., list[Pair]]
) -> None:
    ((ours, _),) = pairs(1)
    ours.setblocking(False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += ours.send(b"x" * 65536)
    one = of(seen(network), ours)
    deadline = time.monotonic() + 10
    while one.health.state is not State.STALLED or one.unacknowledged:
        assert time.monotonic() < deadline, one
        time.sleep(0.02)
        one = of(seen(network), ours)
    assert one.timer is Timer.WINDOW_PROBE
    assert 0 < one.unsent == one.answer.queued < written


@pytest.mark.usefixtures("dead_peers")
def test_bytes_that_are_not_acknowledged_are_counted_and_the_peer_is_suspect(
    network: Namespace, pairs: Callable[..., list[Pair]]
) -> None:
    ((ours, peer),) = pairs(1)
    with blackhole(peer), network.entered(), Connections() as connections:
        ours.send(b"seven..")
        one = of(connections.sample(), ours)
        deadline = time.monotonic() + 10
        while one.health.state is not State.SUSPECT:
            assert time.monotonic() < deadline, one
            time.sleep(0.02)
            one = of(connections.sample(), ours)
        assert (one.unacknowledged, one.unsent, one.timer) == (7, 0, Timer.RETRANSMIT)
        assert one.unanswered >= 1


@pytest.mark.usefixtures("dead_peers")
def test_a_peer_that_was_never_heard_has_no_silence(network: Namespace) -> None:
    with network.entered(), socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as ours:
        ours.setblocking(False)
        with blackhole(listener), Connections() as connections:
            assert ours.connect_ex(listener.getsockname()) == errno.EINPROGRESS
            one = of(connections.sample(), ours)
    assert (one.state, one.silence) == (kaio.TcpState.SYN_SENT, None)


def test_listening_sockets_are_not_listed(network: Namespace) -> None:
    with network.entered(), socket.create_server(("127.0.0.1", 0)), Connections() as connections:
        assert connections.sample() == []


# -- who holds them

# Makes connections to itself, says how many, and holds its server's ends in a child of its own.
CROWD = """
import os, resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
count = int(sys.argv[1])
listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
ready, done = os.pipe()
child = os.fork()
if child == 0:
    accepted = [listener.accept()[0] for _ in range(count)]
    os.write(done, b".")
    os.close(done)
    os.read(0, 1)
    os._exit(0)
peers = [socket.create_connection(listener.getsockname()) for _ in range(count)]
os.read(ready, 1)
print(child, flush=True)
os.read(0, 1)
"""


@contextlib.contextmanager
def crowd(network: Namespace, count: int) -> Iterator[tuple[int, int]]:
    """Connections between two processes; their numbers, the client's first."""
    with network.entered():
        process = subprocess.Popen([sys.executable, "-c", CROWD, str(count)], stdin=-1, stdout=-1, text=True)
    with process:
        try:
            assert process.stdout is not None
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()  # the end of its input ends the child


def test_only_connections_of_the_given_processes_are_listed_in_any_network_namespace(
    network: Namespace, pairs: Callable[..., list[Pair]]
) -> None:
    pairs(1)
    with crowd(network, 2) as (client, server):
        assert len(seen(network)) == 6
        for pids in ([client], [server], [client, server], [server, server]):
            with Connections(pids) as connections:  # from where there are no such connections
                found = connections.sample()
                assert found
                assert {holder.pid for one in found for holder in one.holders} == set(pids)
                assert len(found) == 2 * len(set(pids))
                assert connections.ended() == []


def test_an_exited_process_is_reported(network: Namespace) -> None:
    with crowd(network, 1) as (client, _):
        connections = Connections([client])
    with connections:
        assert connections.sample() == []
        assert connections.ended() == [client]


def test_all_processes_that_share_a_socket_are_its_holders(
    network: Namespace, pairs: Callable[..., list[Pair]]
) -> None:
    ((ours, _),) = pairs(1)
    with network.entered():
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[ours.fileno()])
    with child:
        try:
            assert {holder.pid for holder in of(seen(network), ours).holders} == {PID, child.pid}
            assert [one.inode for one in seen(network, child.pid)] == [os.fstat(ours.fileno()).st_ino]
        finally:
            child.kill()


def test_a_connection_in_the_accept_queue_has_no_holder(network: Namespace) -> None:
    with network.entered(), socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        with peer, Connections() as connections:
            (queued,) = [one for one in connections.sample() if one.inode != os.fstat(peer.fileno()).st_ino]
            assert (queued.inode, queued.holders) == (0, ())


def test_processes_are_searched_only_for_a_new_socket(
    network: Namespace, pairs: Callable[..., list[Pair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    whole = Connections.__init__.__globals__["Holders"]._look
    monkeypatch.setattr(Connections.__init__.__globals__["Holders"], "_look", lambda self: looks.append(whole(self)))
    ((ours, _),) = pairs(1)
    with network.entered(), Connections() as connections:
        for _ in range(5):
            assert of(connections.sample(), ours).holders
        assert len(looks) == 1
        ((new, _),) = pairs(1)
        deadline = time.monotonic() + 10
        while not of(connections.sample(), new).holders:
            assert time.monotonic() < deadline
        assert len(looks) == 2


# -- what may be missing


def test_a_process_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ProcessError, match=f"process {2**22 + 1}: there is no such process"):
        Connections([2**22 + 1])


def test_lacking_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacking() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "this is darwin" in str(lacking())
    with pytest.raises(OSError, match="this is darwin") as caught:
        Connections()
    assert caught.value.errno == errno.ENOTSUP


def test_without_pyroute2_the_command_says_how_to_get_it() -> None:
    script = "import sys; sys.modules['pyroute2'] = None; from kaio.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "top"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("kaio: ")
    assert "pip install 'kaio-net[cli]'" in line


# -- what the kernel answers, decoded


def answer(**given: object) -> Answer:
    """An answer like the kernel's."""
    usual = {"family": socket.AF_INET, "state": 1, "timer": 0, "retransmissions": 0, "ports": b"\x1f\x90\x00\x50"}
    usual |= {"source": bytes(16), "destination": bytes(16), "interface": 0, "cookie": bytes(8), "expires": 0}
    usual |= {"unread": 0, "queued": 0, "uid": 0, "inode": 0, "info": bytes(232)}
    return Answer(**{**usual, **given})  # type: ignore[arg-type]


def message(kind: int, content: bytes) -> bytes:
    """A netlink message, as long as it says and filled up to a multiple of four."""
    length = 16 + len(content)
    return struct.pack("=IHHII", length, kind, 2, 1, 0) + content + bytes(-length % 4)


def told(one: Answer, *before: bytes) -> bytes:
    """What the kernel sends of an answer: attributes of other types stand before the one that is asked for."""
    head = struct.pack("=BBBB 4s16s16sI8s 5I", *one[:-1])
    attributes = [(8, each) for each in before] + [(2, one.info)]
    return message(
        20, head + b"".join(struct.pack("=HH", 4 + len(a), k) + a + bytes(-len(a) % 4) for k, a in attributes)
    )


def test_answers_are_decoded_one_after_the_other() -> None:
    some = [answer(inode=number, info=bytes([1]) * 280) for number in (7, 8, 9)]
    data = b"".join(told(one, b"\x01", b"abcdef") for one in some)
    assert decode(data, ()) == (some, False, None)
    assert decode(data, {8}).answers == [some[0], some[2]]
    assert decode(data + message(3, bytes(4)), ()) == (some, True, None)


def test_sockets_without_tcp_info_are_skipped() -> None:
    head = struct.pack("=BBBB 4s16s16sI8s 5I", *answer()[:-1])
    assert decode(message(20, head), ()).answers == []


@pytest.mark.parametrize(
    ("kind", "number", "words"), [(2, errno.EPERM, "not permitted"), (3, errno.ENOENT, "tcp_diag")]
)
def test_an_error_ends_the_list(kind: int, number: int, words: str) -> None:
    part = decode(message(kind, struct.pack("=i", -number)), ())
    assert part.done
    assert isinstance(part.error, OSError)
    assert part.error.errno == number
    assert words in str(part.error)


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_truncated_messages_are_harmless(cut: int) -> None:
    with contextlib.suppress(struct.error):
        decode(told(answer())[:cut], ())


# -- what is shown


def connection(number: int, **health: int) -> TcpConnection:
    """A connection of which a few things are known."""
    info = kaio.TcpInfo(state=1, probes=0, retransmits=0, last_ack_recv=1.0, last_data_recv=2.0, rtt=0.001)
    ports = number.to_bytes(2) + b"\x00\x50"
    return TcpConnection(answer(inode=number, ports=ports), (), judge(info._replace(**health)))


def test_rows_are_sorted_by_the_sort_key() -> None:
    rows = [connection(1, probes=2), connection(2, last_ack_recv=1, rtt=5), connection(3, last_ack_recv=0)]
    rows.append(connection(4, notsent_bytes=9, snd_wnd=5))
    orders = {}
    view = top.View(connections=rows)
    for key in "spturr":
        assert view.press(key)
        orders[key] = [row.inode for row in view.chosen()]
    assert view.sort == "unsent"
    assert orders["s"][-1] == 3
    assert orders["p"][0] == 1
    assert orders["t"][0] == 2
    assert orders["u"][0] == 4
    view.press("r")
    assert [row.inode for row in view.chosen()][-1] == 4
    assert not view.press("q")


def test_the_filter_is_typed() -> None:
    view = top.View(connections=[connection(number) for number in (8080, 9090)])
    for key in ("/", "9", "q", "\x7f", "0", "9"):
        assert view.press(key)
    assert (view.filter, view.typing) == ("909", True)
    assert [row.inode for row in view.chosen()] == [9090]
    view.press("\r")
    assert not view.typing
    view.press("\x1b")
    assert (view.filter, len(view.chosen())) == ("", 2)
    for key in ("f", "x", "\x15", "S", "u", "s", "\x1b"):
        view.press(key)
    assert (view.filter, view.typing, view.sort) == ("", False, "probes")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (132, 10), (79, 4), (40, 3), (10, 1), (300, 200)])
def test_the_page_fits_the_terminal_and_only_visible_rows_are_formatted(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [connection(number, probes=number % 2) for number in range(1, 151)]
    asked: list[TcpConnection] = []
    cells = top._cells

    def counted(connection: TcpConnection) -> tuple[str, ...]:
        asked.append(connection)
        return cells(connection)

    monkeypatch.setattr(top, "_cells", counted)
    view = top.View(connections=rows, ended=[4711])
    console = Console(width=width, height=height, file=io.StringIO(), record=True)
    console.print(top._page(view, width, height))
    lines = console.export_text().splitlines()
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert len(asked) == min(len(rows), max(0, height - 3))
    if width >= 80 and height > 3:
        assert "ended: 4711" in lines[0]
        for heading in ("process", "peer", "health", "timer", "probes", "silent"):
            assert heading in lines[1]
        assert "suspect" in lines[2]
        assert (f"{150 - len(asked)} more below" in lines[-1]) is (len(asked) < 150)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, ""), (0.04, "0.0 s"), (9.94, "9.9 s"), (12.3, "12 s"), (999, "999 s"), (7200, "120 m"), (432000, "120 h")],
)
def test_times_are_short(seconds: float | None, shown: str) -> None:
    assert top._seconds(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, ""), (9999, "9999"), (10_000, "10k"), (3_782_000, "3782k"), (12_345_678, "12M")]
)
def test_sizes_are_short(count: int, shown: str) -> None:
    assert top._bytes(count) == shown


# -- the command


def address(sock: socket.socket) -> str:
    """A socket's own address."""
    host, port = sock.getsockname()
    return f"{host}:{port}"


def test_once_prints_plain_lines_without_a_terminal(network: Namespace, pairs: Callable[..., list[Pair]]) -> None:
    ((ours, peer), _) = pairs(2)
    for arguments in ((), ("--once",), ("--once", PID)):
        done = run(*arguments, network=network)
        assert (done.returncode, done.stderr) == (0, "")
        head, *rows = done.stdout.splitlines()
        assert head.split() == [column.heading for column in top._COLUMNS]
        assert len(rows) == 4
        row = line(rows, ours, peer)
        assert row.startswith(f"{PID} ")
        assert re.search(r" established +alive +keepalive [01]\.\d s ", row)
        assert "\x1b" not in done.stdout


def test_json_is_one_document(network: Namespace, pairs: Callable[..., list[Pair]]) -> None:
    ((ours, peer),) = pairs(1)
    done = run("--json", "--filter", address(peer), "--sort", "process", "--reverse", network=network)
    assert (done.returncode, done.stderr) == (0, "")
    document = {one["inode"]: one for one in json.loads(done.stdout)["connections"]}
    one = document[os.fstat(ours.fileno()).st_ino]
    assert len(document) == 2
    assert one["processes"] == [{"pid": PID, "name": Path("/proc/self/comm").read_text().strip()}]
    assert (one["local"], one["peer"]) == (address(ours), address(peer))
    assert (one["state"], one["health"], one["timer"], one["probes"]) == ("established", "alive", "keepalive", 0)
    assert 0 <= one["expires"] <= 1
    assert one["silence"] >= 0


def test_the_filter_selects_rows_that_contain_its_text(network: Namespace, pairs: Callable[..., list[Pair]]) -> None:
    (_, (_, peer)) = pairs(2)
    assert len(run("--once", "--filter", address(peer), network=network).stdout.splitlines()) == 1 + 2
    assert len(run("--once", "--filter", "ESTABLISHED", network=network).stdout.splitlines()) == 1 + 4
    assert len(run("--once", "--filter", "nothing has this", network=network).stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--interval", "0"], 2, "interval='0'"),
        (["--interval", "soon"], 2, "interval='soon'"),
        (["--sort", "colour"], 2, "colour"),
        (["no-such-server"], 3, "there is no process of that name"),
        ([2**22 + 1], 3, "no such process"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[object], code: int, words: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# -- in a terminal


class Tmux:
    """A terminal whose screen can be read, of a tmux server of its own."""

    def __init__(self, directory: Path, script: str) -> None:
        self._command = ["tmux", "-L", "top", "-f", "/dev/null"]
        self._environment = {"PATH": os.environ["PATH"], "TMUX_TMPDIR": str(directory), "LC_ALL": "C.UTF-8"}
        self._call("new-session", "-d", "-x", "170", "-y", "16", script)

    def _call(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments], env=self._environment, capture_output=True, text=True, timeout=20, check=False
        )
        assert not done.returncode, done.stderr
        return done.stdout

    def keys(self, *keys: str) -> None:
        """Press keys."""
        self._call("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        """Make the terminal as large as that."""
        self._call("resize-window", "-x", str(width), "-y", str(height))

    def screen(self) -> list[str]:
        """What is on it now."""
        return self._call("capture-pane", "-p").splitlines()

    @property
    def is_alternate(self) -> bool:
        """Whether it shows the screen that programs have for themselves."""
        return self._call("display-message", "-p", "#{alternate_on}").strip() == "1"

    def until(self, condition: Callable[[list[str]], object], within: float = 30) -> list[str]:
        """Wait for something to be seen on it."""
        deadline = time.monotonic() + within
        while not condition(screen := self.screen()):
            assert time.monotonic() < deadline, "\n".join(screen)
            time.sleep(0.05)
        return screen

    def close(self) -> None:
        """End it, and what runs in it."""
        self._call("kill-server")


@pytest.fixture
def terminal(network: Namespace, tmp_path: Path) -> Iterator[Callable[[str], Tmux]]:
    """Opens a terminal in the network, and runs a shell's script in it."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed: run scripts/install-system-packages")
    with contextlib.ExitStack() as stack:

        def start(script: str) -> Tmux:
            with network.entered():
                made = Tmux(tmp_path, script)
            stack.callback(made.close)
            return made

        yield start


def line(screen: Sequence[str], sock: socket.socket, peer: socket.socket) -> str:
    """The row of a connection; empty when there is none."""
    ends = re.escape(address(sock)), re.escape(address(peer))
    return next((row for row in screen if re.search(rf" {ends[0]} +{ends[1]} ", row)), "")


def twice(directory: Path, *arguments: object) -> str:
    """A shell's script that runs the command twice, and writes down how it ended and what became of the terminal."""
    command = shlex.join([*TOP, *map(str, arguments)])
    return f"""cd {shlex.quote(str(directory))}
        export PYTHONPATH={shlex.quote(str(Path(kaio.__file__).parents[1]))}
        for turn in 1 2; do
            stty -g > before$turn
            sh -c "echo \\$\\$ > pid$turn; exec {command}"
            echo $? > code$turn
            stty -g > after$turn
            echo turn $turn is over
        done
        exec sleep 60"""


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
def test_in_a_terminal_a_dying_peer_turns_suspect_and_disappears(
    pairs: Callable[..., list[Pair]], terminal: Callable[[str], Tmux], tmp_path: Path
) -> None:
    (ours, peer), *living = pairs(3)
    screen = terminal(twice(tmp_path, PID, "--interval", "200ms"))
    screen.until(lambda seen: all("alive" in line(seen, *pair) for pair in [(ours, peer), *living]))
    assert screen.is_alternate

    counts: list[int] = []
    with blackhole(peer):
        while row := line(seen := screen.screen(), ours, peer):
            if "suspect" in row:
                assert seen[2] == row, "those in trouble come first"
                found = re.search(r"keepalive [\d.]+ s +(\d+) ", row)
                assert found is not None, row
                counts.append(int(found[1]))
            assert all(line(seen, *pair) for pair in living)
            time.sleep(0.05)
    assert counts == sorted(counts)
    assert len(set(counts)) > 1
    assert set(counts) <= {1, 2, 3, 4}
    ours.settimeout(0)
    with pytest.raises(TimeoutError, match="timed out"):
        ours.recv(1)

    screen.keys("n", "r")
    screen.until(lambda seen: "by process, descending" in seen[0])
    screen.keys("f", *str(living[0][1].getsockname()[1]))
    screen.until(lambda seen: seen[-1].startswith("filter: ") and not line(seen, *living[1]))
    screen.keys("Enter")
    seen = screen.until(lambda seen: seen[-1].startswith("s silence"))
    assert line(seen, *living[0])
    screen.keys("Escape")
    seen = screen.until(lambda seen: line(seen, *living[1]))
    assert "local" in seen[1]
    screen.resize(80, 6)
    seen = screen.until(lambda seen: len(seen) == 6 and "more below" in seen[-1])
    assert "local" not in seen[1]

    screen.keys("q")
    screen.until(lambda seen: "turn 1 is over" in seen or screen.is_alternate)
    screen.until(lambda seen: screen.is_alternate and any("alive" in row for row in seen))
    os.kill(int((tmp_path / "pid2").read_text()), signal.SIGTERM)
    screen.until(lambda seen: "turn 2 is over" in seen)
    assert not screen.is_alternate
    assert [(tmp_path / f"code{turn}").read_text().strip() for turn in (1, 2)] == ["0", str(128 + signal.SIGTERM)]
    for turn in (1, 2):
        assert (tmp_path / f"before{turn}").read_text() == (tmp_path / f"after{turn}").read_text()


@pytest.mark.slow
@pytest.mark.heavy
def test_sampling_ten_thousand_connections_is_fast(network: Namespace) -> None:
    """The time is printed."""
    count = 10_000
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < count + 100:
        pytest.skip("needs 10,100 file descriptors")
    with crowd(network, count) as (client, server):
        for pids in ([server], []):
            with network.entered(), Connections(pids) as connections:
                took = []
                for _ in range(3):
                    began = time.process_time()
                    found = connections.sample()
                    took.append(f"{time.process_time() - began:.3f}")
                began = time.process_time()
                top._page(top.View(connections=found), 120, 40)
                page = time.process_time() - began
            assert {holder.pid for one in found for holder in one.holders} == set(pids or [client, server])
            assert len(found) == len({one.inode for one in found}) == (count if pids else 2 * count)
            assert all(one.timer is None and one.health.state is State.ALIVE for one in found)
            print(f"{len(found)} ends: {', '.join(took)} s of CPU a sample, {page:.3f} s a page")
