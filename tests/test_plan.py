"""`kaio plan`: its arithmetic, and the kernel that it is about."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import select
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

import kaio
import kaio.tools.sysctls
from kaio import Keepalive
from kaio.cli import cli
from kaio.testing import blackhole
from kaio.tools.middleboxes import MIDDLEBOXES, outlasts, second_probe
from kaio.tools.plans import ACK_BYTES, Fate, cost, duration, fates
from kaio.tools.sysctls import Defaults

from .namespaces import Namespace, lacking

NEVER = math.inf
LINUX = Defaults()


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A host of the test's own."""
    reason = lacking()
    if reason is not None:
        pytest.skip(reason)
    host = Namespace("host")
    yield host
    host.close()


# -- when a death is found


@pytest.mark.parametrize(
    ("spec", "idle", "unacknowledged", "shut", "connecting", "paused"),
    [  # on kaio's connections, and with the options alone
        ("20:10:4", (60, 60), (60, 924.6), (60, 924.6), (60, 131), (60, NEVER)),
        ("20:10:4,stalled=drop", (60, 60), (60, 60), (60, 60), (60, 60), (60, NEVER)),
        ("20:10:4,user_timeout=2m", (60, 60), (120, 924.6), (120, 924.6), (120, 131), (60, NEVER)),
        ("20:10:4,user_timeout=2m,stalled=drop", (120, 120), (120, 120), (120, 120), (120, 120), (120, NEVER)),
        # tcp_retries2 ends what is unacknowledged, unless TCP_USER_TIMEOUT stands in its place
        ("20:10:4,user_timeout=1h", (60, 60), (924.6, 924.6), (924.6, 924.6), (131, 131), (60, NEVER)),
        (
            "20:10:4,user_timeout=1h,stalled=drop",
            (3600, 3600),
            (3600, 3600),
            (924.6, 924.6),
            (131, 131),
            (3600, NEVER),
        ),
        ("20:10:4,user_timeout=none", (60, 60), (924.6, 924.6), (924.6, 924.6), (131, 131), (60, NEVER)),
        ("off", (NEVER, NEVER), (924.6, 924.6), (924.6, 924.6), (131, 131), (NEVER, NEVER)),
    ],
)
def test_when_a_death_is_detected(
    spec: str,
    idle: tuple[float, float],
    unacknowledged: tuple[float, float],
    shut: tuple[float, float],
    connecting: tuple[float, float],
    paused: tuple[float, float],
) -> None:
    """In each state, by kaio and without it."""
    states = fates(Keepalive.parse(spec), LINUX)
    names = ["idle", "sent data unacknowledged", "window shut", "connecting", "reading paused"]
    assert [fate.state for fate in states] == names
    found = [(round(fate.found_after, 3), round(fate.found_alone, 3)) for fate in states]
    assert found == [idle, unacknowledged, shut, connecting, paused]


def test_what_happens_until_then() -> None:
    """The kernel's timers: probes, doubling retransmissions, SYNs a second apart and then doubling."""
    idle, unacknowledged, shut, connecting, paused = fates(Keepalive(20, 10, 4), LINUX)
    assert idle.steps == paused.steps == Keepalive(20, 10, 4).timeline()
    assert [step.at for step in unacknowledged.steps] == [0.2, 0.6, 1.4, 3.0, 6.2, 12.6, 25.4, 51.0, 60]
    assert [step.at for step in shut.steps] == [step.at for step in unacknowledged.steps]
    assert [step.at for step in connecting.steps] == [1, 2, 3, 4, 5, 7, 11, 19, 35, 60]
    for fate in (idle, unacknowledged, shut, connecting, paused):
        assert fate.steps[-1] == (60, "dead")


def test_equal_waits_are_one_step() -> None:
    """Two minutes apart, up to the end, however far that is."""
    longest = Keepalive(20, 10, 4, user_timeout=2_000_000, stalled="drop")
    steps = fates(longest, LINUX)[1].steps
    assert steps[-2] == (444.6, "resent, and every 120 s")
    assert steps[-1] == (2_000_000, "dead")
    assert len(steps) < 15


