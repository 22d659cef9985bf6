"""The tree of exceptions, and nothing else.

    KaioError
    ├── PolicyError(ValueError)          a policy that cannot be: names the field, the value and the limit
    ├── AddressError(ValueError)         an address that cannot be: names the address and what is wrong with it
    ├── KeepaliveError(OSError)          the socket cannot have the policy, or the kernel disagrees
    ├── DeadPeerError(ConnectionError)   the peer no longer answers; says why, and since when
    └── ResetError(ConnectionResetError) a stream's peer, alive, has thrown the connection away

Rules kept here: the last two are also `anyio.BrokenResourceError`, so that code written for anyio's streams catches
them. No error of kaio's is a `TimeoutError`: a handler's own `except TimeoutError` never takes a dead peer for its
own deadline.
"""

from __future__ import annotations

import enum
import math
import os
import weakref
from collections.abc import Callable
from errno import ETIMEDOUT
from typing import TYPE_CHECKING, Any

from anyio import BrokenResourceError

if TYPE_CHECKING:
    from .kernel.tcpinfo import TcpInfo
    from .policy import Keepalive

__all__ = [
    "AddressError",
    "Cause",
    "DeadPeerError",
    "KaioError",
    "KeepaliveError",
    "PolicyError",
    "ResetError",
]


class KaioError(Exception):
    """What every error that kaio itself raises has in common."""


class PolicyError(KaioError, ValueError):
    """A keepalive policy that cannot be; raised before anything was changed.

    `field` is the name of the argument, `value` what was given, `limit` what would be accepted.
    """

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(field, value, limit)
        self.field = field
        self.value = value
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.field}={self.value!r}: {self.limit}"


class AddressError(KaioError, ValueError):
    """An address to connect to or to listen on that cannot be; `address` is what was given."""

    def __init__(self, address: object, problem: str) -> None:
        super().__init__(address, problem)
        self.address = address
        self.problem = problem

    def __str__(self) -> str:
        return f"address {self.address!r}: {self.problem}"


class KeepaliveError(KaioError, OSError):
    """A socket that cannot have a policy, or that has something else than was asked for.

    `errno` is the kernel's where it refused; the message names the socket, the option and both values. Whatever had
    been changed before the refusal was put back.
    """


class Cause(enum.StrEnum):
    """Which of the kernel's ways of waiting for the peer ran out."""

    KEEPALIVE = "keepalive"
    """Idle, and no keepalive probe was answered (tcp(7): TCP_KEEPCNT)."""
    UNACKNOWLEDGED = "unacknowledged"
    """Sent data was not acknowledged in time (RFC 9293 3.8.3; tcp(7): TCP_USER_TIMEOUT, tcp_retries2)."""
    ZERO_WINDOW = "zero window"
    """The peer's window was shut and no window probe was answered (RFC 9293 3.8.6.1)."""
    UNREACHABLE = "unreachable"
    """There was no way to the peer: the network said so (ICMP, ARP), or data could not leave this host."""
    CONNECTING = "connecting"
    """The peer never answered the handshake."""


