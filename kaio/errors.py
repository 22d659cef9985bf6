"""The exceptions of kaio, and what it takes to make, keep and print them.

    KaioError
    ├── PolicyError(ValueError)    invalid policy: has the field, the value and the limit
    ├── AddressError(ValueError)   invalid address: has the address and the problem
    ├── KeepaliveError(OSError)    the options of a socket could not be set or read
    └── ConnectionEnded            what every end of a connection has in common
        ├── DeadPeerError(ConnectionError)             the peer no longer answers: has the cause and the silence
        ├── ResetError(ConnectionResetError)           the peer is alive and has reset or closed the connection
        ├── IdleTimeoutError(ConnectionAbortedError)   nothing was received for as long as this side allows
        ├── SendTimeoutError(ConnectionAbortedError)   nothing was acknowledged for as long as this side allows
        ├── ContentTimeoutError(ConnectionAbortedError)  no content was received for as long as this side allows
        ├── BrokenResourceError(anyio.BrokenResourceError)   another error has ended it: the __cause__
        ├── EndOfStream(anyio.EndOfStream)                   the peer has sent EOF
        ├── IncompleteRead(anyio.IncompleteRead)             it has sent EOF before what was waited for
        └── ClosedResourceError(anyio.ClosedResourceError)   this side has closed it

Rules kept here: the first six of those are also `anyio.BrokenResourceError`, so that code written for anyio's streams
catches them all. No exception of kaio is a `TimeoutError`: an `except TimeoutError` around an application's own timeout
does not catch a dead peer.

`remember` and `as_stream_error` keep the exception that ended a connection and give it to each caller of a stream.
`format_address` writes an address in a message, `os_error` makes the exception of an error number.
"""

from __future__ import annotations

import enum
import math
import os
import weakref
from collections.abc import Callable
from errno import ECONNABORTED, ETIMEDOUT
from typing import TYPE_CHECKING, Any, Final

import anyio

if TYPE_CHECKING:
    from .kernel.tcpinfo import TcpInfo
    from .policy import Keepalive

__all__ = [
    "AddressError",
    "BrokenResourceError",
    "Cause",
    "ClosedResourceError",
    "ConnectionEnded",
    "ContentTimeoutError",
    "DeadPeerError",
    "EndOfStream",
    "IdleTimeoutError",
    "IncompleteRead",
    "KaioError",
    "KeepaliveError",
    "PolicyError",
    "ResetError",
    "SendTimeoutError",
]


class KaioError(Exception):
    """Base class of all exceptions that kaio defines."""


class PolicyError(KaioError, ValueError):
    """An invalid keepalive policy. Raised before any socket is changed.

    `field` is the name of the argument, `value` the value given, `limit` the condition that it does not meet.
    """

    def __init__(self, field: str, value: object, limit: str) -> None:
        super().__init__(field, value, limit)
        self.field = field
        self.value = value
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.field}={self.value!r}: {self.limit}"


class AddressError(KaioError, ValueError):
    """An invalid address to connect to or to listen on.

    `address` is the value given, `problem` says what is wrong with it.
    """

    def __init__(self, address: object, problem: str) -> None:
        super().__init__(address, problem)
        self.address = address
        self.problem = problem

    def __str__(self) -> str:
        return f"address {self.address!r}: {self.problem}"


class KeepaliveError(KaioError, OSError):
    """The keepalive options or the TCP_INFO of a socket could not be set or read.

    The kernel refused an option (`errno` is its error number), reports another value than was set (EINVAL), or the
    socket is not TCP (EOPNOTSUPP, ENOTSOCK) or closed (EBADF). The message names the socket, the field and the values.
    Options that were already set have been restored.
    """


class ConnectionEnded(KaioError):  # noqa: N818 - an end is often no error
    """The connection has ended, in whatever way, or cannot give what was waited for because its end has been reached.

    What a `Connection` raises then is always a kind of this: the peer is dead or has reset or closed the connection, a
    time limit has passed, or this side has closed it.
    """


class Cause(enum.StrEnum):
    """The reason why a peer is considered dead."""

    KEEPALIVE = "keepalive"
    """The connection was idle and no keepalive probe was answered (tcp(7): TCP_KEEPCNT)."""
    UNACKNOWLEDGED = "unacknowledged"
    """Sent data was not acknowledged in time (RFC 9293 3.8.3; tcp(7): TCP_USER_TIMEOUT, tcp_retries2)."""
    ZERO_WINDOW = "zero window"
    """The peer's receive window was zero and no window probe was answered (RFC 9293 3.8.6.1)."""
    UNREACHABLE = "unreachable"
    """The network reported the peer unreachable (ICMP, ARP), or data could not leave this host."""
    CONNECTING = "connecting"
    """The peer did not answer the SYN."""
    HEARTBEAT = "heartbeat"
    """The far application gave no sign of life (`Heartbeat`); its host, or a proxy before it, may answer probes."""


class DeadPeerError(ConnectionEnded, ConnectionError, anyio.BrokenResourceError):
    """The peer of a TCP connection no longer answers. It is a `ConnectionError`, and not a `TimeoutError`.

    `__cause__` is the kernel's `OSError`, and `errno` its error number: ETIMEDOUT; or, with the cause UNREACHABLE, the
    last error from a router (EHOSTUNREACH, ENETUNREACH and others) or from this host's own routes and packet filter
    (EINVAL, EACCES, EPERM).
    """

    cause: Cause
    """Why the peer is considered dead."""
    silence: float
    """Seconds since the last segment was received from the peer; while connecting, since the attempt began; NaN where
    the platform does not report it."""
    peername: Any
    """The peer's address, as `transport.get_extra_info("peername")` returns it, or None."""
    policy: Keepalive | None
    """The policy under which the connection was watched."""
    info: TcpInfo | None
    """TCP_INFO at the time of the verdict, or None where it could no longer be read."""
    this_host: bool
    """Whether the cause lies on this host: its link, route, address or packet filter."""

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
        what = f"this host cannot reach {where}" if this_host else f"{where} is dead"
        details = [os.strerror(errno)] if this_host and errno != ETIMEDOUT else []
        if not math.isnan(silence) and not (this_host and info is None):  # else nothing left that could be answered
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