@pytest.mark.parametrize("spec", ["on", "30m::10", "::"])
def test_a_policy_that_leaves_times_to_the_system_is_rejected(spec: str) -> None:
    """Arithmetic needs all three."""
    for question in (lambda p: fates(p, LINUX), lambda p: cost(p, 1), lambda p: outlasts(p, 350)):
        with pytest.raises(kaio.PolicyError, match="left to the system"):
            question(Keepalive.parse(spec))


# -- what it costs


@pytest.mark.parametrize(
    ("spec", "connections", "probes", "octets", "in_vain"),
    [
        ("20:10:4", 10_000, 500, 52_000, 1000),
        ("175:87:4", 1, 1 / 175, 104 / 175, 1 / 87),
        ("1:4:2", 8, 2, 208, 2),  # after an answer the interval passes, too
        ("off", 10_000, 0, 0, 0),
    ],
)
def test_what_probes_cost(spec: str, connections: int, probes: float, octets: float, in_vain: float) -> None:
    """Probes and bytes a second, both ways."""
    price = cost(Keepalive.parse(spec), connections)
    assert price == pytest.approx((probes, octets, in_vain))


# -- what it outlasts


@pytest.mark.parametrize("against", [3, 4, 5, 7, 10, 59.5, 60, 240, 350, 600, 900, 7440, 65534, 432_000])
def test_hold_outlasts_its_own_timeout(against: float) -> None:
    """The rule is that of `Keepalive.hold`."""
    assert outlasts(Keepalive.hold(against), against)


@pytest.mark.parametrize(
    ("spec", "latest"),
    [
        ("175:87:4", 294.75),
        ("20:10:1", None),  # a single lost probe is the end
        ("20:10:2", 33.75),
        ("60:200:9", 450),  # 200 s after an answer, 200 s after that
        ("300:75:9", 421.875),
        ("off", None),
    ],
)
def test_the_second_probe_must_come_in_time(spec: str, latest: float | None) -> None:
    """An eighth late at worst; strictly before the middlebox's timeout."""
    policy = Keepalive.parse(spec)
    assert second_probe(policy) == latest
    if latest is None:
        assert not outlasts(policy, 10**9)
    else:
        assert not outlasts(policy, latest)
        assert outlasts(policy, latest + 0.001)


def test_each_middlebox_has_its_source() -> None:
    """They are sorted by timeout, without repetition, each with an address."""
    assert [box.forgets_after for box in MIDDLEBOXES] == sorted(box.forgets_after for box in MIDDLEBOXES)
    assert len({box.name for box in MIDDLEBOXES}) == len(MIDDLEBOXES)
    assert all(box.source.startswith("https://") for box in MIDDLEBOXES)
    assert {box.name for box in MIDDLEBOXES if not box.heeds_probes} == {
        "AWS Application Load Balancer",
        "AWS Classic Load Balancer",
        "Cloudflare, client side",
    }


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.2, "0.2 s"),
        (59.9999, "1 min"),
        (60, "1 min"),
        (924.6, "15 min 24.6 s"),
        (7875, "2 h 11 min 15 s"),
        (432_000, "5 d"),
        (90_061.5, "1 d 1 h 1 min 1.5 s"),
        (NEVER, "never"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    """As people write them."""
    assert duration(seconds) == words


# -- the kernel


def check(fate: Fate, took: float) -> None:
    """A death was found when it was foretold; late by the timer's eighth, or until the next retransmission."""
    assert fate.found_alone - 0.1 < took < 2 * fate.found_alone + 1.6, fate.state


@pytest.mark.slow
def test_the_kernel_does_what_the_plan_says(host: Namespace, dead_peers: None) -> None:
    """A probe's size and pace; the end of connections that have nothing but the options. All side by side."""
    pace, quick, keeps = Keepalive(1, 2, 2), Keepalive(1, 1, 2, stalled="drop"), Keepalive(1, 1, 2)
    with host.entered(), contextlib.ExitStack() as ends:
        kaio.tools.sysctls.change({"retries2": 2})
        system = kaio.tools.sysctls.read()
        listener = ends.enter_context(socket.create_server(("127.0.0.1", 0)))
        sniffer = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)))
        ours = [ends.enter_context(socket.create_connection(listener.getsockname())) for _ in range(4)]
        theirs = [ends.enter_context(listener.accept()[0]) for _ in ours]
        answered, idle, unacknowledged, resent = ours
        for sock, policy in zip(ours, (pace, quick, quick, keeps), strict=True):
            kaio.apply(sock, policy)
        dying = ours[1:]
        with blackhole(*theirs[1:]):
            began = time.monotonic()
            unacknowledged.send(b"into the void")
            resent.send(b"into the void")
            took = deaths(dying, began, within=12)
            for sock in dying:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ETIMEDOUT
        while time.monotonic() < began + 4.5:
            time.sleep(0.05)
        sizes = packets(sniffer, answered)

    dropped, kept = fates(quick, system), fates(keeps, system)
    check(dropped[0], took[idle])
    check(dropped[1], took[unacknowledged])
    check(kept[1], took[resent])
    # Probes at 1 and 3 s, each with its answer: the interval, which is the longer time, is the pace.
    assert set(sizes) == {ACK_BYTES}
    assert 4 <= len(sizes) <= 6
    assert 1 / cost(pace, 1).probes == pace.interval


