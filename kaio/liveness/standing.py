"""Sockets that others make: whose options they have, and giving them the policy where nobody chose.

Rules kept here: what the application chose wins, as a whole and not option by option: keepalive on, and any time
different from the system's, and the socket keeps all that it has. Keepalive alone, without times, gets the policy. A
socket is judged by what the kernel says of it, never by who made it.
"""

from __future__ import annotations

import enum
from collections import Counter
from typing import Final

from ..kernel.options import SocketLike, platform
from ..kernel.sockets import apply, system_state, wanted
from ..policy import Keepalive, SocketState

__all__ = ["Standing", "adopt", "has_own_times", "standing", "tally"]


class Standing(enum.StrEnum):
    """Whose options a socket has."""

    POLICY = "policy"
    """It has the policy's times."""
    OWN = "own"
    """Keepalive is on with a time that is not the system's: the application chose, and all of it stands."""
    UNCOVERED = "uncovered"
    """Keepalive is off, or on with the system's two hours."""


def has_own_times(state: SocketState, system: tuple[float | None, float | None, int | None]) -> bool:
    """Whether the application has chosen times: keepalive is on, and any time differs from the system's."""
    return state.enabled and state.times != system


def standing(sock: SocketLike, policy: Keepalive) -> tuple[Standing, SocketState]:
    """Whose options a TCP socket has, and which. Raises OSError, `KeepaliveError`."""
    state = platform.read(sock)
    if not policy.enabled:
        chosen = has_own_times(state, system_state(sock).times)
        return Standing.OWN if chosen else Standing.POLICY, state
    if not state.enabled:
        return Standing.UNCOVERED, state
    if state.times == wanted(policy, sock).times:
        return Standing.POLICY, state
    return Standing.OWN if has_own_times(state, system_state(sock).times) else Standing.UNCOVERED, state


tally: Final[Counter[Standing]] = Counter()
"""How many sockets were judged in this process, by whose options they have now; those that inherit theirs are not."""


def adopt(sock: SocketLike, policy: Keepalive) -> tuple[Standing, SocketState]:
    """Give a TCP socket the policy unless the application chose for it. Raises OSError, `KeepaliveError`."""
    found, state = standing(sock, policy)
    if found is Standing.UNCOVERED:
        found, state = Standing.POLICY, apply(sock, policy)
    tally[found] += 1
    return found, state
