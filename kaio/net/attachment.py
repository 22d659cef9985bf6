"""What kaio attaches to a protocol of its own: the terms of its connection first, the transport in their place later.

Rules kept here: a protocol that is none of kaio's is left as it is. A protocol has one connection at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from .endpoints import REFUSED, Arrival, Handshake, Terms
from .protocols import Watched
from .transports import WatchedTransport

__all__ = ["attached_transport", "attaching", "refuse"]

P = TypeVar("P", bound=asyncio.BaseProtocol)


def attaching(factory: Callable[[], P]) -> Callable[[Terms | Handshake | Arrival], P]:
    """Make a protocol factory one that takes terms, and attaches them to each protocol that it makes."""

    def make_new(terms: Terms | Handshake | Arrival) -> P:
        protocol = factory()
        assert isinstance(protocol, Watched)
        protocol._kaio = terms
        return protocol

    def make(terms: Terms | Handshake | Arrival) -> P:
        protocol = factory()
        if isinstance(protocol, Watched):
            present = getattr(protocol, "_kaio", None)
            if isinstance(present, WatchedTransport) and not present.ended:
                raise RuntimeError(f"{protocol!r} has a connection already: the factory must make a protocol for each")
            protocol._kaio = terms
        return protocol

    # A class makes a new object each time, which has no connection yet.
    return make_new if isinstance(factory, type) and issubclass(factory, Watched) else make


def attached_transport(protocol: asyncio.BaseProtocol) -> WatchedTransport | None:
    """The transport that kaio has given a protocol; None before connection_made, and for a protocol not of kaio's."""
    attached = getattr(protocol, "_kaio", None) if isinstance(protocol, Watched) else None
    return attached if isinstance(attached, WatchedTransport) else None


def refuse(protocol: asyncio.BaseProtocol) -> None:
    """Have the connection of a protocol aborted as soon as it is made."""
    if isinstance(protocol, Watched):
        protocol._kaio = REFUSED