def deaths(sockets: list[socket.socket], began: float, within: float) -> dict[socket.socket, float]:
    """When each connection ended, in seconds from the beginning."""
    poll = select.poll()
    by_fd = {sock.fileno(): sock for sock in sockets}
    for fd in by_fd:
        poll.register(fd, 0)
    took: dict[socket.socket, float] = {}
    while len(took) < len(sockets):
        assert time.monotonic() < began + within
        for fd, _ in poll.poll(200):
            poll.unregister(fd)
            took[by_fd[fd]] = time.monotonic() - began
    return took


def packets(sniffer: socket.socket, sock: socket.socket) -> list[int]:
    """The sizes of a connection's IPv4 packets after its handshake, as they went over the loopback interface."""
    port = sock.getsockname()[1]
    sizes: list[int] = []
    sniffer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            packet, address = sniffer.recvfrom(65535)
            if address[2] == 4 or packet[9] != socket.IPPROTO_TCP:  # PACKET_OUTGOING: it is seen again as it comes in
                continue
            source, destination = struct.unpack_from("!HH", packet, (packet[0] & 15) * 4)
            if port in (source, destination):
                sizes.append(struct.unpack_from("!H", packet, 2)[0])
    return sizes[3:]


# -- the command


def plan(*arguments: str, code: int = 0) -> str:
    """What `kaio plan` prints."""
    done = CliRunner().invoke(cli, ["plan", *arguments])
    assert (done.exit_code, done.stderr) == (code, ""), done.output
    return done.stdout


def test_explains_a_policy_in_plain_lines() -> None:
    """All states, the cost, the middleboxes."""
    lines = plan("20s:10s:4", "--connections", "10000").splitlines()
    assert lines[0] == "20s:10s:4: a dead idle peer is detected after 1 min."
    for line in (
        "sent data unacknowledged  1 min                  15 min 24.6 s",
        "reading paused            1 min                  never",
        "  idle: probes at 20, 30, 40, 50 s, then dead",
        "  connecting: SYN again at 1, 2, 3, 4, 5, 7, 11, 19, 35 s, then dead",
    ):
        assert line in lines
    cells = {line.split("  ")[0]: line for line in lines}
    assert "500 probes and 52,000 bytes a second" in next(line for line in lines if "10,000 idle" in line)
    assert "  yes  " in cells["AWS Network Load Balancer"]
    assert "  no: data only  " in cells["AWS Classic Load Balancer"]


