"""Linux. The numbers are from include/uapi/linux/tcp.h and include/uapi/asm-generic/socket.h; see tcp(7)."""

from __future__ import annotations

import _socket
import socket
from typing import Final

from ...policy.state import SocketState
from ..tcpinfo import TcpInfo, idle_time_from_bytes, last_data_recv_from_bytes
from .base import SocketLike, milliseconds, set_option

__all__ = [
    "INHERITS",
    "NAME",
    "cap_backoff",
    "idle_time",
    "is_tcp",
    "last_data_recv",
    "missing",
    "read",
    "rounded",
    "set_user_timeout",
    "tcp_info",
    "write",
]

NAME: str = "Linux"
INHERITS: bool = True  # all options, as they are when the handshake ends (net/ipv4/tcp_minisocks.c)

_TCP: Final = 6
_MPTCP: Final = 262
_SO_KEEPALIVE: Final = 9
_SO_PROTOCOL: Final = 38
_TCP_KEEPIDLE: Final = 4
_TCP_KEEPINTVL: Final = 5
_TCP_KEEPCNT: Final = 6
_TCP_INFO: Final = 11
_TCP_USER_TIMEOUT: Final = 18
_TCP_RTO_MAX_MS: Final = 44
_ACTIVITY_SIZE: Final = 148  # the part of struct tcp_info that tells whether the connection is idle
_INFO_SIZE: Final = 512  # longer than any kernel's struct tcp_info so far


def is_tcp(sock: SocketLike) -> bool:
    return (
        sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.type & 0xF == socket.SOCK_STREAM
        and sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) in (_TCP, _MPTCP)
    )


def missing(state: SocketState) -> list[str]:
    return []


def rounded(state: SocketState) -> SocketState:
    return state


def read(sock: SocketLike) -> SocketState:
    return SocketState(
        enabled=bool(sock.getsockopt(socket.SOL_SOCKET, _SO_KEEPALIVE)),
        idle=sock.getsockopt(_TCP, _TCP_KEEPIDLE),
        interval=sock.getsockopt(_TCP, _TCP_KEEPINTVL),
        count=sock.getsockopt(_TCP, _TCP_KEEPCNT),
        user_timeout=_user_timeout(sock),
    )


def _user_timeout(sock: SocketLike) -> float | None:
    try:
        return sock.getsockopt(_TCP, _TCP_USER_TIMEOUT) / 1000 or None
    except OSError:
        if sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) == _MPTCP:
            return None  # MPTCP does not have the option: getsockopt fails
        raise


def write(sock: SocketLike, state: SocketState) -> None:
    if state.idle is not None:
        set_option(sock, "idle", _TCP, _TCP_KEEPIDLE, int(state.idle))
    if state.interval is not None:
        set_option(sock, "interval", _TCP, _TCP_KEEPINTVL, int(state.interval))
    if state.count is not None:
        set_option(sock, "count", _TCP, _TCP_KEEPCNT, state.count)
    if state.user_timeout is not None or _user_timeout(sock) is not None:
        set_option(sock, "user_timeout", _TCP, _TCP_USER_TIMEOUT, milliseconds(state.user_timeout))
    set_option(sock, "enabled", socket.SOL_SOCKET, _SO_KEEPALIVE, state.enabled)


def set_user_timeout(sock: SocketLike, seconds: float | None) -> bool:
    # The same option bounds the handshake and, afterwards, sent data: to bound only the handshake, remove it again.
    set_option(sock, "user_timeout", _TCP, _TCP_USER_TIMEOUT, milliseconds(seconds))
    return True


def cap_backoff(sock: SocketLike, seconds: float) -> int | None:
    try:
        before = sock.getsockopt(_TCP, _TCP_RTO_MAX_MS)
        sock.setsockopt(_TCP, _TCP_RTO_MAX_MS, min(120_000, max(1_000, milliseconds(seconds))))
    except OSError:  # before Linux 6.15; MPTCP
        return None
    return before


def idle_time(sock: SocketLike) -> float | None:
    return idle_time_from_bytes(_read_info(sock))


def _read_info(sock: SocketLike) -> bytes:
    """Read the part of TCP_INFO that is asked for most."""
    if type(sock).__name__ != "PseudoSocket":
        return sock.getsockopt(_TCP, _TCP_INFO, _ACTIVITY_SIZE)
    # uvloop's PseudoSocket creates a socket.socket for each call. The C class takes a third less of the whole call.
    borrowed = _socket.socket(sock.family, socket.SOCK_STREAM, _TCP, sock.fileno())
    try:
        return borrowed.getsockopt(_TCP, _TCP_INFO, _ACTIVITY_SIZE)
    finally:
        borrowed.detach()


def last_data_recv(sock: SocketLike) -> float | None:
    return last_data_recv_from_bytes(_read_info(sock))


def tcp_info(sock: SocketLike) -> TcpInfo:
    return TcpInfo.from_bytes(sock.getsockopt(_TCP, _TCP_INFO, _INFO_SIZE))