class DeadPeerError(KaioError, ConnectionError, BrokenResourceError):
    """The peer of a TCP connection no longer answers. It is a `ConnectionError`, and not a `TimeoutError`.

    `__cause__` is the `OSError` that the kernel gave, `errno` its number: ETIMEDOUT; or, with the cause UNREACHABLE,
    what a router or this host had said last (EHOSTUNREACH, ENETUNREACH; EINVAL, EACCES, EPERM from this host's own
    routes and filters; and others).
    """

    cause: Cause
    """Which of the kernel's clocks ran out."""
    silence: float
    """Seconds since the last segment was heard from the peer; while connecting, since the attempt began; NaN where the
    platform does not tell."""
    peername: Any
    """The peer's address as the transport gives it, or None."""
    policy: Keepalive | None
    """The policy under which the connection was watched."""
    info: TcpInfo | None
    """The kernel's TCP_INFO at the end, where it could still be read."""
    this_host: bool
    """Whether it was this host that had no way to the peer: its link, route, address or packet filter."""

    def __init__(
        self,
        cause: Cause,
        errno: int,
        *,
        silence: float,
        peername: object = None,
        policy: Keepalive | None = None,
        info: TcpInfo | None = None,
        this_host: bool = False,
    ) -> None:
        where = "peer" if peername is None else f"peer {format_address(peername)}"
        what = f"no way from this host to {where}" if this_host else f"{where} is dead"
        details = [os.strerror(errno)] if this_host and errno != ETIMEDOUT else []
        if not math.isnan(silence) and not (this_host and info is None):  # nothing was sent that could be answered
            details.append(f"silent for {silence:.1f} s")
        super().__init__(errno, f"{what} ({cause.value})" + (f": {', '.join(details)}" if details else ""))
        self.cause = cause
        self.silence = silence
        self.peername = peername
        self.policy = policy
        self.info = info
        self.this_host = this_host

    def __reduce__(self) -> tuple[Callable[..., DeadPeerError], tuple[object, ...]]:
        return _rebuild, (self.cause, self.errno, self.silence, self.peername, self.policy, self.info, self.this_host)

    def __str__(self) -> str:
        return str(self.strerror)


def _rebuild(
    cause: Cause,
    errno: int,
    silence: float,
    peername: object,
    policy: Keepalive | None,
    info: TcpInfo | None,
    this_host: bool = False,
) -> DeadPeerError:
    return DeadPeerError(
        cause, errno, silence=silence, peername=peername, policy=policy, info=info, this_host=this_host
    )


class ResetError(KaioError, ConnectionResetError, BrokenResourceError):
    """The peer of a `Connection` reset it or went away while data was under way: it is alive, the connection is not."""


class RememberedError:
    """A `DeadPeerError` that is one object for as long as anybody has it.

    What raised it holds its traceback, which holds frames, which hold the connection: were the connection to hold the
    error, nothing of it would go away without the garbage collector.
    """

    __slots__ = ("_arguments", "_cause", "_error", "_make")

    def __init__(self, error: DeadPeerError) -> None:
        self._make, self._arguments = error.__reduce__()
        self._cause = error.__cause__
        self._take(error)

    def _take(self, error: DeadPeerError) -> None:
        self._error = weakref.ref(error)
        _remembered[error] = self  # for all who remember it

    def __call__(self) -> DeadPeerError:
        error = self._error()
        if error is None:
            error = self._make(*self._arguments)
            error.__cause__ = self._cause
            self._take(error)
        return error


_remembered: weakref.WeakKeyDictionary[DeadPeerError, RememberedError] = weakref.WeakKeyDictionary()


def remember(exc: BaseException | None) -> Any:
    """What a connection keeps of what ended it, for `as_stream_error`."""
    return _remembered.get(exc) or RememberedError(exc) if isinstance(exc, DeadPeerError) else exc


def as_stream_error(exc: RememberedError | BaseException | None) -> BaseException | None:
    """What connection_lost comes with, as a stream raises it: anyio's BrokenResourceError, in the kind that fits.

    Takes what `remember` gives, too. A `DeadPeerError` is always the same one; all else is made anew.
    """
    if isinstance(exc, RememberedError):
        return exc()
    if exc is None or isinstance(exc, DeadPeerError):
        return exc
    error: BaseException
    if isinstance(exc, ConnectionError):
        error = ResetError(exc.errno, exc.strerror or str(exc))
    else:
        error = BrokenResourceError(str(exc))
    error.__cause__ = exc
    return error


def format_address(address: object) -> str:
    """A socket address the way people write it: 192.0.2.1:80, [2001:db8::1]:80, unix:/run/x.sock."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[0], address[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    if isinstance(address, (str, bytes)):
        path = address.decode("utf-8", "replace") if isinstance(address, bytes) else address
        return f"unix:{path}" if path else "unix:"
    return str(address)


def os_error(number: int) -> OSError:
    """The `OSError` of an error number, with the system's text for it; ETIMEDOUT gives a TimeoutError, and so on."""
    return OSError(number, os.strerror(number))
