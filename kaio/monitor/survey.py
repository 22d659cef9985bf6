"""All TCP sockets of this process: a survey of whose options they have, and sweeps that give them the policy.

Rules kept here: they reach what never touches an event loop, and judge as the loop does (`liveness.standing`).
"""

from __future__ import annotations

import dataclasses

from ..errors import KeepaliveError, format_address
from ..kernel.descriptors import Descriptor, descriptors
from ..kernel.options import SocketLike, platform
from ..kernel.sockets import logger
from ..kernel.tcpinfo import TcpState
from ..liveness.standing import Standing, adopt, standing
from ..policy import Keepalive, KeepaliveArg, SocketState, as_policy

__all__ = ["Report", "Row", "is_open", "survey", "sweep"]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A TCP socket of this process."""

    fd: int
    local: str
    peer: str
    """Empty where there is none."""
    listening: bool
    standing: Standing
    state: SocketState
    """What the kernel has for it."""
    why: str
    """In words: why it is covered, or why it is not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The TCP sockets of this process, and whose options they have. Its text is a table."""

    policy: Keepalive
    rows: tuple[Row, ...]

    @property
    def uncovered(self) -> tuple[Row, ...]:
        """Those whose peer may be dead for hours before anybody hears of it."""
        return tuple(row for row in self.rows if row.standing is Standing.UNCOVERED)

    def __str__(self) -> str:
        lines = [("fd", "local", "peer", "keepalive", "standing", "why"), *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        counted = [f"{sum(row.standing is each for row in self.rows)} {each.value}" for each in Standing]
        head = f"kaio: {len(self.rows)} TCP sockets under the policy {self.policy}: {', '.join(counted)}"
        table = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join((head, *(line.rstrip() for line in (table if self.rows else ()))))


def survey(policy: Keepalive) -> Report:
    """Look at every TCP socket of this process, and change nothing. Raises `KeepaliveError` where there is no /proc."""
    return Report(policy, tuple(filter(None, (_row(found, policy) for found in descriptors()))))


def sweep(keepalive: KeepaliveArg = None) -> Report:
    """Give the policy to every TCP socket of this process, whoever opened it, unless the application chose for it.

    It reaches what never touches an event loop: C cores, threads, libraries that block. What the application chose
    itself stands. No monitor watches what it covers, so that data in flight is bounded by stalled="drop" alone; `kaio
    run` sweeps again and again, and bounds it.

    Returns what was found, as it is now. Raises `PolicyError`; `KeepaliveError` on systems without /proc.
    """
    policy = as_policy(keepalive)
    for found in descriptors():
        try:
            if is_open(found):
                adopt(found, policy)
        except KeepaliveError as exc:
            if found.fileno() >= 0:
                logger.warning("the policy %s cannot be had: %s", policy, exc.strerror)
        except OSError:  # closed meanwhile
            continue
    return survey(policy)


def is_open(sock: SocketLike) -> bool:
    """Whether a TCP socket connects, is connected or listens; its owner has not done with it, nor just made it."""
    return platform.tcp_info(sock).state not in (TcpState.CLOSE, TcpState.TIME_WAIT)


def _cells(row: Row) -> tuple[str, ...]:
    peer = row.peer or ("(listening)" if row.listening else "")
    return str(row.fd), row.local, peer, str(row.state), row.standing.value, row.why


def _row(found: Descriptor, policy: Keepalive) -> Row | None:
    try:
        whose, state = standing(found, policy)
        listening = found.is_listening
        local, peer = (_address(found, name) for name in ("getsockname", "getpeername"))
    except (OSError, KeepaliveError):  # closed meanwhile
        return None
    fd = found.fileno()
    if fd < 0:
        return None
    return Row(fd, local, peer, listening, whose, state, _why(whose, state, policy))


def _address(found: Descriptor, method: str) -> str:
    try:
        return format_address(getattr(found, method)())
    except OSError:
        return ""


def _why(whose: Standing, state: SocketState, policy: Keepalive) -> str:
    if whose is Standing.OWN:
        return "the application chose its times"
    if whose is Standing.POLICY:
        return "it has the policy" if policy.enabled else "the policy is off"
    return "keepalive is on with the system's times" if state.enabled else "keepalive is off"
