"""The module of each platform, with a fake socket that records the calls. These tests run on every platform."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import kaio.kernel.sockets
from kaio import Keepalive, KeepaliveError, SocketState, TcpInfo, TcpState
from kaio.kernel.options import Platform, bsd, darwin, linux, windows

SOL = socket.SOL_SOCKET
TCP = 6
Option = tuple[int, int]  # level, name


class Refusal(NamedTuple):
    """An answer of the kernel: this error number."""

    number: int


class FakeSocket:
    """A TCP socket of any platform: its options are a dict, and calls of setsockopt are recorded.

    `answers` maps a call to its effect: another value, or a `Refusal`.
    """

    def __init__(
        self,
        options: Mapping[Option, int | bytes] | None = None,
        *,
        answers: Mapping[tuple[int, int, int], int | Refusal] | None = None,
        family: int = socket.AF_INET,
        kind: int = socket.SOCK_STREAM,
    ) -> None:
        self.options = dict(options or {})
        self.answers = dict(answers or {})
        self.family = family
        self.type = kind
        self.calls: list[tuple[int, int, int]] = []

    def fileno(self) -> int:
        return 7

    def getsockopt(self, level: int, option: int, length: int = 0, /) -> Any:
        if (level, option) not in self.options:
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        value = self.options[level, option]
        assert isinstance(value, bytes) == bool(length)
        return value[:length] if isinstance(value, bytes) else value

    def setsockopt(self, level: int, option: int, value: Any, /) -> None:
        self.calls.append((level, option, int(value)))
        answer = self.answers.get((level, option, int(value)), int(value))
        if isinstance(answer, Refusal):
            raise OSError(answer.number, os.strerror(answer.number))
        self.options[level, option] = answer


@dataclasses.dataclass(frozen=True)
class Case:
    """A platform: its module, and the numbers of its options from its headers."""

    name: str
    module: ModuleType
    system: str | None = None  # the key in bsd's table
    keepalive: Option = (SOL, 0x0008)
    idle: Option | None = None
    interval: Option | None = None
    count: Option | None = None
    user_timeout: Option | None = None
    unit: int = 1  # units per second of idle and interval
    user_unit: int = 1  # units per second of the user timeout
    connect: Option | None = None
    connect_unit: int = 1
    info: Option | None = None

    def __repr__(self) -> str:
        return self.name


LINUX = Case(
    "Linux",
    linux,
    None,
    (SOL, 9),
    (TCP, 4),
    (TCP, 5),
    (TCP, 6),
    (TCP, 18),
    user_unit=1000,
    connect=(TCP, 18),
    connect_unit=1000,
    info=(TCP, 11),
)
DARWIN = Case(
    "macOS",
    darwin,
    idle=(TCP, 0x10),
    interval=(TCP, 0x101),
    count=(TCP, 0x102),
    user_timeout=(TCP, 0x80),
    connect=(TCP, 0x20),
    info=(TCP, 0x106),
)
WINDOWS = Case(
    "Windows",
    windows,
    idle=(TCP, 3),
    interval=(TCP, 17),
    count=(TCP, 16),
    user_timeout=(TCP, 14),
    user_unit=1000,
)
FREEBSD = Case(
    "FreeBSD",
    bsd,
    "freebsd",
    idle=(TCP, 256),
    interval=(TCP, 512),
    count=(TCP, 1024),
    user_timeout=(TCP, 68),
    connect=(TCP, 128),
    info=(TCP, 32),
)
NETBSD = Case(
    "NetBSD",
    bsd,
    "netbsd",
    idle=(TCP, 3),
    interval=(TCP, 5),
    count=(TCP, 6),
    connect=(TCP, 7),
    info=(TCP, 9),
)
DRAGONFLY = Case(
    "DragonFly",
    bsd,
    "dragonfly",
    idle=(TCP, 256),
    interval=(TCP, 512),
    count=(TCP, 1024),
    unit=1000,
    connect=(TCP, 32),
    connect_unit=1000,
)
OPENBSD = Case("OpenBSD", bsd, "openbsd")

CASES = [LINUX, DARWIN, WINDOWS, FREEBSD, NETBSD, DRAGONFLY, OPENBSD]
WITH_TIMES = [case for case in CASES if case.idle]

Use = Callable[[Case], Platform]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Make kaio use a platform's module, and return it."""

    def make(case: Case) -> Platform:
        if case.system is not None:
            monkeypatch.setattr(bsd, "_HERE", bsd._SYSTEMS[case.system])
            monkeypatch.setattr(bsd, "NAME", bsd._SYSTEMS[case.system].name)
        monkeypatch.setattr(kaio.kernel.sockets, "platform", case.module)
        platform: Platform = case.module
        return platform

    return make


