"""`apply`, `inspect` and `health`: a policy and any socket, whoever owns it.

Rules kept here: what is set is read back from the kernel and compared; when anything fails, the socket has what it had
before. An OSError of the kernel's becomes a `KeepaliveError` here that names the socket and the field.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import Final, cast

from anyio import ClosedResourceError, TypedAttributeProvider
from anyio.abc import SocketAttribute, SocketStream

from ..errors import KeepaliveError, format_address
from ..policy import Keepalive, KeepaliveArg, SocketState, as_policy
from .options import SocketLike, platform
from .tcpinfo import TcpInfo

__all__ = ["apply", "cover", "describe", "inspect", "raw_socket", "system_state", "tcp_info", "wanted"]

logger: Final = logging.getLogger("kaio")


def apply(sock_or_transport: object, keepalive: KeepaliveArg = None) -> SocketState:
    """Give a socket a keepalive policy, and return what the kernel says that it has now.

    Takes a socket, an asyncio transport or StreamWriter, an anyio stream, a kaio `Connection`. Where the policy says
    None, the socket gets the system's value of now.

    On a socket that is not kaio's, what the kernel does by itself is what there is: keepalive probes, and with
    stalled="drop" the user timeout. With stalled="keep", data in flight is bounded by the system's retransmissions
    (about 15 minutes), because it is the monitor of kaio's own connections that enforces the user timeout.

    Raises `PolicyError` before anything was changed; `KeepaliveError` when the socket is not TCP or is closed, when the
    platform lacks an option, and when the kernel refuses or disagrees: then the socket has what it had before.
    TypeError for what has no socket.
    """
    policy = as_policy(keepalive)
    sock = raw_socket(sock_or_transport)
    before = _read(sock)
    values = wanted(policy, sock)
    lacking = platform.missing(values)
    if lacking:
        raise KeepaliveError(
            errno.EOPNOTSUPP, f"{describe(sock)}: {platform.NAME} has no {', '.join(lacking)} of a socket's own"
        )
    try:
        platform.write(sock, values)
        after = platform.read(sock)
        _compare(platform.takes(values), after)
    except OSError as exc:
        _put_back(sock, before)
        raise KeepaliveError(exc.errno, f"{describe(sock)}: {exc.strerror or exc}") from exc
    follow = getattr(
        sock_or_transport, "_kaio_follow", None
    )  # a transport or Connection of kaio's: the monitor follows
    if follow is not None:
        follow(policy, after)
    return after


def inspect(sock_or_transport: object) -> SocketState:
    """What the kernel has for a socket now: keepalive, its times, the user timeout.

    Takes what `apply` takes. Raises `KeepaliveError` when it is not a TCP socket or is closed.
    """
    return _read(raw_socket(sock_or_transport))


def tcp_info(sock_or_transport: object) -> TcpInfo:
    """The kernel's TCP_INFO of a socket.

    Takes what `apply` takes. Raises `KeepaliveError` when it is not a TCP socket or is closed, and on platforms that
    tell nothing.
    """
    sock = raw_socket(sock_or_transport)
    _require_tcp(sock)
    try:
        return platform.tcp_info(sock)
    except KeepaliveError:
        raise
    except OSError as exc:
        raise KeepaliveError(exc.errno, f"{describe(sock)}: TCP_INFO: {exc.strerror or exc}") from exc


def cover(sock: SocketLike, policy: Keepalive, *, explicit: bool) -> SocketState | None:
    """Give a socket that kaio made or accepted its policy, and return what it has; None when it cannot be had.

    What the platform cannot do is an error when the policy was asked for, and a logged warning when it is the default.
    """
    try:
        return apply(sock, policy)
    except KeepaliveError as exc:
        if explicit or exc.errno != errno.EOPNOTSUPP:
            raise
        logger.warning("the default keepalive policy %s cannot be had: %s", policy, exc.strerror)
        return None


def raw_socket(obj: object) -> SocketLike:
    """The socket of a socket, transport, StreamWriter, anyio stream or Connection. Raises TypeError, KeepaliveError."""
    if isinstance(obj, socket.socket):
        return obj
    found: object = None
    if isinstance(obj, (TypedAttributeProvider, SocketStream)):
        try:
            found = obj.extra(SocketAttribute.raw_socket, None)  # noqa: S610 - not Django's
        except ClosedResourceError:
            raise KeepaliveError(errno.EBADF, "the socket is closed") from None
    elif hasattr(obj, "get_extra_info"):
        try:
            found = obj.get_extra_info("socket")
        except AttributeError:  # asyncio's TLS transport once it was closed twice
            raise KeepaliveError(errno.EBADF, "the socket is closed") from None
    elif hasattr(obj, "getsockopt") and hasattr(obj, "fileno"):
        found = obj  # asyncio's TransportSocket, uvloop's PseudoSocket
    else:
        raise TypeError(
            f"expected a socket, a transport, a StreamWriter, an anyio stream or a Connection, got {type(obj).__name__}"
        )
    if found is None:
        is_closing = getattr(obj, "is_closing", None)
        if is_closing is not None and is_closing():  # a Unix transport of uvloop's after its end
            raise KeepaliveError(errno.EBADF, "the socket is closed")
        raise KeepaliveError(errno.ENOTSOCK, f"{obj!r} has no socket: keepalive is of TCP sockets only")
    return cast("SocketLike", found)


def wanted(policy: Keepalive, sock: SocketLike) -> SocketState:
    """The values that make up a policy on a socket. Raises `KeepaliveError` when the system's cannot be read."""
    if not policy.enabled:
        return SocketState(enabled=False)
    if policy.idle is None or policy.interval is None or policy.count is None:
        # Those are set too: a socket may have others from before.
        system = system_state(sock)
        policy = policy.filled(idle=system.idle, interval=system.interval, count=system.count)
    return SocketState(
        enabled=True,
        idle=policy.idle,
        interval=policy.interval,
        count=policy.count,
        user_timeout=policy.effective_user_timeout if policy.stalled == "drop" else None,
    )


