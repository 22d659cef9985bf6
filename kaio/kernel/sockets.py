"""`apply` and `inspect`: set and read the keepalive options of any socket, whoever owns it.

Rules kept here: options are read back after they were set, and compared; on any failure the previous ones are restored.
An OSError from the kernel becomes a `KeepaliveError`, which names the socket and the field.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import Any, Final, cast

from anyio import ClosedResourceError, TypedAttributeProvider
from anyio.abc import SocketAttribute, SocketStream

from ..errors import KeepaliveError, format_address
from ..policy import Keepalive, KeepaliveArg, SocketState, as_policy
from .options import SocketLike, platform
from .tcpinfo import TcpInfo

__all__ = ["apply", "apply_or_warn", "describe", "inspect", "raw_socket", "system_state", "target_state", "tcp_info"]

logger: Final = logging.getLogger("kaio")


def apply(sock_or_transport: object, keepalive: KeepaliveArg = None) -> SocketState:
    """Set the keepalive options of a socket to a policy, and return the options as read back from the kernel.

    Accepts a socket, an asyncio transport or StreamWriter, an anyio stream, a kaio `Connection`. Fields of the policy
    that are None are set to the system's current values.

    A socket that kaio does not manage has only what the kernel does: keepalive probes, and with stalled="drop" the user
    timeout. With stalled="keep" sent data may stay unacknowledged for as long as the kernel retransmits it (about 15
    minutes), because kaio's monitor, which enforces the user timeout, does not watch that socket.

    Raises `PolicyError` for an invalid policy; `KeepaliveError` when the socket is not TCP or is closed, when the
    platform does not have an option, and when the kernel refuses a value or reports another one afterwards; TypeError
    for an object without a socket. The socket then has the options that it had before.
    """
    policy = as_policy(keepalive)
    sock = raw_socket(sock_or_transport)
    before = _read(sock)
    target = target_state(policy, sock)
    missing = platform.missing(target)
    if missing:
        problem = f"{platform.NAME} cannot set {', '.join(missing)} for a single socket"
        raise KeepaliveError(errno.EOPNOTSUPP, f"{describe(sock)}: {problem}")
    try:
        platform.write(sock, target)
        after = platform.read(sock)
        _compare(platform.rounded(target), after)
    except OSError as exc:
        _restore(sock, before)
        raise _keepalive_error(sock, exc) from exc
    # A transport or Connection of kaio's: tell its monitor. By name, because they are in a package above this one.
    follow = getattr(sock_or_transport, "_kaio_follow", None)
    if follow is not None:
        follow(policy, after)
    return after


def inspect(sock_or_transport: object) -> SocketState:
    """Read the keepalive options of a socket from the kernel.

    Accepts what `apply` accepts. Raises `KeepaliveError` when the socket is not TCP or is closed, TypeError for an
    object without a socket.
    """
    return _read(raw_socket(sock_or_transport))


def tcp_info(sock_or_transport: object) -> TcpInfo:
    """Read the TCP_INFO of a socket from the kernel.

    Accepts what `apply` accepts. Raises `KeepaliveError` when the socket is not TCP or is closed, and on platforms
    without TCP_INFO; TypeError for an object without a socket.
    """
    sock = raw_socket(sock_or_transport)
    _require_tcp(sock)
    try:
        return platform.tcp_info(sock)
    except KeepaliveError:
        raise
    except OSError as exc:
        raise _keepalive_error(sock, exc, "TCP_INFO: ") from exc


def apply_or_warn(sock: SocketLike, policy: Keepalive, *, explicit: bool) -> SocketState | None:
    """Set the options of a socket that kaio created or accepted, and return them as `apply` does.

    When the platform does not have an option, an `explicit` policy raises `KeepaliveError`; the default policy logs a
    warning and returns None.
    """
    try:
        return apply(sock, policy)
    except KeepaliveError as exc:
        if explicit or exc.errno != errno.EOPNOTSUPP:
            raise
        logger.warning("cannot apply the default keepalive policy %s: %s", policy, exc.strerror)
        return None


def raw_socket(obj: object) -> SocketLike:
    """Return the socket of a socket, transport, StreamWriter, anyio stream or Connection.

    Raises `KeepaliveError` when the socket is closed or the object has none at present, TypeError for other objects.
    """
    if isinstance(obj, socket.socket):
        return obj
    found: object = None
    if isinstance(obj, (TypedAttributeProvider, SocketStream)):
        try:
            found = obj.extra(SocketAttribute.raw_socket, None)  # noqa: S610 - not Django's
        except ClosedResourceError:
            raise KeepaliveError(errno.EBADF, "the socket is closed") from None
    elif hasattr(obj, "get_extra_info"):
        transport: Any = obj
        try:
            found = transport.get_extra_info("socket")
        except AttributeError:  # from asyncio's TLS transport after its second close()
            raise KeepaliveError(errno.EBADF, "the socket is closed") from None
    elif hasattr(obj, "getsockopt") and hasattr(obj, "fileno"):
        found = obj  # asyncio's TransportSocket, uvloop's PseudoSocket
    else:
        raise TypeError(
            f"expected a socket, a transport, a StreamWriter, an anyio stream or a Connection, got {type(obj).__name__}"
        )
    if found is None:
        is_closing = getattr(obj, "is_closing", None)
        if is_closing is not None and is_closing():  # uvloop's Unix transport after its end
            raise KeepaliveError(errno.EBADF, "the socket is closed")
        raise KeepaliveError(errno.ENOTSOCK, f"{obj!r} has no socket: keepalive requires a TCP socket")
    return cast("SocketLike", found)


def target_state(policy: Keepalive, sock: SocketLike) -> SocketState:
    """Return the options that a socket has to have for a policy.

    Raises `KeepaliveError` when the system's values are needed and cannot be read, `PolicyError` when the user timeout
    is too short for them.
    """
    if not policy.enabled:
        return SocketState(enabled=False)
    if policy.idle is None or policy.interval is None or policy.count is None:
        # The socket may have other values than the system's, from a previous policy.
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
    """Read the system's current values: those of a new socket of the same family. Raises `KeepaliveError`."""
    try:
        with socket.socket(sock.family) as fresh:
            return platform.read(fresh)
    except OSError as exc:
        raise KeepaliveError(exc.errno, f"cannot read the system's keepalive values: {exc.strerror}") from exc