def options_of(
    case: Case, *, on: bool, idle: int, interval: int, count: int, user_timeout: float = 0
) -> dict[Option, Any]:
    """The options of a socket of that platform; times in seconds."""
    values: dict[Option | None, int] = {
        case.keepalive: int(on),
        case.idle: idle * case.unit,
        case.interval: interval * case.unit,
        case.count: count,
        case.user_timeout: int(user_timeout * case.user_unit),
    }
    return {option: value for option, value in values.items() if option is not None}


# -- the modules


@pytest.mark.parametrize("module", [linux, darwin, bsd, windows], ids=lambda module: module.__name__)
def test_every_platform_has_the_same_functions(module: ModuleType) -> None:
    """Those of Platform, with the same parameters, and no other public function."""
    promised = {
        name: list(inspect.signature(function).parameters)[1:]
        for name, function in inspect.getmembers(Platform, inspect.isfunction)
        if not name.startswith("_")
    }
    found = {
        name: list(inspect.signature(function).parameters)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    assert found == promised
    assert set(promised) == {
        "is_tcp",
        "missing",
        "rounded",
        "read",
        "write",
        "set_user_timeout",
        "cap_backoff",
        "idle_time",
        "last_data_recv",
        "tcp_info",
    }


@pytest.mark.parametrize("module", [linux, darwin, bsd, windows], ids=lambda module: module.__name__)
def test_every_platform_has_a_name_and_says_whether_options_are_inherited(module: ModuleType) -> None:
    """The two attributes of Platform; only on Linux accepted sockets inherit all options."""
    assert list(Platform.__annotations__) == ["NAME", "INHERITS"]
    assert isinstance(module.NAME, str)
    assert module.NAME
    assert module.INHERITS is (module is linux)


def test_every_bsd_is_in_the_table() -> None:
    """A new system needs a case in this file."""
    assert {case.system: case.name for case in CASES if case.system} == {
        key: system.name for key, system in bsd._SYSTEMS.items()
    }


# -- TCP sockets


@pytest.mark.parametrize(
    ("family", "kind", "protocol", "tcp"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, 6, True),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, True),
        (socket.AF_INET, socket.SOCK_STREAM, 262, True),  # MPTCP
        (socket.AF_INET, socket.SOCK_STREAM | 0o4000, 6, True),  # some event loops leave SOCK_NONBLOCK in the type
        (socket.AF_INET, socket.SOCK_STREAM, 132, False),  # SCTP
        (socket.AF_INET, socket.SOCK_STREAM, 256, False),  # SMC
        (socket.AF_INET, socket.SOCK_DGRAM, 17, False),
        (socket.AF_INET6, socket.SOCK_DGRAM, 17, False),
        (socket.AF_INET, socket.SOCK_SEQPACKET, 132, False),
        (socket.AF_INET, socket.SOCK_RAW, 6, False),
        (socket.AF_UNIX, socket.SOCK_STREAM, 0, False),
        (40, socket.SOCK_STREAM, 0, False),  # AF_VSOCK
    ],
)
def test_linux_checks_family_type_and_protocol(family: int, kind: int, protocol: int, tcp: bool) -> None:
    """SOCK_STREAM is used for other protocols, too."""
    assert linux.is_tcp(FakeSocket({(SOL, 38): protocol}, family=family, kind=kind)) is tcp


@pytest.mark.parametrize("case", CASES[1:], ids=repr)
@pytest.mark.parametrize(
    ("family", "kind", "tcp"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, True),
        (socket.AF_INET6, socket.SOCK_STREAM, True),
        (socket.AF_INET, socket.SOCK_DGRAM, False),
        (socket.AF_INET6, socket.SOCK_DGRAM, False),
        (socket.AF_UNIX, socket.SOCK_STREAM, False),
    ],
)
def test_other_platforms_check_family_and_type(use: Use, case: Case, family: int, kind: int, tcp: bool) -> None:
    """They have no SO_PROTOCOL."""
    assert use(case).is_tcp(FakeSocket(family=family, kind=kind)) is tcp