class ResetError(ConnectionEnded, ConnectionResetError, anyio.BrokenResourceError):
    """The peer of a `Connection` reset it, or closed it while data was in flight. The peer is alive."""


class _TimeLimitError(ConnectionEnded, ConnectionAbortedError, anyio.BrokenResourceError):
    """A time limit of this side's has ended a connection: a `ConnectionError`, and not a `TimeoutError`."""

    timeout: float
    """The time limit in seconds."""
    peername: Any
    """The peer's address, as `transport.get_extra_info("peername")` returns it, or None."""

    _what = ""

    def __init__(self, timeout: float, peername: object = None) -> None:
        where = "peer" if peername is None else f"peer {format_address(peername)}"
        super().__init__(ECONNABORTED, self._what.format(where=where, timeout=timeout))
        self.timeout = timeout
        self.peername = peername

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[object, ...]]:
        return type(self), (self.timeout, self.peername)

    def __str__(self) -> str:
        return str(self.strerror)


class IdleTimeoutError(_TimeLimitError):
    """Nothing was received from the peer for `idle_timeout` seconds, and this side has closed the connection.

    The peer may be alive. `errno` is ECONNABORTED.
    """

    _what = "nothing received from {where} for {timeout:g} s"


class SendTimeoutError(_TimeLimitError):
    """Data waited for `send_timeout` seconds, in which the peer acknowledged none; the connection was aborted.

    The peer may be alive, and not read. `errno` is ECONNABORTED.
    """

    _what = "{where} has not taken any data for {timeout:g} s"


class ContentTimeoutError(_TimeLimitError):
    """No content was received for the `content_timeout` of a `Heartbeat`; the connection was aborted.

    The peer is alive, or something before it that keeps the connection open. `errno` is ECONNABORTED.
    """

    _what = "no content received from {where} for {timeout:g} s"


class BrokenResourceError(ConnectionEnded, anyio.BrokenResourceError):
    """An error that is neither a death nor a reset has ended the connection, such as one of TLS: it is the `__cause__`.

    Without a cause: the connection has ended in good order, and nothing more can be sent.
    """


class EndOfStream(ConnectionEnded, anyio.EndOfStream):
    """The peer has closed the connection or sent EOF, and everything that it sent before has been received."""


class IncompleteRead(ConnectionEnded, anyio.IncompleteRead):
    """The peer has sent EOF before everything that was waited for. What did come stays in the buffer."""

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[object, ...]]:
        return type(self), ()  # anyio's takes no arguments, and has one


class ClosedResourceError(ConnectionEnded, anyio.ClosedResourceError):
    """This side has closed the connection."""


class RememberedError:
    """A `DeadPeerError` or another error of kaio's kept by a weak reference, and made again once it is gone.

    An exception that was raised refers to its traceback, the traceback to frames, and the frames to the connection: if
    the connection referred to the exception, only the garbage collector would free the two. All who call get the same
    object for as long as one of them keeps it.
    """

    __slots__ = ("_arguments", "_cause", "_error", "_make")

    def __init__(self, error: DeadPeerError | _TimeLimitError) -> None:
        self._make, self._arguments = error.__reduce__()
        self._cause = error.__cause__
        self._refer_to(error)

    def _refer_to(self, error: BaseException) -> None:
        self._error = weakref.ref(error)
        _remembered[error] = self  # several connections and scopes may remember the same exception

    def __call__(self) -> BaseException:
        error = self._error()
        if error is None:
            error = self._make(*self._arguments)
            error.__cause__ = self._cause
            self._refer_to(error)
        return error


_KEPT: Final = (DeadPeerError, _TimeLimitError)  # what a stream raises as it is

# Not an attribute of the exception: it is the user's, and shows what it has.
_remembered: weakref.WeakKeyDictionary[BaseException, RememberedError] = weakref.WeakKeyDictionary()


def remember(exc: BaseException | None) -> Any:
    """Return what a connection is to keep of the exception that ended it, for `as_stream_error`."""
    return _remembered.get(exc) or RememberedError(exc) if isinstance(exc, _KEPT) else exc


def as_stream_error(exc: RememberedError | BaseException | None) -> BaseException | None:
    """Convert the argument of `connection_lost` to what a stream raises, a kind of anyio's BrokenResourceError.

    Also accepts the result of `remember`. A `DeadPeerError`, as any error of kaio's, stays the same object; any other
    exception becomes the cause of a new one.
    """
    if isinstance(exc, RememberedError):
        return exc()
    if exc is None or isinstance(exc, _KEPT):
        return exc
    error: BaseException
    if isinstance(exc, ConnectionError):
        error = ResetError(exc.errno, exc.strerror or str(exc))
    else:
        error = BrokenResourceError(str(exc))
    error.__cause__ = exc
    return error


def format_address(address: object) -> str:
    """Write a socket address for a message: 192.0.2.1:80, [2001:db8::1]:80, unix:/run/x.sock."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[0], address[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    if isinstance(address, (str, bytes)):
        path = address.decode("utf-8", "replace") if isinstance(address, bytes) else address
        return f"unix:{path}" if path else "unix:"
    return str(address)


def os_error(number: int) -> OSError:
    """Make the `OSError` of an error number, with the system's text; as always, ETIMEDOUT gives a TimeoutError."""
    return OSError(number, os.strerror(number))
