"""Windows 10 1709 and later. Written from ws2ipdef.h and mstcpip.h, tested with a fake socket; never run on Windows.

TCP_KEEPCNT exists since 1703, TCP_KEEPIDLE and TCP_KEEPINTVL since 1709: setting them on older systems is an error.
A user timeout (TCP_MAXRTMS) cannot be removed once it is set: that is an error too.
"""

from __future__ import annotations

import socket
from typing import Final

from ...policy.state import SocketState
from ..tcpinfo import TcpInfo
from .base import SocketLike, milliseconds, set_option, unsupported

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

NAME: str = "Windows"
INHERITS: bool = False

_TCP: Final = 6
_SO_KEEPALIVE: Final = 0x0008
_TCP_KEEPIDLE: Final = 3
_TCP_MAXRTMS: Final = 14
_TCP_KEEPCNT: Final = 16
_TCP_KEEPINTVL: Final = 17


def is_tcp(sock: SocketLike) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM


def missing(state: SocketState) -> list[str]:
    return []


def rounded(state: SocketState) -> SocketState:
    return state


def read(sock: SocketLike) -> SocketState:
    timeout = sock.getsockopt(_TCP, _TCP_MAXRTMS) & 0xFFFFFFFF
    return SocketState(
        enabled=bool(sock.getsockopt(socket.SOL_SOCKET, _SO_KEEPALIVE)),
        idle=sock.getsockopt(_TCP, _TCP_KEEPIDLE),
        interval=sock.getsockopt(_TCP, _TCP_KEEPINTVL),
        count=sock.getsockopt(_TCP, _TCP_KEEPCNT),
        user_timeout=None if timeout in (0, 0xFFFFFFFF) else timeout / 1000,
    )


def write(sock: SocketLike, state: SocketState) -> None:
    if state.idle is not None:
        set_option(sock, "idle", _TCP, _TCP_KEEPIDLE, int(state.idle))
    if state.interval is not None:
        set_option(sock, "interval", _TCP, _TCP_KEEPINTVL, int(state.interval))
    if state.count is not None:
        set_option(sock, "count", _TCP, _TCP_KEEPCNT, state.count)
    if state.user_timeout is not None:
        set_option(sock, "user_timeout", _TCP, _TCP_MAXRTMS, milliseconds(state.user_timeout))
    set_option(sock, "enabled", socket.SOL_SOCKET, _SO_KEEPALIVE, state.enabled)


def set_user_timeout(sock: SocketLike, seconds: float | None) -> bool:
    return False  # TCP_MAXRTMS also bounds connect(), but cannot be removed afterwards


def cap_backoff(sock: SocketLike, seconds: float) -> int | None:
    return None


def idle_time(sock: SocketLike) -> float | None:
    return None


def last_data_recv(sock: SocketLike) -> float | None:
    return None


def tcp_info(sock: SocketLike) -> TcpInfo:
    raise unsupported(NAME, "TCP_INFO that Python can read (SIO_TCP_INFO requires WSAIoctl)")
