"""FreeBSD, NetBSD, DragonFly and OpenBSD. Written from their netinet/tcp.h and tcp(4), tested with a fake socket; never
run on a BSD.

OpenBSD has keepalive times for the whole system only, so there a policy can only be on or off. DragonFly's unit is the
millisecond. Only FreeBSD, since version 14, has an option like TCP_USER_TIMEOUT.
"""

from __future__ import annotations

import dataclasses
import errno
import socket
import struct
import sys
from typing import Final

from ...policy.state import SocketState
from ..tcpinfo import TcpInfo
from .base import BSD_STATES, SocketLike, seconds_up, set_option, unsupported

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

_TCP: Final = 6
_SO_KEEPALIVE: Final = 0x0008


@dataclasses.dataclass(frozen=True)
class _System:
    name: str
    idle: int | None = None
    interval: int | None = None
    count: int | None = None
    unit: int = 1  # of the options idle, interval and connect: units per second
    user_timeout: int | None = None  # TCP_MAXUNACKTIME, seconds
    connect: int | None = None  # TCP_KEEPINIT
    info: int | None = None


_SYSTEMS: Final = {
    "freebsd": _System("FreeBSD", 256, 512, 1024, user_timeout=68, connect=128, info=32),
    "netbsd": _System("NetBSD", 3, 5, 6, connect=7, info=9),
    "dragonfly": _System("DragonFly", 256, 512, 1024, unit=1000, connect=32),
    "openbsd": _System("OpenBSD"),
}
_HERE: _System = next((s for key, s in _SYSTEMS.items() if sys.platform.startswith(key)), _SYSTEMS["openbsd"])

NAME: str = _HERE.name
INHERITS: bool = False  # some versions do, but none documents it


def is_tcp(sock: SocketLike) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type & 0xF == socket.SOCK_STREAM


def missing(state: SocketState) -> list[str]:
    fields = ("idle", "interval", "count", "user_timeout")
    return [field for field in fields if getattr(state, field) is not None and getattr(_HERE, field) is None]


def rounded(state: SocketState) -> SocketState:
    return dataclasses.replace(state, user_timeout=seconds_up(state.user_timeout) or None)


def read(sock: SocketLike) -> SocketState:
    idle, interval = _read(sock, _HERE.idle), _read(sock, _HERE.interval)
    return SocketState(
        enabled=bool(sock.getsockopt(socket.SOL_SOCKET, _SO_KEEPALIVE)),
        idle=None if idle is None else idle / _HERE.unit,
        interval=None if interval is None else interval / _HERE.unit,
        count=_read(sock, _HERE.count),
        user_timeout=_user_timeout(sock),
    )


def _user_timeout(sock: SocketLike) -> float | None:
    try:
        return _read(sock, _HERE.user_timeout) or None
    except OSError as exc:
        if exc.errno == errno.ENOPROTOOPT:  # FreeBSD before 14
            return None
        raise


def _read(sock: SocketLike, option: int | None) -> int | None:
    return None if option is None else sock.getsockopt(_TCP, option)


def write(sock: SocketLike, state: SocketState) -> None:
    if state.idle is not None and _HERE.idle is not None:
        set_option(sock, "idle", _TCP, _HERE.idle, int(state.idle * _HERE.unit))
    if state.interval is not None and _HERE.interval is not None:
        set_option(sock, "interval", _TCP, _HERE.interval, int(state.interval * _HERE.unit))
    if state.count is not None and _HERE.count is not None:
        set_option(sock, "count", _TCP, _HERE.count, state.count)
    if _HERE.user_timeout is not None and (state.user_timeout is not None or _user_timeout(sock) is not None):
        set_option(sock, "user_timeout", _TCP, _HERE.user_timeout, seconds_up(state.user_timeout))
    set_option(sock, "enabled", socket.SOL_SOCKET, _SO_KEEPALIVE, state.enabled)


def set_user_timeout(sock: SocketLike, seconds: float | None) -> bool:
    if _HERE.connect is None:
        return False
    if seconds is not None:
        set_option(sock, "user_timeout", _TCP, _HERE.connect, seconds_up(seconds) * _HERE.unit)
    return True


def cap_backoff(sock: SocketLike, seconds: float) -> int | None:
    return None


def idle_time(sock: SocketLike) -> float | None:
    return None


def last_data_recv(sock: SocketLike) -> float | None:
    return None if _HERE.info is None else tcp_info(sock).last_data_recv


def tcp_info(sock: SocketLike) -> TcpInfo:
    if _HERE.info is None:
        raise unsupported(_HERE.name, "TCP_INFO")
    # The same offsets as in Linux, but the BSDs' states, and all times in microseconds.
    data = sock.getsockopt(_TCP, _HERE.info, 512)
    (rto,) = struct.unpack_from("=I", data, 8)
    (last_data_recv,) = struct.unpack_from("=I", data, 52)
    rtt, rttvar = struct.unpack_from("=2I", data, 68)
    (snd_cwnd,) = struct.unpack_from("=I", data, 80)
    return TcpInfo(
        state=BSD_STATES.get(data[0], data[0]),
        rto=rto / 1_000_000,
        last_data_recv=last_data_recv / 1_000_000,
        rtt=rtt / 1_000_000,
        rttvar=rttvar / 1_000_000,
        snd_cwnd=snd_cwnd,
    )