def _require_tcp(sock: SocketLike) -> None:
    if sock.fileno() < 0:
        raise KeepaliveError(errno.EBADF, "the socket is closed")
    try:
        tcp = platform.is_tcp(sock)
    except OSError as exc:
        raise _keepalive_error(sock, exc) from exc
    if not tcp:
        raise KeepaliveError(
            errno.EOPNOTSUPP, f"{describe(sock)} is not a TCP socket, which keepalive and TCP_INFO require"
        )


def _read(sock: SocketLike) -> SocketState:
    _require_tcp(sock)
    try:
        return platform.read(sock)
    except OSError as exc:
        raise _keepalive_error(sock, exc) from exc


def _compare(target: SocketState, state: SocketState) -> None:
    fields = ("enabled", "user_timeout", *(("idle", "interval", "count") if target.enabled else ()))
    for field in fields:
        asked, has = getattr(target, field), getattr(state, field)
        if asked != has and not (asked is None and field != "user_timeout"):
            raise KeepaliveError(errno.EINVAL, f"{field}: set to {asked}, but the kernel reports {has}")


def _restore(sock: SocketLike, before: SocketState) -> None:
    try:
        platform.write(sock, before)
    except OSError as exc:
        if exc.errno in (errno.EBADF, errno.ENOTSOCK):  # closed by its owner: nothing to restore
            return
        try:
            if platform.read(sock) == before:
                return
        except OSError:
            pass
        logger.warning(
            "%s: cannot restore the previous keepalive options (%s): %s", describe(sock), before, exc.strerror
        )


def _keepalive_error(sock: SocketLike, exc: OSError, what: str = "") -> KeepaliveError:
    return KeepaliveError(exc.errno, f"{describe(sock)}: {what}{exc.strerror or exc}")


def describe(sock: SocketLike) -> str:
    """Name a socket in a message: by the address of its peer, else by its own, else by its file descriptor."""
    for get in ("getpeername", "getsockname"):
        try:
            address = getattr(sock, get)()
        except (OSError, AttributeError, NotImplementedError):
            continue
        return f"socket {'to' if get == 'getpeername' else 'at'} {format_address(address)}"
    return f"socket with descriptor {sock.fileno()}"