# -- writing and reading

ALL = SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=60.25)
TIMES = SocketState(enabled=True, idle=20, interval=10, count=4)


@pytest.mark.parametrize(
    ("case", "calls"),
    [
        (LINUX, [(TCP, 4, 20), (TCP, 5, 10), (TCP, 6, 4), (TCP, 18, 60250), (SOL, 9, 1)]),
        (DARWIN, [(TCP, 0x10, 20), (TCP, 0x101, 10), (TCP, 0x102, 4), (TCP, 0x80, 61), (SOL, 8, 1)]),
        (WINDOWS, [(TCP, 3, 20), (TCP, 17, 10), (TCP, 16, 4), (TCP, 14, 60250), (SOL, 8, 1)]),
        (FREEBSD, [(TCP, 256, 20), (TCP, 512, 10), (TCP, 1024, 4), (TCP, 68, 61), (SOL, 8, 1)]),
        (NETBSD, [(TCP, 3, 20), (TCP, 5, 10), (TCP, 6, 4), (SOL, 8, 1)]),
        (DRAGONFLY, [(TCP, 256, 20_000), (TCP, 512, 10_000), (TCP, 1024, 4), (SOL, 8, 1)]),
        (OPENBSD, [(SOL, 8, 1)]),
    ],
    ids=repr,
)
def test_write_sets_everything_and_keepalive_last(use: Use, case: Case, calls: list[tuple[int, int, int]]) -> None:
    """In the platform's units; keepalive is switched on when its times are set."""
    sock = FakeSocket(options_of(case, on=False, idle=7200, interval=75, count=9))
    use(case).write(sock, ALL)
    assert sock.calls == calls


@pytest.mark.parametrize(
    ("case", "calls"),
    [
        (LINUX, [(TCP, 18, 0), (SOL, 9, 0)]),
        (DARWIN, [(TCP, 0x80, 0), (SOL, 8, 0)]),
        (WINDOWS, [(SOL, 8, 0)]),  # cannot be removed; apply notices when it reads back
        (FREEBSD, [(TCP, 68, 0), (SOL, 8, 0)]),
        (NETBSD, [(SOL, 8, 0)]),
        (DRAGONFLY, [(SOL, 8, 0)]),
        (OPENBSD, [(SOL, 8, 0)]),
    ],
    ids=repr,
)
def test_write_of_off_removes_the_user_timeout_and_keeps_the_times(
    use: Use, case: Case, calls: list[tuple[int, int, int]]
) -> None:
    """None leaves idle, interval and count unchanged, but removes the user timeout."""
    sock = FakeSocket(options_of(case, on=True, idle=20, interval=10, count=4, user_timeout=60))
    use(case).write(sock, SocketState(enabled=False))
    assert sock.calls == calls


@pytest.mark.parametrize("field", ["idle", "interval", "count"])
@pytest.mark.parametrize("case", WITH_TIMES, ids=repr)
def test_write_sets_only_fields_that_are_not_none(use: Use, case: Case, field: str) -> None:
    """Each field is set by its own option."""
    before = options_of(case, on=False, idle=7200, interval=75, count=9)
    sock = FakeSocket(before)
    value = 5
    given: dict[str, Any] = {field: value}
    use(case).write(sock, SocketState(enabled=True, **given))
    unit = 1 if field == "count" else case.unit
    assert sock.options == {**before, getattr(case, field): value * unit, case.keepalive: 1}


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_read_returns_the_options(use: Use, case: Case) -> None:
    """In seconds; None for options that the platform does not have."""
    sock = FakeSocket(options_of(case, on=True, idle=20, interval=10, count=4, user_timeout=61))
    assert use(case).read(sock) == SocketState(
        enabled=True,
        idle=20 if case.idle else None,
        interval=10 if case.interval else None,
        count=4 if case.count else None,
        user_timeout=61 if case.user_timeout else None,
    )
    assert sock.calls == []


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_user_timeout_of_zero_is_none(use: Use, case: Case) -> None:
    """0 means that the option is not set."""
    state = use(case).read(FakeSocket(options_of(case, on=False, idle=7200, interval=75, count=9)))
    assert state.user_timeout is None
    assert state.enabled is False


