"""The policy as the options of other libraries: the numbers of each platform, and what the kernel makes of them."""

from __future__ import annotations

import socket
import sys

import pytest

import kaio
from kaio import Keepalive, KeepaliveError
from kaio.kernel.options import bsd

from .test_platforms import CASES, LINUX, OPENBSD, WITH_TIMES, Case, FakeSocket, options_of

POLICIES = [
    Keepalive(),
    Keepalive.detect(within=9),
    Keepalive.hold(against=350),
    Keepalive(1, 1, 2, stalled="drop"),
    Keepalive(20, 10, 4, user_timeout=60.001),
    Keepalive(20, 10, 4, user_timeout=None),
    Keepalive(user_timeout=98.41),  # 98410.00000000001 ms as a float
    Keepalive(32767, 32767, 127),  # whose detection time is more than a user timeout may be
]
SYSTEMS = {"Linux": "linux", "macOS": "darwin", "Windows": "win32", "OpenBSD": "openbsd7"}


@pytest.fixture(params=CASES, ids=repr)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Each platform in turn."""
    case: Case = request.param
    monkeypatch.setattr(sys, "platform", SYSTEMS.get(case.name, case.system))
    if case.system is not None:
        monkeypatch.setattr(bsd, "_HERE", bsd._SYSTEMS[case.system])
    return case


def written(case: Case, policy: Keepalive) -> dict[tuple[int, int], int]:
    """What kaio's own file for a platform sets for a policy whose user timeout the kernel enforces."""
    sock = FakeSocket(options_of(case, on=False, idle=7200, interval=75, count=9))
    bound = policy.effective_user_timeout
    state = kaio.SocketState(
        enabled=True,
        idle=policy.idle,
        interval=policy.interval,
        count=policy.count,
        user_timeout=None if bound is None else min(bound, 2147483.647),
    )
    case.module.write(sock, state)
    return {(level, option): value for level, option, value in sock.calls if value or option != 0x80}


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_options_are_those_that_kaio_sets_itself(case: Case, policy: Keepalive) -> None:
    """On each platform, in its units; SO_KEEPALIVE last."""
    if case not in WITH_TIMES or (case.user_timeout is None and policy.stalled == "drop"):
        with pytest.raises(KeepaliveError, match=r"cannot set (idle|user_timeout) for a single socket"):
            policy.socket_options()
        return
    options = policy.socket_options()
    assert {(level, option): value for level, option, value in options} == written(case, policy)
    assert options[-1][:2] == case.keepalive
    assert policy.redis()["socket_keepalive_options"] == {option: value for _, option, value in options[:-1]}


def test_off_and_system_need_no_times(case: Case) -> None:
    """They can be had on each platform, OpenBSD too."""
    assert Keepalive.OFF.socket_options() == [(*case.keepalive, 0)]
    assert Keepalive.SYSTEM.socket_options() == [(*case.keepalive, 1)]
    assert Keepalive.OFF.redis() == {"socket_keepalive": False}
    assert Keepalive.SYSTEM.redis() == {"socket_keepalive": True, "socket_keepalive_options": {}}


def test_what_a_platform_cannot_set_is_named(case: Case) -> None:
    """Never silence."""
    if case is OPENBSD:
        with pytest.raises(KeepaliveError, match=r"openbsd7 cannot set idle for a single socket.*20s:10s:4"):
            Keepalive().socket_factory((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("", 0)))


def test_what_is_left_to_the_system_is_left_out() -> None:
    """nginx's empty fields."""
    policy = Keepalive.parse("30m::10")
    assert policy.socket_options() == [(6, 4, 1800), (6, 6, 10), (socket.SOL_SOCKET, LINUX.keepalive[1], 1)]
    assert policy.libpq() == {"keepalives": 1, "keepalives_idle": 1800, "keepalives_count": 10}


def test_libpq_has_milliseconds() -> None:
    """Its tcp_user_timeout; the rest are seconds."""
    assert Keepalive(20, 10, 4, user_timeout=60.001).libpq() == {
        "keepalives": 1,
        "keepalives_idle": 20,
        "keepalives_interval": 10,
        "keepalives_count": 4,
        "tcp_user_timeout": 60001,
    }
    assert Keepalive.OFF.libpq() == {"keepalives": 0}
    assert Keepalive.SYSTEM.libpq() == {"keepalives": 1}


@pytest.mark.parametrize("policy", [*POLICIES[:-1], Keepalive.OFF, Keepalive.SYSTEM], ids=str)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=lambda family: family.name)
def test_socket_factory_makes_a_socket_with_the_policy(policy: Keepalive, family: int) -> None:
    """As the kernel has it afterwards."""
    with policy.socket_factory((family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("", 0))) as sock:
        state = kaio.inspect(sock)
    assert state.enabled is policy.enabled
    if policy.idle is not None:
        assert state.times == (policy.idle, policy.interval, policy.count)
    assert state.user_timeout == (policy.effective_user_timeout if policy.enabled else None)


def test_socket_factory_leaves_other_families_alone() -> None:
    """A Unix socket has no keepalive."""
    with Keepalive().socket_factory((socket.AF_UNIX, socket.SOCK_STREAM, 0, "", "/run/x.sock")) as sock:
        assert sock.family == socket.AF_UNIX
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_an_option_that_did_not_take_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses it, or says that it has another value; the socket is closed (else: ResourceWarning)."""
    info = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("", 0))
    monkeypatch.setattr("kaio.policy.libraries.socket_options", lambda _: [(6, 4, 40_000)])
    with pytest.raises(KeepaliveError, match="option 4 of level 6: 40000: Invalid argument"):
        Keepalive().socket_factory(info)
    monkeypatch.setattr("kaio.policy.libraries.socket_options", lambda _: [(socket.SOL_SOCKET, socket.SO_RCVBUF, 5000)])
    with pytest.raises(KeepaliveError, match="set to 5000, but it is 10000"):
        Keepalive().socket_factory(info)
