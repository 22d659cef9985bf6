"""What the platform files share: their interface, that of a socket, and setting one option with a clear error."""

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
    """The methods of a socket that kaio needs; asyncio's TransportSocket and uvloop's PseudoSocket have them too."""

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
    """The functions that every platform file has. Times are seconds."""

    NAME: str
    """The name of the platform, for messages."""
    INHERITS: bool
    """Whether accepted sockets inherit all options of `SocketState` from the listening socket."""

    def is_tcp(self, sock: SocketLike) -> bool:
        """Return whether the socket is a TCP socket."""
        ...

    def missing(self, state: SocketState) -> list[str]:
        """Return the names of the fields that are not None and that this platform cannot set."""
        ...

    def rounded(self, state: SocketState) -> SocketState:
        """Return what `read` gives after `write(state)`: times are rounded up to the platform's units."""
        ...

    def read(self, sock: SocketLike) -> SocketState:
        """Read the options from the kernel. Raises OSError."""
        ...

    def write(self, sock: SocketLike, state: SocketState) -> None:
        """Set the options that are not None, SO_KEEPALIVE last. Raises KeepaliveError.

        `user_timeout=None` removes the user timeout.
        """
        ...

    def set_user_timeout(self, sock: SocketLike, seconds: float | None) -> bool:
        """Set only the user timeout, which also bounds connect(); None removes it. Raises KeepaliveError.

        Returns False where the platform has no such option.
        """
        ...

    def cap_backoff(self, sock: SocketLike, seconds: float) -> int | None:
        """Limit the time between retransmissions and between window probes (TCP_RTO_MAX_MS).

        Returns the previous limit in milliseconds, or None where the platform has no such option.
        """
        ...

    def idle_time(self, sock: SocketLike) -> float | None:
        """Return the seconds since an idle connection last received a segment. Raises OSError.

        None when the connection is not idle or the platform does not tell: then `tcp_info` has the details.
        """
        ...

    def last_data_recv(self, sock: SocketLike) -> float | None:
        """Return the seconds since data was last received, whether it was read or not. Raises OSError.

        None where the platform does not tell.
        """
        ...

    def tcp_info(self, sock: SocketLike) -> TcpInfo:
        """Read TCP_INFO. Raises OSError, and KeepaliveError where the platform does not have it."""
        ...


def set_option(sock: SocketLike, field: str, level: int, option: int, value: int) -> None:
    """Call setsockopt. Raises KeepaliveError, which names the field, the value and the kernel's reason."""
    try:
        sock.setsockopt(level, option, value)
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno else str(exc)
        raise KeepaliveError(exc.errno, f"{field}: the kernel refused {value}: {reason}") from exc


def unsupported(platform: str, what: str) -> KeepaliveError:
    """Make the exception for something that the platform does not have."""
    return KeepaliveError(errno.EOPNOTSUPP, f"{platform} has no {what}")


def milliseconds(seconds: float | None) -> int:
    """Convert seconds to whole milliseconds; None to 0, which removes the option."""
    return 0 if seconds is None else round(seconds * 1000)


def seconds_up(seconds: float | None) -> int:
    """Round seconds up to whole seconds; None to 0, which removes the option."""
    return 0 if seconds is None else math.ceil(seconds)
