"""What the platform files share: the shape of a socket, and reading and setting one option with a clear error."""

from __future__ import annotations

import errno
import math
import os
from typing import TYPE_CHECKING, Final, Protocol, overload

from ...errors import KeepaliveError
from ..tcpinfo import TcpInfo, TcpState

if TYPE_CHECKING:
    from ...policy.state import SocketState

__all__ = ["BSD_STATES", "Platform", "SocketLike", "milliseconds", "seconds_up", "set_option", "unsupported"]

BSD_STATES: Final = {
    0: TcpState.CLOSE,
    1: TcpState.LISTEN,
    2: TcpState.SYN_SENT,
    3: TcpState.SYN_RECV,
    4: TcpState.ESTABLISHED,
    5: TcpState.CLOSE_WAIT,
    6: TcpState.FIN_WAIT1,
    7: TcpState.CLOSING,
    8: TcpState.LAST_ACK,
    9: TcpState.FIN_WAIT2,
    10: TcpState.TIME_WAIT,
}
"""The TCPS_ numbers of the BSDs and of macOS (netinet/tcp_fsm.h)."""


class SocketLike(Protocol):
    """The part of a socket that is needed; asyncio's and uvloop's stand-ins have it too."""

    @property
    def family(self) -> int: ...

    @property
    def type(self) -> int: ...

    def fileno(self) -> int: ...

    @overload
    def getsockopt(self, level: int, optname: int, /) -> int: ...
    @overload
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...

    def setsockopt(self, level: int, optname: int, value: int | bytes, /) -> None: ...


class Platform(Protocol):
    """The functions that every platform file has."""

    NAME: str
    """The platform, for messages."""
    INHERITS: bool
    """Whether accepted sockets start with all that their listening socket had."""

    def is_tcp(self, sock: SocketLike) -> bool:
        """Whether keepalive means anything on this socket."""
        ...

    def missing(self, wanted: SocketState) -> list[str]:
        """The fields that this platform cannot set; empty when it can set them all."""
        ...

    def takes(self, wanted: SocketState) -> SocketState:
        """What the platform will have after `write(wanted)`: its own rounding applied."""
        ...

    def read(self, sock: SocketLike) -> SocketState:
        """What the kernel has now. Raises OSError."""
        ...

    def write(self, sock: SocketLike, wanted: SocketState) -> None:
        """Set what is not None, keepalive itself last; `user_timeout=None` means none. Raises KeepaliveError."""
        ...

    def set_user_timeout(self, sock: SocketLike, seconds: float | None) -> bool:
        """Set the user timeout alone, by which connect() gives up too; None takes it off. False where it cannot be."""
        ...

    def cap_backoff(self, sock: SocketLike, seconds: float) -> int | None:
        """Let retransmissions and window probes come at least that often; None where the platform cannot.

        Returns what the bound was before, in milliseconds.
        """
        ...

    def resting_for(self, sock: SocketLike) -> float | None:
        """Seconds of silence of a connection with which all is well; None: ask `tcp_info`. Raises OSError."""
        ...

    def tcp_info(self, sock: SocketLike) -> TcpInfo:
        """A sample of the connection. Raises KeepaliveError where the platform has none, OSError."""
        ...


def set_option(sock: SocketLike, field: str, level: int, option: int, value: int) -> None:
    """setsockopt whose refusal names the field, the value and the kernel's reason."""
    try:
        sock.setsockopt(level, option, value)
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno else str(exc)
        raise KeepaliveError(exc.errno, f"{field}: the kernel refused {value}: {reason}") from exc


def unsupported(platform: str, what: str) -> KeepaliveError:
    """The error for what a platform does not have."""
    return KeepaliveError(errno.EOPNOTSUPP, f"{platform} has no {what}")


def milliseconds(seconds: float | None) -> int:
    """For the kernel: 0 is none."""
    return 0 if seconds is None else round(seconds * 1000)


def seconds_up(seconds: float | None) -> int:
    """Whole seconds for the kernel, rounded up: 0 is none."""
    return 0 if seconds is None else math.ceil(seconds)