@pytest.mark.parametrize(
    ("raw", "seconds"), [(0, None), (-1, None), (0xFFFFFFFF, None), (1500, 1.5), (-2, 4294967.294)]
)
def test_the_user_timeout_of_windows_is_unsigned(raw: int, seconds: float | None) -> None:
    """TCP_MAXRTMS is a ULONG of milliseconds; all bits set means the system's limit."""
    options = options_of(WINDOWS, on=True, idle=20, interval=10, count=4)
    assert windows.read(FakeSocket({**options, (TCP, 14): raw})).user_timeout == seconds


def test_the_user_timeout_of_mptcp_is_none_and_is_not_set() -> None:
    """MPTCP does not have the option, which is an error only when a policy needs it."""
    options = options_of(LINUX, on=False, idle=7200, interval=75, count=9) | {(SOL, 38): 262}
    del options[TCP, 18]
    sock = FakeSocket(options)
    assert linux.read(sock).user_timeout is None
    linux.write(sock, TIMES)
    assert (TCP, 18) not in [call[:2] for call in sock.calls]
    sock.options[SOL, 38] = TCP
    with pytest.raises(OSError, match=os.strerror(errno.ENOPROTOOPT)):
        linux.read(sock)


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        (LINUX, []),
        (DARWIN, []),
        (WINDOWS, []),
        (FREEBSD, []),
        (NETBSD, ["user_timeout"]),
        (DRAGONFLY, ["user_timeout"]),
        (OPENBSD, ["idle", "interval", "count", "user_timeout"]),
    ],
    ids=repr,
)
def test_missing_names_what_cannot_be_set(use: Use, case: Case, fields: list[str]) -> None:
    """Only fields that are not None."""
    platform = use(case)
    assert platform.missing(ALL) == fields
    assert platform.missing(TIMES) == [field for field in fields if field != "user_timeout"]
    assert platform.missing(SocketState(enabled=True)) == []
    assert platform.missing(SocketState(enabled=False)) == []


@pytest.mark.parametrize(
    ("case", "user_timeout"), [(LINUX, 60.25), (WINDOWS, 60.25), (DARWIN, 61), (FREEBSD, 61)], ids=repr
)
def test_rounded_rounds_up_as_write_does(use: Use, case: Case, user_timeout: float) -> None:
    """It predicts what read returns after write."""
    platform = use(case)
    assert platform.rounded(ALL) == SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=user_timeout)
    assert platform.rounded(TIMES) == TIMES
    assert platform.rounded(SocketState(enabled=False)) == SocketState(enabled=False)
    sock = FakeSocket(options_of(case, on=False, idle=7200, interval=75, count=9))
    platform.write(sock, ALL)
    assert platform.read(sock) == platform.rounded(ALL)


@pytest.mark.parametrize("field", ["idle", "interval", "count", "enabled"])
@pytest.mark.parametrize("case", WITH_TIMES, ids=repr)
def test_write_stops_at_a_refusal_and_names_it(use: Use, case: Case, field: str) -> None:
    """The error has the kernel's error number, the field, the value and the reason."""
    option = case.keepalive if field == "enabled" else getattr(case, field)
    refused = (*option, options_of(case, on=True, idle=20, interval=10, count=4)[option])
    sock = FakeSocket(
        options_of(case, on=False, idle=7200, interval=75, count=9), answers={refused: Refusal(errno.EPERM)}
    )
    value = True if field == "enabled" else refused[2]
    with pytest.raises(
        KeepaliveError, match=f"{field}: the kernel refused {value}: {os.strerror(errno.EPERM)}"
    ) as caught:
        use(case).write(sock, TIMES)
    assert caught.value.errno == errno.EPERM
    assert isinstance(caught.value.__cause__, PermissionError)
    assert sock.calls[-1] == refused


