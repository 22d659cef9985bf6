"""The interface between the monitor and the connections that it watches.

There are three kinds of connections: kaio's own transports (`net.transports`), other libraries' transports, and bare
descriptors (both in `loop.foreign`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from ..errors import Cause
    from ..kernel.options import SocketLike
    from ..kernel.tcpinfo import TcpInfo
    from ..liveness.health import Health
    from ..liveness.limits import Limits
    from ..liveness.watch import Decision, Watch
    from .counters import Event

__all__ = ["SuspectDescriptor", "WatchedConnection"]


class WatchedConnection(Protocol):
    """A connection as the monitor knows it. Its fields are set by the monitor."""

    due: int
    """The tick of the wheel at which it is checked; -1: it is not in the wheel."""
    watched_fd: int
    """Its descriptor in the error watch; -1: it is not there."""
    inode: int
    """The inode of its socket in the registry of watched sockets (`owners`); 0: it is not there."""
    watch: Watch | None
    """The memory of its checks; None: there is nothing to remember."""
    limits: Limits | None

    @property
    def ended(self) -> bool:
        """Whether it is watched no more."""
        ...

    def get_socket(self) -> SocketLike:
        """Return its socket. Raises OSError, ValueError or AttributeError once it is closed."""
        ...

    def on_look(self, sock: SocketLike, decision: Decision) -> None:
        """The monitor has checked the connection, which goes on."""
        ...

    def on_kernel_end(self, sample: TcpInfo | None) -> None:
        """The kernel has ended the connection, or may have: report it if the loop does not."""
        ...

    def call_back(self, name: str, argument: object, /) -> None:
        """Call a callback of the protocol; what it raises goes to the loop's exception handler."""
        ...

    def make_event(self, kind: Literal["suspect", "recovered"], health: Health) -> Event: ...

    def end_dead(self, exc: OSError, cause: Cause | None, sample: TcpInfo | None) -> None:
        """End the connection for a reason that the loop does not know, or would not report."""
        ...

    def on_socket_closed(self) -> None:
        """Its socket is closed, and connection_lost has not been called yet."""
        ...


class SuspectDescriptor(Protocol):
    """A descriptor that its owner may close without the monitor's knowledge."""

    def look_whether_closed(self) -> None:
        """Report the death of the peer if the owner has closed the descriptor because of it."""
        ...
