"""The limits of a listener: how many connections it may have, and how many of them one peer.

Rules kept here: a listener that is full stops accepting, and the kernel's queue holds the others. One log record when a
limit is reached, and one when there is room again for a tenth of it, so that a server that stays full does not fill the
log. What was never limited costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import Any, Final, TypeAlias

from ..addresses import Address
from .endpoints import Endpoint

__all__ = ["Gate", "PeerKey", "check_limit", "peer_key"]

logger: Final = logging.getLogger("kaio")

PeerKey: TypeAlias = str | int
"""What counts as one peer: an IPv4 address, or the first 64 bits of an IPv6 address."""


class Gate:
    """Counts the connections of one endpoint, and says whether another may be accepted."""

    def __init__(
        self, address: Address, endpoint: Endpoint, max_connections: int | None, max_per_peer: int | None
    ) -> None:
        self._address = address
        self._endpoint = endpoint
        self.max_connections = max_connections
        self.max_per_peer = max_per_peer
        self._peers: dict[PeerKey, int] = {}  # open connections of each peer, where they are limited
        self._refused: set[PeerKey] = set()  # peers that have reached their limit, and were logged
        self.is_reached: bool = False  # it was logged, and has not ended

    # -- all connections

    def count(self) -> int:
        """Return how many connections are open or about to be."""
        endpoint = self._endpoint
        return len(endpoint.live) + len(endpoint.setup_tasks) + len(endpoint.handshakes)

    def is_full(self) -> bool:
        """Return whether no further connection may be accepted."""
        return self.max_connections is not None and self.count() >= self.max_connections

    def wait_for_room(self, resume: Callable[[], None]) -> None:
        """Call `resume` once a connection has ended and there is room."""

        def on_leave() -> None:
            if not self.is_full():
                self._endpoint.on_leave = None
                resume()

        self._endpoint.on_leave = on_leave

    def log_reached(self) -> None:
        """Log that the limit is reached, unless that was logged."""
        if not self.is_reached and self.is_full():
            self.is_reached = True
            logger.warning(
                "%s: %d connections, as many as max_connections=%d allows; new ones wait in the queue",
                self._address,
                self.count(),
                self.max_connections,
            )

    def log_ended(self) -> None:
        """Log that the limit is no longer reached, once a tenth of it is free."""
        if self.is_reached and (self.max_connections is None or self.count() <= self.max_connections * 0.9):
            self.is_reached = False
            logger.info("%s: below max_connections again", self._address)

    # -- those of one peer

    def enter(self, key: PeerKey) -> bool:
        """Count a connection of a peer; return False, and count nothing, when it has as many as it may."""
        has = self._peers.get(key, 0)
        if self.max_per_peer is not None and has >= self.max_per_peer:
            if key not in self._refused:
                self._refused.add(key)
                logger.warning(
                    "%s: %s has %d connections, as many as max_connections_per_peer=%d allows; further ones are closed",
                    self._address,
                    _name_of(key),
                    has,
                    self.max_per_peer,
                )
            return False
        self._peers[key] = has + 1
        return True

    def leave(self, key: PeerKey) -> None:
        """A connection of a peer has ended."""
        has = self._peers[key] - 1
        if has:
            self._peers[key] = has
        else:
            del self._peers[key]
        if key in self._refused and (self.max_per_peer is None or has <= self.max_per_peer * 0.9):
            self._refused.discard(key)
            logger.info("%s: %s is below max_connections_per_peer again", self._address, _name_of(key))


def peer_key(peername: Any) -> PeerKey | None:
    """Return what a peer is counted by: an IPv4 address as text, an IPv6 /64 as a number, None for any other."""
    if not isinstance(peername, tuple) or not peername:
        return None
    host = str(peername[0])
    if ":" not in host:
        return host
    address = IPv6Address(host.partition("%")[0])
    return int(address) >> 64 if address.ipv4_mapped is None else str(address.ipv4_mapped)


def _name_of(key: PeerKey) -> str:
    return key if isinstance(key, str) else f"{IPv6Address(key << 64)}/64"


def check_limit(name: str, value: Any) -> int | None:
    """Return a limit that was given by a caller. Raises TypeError, ValueError."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int or None, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}={value!r}: must be at least 1, or None for no limit")
    return value
