"""Types and limits of a policy's fields."""

from __future__ import annotations

import enum
from typing import Final, Literal, TypeAlias

__all__ = ["AUTO", "MAX_COUNT", "MAX_SECONDS", "MAX_USER_TIMEOUT_MS", "Auto", "Stalled"]

# Linux, include/net/tcp.h: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT; the user timeout is an int of ms.
MAX_SECONDS: Final = 32767
MAX_COUNT: Final = 127
MAX_USER_TIMEOUT_MS: Final = 2**31 - 1


class Auto(enum.Enum):
    """The type of `AUTO`."""

    AUTO = "auto"

    def __repr__(self) -> str:
        return "AUTO"


AUTO: Final = Auto.AUTO
"""A user timeout equal to the policy's detection time."""

Stalled: TypeAlias = Literal["keep", "drop"]
"""What happens to a peer that is alive but accepts no data for the user timeout."""
