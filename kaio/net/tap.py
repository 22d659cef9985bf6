"""Seeing the data that a protocol gets, without a cost for those that nobody looks at.

The loops call a protocol's `data_received` directly. So the class of the one protocol that is looked at is replaced, by
a subclass of it that shows the data first; everything else about the object stays as it is.
"""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["tap"]


def tap(protocol: Any) -> bool:
    """Let a protocol show its data to its transport (`on_data`); return False if it does already. Raises TypeError."""
    kind = type(protocol)
    if isinstance(protocol, asyncio.BufferedProtocol) or not hasattr(protocol, "data_received"):
        raise TypeError(f"{kind.__name__} is a BufferedProtocol: its data cannot be seen, which this heartbeat needs")
    tapped = kind.__dict__.get("_kaio_tapped")
    if tapped is None:
        kind._kaio_tapped = tapped = _make(kind)
    protocol.__class__ = tapped
    return tapped is not kind


def _make(kind: Any) -> Any:
    """Make the subclass, which is kept in the class."""

    def data_received(self: Any, data: bytes) -> None:
        self._kaio.on_data(data)
        kind.data_received(self, data)

    body = {"__slots__": (), "__module__": kind.__module__, "data_received": data_received}
    made = type(kind)(kind.__name__, (kind,), body)
    made._kaio_tapped = made
    return made
