"""`SocketState`: the keepalive options that a socket has."""

from __future__ import annotations

import dataclasses
import math

from .units import format_seconds, format_times

__all__ = ["SocketState"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SocketState:
    """The keepalive options of a socket, as read from the kernel. Times in seconds; None where unknown.

    `idle`, `interval` and `count` are set even when keepalive is off, and take effect when it is switched on.
    `user_timeout` is None when the option is not set: sent data may then stay unacknowledged for as long as the kernel
    retransmits it.
    """

    enabled: bool
    idle: float | None = None
    interval: float | None = None
    count: int | None = None
    user_timeout: float | None = None

    @property
    def times(self) -> tuple[float | None, float | None, int | None]:
        """Idle, interval and count."""
        return self.idle, self.interval, self.count

    @property
    def detection_time(self) -> float | None:
        """Seconds until a dead idle peer is detected; `math.inf` when keepalive is off, None when a time is unknown."""
        if not self.enabled:
            return math.inf
        if self.idle is None or self.interval is None or self.count is None:
            return None
        return self.idle + self.interval * self.count

    def __str__(self) -> str:
        if not self.enabled and self.user_timeout is None:
            return "off"
        times = format_times(*self.times, "?") if self.enabled else "off"
        return times if self.user_timeout is None else f"{times},user_timeout={format_seconds(self.user_timeout)}"
