"""For other people's tests: a peer that really plays dead.

    with kaio.testing.blackhole(their_end):
        ...  # our end's kernel now probes in vain

A pytest plugin, installed with kaio, offers it as the fixture `blackhole`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .filters import blackhole, lacking

__all__ = ["blackhole", "lacking"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: pytest imports this package in every run, for its plugin."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import filters  # noqa: PLC0415

    globals().update(blackhole=filters.blackhole, lacking=filters.lacking)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