def test_explains_off_and_unusual_policies() -> None:
    """Never detected; an interval that is longer than the idle time; a stalled peer that is dropped."""
    assert plan("off").startswith("off: a dead idle peer is never detected.")
    assert "No probes, no cost." in plan("off")
    assert "everything happens 3 s later" in plan("1:4:2")
    assert "accepts no data for 1 min is dropped too" in plan("20:10:4,stalled=drop")
    assert "16, 17, ..." not in plan("1:1:127")
    assert "probes at 1, 2, 3, 4, 5, 6, 7, ..., 126, 127 s" in plan("1:1:127")


def test_what_is_left_to_the_system_is_the_systems(host: Namespace) -> None:
    """Of the network namespace that it runs in: keepalive's times and the retransmissions."""
    host.sysctl("net.ipv4.tcp_keepalive_time", 600)
    host.sysctl("net.ipv4.tcp_retries2", 8)
    with host.entered():
        shown = json.loads(plan("on", "--json"))
    assert shown["policy"].startswith("600s:75s:9")
    assert shown["detection_time"] == 600 + 75 * 9
    assert shown["states"]["sent data unacknowledged"]["kaio"] == pytest.approx(102.2)


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("hold=350s", 0, "175s:87s:4 outlasts a middlebox with a timeout of 5 min 50 s."),
        ("20s:10s:4", 0, "outlasts"),
        ("300:75:9", 1, "may be sent as late as 7 min 1.875 s; `kaio plan hold=350s`, which is 175s:87s:4, does."),
        ("on", 1, "does not outlast"),
        ("off", 1, "it sends no second probe"),
        ("20:10:1", 1, "it sends no second probe"),
    ],
)
def test_against_is_the_exit_code(spec: str, code: int, words: str) -> None:
    """And the last line gives the reason, and a policy that does."""
    assert words in plan(spec, "--against", "350", code=code).splitlines()[-1]
    shown = json.loads(plan(spec, "--against", "350", "--json", code=code))
    assert shown["against"] == {"forgets_after": 350, "outlasted": code == 0}


def test_some_middleboxes_cannot_be_outlasted() -> None:
    """The kernel counts in whole seconds."""
    assert "no policy does" in plan("1:1:9", "--against", "2", code=1)


def test_as_json_never_is_null() -> None:
    """One document; the boxes with their sources."""
    shown = json.loads(plan("20s:10s:4", "--json"))
    assert shown["states"]["reading paused"]["options_alone"] is None
    assert shown["cost"]["bytes_of_a_probe"] == 52
    box = next(box for box in shown["middleboxes"] if box["name"] == "AWS Network Load Balancer")
    assert box["outlasted"] is True
    assert box["source"].startswith("https://docs.aws.amazon.com/")
    json.loads(plan("off", "--json"), parse_constant=pytest.fail)


def test_without_a_policy_it_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keepalive=None means: the environment's, else 20s:10s:4."""
    assert plan().startswith("20s:10s:4:")
    monkeypatch.setenv("KAIO_KEEPALIVE", "detect=30s")
    assert plan().startswith("10s:5s:4:")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["soon"], ["keepalive='soon'", "idle:interval:count", "`kaio plan 20s:10s:4`"]),
        (["0:1:2"], ["idle=0", "above 0"]),
        (["20:10:4,user_timeout=5"], ["user_timeout=5", "at least idle + 2 * interval = 40 s"]),
        (["::2,user_timeout=5"], ["user_timeout=5", "at least"]),
        (["20:10:4", "--connections", "0"], ["--connections='0'", "from 1"]),
        (["20:10:4", "--connections", "many"], ["--connections='many'"]),
        (["20:10:4", "--against", "nan"], ["--against='nan'", "above 0"]),
        (["20:10:4", "--against", "-1"], ["--against='-1'"]),
        (["20:10:4", "--against", "x"], ["--against='x'", "must be a time above 0"]),
    ],
)
def test_a_usage_error_is_one_line(arguments: list[str], words: list[str]) -> None:
    """What, why, and a command that works."""
    done = CliRunner().invoke(cli, ["plan", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    for word in ("kaio: ", "such as `kaio plan ", *words):
        assert word in line