def system_state(sock: SocketLike) -> SocketState:
    """What a fresh socket of the same family has: the system's values of now. Raises `KeepaliveError`."""
    try:
        with socket.socket(sock.family) as fresh:
            return platform.read(fresh)
    except OSError as exc:
        raise KeepaliveError(exc.errno, f"the system's values cannot be read: {exc.strerror}") from exc


def _require_tcp(sock: SocketLike) -> None:
    if sock.fileno() < 0:
        raise KeepaliveError(errno.EBADF, "the socket is closed")
    try:
        tcp = platform.is_tcp(sock)
    except OSError as exc:
        raise KeepaliveError(exc.errno, f"{describe(sock)}: {exc.strerror or exc}") from exc
    if not tcp:
        raise KeepaliveError(
            errno.EOPNOTSUPP, f"{describe(sock)} is not a TCP socket: keepalive and TCP_INFO are of TCP only"
        )


def _read(sock: SocketLike) -> SocketState:
    _require_tcp(sock)
    try:
        return platform.read(sock)
    except OSError as exc:
        raise KeepaliveError(exc.errno, f"{describe(sock)}: {exc.strerror or exc}") from exc


def _compare(asked_for: SocketState, got: SocketState) -> None:
    fields = ("enabled", "user_timeout", *(("idle", "interval", "count") if asked_for.enabled else ()))
    for field in fields:
        asked, has = getattr(asked_for, field), getattr(got, field)
        if asked != has and not (asked is None and field != "user_timeout"):
            raise KeepaliveError(errno.EINVAL, f"{field}: asked for {asked}, the kernel has {has}")


def _put_back(sock: SocketLike, before: SocketState) -> None:
    try:
        platform.write(sock, before)
    except OSError as exc:
        if exc.errno in (errno.EBADF, errno.ENOTSOCK):  # its owner closed it meanwhile: nothing is left to put back
            return
        try:
            if platform.read(sock) == before:
                return
        except OSError:
            pass
        logger.warning("%s could not be given back what it had (%s): %s", describe(sock), before, exc.strerror)


def describe(sock: SocketLike) -> str:
    """A socket in a message: by its peer, else by its own address, else by its descriptor."""
    for get in ("getpeername", "getsockname"):
        try:
            address = getattr(sock, get)()
        except (OSError, AttributeError, NotImplementedError):
            continue
        return f"socket {'to' if get == 'getpeername' else 'at'} {format_address(address)}"
    return f"socket of descriptor {sock.fileno()}"
