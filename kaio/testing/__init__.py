"""For other people's tests: a peer that really plays dead.

    with kaio.testing.blackhole(their_end):
        ...  # our end's kernel now probes in vain

A pytest plugin, installed with kaio, offers it as the fixture `blackhole`.
"""

from __future__ import annotations

from .blackhole import blackhole, lacking

__all__ = ["blackhole", "lacking"]
