"""A policy as the options that other libraries accept, for clients that keep their own loop.

Rules kept here: numbers and names only, and no socket is opened. Times that the policy leaves to the system are left
out. The user timeout is always the kernel's: no monitor watches these sockets, so nothing else bounds data in flight.
"""

from __future__ import annotations

import dataclasses
import errno
import socket
import sys
from typing import TYPE_CHECKING, Final

from ..errors import KeepaliveError
from .fields import MAX_USER_TIMEOUT_MS

if TYPE_CHECKING:
    from .keepalive import Keepalive

__all__ = ["SocketOption", "libpq", "redis", "socket_options"]

SocketOption = tuple[int, int, int]
"""The arguments of setsockopt: level, option, value."""

_TCP: Final = 6


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The options of a platform, as in `kaio.kernel.options`, which has the sources. None: it has no such option."""

    name: str
    keepalive: int = 0x0008  # SO_KEEPALIVE
    idle: int | None = None
    interval: int | None = None
    count: int | None = None
    unit: int = 1  # of idle and interval: units per second
    user_timeout: int | None = None
    user_ms: int = 1000  # milliseconds in its unit


_SYSTEMS: Final = {
    "linux": _Numbers("Linux", 9, 4, 5, 6, user_timeout=18, user_ms=1),
    "darwin": _Numbers("macOS", 8, 0x10, 0x101, 0x102, user_timeout=0x80),
    "win32": _Numbers("Windows", 8, 3, 17, 16, user_timeout=14, user_ms=1),
    "freebsd": _Numbers("FreeBSD", 8, 256, 512, 1024, user_timeout=68),
    "netbsd": _Numbers("NetBSD", 8, 3, 5, 6),
    "dragonfly": _Numbers("DragonFly", 8, 256, 512, 1024, unit=1000),
}


def _here() -> _Numbers:
    found = (numbers for system, numbers in _SYSTEMS.items() if sys.platform.startswith(system))
    return next(found, _Numbers(sys.platform))


def _user_timeout_ms(policy: Keepalive) -> int | None:
    bound = policy.effective_user_timeout if policy.enabled else None
    return None if bound is None else min(round(bound * 1000), MAX_USER_TIMEOUT_MS)


def _tcp_options(policy: Keepalive) -> dict[int, int]:
    """Return the options of level IPPROTO_TCP. Raises `KeepaliveError` for what the platform does not have."""
    here, milliseconds = _here(), _user_timeout_ms(policy)
    if here.user_timeout is None and policy.stalled == "keep":
        milliseconds = None  # no reason to refuse the rest
    wanted = (
        ("idle", here.idle, None if policy.idle is None else int(policy.idle * here.unit)),
        ("interval", here.interval, None if policy.interval is None else int(policy.interval * here.unit)),
        ("count", here.count, policy.count),
        ("user_timeout", here.user_timeout, None if milliseconds is None else -(-milliseconds // here.user_ms)),
    )
    options: dict[int, int] = {}
    for field, number, value in wanted:
        if value is not None and number is None:
            problem = f"{here.name} cannot set {field} for a single socket, and the policy is {policy}"
            raise KeepaliveError(errno.EOPNOTSUPP, problem)
        if value is not None and number is not None:
            options[number] = value
    return options


def socket_options(policy: Keepalive) -> list[SocketOption]:
    """Return the arguments of setsockopt. SO_KEEPALIVE comes last, so that the first probe has the policy's times."""
    times = [(_TCP, number, value) for number, value in _tcp_options(policy).items()]
    return [*times, (socket.SOL_SOCKET, _here().keepalive, int(policy.enabled))]


def libpq(policy: Keepalive) -> dict[str, int]:
    """Return libpq's connection parameters."""
    if not policy.enabled:
        return {"keepalives": 0}
    wanted = {
        "keepalives": 1,
        "keepalives_idle": policy.idle,
        "keepalives_interval": policy.interval,
        "keepalives_count": policy.count,
        "tcp_user_timeout": _user_timeout_ms(policy),
    }
    return {name: int(value) for name, value in wanted.items() if value is not None}


def redis(policy: Keepalive) -> dict[str, bool | dict[int, int]]:
    """Return redis-py's connection arguments."""
    if not policy.enabled:
        return {"socket_keepalive": False}
    return {"socket_keepalive": True, "socket_keepalive_options": _tcp_options(policy)}
