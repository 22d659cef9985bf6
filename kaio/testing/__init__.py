"""For other people's tests: a peer that really plays dead, and their own suite on kaio's loop.

    with kaio.testing.blackhole(their_end):
        ...  # our end's kernel now probes in vain

The pytest plugin that is installed with kaio has a fixture `blackhole`, and the option `--kaio-loop`.
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
