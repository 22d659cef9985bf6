"""The exceptions: their base classes, fields, messages and copies."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from collections.abc import Callable
from typing import Any

import anyio
import pytest

import kaio
from kaio import (
    AddressError,
    Cause,
    ConnectionEnded,
    DeadPeerError,
    KaioError,
    Keepalive,
    KeepaliveError,
    PolicyError,
    ResetError,
)
from kaio import errors as errors_module
from kaio.errors import format_address, os_error

ENDED: set[type[Exception]] = {KaioError, ConnectionEnded}
TREE: dict[type[Exception], set[type[Exception]]] = {
    KaioError: set(),
    PolicyError: {KaioError, ValueError},
    AddressError: {KaioError, ValueError},
    KeepaliveError: {KaioError, OSError},
    ConnectionEnded: {KaioError},
    DeadPeerError: {*ENDED, OSError, ConnectionError, anyio.BrokenResourceError},
    ResetError: {*ENDED, OSError, ConnectionError, ConnectionResetError, anyio.BrokenResourceError},
    kaio.IdleTimeoutError: {*ENDED, OSError, ConnectionError, ConnectionAbortedError, anyio.BrokenResourceError},
    kaio.SendTimeoutError: {*ENDED, OSError, ConnectionError, ConnectionAbortedError, anyio.BrokenResourceError},
    kaio.ContentTimeoutError: {*ENDED, OSError, ConnectionError, ConnectionAbortedError, anyio.BrokenResourceError},
    kaio.BrokenResourceError: {*ENDED, anyio.BrokenResourceError},
    kaio.EndOfStream: {*ENDED, anyio.EndOfStream},
    kaio.IncompleteRead: {*ENDED, anyio.IncompleteRead},
    kaio.ClosedResourceError: {*ENDED, anyio.ClosedResourceError},
}
ASKED: set[type[Exception]] = {
    KaioError,
    ConnectionEnded,
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
    anyio.IncompleteRead,
}


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_exceptions_have_these_base_classes_and_no_others(error: type[Exception]) -> None:
    """No exception is a TimeoutError."""
    assert {parent for parent in ASKED if issubclass(error, parent)} - {error} == TREE[error]
    assert not issubclass(error, TimeoutError)


def test_every_public_exception_is_in_the_tree() -> None:
    """A new exception needs a line in TREE."""
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


def test_a_dead_peer_error_has_its_fields() -> None:
    """Cause, error number, silence, address, policy and TCP_INFO."""
    assert DEAD.cause is Cause.KEEPALIVE
    assert DEAD.errno == errno.ETIMEDOUT
    assert DEAD.silence == 60.012
    assert DEAD.peername == ("192.0.2.1", 80)
    assert DEAD.policy == Keepalive(user_timeout=90)
    assert DEAD.info is SAMPLE
    assert (BARE.peername, BARE.policy, BARE.info) == (None, None, None)


def test_a_dead_peer_error_with_etimedout_is_not_a_timeout_error() -> None:
    """OSError(ETIMEDOUT) is a TimeoutError; a dead peer is a ConnectionError with the same error number."""
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
    """It can be sent to another process, as multiprocessing and logging handlers do."""
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
        kaio.BrokenResourceError("TLS"),
        kaio.EndOfStream(),
        kaio.IncompleteRead(),
        kaio.ClosedResourceError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("duplicate", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_copies_of_the_other_exceptions_are_equal(error: Exception, duplicate: Callable[[Exception], Any]) -> None:
    """In type, arguments, fields and text."""
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
def test_messages_of_the_exceptions(error: Exception, text: str) -> None:
    """Each message is one line."""
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
def test_causes_are_strings(cause: Cause, text: str) -> None:
    """They appear in messages and as labels of metrics."""
    assert str(cause) == cause.value == text


def test_there_are_five_causes() -> None:
    """A new cause would break code that handles each of them."""
    assert len(Cause) == 6


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
def test_addresses_in_messages(address: object, text: str) -> None:
    """IPv6 in brackets, unix: before a path, and str() of anything else."""
    assert format_address(address) == text


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ETIMEDOUT, TimeoutError), (errno.ECONNRESET, ConnectionResetError), (errno.EHOSTUNREACH, OSError)],
)
def test_os_error_makes_the_exception_of_an_error_number(number: int, kind: type[OSError]) -> None:
    """Of the class that the kernel's own errors have in Python, with the system's text."""
    error = os_error(number)
    assert type(error) is kind
    assert (error.errno, error.strerror) == (number, os.strerror(number))
