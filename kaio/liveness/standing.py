"""Whose keepalive options a socket has, and giving it the policy where the application set none.

Rules kept here: options set by the application are never changed, all of them together: with keepalive on and any time
that differs from the system's, a socket keeps what it has. Keepalive alone, without times, gets the policy. A socket is
judged by what the kernel reports, never by who made it.
"""

from __future__ import annotations

import enum
from collections import Counter
from typing import Final

from ..kernel.options import SocketLike, platform
from ..kernel.sockets import apply, system_state, target_state
from ..policy import Keepalive, SocketState

__all__ = ["Standing", "adopt", "has_own_times", "standing", "tally"]


class Standing(enum.StrEnum):
    """Whose options a socket has."""

    POLICY = "policy"
    """It has the policy's times."""
    OWN = "own"
    """Keepalive is on with a time that is not the system's: set by the application, and never changed."""
    UNCOVERED = "uncovered"
    """Keepalive is off, or on with the system's two hours."""


def has_own_times(state: SocketState, system: tuple[float | None, float | None, int | None]) -> bool:
    """Whether the application has chosen times: keepalive is on, and any time differs from the system's."""
    return state.enabled and state.times != system


def standing(sock: SocketLike, policy: Keepalive) -> tuple[Standing, SocketState]:
    """Return whose options a TCP socket has, and the options. Raises OSError, `KeepaliveError`."""
    state = platform.read(sock)
    if not policy.enabled:
        chosen = has_own_times(state, system_state(sock).times)
        return Standing.OWN if chosen else Standing.POLICY, state
    if not state.enabled:
        return Standing.UNCOVERED, state
    if state.times == target_state(policy, sock).times:
        return Standing.POLICY, state
    return Standing.OWN if has_own_times(state, system_state(sock).times) else Standing.UNCOVERED, state


tally: Final[Counter[Standing]] = Counter()
"""Number of sockets judged in this process, by whose options they have; sockets that inherit theirs are not judged."""


def adopt(sock: SocketLike, policy: Keepalive) -> tuple[Standing, SocketState]:
    """Give a TCP socket the policy unless the application has set options. Raises OSError, `KeepaliveError`."""
    found, state = standing(sock, policy)
    if found is Standing.UNCOVERED:
        found, state = Standing.POLICY, apply(sock, policy)
    tally[found] += 1
    return found, state
