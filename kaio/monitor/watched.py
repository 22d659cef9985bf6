"""The seam between the monitor and what it watches: what it needs of a connection, of whichever kind.

Three kinds there are: kaio's own transports (`net.transports`), other libraries' transports, and bare descriptors
(both in `loop.foreign`).
"""

from __future__ import annotations

from typing import Literal, Protocol

from ..errors import Cause
from ..kernel.options import SocketLike
from ..kernel.tcpinfo import TcpInfo
from ..liveness.health import Health
from ..liveness.limits import Limits
from ..liveness.watch import Decision, Watch
from .counters import Event

__all__ = ["SuspectDescriptor", "WatchedConnection"]


class WatchedConnection(Protocol):
    """A connection as the monitor knows it. The fields are the monitor's own to set."""

    due: int
    """The wheel's tick at which it is looked at; -1: it is not in the wheel."""
    watched_fd: int
    """Its descriptor in the error watch; -1: it is not there."""
    inode: int
    """Its socket in the registry of what this process watches (`owners`); 0: it is not there."""
    watch: Watch | None
    """What the last looks remember; None: nothing."""
    limits: Limits | None

    @property
    def ended(self) -> bool:
        """Whether it is watched no more."""
        ...

    def get_socket(self) -> SocketLike:
        """Its socket. Raises OSError, ValueError, AttributeError once it is closed."""
        ...

    def on_look(self, sock: SocketLike, decision: Decision) -> None:
        """The monitor has looked, and lets it live."""
        ...

    def on_kernel_end(self, sample: TcpInfo | None) -> None:
        """The kernel has ended the connection, or may have: let its owner hear of it if the loop does not listen."""
        ...

    def call_back(self, name: str, argument: object) -> None:
        """Call back the protocol, whatever it raises."""
        ...

    def make_event(self, kind: Literal["suspect", "recovered"], health: Health) -> Event: ...

    def end_dead(self, exc: OSError, cause: Cause | None, sample: TcpInfo | None) -> None:
        """End the connection with a verdict that the loop has not heard, or would not hear."""
        ...

    def on_socket_closed(self) -> None:
        """Its socket is closed, and its owner was not told yet."""
        ...


class SuspectDescriptor(Protocol):
    """A bare descriptor that may be closed behind the monitor's back."""

    def look_whether_closed(self) -> None:
        """Report its death if its owner has closed it when it was due."""
        ...
