"""Who connected, and when the death of each was reported: lines on standard output, written when nothing is timed."""

from __future__ import annotations

import time
from typing import Any, Final

__all__ = ["connected", "died", "finish"]

_reports: Final[dict[int, int]] = {}
_alive: Final[set[int]] = set()


def connected(transport: Any) -> int:
    """Tell the client's port and our descriptor of it; return the port, by which the connection is known."""
    port = int(transport.get_extra_info("peername")[1])
    _alive.add(port)
    print(port, transport.get_extra_info("socket").fileno(), flush=True)
    return port


def died(port: int) -> None:
    """The death of the peer was reported just now. Only the first report counts; with the last, an empty line."""
    at = time.monotonic_ns()
    if port in _alive:
        _alive.discard(port)
        _reports[port] = at
        if not _alive:
            print(flush=True)


def finish() -> None:
    """Tell all moments, on the clock of `time.monotonic_ns`."""
    for port, at in _reports.items():
        print(port, at)
