"""All TCP sockets of this process: a report of whose options they have, and a sweep that gives them the policy.

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
        """Sockets without keepalive, or with the system's two hours."""
        return tuple(row for row in self.rows if row.standing is Standing.UNCOVERED)

    def __str__(self) -> str:
        lines = [("fd", "local", "peer", "keepalive", "standing", "why"), *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        counted = [f"{sum(row.standing is each for row in self.rows)} {each.value}" for each in Standing]
        head = f"kaio: {len(self.rows)} TCP sockets under the policy {self.policy}: {', '.join(counted)}"
        table = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join((head, *(line.rstrip() for line in (table if self.rows else ()))))


def survey(policy: Keepalive) -> Report:
    """Report on every TCP socket of this process; change nothing. Raises `KeepaliveError` where there is no /proc."""
    return Report(policy, tuple(filter(None, (_row(found, policy) for found in descriptors()))))


def sweep(keepalive: KeepaliveArg = None) -> Report:
    """Give the policy to every TCP socket of this process, whoever opened it.

    This reaches sockets that no event loop handles: those of C libraries, of threads, of blocking code. Options set by
    the application are never changed. No monitor watches these sockets, so data in flight is bounded by stalled="drop"
    alone; `kaio run` sweeps periodically, and bounds it.

    Returns a report on all of them. Raises `PolicyError`; `KeepaliveError` on systems without /proc.
    """
    policy = as_policy(keepalive)
    for found in descriptors():
        try:
            if is_open(found):
                adopt(found, policy)
        except KeepaliveError as exc:
            if found.fileno() >= 0:
                logger.warning("cannot apply the keepalive policy %s: %s", policy, exc.strerror)
        except OSError:  # closed meanwhile
            continue
    return survey(policy)


def is_open(sock: SocketLike) -> bool:
    """Return whether a TCP socket is connecting, connected or listening: not new, and not closed."""
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
