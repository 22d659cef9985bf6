"""A connection of a pool's: whether it can be handed out, and for how long it may stand.

Rules kept here: what the loop and the monitor know is looked up without a system call: it has ended, its peer has sent
EOF or what nobody asked for, it is suspect. For what the kernel knows, and the loop has not heard yet, there is one
poll(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import select
from collections.abc import Callable
from typing import Any, Final, cast

from ..errors import DeadPeerError
from ..liveness.health import Health
from .connection import CLOSE_TIMEOUT, Connection, finish
from .stream import StreamProtocol

__all__ = ["PooledConnection", "PooledProtocol"]

_LIFETIMES: Final = 0.9, 1.0  # of the longest, so that connections that were made together do not end together


class PooledConnection:
    """A connection of a pool's, which calls `on_end` when its peer has closed it or died."""

    __slots__ = ("_ends_at", "_loop", "_on_end", "_poll", "_protocol", "connection", "idle_since", "used")

    def __init__(
        self, connection: Connection, max_lifetime: float | None, on_end: Callable[[PooledConnection], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._protocol = cast("PooledProtocol", connection.transport.get_protocol())
        self._on_end = on_end
        self._poll = _make_poll(connection)
        self.connection: Connection = connection
        self.used: bool = False  # whether somebody has used it before
        self.idle_since: float = self._loop.time()
        share = random.uniform(*_LIFETIMES)  # noqa: S311 - no secret
        self._ends_at = float("inf") if max_lifetime is None else self.idle_since + share * max_lifetime
        self._protocol.pooled = self

    def is_old(self) -> bool:
        """Return whether it has stood for as long as it may."""
        return self._loop.time() >= self._ends_at

    def has_hung_up(self) -> bool:
        """Return whether the kernel knows that the peer has closed or reset it."""
        return self._poll is not None and any(events & ~select.POLLIN for _, events in self._poll.poll(0))

    def is_usable(self) -> bool:
        """Return whether it was worth keeping when it was given back, as far as the loop and the monitor know."""
        protocol = self._protocol
        return protocol.receivable and protocol.sendable and not protocol.is_suspect and self.idle_since < self._ends_at

    def is_healthy(self) -> bool:
        return self.is_usable() and not self.is_old() and (self._poll is None or not self._poll.poll(0))

    def on_give_back(self) -> None:
        """Note that somebody has used it until now."""
        self.used = True
        self.idle_since = self._loop.time()

    def close(self) -> None:
        finish(self.connection, CLOSE_TIMEOUT)

    def on_end(self) -> None:
        """Tell the pool in the loop's next turn, because this one is in a callback of the transport's."""
        self._loop.call_soon(self._on_end, self)


def _make_poll(connection: Connection) -> Any:
    """Return an object whose poll() tells what the kernel knows of a socket; None: this platform has none.

    Its descriptor may be another's once the connection is closed, but then the loop has heard of that.
    """
    transport = connection.transport
    with contextlib.suppress(AttributeError, OSError):
        made, hangup = select.poll(), getattr(select, "POLLRDHUP", 0)
        # TLS has messages of its own, such as session tickets, which are no answers.
        events = hangup if transport.get_extra_info("sslcontext") is not None else hangup | select.POLLIN
        made.register(transport.get_extra_info("socket").fileno(), events)
        return made
    return None


class PooledProtocol(StreamProtocol):
    """The protocol of such a connection, which hears what is to be known of its peer."""

    __slots__ = ("is_suspect", "pooled")

    def __init__(self, on_connect: Callable[[Connection], None] | None = None) -> None:
        super().__init__(on_connect)
        self.is_suspect: bool = False
        self.pooled: PooledConnection | None = None

    def peer_suspect(self, health: Health) -> None:
        self.is_suspect = True

    def peer_recovered(self, health: Health) -> None:
        self.is_suspect = False

    def eof_received(self) -> bool:
        self._tell()
        return super().eof_received()

    def peer_dead(self, error: DeadPeerError) -> None:
        self._tell()
        super().peer_dead(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._tell()
        self.pooled = None  # a reference cycle
        super().connection_lost(exc)

    def _tell(self) -> None:
        if self.pooled is not None:
            self.pooled.on_end()
