"""The times by which a connection is watched, from its policy or from what its socket has.

Rules kept here: plain functions on plain data, no I/O and no clock.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..policy import Keepalive, SocketState

__all__ = ["Limits", "limits_of", "limits_of_state"]


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The times by which a connection is watched, in seconds: a policy whose times are all known."""

    idle: float
    interval: float
    count: int
    user_timeout: float | None
    """How long the peer may be silent while data is in flight or its window is shut; None: the kernel decides."""

    @property
    def first_look(self) -> float:
        """Seconds of silence after which a connection is checked.

        The first probe goes out after `idle`; half an interval is time for its answer.
        """
        late = self.idle + self.interval / 2
        return late if self.user_timeout is None else min(late, self.user_timeout)

    @property
    def least_asking(self) -> float:
        """The least time over which a peer must have been asked: questions that were all asked at once prove nothing.

        What remains of the user timeout after the first check is enough, and so are one and a half intervals.
        """
        bound = self.user_timeout or 0.0
        rest = bound - self.first_look
        return min(rest if rest > 0 else bound, 1.5 * self.interval)

    def longest_backoff(self, *, under_shrunk_window: bool = False) -> float | None:
        """The longest time between two of the kernel's questions that lets the user timeout hold; None: there is none.

        Not less than a seventh of it: the kernel itself gives up after tcp_retries2 (15) of them. Where a window has
        shrunk under a segment in flight, not less than half: there it gives up after two of the longest
        (net/ipv4/tcp_timer.c, tcp_rtx_probe0_timed_out). Not more than a third of it, else: two must fit.
        """
        bound = self.user_timeout
        if bound is None:
            return None
        return bound / 2 if under_shrunk_window else min(max(self.interval, bound / 7), bound / 3)


@functools.lru_cache(maxsize=256)
def limits_of(policy: Keepalive) -> Limits | None:
    """Return the limits of connections with a policy; None when it is off or leaves times to the system."""
    if not policy.enabled or policy.idle is None or policy.interval is None or policy.count is None:
        return None
    bound = policy.effective_user_timeout if policy.stalled == "keep" else None
    return Limits(policy.idle, policy.interval, policy.count, bound)


def limits_of_state(policy: Keepalive, state: SocketState) -> Limits | None:
    """Return the limits of a connection that another library made, from its socket's options; None: keepalive is off.

    With the policy's times, the policy decides. With other times, set by the application, those decide, and data
    in flight is bounded by their detection time unless the socket has a user timeout.
    """
    idle, interval, count = state.idle, state.interval, state.count
    if not state.enabled or idle is None or interval is None or count is None:
        return None
    filled = policy.filled(idle=idle, interval=interval, count=count) if policy.enabled else policy
    if (filled.idle, filled.interval, filled.count) == (idle, interval, count) and filled.enabled:
        return limits_of(filled)
    return Limits(idle, interval, count, None if state.user_timeout else idle + interval * count)