# -- connecting


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("seconds", [8.25, 60, 0.001])
def test_a_timeout_for_connecting_is_rounded_up_to_the_platforms_unit(use: Use, case: Case, seconds: float) -> None:
    """False where the platform has no such option; no other option is set."""
    sock = FakeSocket()
    bounded = use(case).set_user_timeout(sock, seconds)
    if case.connect is None:
        assert not bounded
        assert sock.calls == []
    else:
        whole = seconds * 1000 if case is LINUX else -(-seconds // 1) * case.connect_unit
        assert bounded
        assert sock.calls == [(*case.connect, whole)]


@pytest.mark.parametrize(
    ("case", "bounded", "calls"),
    [
        (LINUX, True, [(TCP, 18, 0)]),  # the same option as the user timeout
        (DARWIN, True, []),
        (WINDOWS, False, []),
        (FREEBSD, True, []),
        (NETBSD, True, []),
        (DRAGONFLY, True, []),
        (OPENBSD, False, []),
    ],
    ids=repr,
)
def test_a_timeout_for_connecting_is_removed(
    use: Use, case: Case, bounded: bool, calls: list[tuple[int, int, int]]
) -> None:
    """On Linux, where it would bound sent data, too; elsewhere nothing has to be done."""
    sock = FakeSocket()
    assert use(case).set_user_timeout(sock, None) is bounded
    assert sock.calls == calls


# -- TCP_INFO


def test_linux_decodes_struct_tcp_info() -> None:
    """With TcpInfo.from_bytes."""
    info = linux.tcp_info(FakeSocket({LINUX.info or (0, 0): b"\x08\0\x02\x03\x04"}))
    assert info == TcpInfo(state=TcpState.CLOSE_WAIT, retransmits=2, probes=3, backoff=4)


# netinet/tcp_fsm.h: 0 to 10
BSD_STATES = [
    TcpState.CLOSE,
    TcpState.LISTEN,
    TcpState.SYN_SENT,
    TcpState.SYN_RECV,
    TcpState.ESTABLISHED,
    TcpState.CLOSE_WAIT,
    TcpState.FIN_WAIT1,
    TcpState.CLOSING,
    TcpState.LAST_ACK,
    TcpState.FIN_WAIT2,
    TcpState.TIME_WAIT,
]


@pytest.mark.parametrize(("number", "state"), list(enumerate(BSD_STATES)))
def test_times_of_macos_are_milliseconds(number: int, state: TcpState) -> None:
    """struct tcp_connection_info of bsd/netinet/tcp.h."""
    # options, flags, rto, maxseg, snd_ssthresh, snd_cwnd, snd_wnd, snd_sbbytes, rcv_wnd, rttcur, srtt, rttvar
    words = (1, 2, 230, 1448, 5, 14480, 65535, 77, 131072, 26, 25, 12)
    data = struct.pack("=4B12I", number, 6, 6, 0, *words) + bytes(60)
    assert darwin.tcp_info(FakeSocket({(TCP, 0x106): data})) == TcpInfo(
        state=state, rto=0.230, rtt=0.025, rttvar=0.012, snd_cwnd=14480, snd_wnd=65535, rcv_wnd=131072
    )


@pytest.mark.parametrize(("number", "state"), list(enumerate(BSD_STATES)))
@pytest.mark.parametrize("case", [FREEBSD, NETBSD], ids=repr)
def test_times_of_the_bsds_are_microseconds(use: Use, case: Case, number: int, state: TcpState) -> None:
    """struct tcp_info of netinet/tcp.h: Linux's offsets, with other units and states."""
    data = bytearray(236)
    data[0] = number
    struct.pack_into("=I", data, 8, 230_000)  # tcpi_rto
    struct.pack_into("=I", data, 52, 1_500_000)  # tcpi_last_data_recv
    struct.pack_into("=2I", data, 68, 25_000, 12_000)  # tcpi_rtt, tcpi_rttvar
    struct.pack_into("=I", data, 80, 14480)  # tcpi_snd_cwnd
    sock = FakeSocket({case.info or (0, 0): bytes(data)})
    assert use(case).tcp_info(sock) == TcpInfo(
        state=state, rto=0.230, last_data_recv=1.5, rtt=0.025, rttvar=0.012, snd_cwnd=14480
    )


@pytest.mark.parametrize("case", [WINDOWS, DRAGONFLY, OPENBSD], ids=repr)
def test_platforms_without_tcp_info_raise_an_error(use: Use, case: Case) -> None:
    """The module and kaio.health raise it, and it names the platform."""
    platform = use(case)
    with pytest.raises(KeepaliveError, match=f"{case.name} has no TCP_INFO") as caught:
        platform.tcp_info(FakeSocket())
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(KeepaliveError, match=f"{case.name} has no TCP_INFO"):
        kaio.health(FakeSocket())


# -- kaio.apply on every platform


@pytest.mark.parametrize("case", WITH_TIMES, ids=repr)
def test_apply_sets_a_policy_and_returns_what_it_read_back(use: Use, case: Case) -> None:
    """On every platform that can set the times of a single socket."""
    use(case)
    sock = FakeSocket(options_of(case, on=False, idle=7200, interval=75, count=9) | {(SOL, 38): TCP})
    assert kaio.apply(sock, "20s:10s:4") == TIMES
    assert kaio.inspect(sock) == TIMES
    assert sock.options == options_of(case, on=True, idle=20, interval=10, count=4) | {(SOL, 38): TCP}


@pytest.mark.parametrize("case", [LINUX, DARWIN, WINDOWS, FREEBSD], ids=repr)
def test_apply_sets_the_user_timeout_for_stalled_drop(use: Use, case: Case) -> None:
    """Rounded up to the platform's unit."""
    use(case)
    sock = FakeSocket(options_of(case, on=False, idle=7200, interval=75, count=9) | {(SOL, 38): TCP})
    state = kaio.apply(sock, Keepalive(user_timeout=60.25, stalled="drop"))
    assert state.user_timeout == (61 if case in (DARWIN, FREEBSD) else 60.25)


@pytest.mark.parametrize(
    ("case", "policy", "fields"),
    [
        (OPENBSD, Keepalive(), "idle, interval, count"),
        (OPENBSD, Keepalive(stalled="drop"), "idle, interval, count, user_timeout"),
        (NETBSD, Keepalive(stalled="drop"), "user_timeout"),
        (DRAGONFLY, Keepalive(stalled="drop"), "user_timeout"),
    ],
    ids=str,
)
def test_apply_refuses_missing_options_before_it_sets_others(
    use: Use, case: Case, policy: Keepalive, fields: str
) -> None:
    """The error names the platform and every field."""
    use(case)
    sock = FakeSocket(options_of(case, on=False, idle=7200, interval=75, count=9))
    with pytest.raises(KeepaliveError, match=f"{case.name} cannot set {fields} for a single socket") as caught:
        kaio.apply(sock, policy)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert sock.calls == []


@pytest.mark.parametrize(("policy", "value"), [("on", 1), ("off", 0)])
def test_keepalive_can_be_on_or_off_where_times_cannot_be_set(use: Use, policy: str, value: int) -> None:
    """OpenBSD, where the times are the system's."""
    use(OPENBSD)
    sock = FakeSocket({OPENBSD.keepalive: 1 - value})
    assert kaio.apply(sock, policy) == SocketState(enabled=bool(value))
    assert sock.calls == [(*OPENBSD.keepalive, value)]


@pytest.mark.parametrize("field", ["idle", "interval", "count", "user_timeout", "enabled"])
@pytest.mark.parametrize("case", [LINUX, DARWIN, WINDOWS, FREEBSD], ids=repr)
@pytest.mark.parametrize("answer", [Refusal(errno.EINVAL), 6], ids=["refuses", "disagrees"])
def test_apply_restores_the_previous_options(use: Use, case: Case, field: str, answer: int | Refusal) -> None:
    """When the kernel refuses an option, and when it reports another value afterwards."""
    if field == "enabled" and not isinstance(answer, Refusal):
        answer = 0
    use(case)
    wanted = options_of(case, on=True, idle=20, interval=10, count=4, user_timeout=90)
    option = case.keepalive if field == "enabled" else getattr(case, field)
    before = options_of(case, on=False, idle=7000, interval=70, count=7, user_timeout=7) | {(SOL, 38): TCP}
    sock = FakeSocket(before, answers={(*option, wanted[option]): answer})
    with pytest.raises(KeepaliveError, match=f"socket with descriptor 7: {field}: ") as caught:
        kaio.apply(sock, Keepalive(user_timeout=90, stalled="drop"))
    assert caught.value.errno == errno.EINVAL
    assert isinstance(caught.value.__cause__, OSError)
    assert sock.options == before
    assert sock.calls != []


def test_the_error_for_another_value_names_both(use: Use) -> None:
    """The value that was set, and the value that the kernel reports."""
    use(LINUX)
    before = options_of(LINUX, on=False, idle=7200, interval=75, count=9) | {(SOL, 38): TCP}
    sock = FakeSocket(before, answers={(TCP, 5, 10): 75})
    with pytest.raises(KeepaliveError, match=r"interval: set to 10, but the kernel reports 75"):
        kaio.apply(sock, "20s:10s:4")


def test_a_user_timeout_that_windows_cannot_remove_is_an_error(use: Use) -> None:
    """apply notices when it reads back, and restores the other options."""
    use(WINDOWS)
    before = options_of(WINDOWS, on=False, idle=7200, interval=75, count=9, user_timeout=60)
    sock = FakeSocket(before)
    with pytest.raises(KeepaliveError, match=r"user_timeout: set to None, but the kernel reports 60\.0"):
        kaio.apply(sock, "20s:10s:4")
    assert sock.options == before


def test_options_that_cannot_be_restored_are_logged(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    """The exception is that of the policy; a warning tells that the socket is changed."""
    use(LINUX)
    before = options_of(LINUX, on=False, idle=7200, interval=75, count=9) | {(SOL, 38): TCP}
    sock = FakeSocket(before, answers={(TCP, 5, 10): Refusal(errno.EINVAL), (TCP, 4, 7200): Refusal(errno.EPERM)})
    with (
        caplog.at_level(logging.WARNING, "kaio"),
        pytest.raises(KeepaliveError, match="interval: the kernel refused 10"),
    ):
        kaio.apply(sock, "20s:10s:4")
    (record,) = caplog.records
    assert "cannot restore the previous keepalive options (off)" in record.getMessage()
    assert "idle: the kernel refused 7200" in record.getMessage()


@pytest.mark.parametrize("gone", [errno.EBADF, errno.ENOTSOCK], ids=errno.errorcode.get)
def test_a_socket_that_was_closed_meanwhile_is_not_restored(
    use: Use, caplog: pytest.LogCaptureFixture, gone: int
) -> None:
    """A sweep sets sockets of other libraries, which may close them at any time: an error, but no warning."""
    use(LINUX)
    before = options_of(LINUX, on=False, idle=7200, interval=75, count=9) | {(SOL, 38): TCP}
    closed = Refusal(gone)
    sock = FakeSocket(before, answers={(TCP, 5, 10): closed, (TCP, 5, 75): closed, (TCP, 4, 7200): closed})
    with pytest.raises(KeepaliveError, match="interval"):
        kaio.apply(sock, "20s:10s:4")
    assert not caplog.records


def test_an_option_that_is_always_refused_does_not_prevent_restoring_the_others(
    use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a sandbox that forbids one option: the refused one was never changed."""
    use(LINUX)
    before = options_of(LINUX, on=False, idle=7200, interval=75, count=9) | {(SOL, 38): TCP}
    forbidden = Refusal(errno.EPERM)
    sock = FakeSocket(before, answers={(TCP, 5, 10): forbidden, (TCP, 5, 75): forbidden})
    with pytest.raises(KeepaliveError, match="interval: the kernel refused 10"):
        kaio.apply(sock, "20s:10s:4")
    assert sock.options == before
    assert "cannot restore" not in caplog.text


@pytest.mark.parametrize("case", CASES[1:], ids=repr)
def test_an_option_that_cannot_be_read_is_a_keepalive_error(use: Use, case: Case) -> None:
    """As on Windows before 1709, which does not have the options: nothing is set."""
    use(case)
    sock = FakeSocket()
    for ask in (kaio.apply, kaio.inspect):
        with pytest.raises(
            KeepaliveError, match=f"socket with descriptor 7: {os.strerror(errno.ENOPROTOOPT)}"
        ) as caught:
            ask(sock)
        assert caught.value.errno == errno.ENOPROTOOPT
    assert sock.calls == []
