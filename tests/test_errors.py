"""The tree of exceptions: what each of them is, is not, and keeps."""

from __future__ import annotations

import copy
import errno
import pickle
from collections.abc import Callable
from typing import Any

import anyio
import pytest

import kaio
from kaio import AddressError, Cause, DeadPeerError, KaioError, Keepalive, KeepaliveError, PolicyError, ResetError
from kaio import errors as errors_module
from kaio.errors import format_address

TREE: dict[type[Exception], set[type[Exception]]] = {
    KaioError: set(),
    PolicyError: {KaioError, ValueError},
    AddressError: {KaioError, ValueError},
    KeepaliveError: {KaioError, OSError},
    DeadPeerError: {KaioError, OSError, ConnectionError, anyio.BrokenResourceError},
    ResetError: {KaioError, OSError, ConnectionError, ConnectionResetError, anyio.BrokenResourceError},
}
ASKED: set[type[Exception]] = {
    KaioError,
    ValueError,
    OSError,
    ConnectionError,
    ConnectionResetError,
    ConnectionAbortedError,
    BrokenPipeError,
    TimeoutError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
}


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_errors_are_caught_as_what_they_are_and_as_nothing_else(error: type[Exception]) -> None:
    """Each error has its parents, and none of them is a TimeoutError."""
    assert {parent for parent in ASKED if issubclass(error, parent)} - {error} == TREE[error]
    assert not issubclass(error, TimeoutError)


def test_every_error_of_the_module_is_in_the_tree() -> None:
    """An error that is added gets its line above."""
    public: list[type] = [getattr(errors_module, name) for name in errors_module.__all__]
    assert {each for each in public if issubclass(each, Exception)} == set(TREE)


SAMPLE = kaio.TcpInfo(state=kaio.TcpState.CLOSE, probes=4, last_ack_recv=60.012)
DEAD = DeadPeerError(
    Cause.KEEPALIVE,
    errno.ETIMEDOUT,
    silence=60.012,
    peername=("192.0.2.1", 80),
    policy=Keepalive(user_timeout=90),
    info=SAMPLE,
)
BARE = DeadPeerError(Cause.CONNECTING, errno.EHOSTUNREACH, silence=3)


def test_a_dead_peer_is_reported_with_its_circumstances() -> None:
    """Cause, number, silence, peer, policy and the kernel's last word."""
    assert DEAD.cause is Cause.KEEPALIVE
    assert DEAD.errno == errno.ETIMEDOUT
    assert DEAD.silence == 60.012
    assert DEAD.peername == ("192.0.2.1", 80)
    assert DEAD.policy == Keepalive(user_timeout=90)
    assert DEAD.info is SAMPLE
    assert (BARE.peername, BARE.policy, BARE.info) == (None, None, None)


def test_a_timeout_of_the_kernels_is_not_one_of_the_applications() -> None:
    """OSError(ETIMEDOUT) would be a TimeoutError; a dead peer is a ConnectionError with that number."""
    assert isinstance(OSError(errno.ETIMEDOUT, ""), TimeoutError)
    assert not isinstance(DEAD, TimeoutError)
    assert not isinstance(KeepaliveError(errno.ETIMEDOUT, ""), TimeoutError)


@pytest.mark.parametrize("error", [DEAD, BARE], ids=["full", "bare"])
@pytest.mark.parametrize(
    "duplicate",
    [
        *[lambda error, n=n: pickle.loads(pickle.dumps(error, n)) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)],
        copy.copy,
        copy.deepcopy,
    ],
)
def test_copies_of_a_dead_peer_error_keep_every_field(
    error: DeadPeerError, duplicate: Callable[[DeadPeerError], DeadPeerError]
) -> None:
    """It can go to another process, as multiprocessing and loggers do with errors."""
    other = duplicate(error)
    assert type(other) is DeadPeerError
    for field in ("cause", "errno", "strerror", "silence", "peername", "policy", "info", "args"):
        assert getattr(other, field) == getattr(error, field)
    assert str(other) == str(error)
    assert other.cause is error.cause


@pytest.mark.parametrize(
    "error",
    [
        PolicyError("idle", 0, "must be above 0"),
        AddressError("x", "has no port"),
        KeepaliveError(errno.EBADF, "the socket is closed"),
        ResetError(errno.ECONNRESET, "reset"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_copies_of_the_other_errors_say_the_same(error: Exception, duplicate: Callable[[Exception], Any]) -> None:
    """Type, arguments, fields and text stay."""
    other = duplicate(error)
    assert type(other) is type(error)
    assert other.args == error.args
    assert vars(other) == vars(error)
    assert str(other) == str(error)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PolicyError("count", 200, "must be from 1 to 127"), "count=200: must be from 1 to 127"),
        (PolicyError("idle", "２０s", "must be a time"), "idle='２０s': must be a time"),
        (AddressError("localhost", "has no port"), "address 'localhost': has no port"),
        (KeepaliveError(errno.EBADF, "the socket is closed"), f"[Errno {errno.EBADF}] the socket is closed"),
        (DEAD, "peer 192.0.2.1:80 is dead (keepalive): silent for 60.0 s"),
        (BARE, "peer is dead (connecting): silent for 3.0 s"),
        (
            DeadPeerError(Cause.ZERO_WINDOW, errno.ETIMEDOUT, silence=59.96, peername=("::1", 80, 0, 0)),
            "peer [::1]:80 is dead (zero window): silent for 60.0 s",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_say_what_happened(error: Exception, text: str) -> None:
    """One line for the log."""
    assert str(error) == text


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (Cause.KEEPALIVE, "keepalive"),
        (Cause.UNACKNOWLEDGED, "unacknowledged"),
        (Cause.ZERO_WINDOW, "zero window"),
        (Cause.UNREACHABLE, "unreachable"),
        (Cause.CONNECTING, "connecting"),
    ],
)
def test_causes_are_words(cause: Cause, text: str) -> None:
    """For messages and for metrics' labels."""
    assert str(cause) == cause.value == text


def test_there_are_five_causes() -> None:
    """Code that matches on them can be complete."""
    assert len(Cause) == 5


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("192.0.2.1", 80), "192.0.2.1:80"),
        (("2001:db8::1", 443, 0, 0), "[2001:db8::1]:443"),
        (("fe80::1%eth0", 80, 0, 2), "[fe80::1%eth0]:80"),
        ("/run/app.sock", "unix:/run/app.sock"),
        (b"\0abstract", "unix:\0abstract"),
        (b"/run/\xff", "unix:/run/\ufffd"),
        ("", "unix:"),
        (None, "None"),
        (7, "7"),
    ],
)
def test_addresses_in_messages_are_as_people_write_them(address: object, text: str) -> None:
    """Brackets around IPv6, unix: before a path, and no error for anything else."""
    assert format_address(address) == text
