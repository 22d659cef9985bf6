"""macOS. Written from XNU's bsd/netinet/tcp.h and tcp(4), tested with a fake socket; never run on macOS."""

from __future__ import annotations

import dataclasses
import socket
import struct
from typing import Final

from ...policy.state import SocketState
from ..tcpinfo import TcpInfo
from .base import BSD_STATES, SocketLike, seconds_up, set_option

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

NAME: str = "macOS"
INHERITS: bool = False  # the idle time is not inherited

_TCP: Final = 6
_SO_KEEPALIVE: Final = 0x0008
_TCP_KEEPALIVE: Final = 0x10  # the idle time
_TCP_CONNECTIONTIMEOUT: Final = 0x20
_TCP_RXT_CONNDROPTIME: Final = 0x80
_TCP_KEEPINTVL: Final = 0x101
_TCP_KEEPCNT: Final = 0x102
_TCP_CONNECTION_INFO: Final = 0x106


def is_tcp(sock: SocketLike) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM


def missing(state: SocketState) -> list[str]:
    return []


def rounded(state: SocketState) -> SocketState:
    return dataclasses.replace(state, user_timeout=seconds_up(state.user_timeout) or None)


def read(sock: SocketLike) -> SocketState:
    return SocketState(
        enabled=bool(sock.getsockopt(socket.SOL_SOCKET, _SO_KEEPALIVE)),
        idle=sock.getsockopt(_TCP, _TCP_KEEPALIVE),
        interval=sock.getsockopt(_TCP, _TCP_KEEPINTVL),
        count=sock.getsockopt(_TCP, _TCP_KEEPCNT),
        user_timeout=sock.getsockopt(_TCP, _TCP_RXT_CONNDROPTIME) or None,
    )


def write(sock: SocketLike, state: SocketState) -> None:
    if state.idle is not None:
        set_option(sock, "idle", _TCP, _TCP_KEEPALIVE, int(state.idle))
    if state.interval is not None:
        set_option(sock, "interval", _TCP, _TCP_KEEPINTVL, int(state.interval))
    if state.count is not None:
        set_option(sock, "count", _TCP, _TCP_KEEPCNT, state.count)
    set_option(sock, "user_timeout", _TCP, _TCP_RXT_CONNDROPTIME, seconds_up(state.user_timeout))
    set_option(sock, "enabled", socket.SOL_SOCKET, _SO_KEEPALIVE, state.enabled)


def set_user_timeout(sock: SocketLike, seconds: float | None) -> bool:
    if seconds is not None:
        set_option(sock, "user_timeout", _TCP, _TCP_CONNECTIONTIMEOUT, seconds_up(seconds))
    return True


def cap_backoff(sock: SocketLike, seconds: float) -> int | None:
    return None


def idle_time(sock: SocketLike) -> float | None:
    return None


def last_data_recv(sock: SocketLike) -> float | None:
    return None


def tcp_info(sock: SocketLike) -> TcpInfo:
    # struct tcp_connection_info: 4 bytes, then options, flags, rto, maxseg, ssthresh, cwnd, wnd, sbbytes, rcv_wnd,
    # rttcur, srtt, rttvar; the times are milliseconds.
    data = sock.getsockopt(_TCP, _TCP_CONNECTION_INFO, 256)
    words = struct.unpack_from("=12I", data, 4)
    return TcpInfo(
        state=BSD_STATES.get(data[0], data[0]),
        rto=words[2] / 1000,
        snd_cwnd=words[5],
        snd_wnd=words[6],
        rcv_wnd=words[8],
        rtt=words[10] / 1000,
        rttvar=words[11] / 1000,
    )
