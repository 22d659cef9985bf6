"""What the TCP sockets of a process have, and what follows from it.

Rules kept here: what a socket has is the kernel's answer and nothing is remembered; each socket comes once, also where
several descriptors stand for it.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import socket
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from ...kernel.options import platform
from ...kernel.tcpinfo import TcpInfo, TcpState
from ...policy import SocketState
from ..sysctls import Defaults
from ._access import Process, ProcessError
from ._system import Systems
from ._watched import watched

__all__ = ["COVERED_WITHIN", "ProcessSocket", "processes", "read", "sockets", "survey", "uncovered"]

COVERED_WITHIN: Final = 3600.0
"""Seconds in which a dead idle peer must be found for a socket to count as covered.

Whoever chooses times stays below; the two hours and eleven minutes that systems come with, which amount to nothing,
are above.
"""

_IPPROTO_MPTCP: Final = 262  # socket.IPPROTO_MPTCP is not in every Python


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSocket:
    """A TCP socket of a running process, as the kernel had it at the time of reading."""

    pid: int
    fd: int
    """The process's own number for it; the lowest, where there are several."""
    inode: int
    """What tells sockets apart, also across the processes that share one."""
    family: socket.AddressFamily
    mptcp: bool
    """Multipath TCP, which has no user timeout."""
    local: Any
    """Its address, as getsockname() gives it."""
    peer: Any
    """The other end's, as getpeername() gives it; None while there is none."""
    listening: bool
    state: SocketState
    """The five options."""
    tcp_state: int
    """A `TcpState`, or a number that a newer kernel has."""
    info: TcpInfo | None
    """The kernel's TCP_INFO; None where it does not tell."""
    system: Defaults
    """What sockets have in its network namespace that were given nothing."""
    watched: bool = False
    """Whether a monitor of kaio's within the process watches it, as the process itself says."""
    monitor_bound: float | None = None
    """Seconds that the monitor lets data wait unanswered, as the process itself says; None: the kernel's own bounds."""

    @property
    def chosen(self) -> bool:
        """Whether the program set its own times: keepalive is on, and any time differs from the system's.

        Keepalive alone is no choice of times, and a user timeout alone none of keepalive.
        """
        state, system = self.state, self.system
        return state.enabled and state.times != (system.idle, system.interval, system.count)

    @property
    def idle_detection(self) -> float:
        """Seconds until a dead peer is found while the connection is idle; `math.inf`: never.

        A user timeout takes the place of the count, and is looked at when a probe is due (net/ipv4/tcp_timer.c).
        """
        state = self.state
        if not state.enabled or state.idle is None or state.interval is None or state.count is None:
            return math.inf
        intervals = state.count
        if state.user_timeout is not None:
            intervals = max(1, math.ceil((state.user_timeout - state.idle) / state.interval))
        return state.idle + state.interval * intervals

    @property
    def in_flight_detection(self) -> float:
        """Seconds until a dead peer is found while sent data is unacknowledged; no keepalive probes are sent then.

        Without a user timeout this is the least that the kernel's retransmissions take; kaio's monitor may be sooner.
        What other programs do of their own cannot be seen from outside.
        """
        return min(self.monitor_bound or math.inf, self.state.user_timeout or self.system.unacknowledged_time)

    @property
    def window_shut_detection(self) -> float:
        """Seconds until a dead peer is found whose window is shut. With a user timeout a live one is dropped, too.

        The kernel counts a window's probes, however long the user timeout is (net/ipv4/tcp_timer.c).
        """
        return min(self.in_flight_detection, self.system.unacknowledged_time)

    @property
    def one_lost_probe_kills(self) -> bool:
        """Whether the user timeout lets a single lost probe end the connection (forbidden by RFC 9293 3.8.4)."""
        state = self.state
        if not state.enabled or state.user_timeout is None or state.idle is None or state.interval is None:
            return False
        return state.count != 1 and state.user_timeout <= state.idle + state.interval

    @property
    def covered(self) -> bool:
        """Whether a dead idle peer is found within an hour, and a live one is not given up for one lost probe."""
        return self.idle_detection <= COVERED_WITHIN and not self.one_lost_probe_kills


def sockets(pid: int) -> list[ProcessSocket]:
    """Every TCP socket of a process, by descriptor: connections, listeners, and what is not connected yet.

    Each is had from the process for the microseconds that its reading takes. Raises `ProcessError`.
    """
    with Process(pid) as process:
        return read(process, Systems(), watched(pid))


def processes() -> list[int]:
    """The processes that have TCP sockets and may be read."""
    return sorted({found.pid for found in survey()[0]})


def survey() -> tuple[list[ProcessSocket], list[ProcessError]]:
    """The TCP sockets of every process that may be read, and why the others may not."""
    found: list[ProcessSocket] = []
    refused: list[ProcessError] = []
    systems = Systems()
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if _has_no_memory(pid):
            continue
        try:
            with Process(pid) as process:
                found += read(process, systems, watched(pid))
        except ProcessError as exc:
            if exc.errno != errno.ESRCH:  # ended meanwhile
                refused.append(exc)
    return found, refused


def uncovered(found: Iterable[ProcessSocket]) -> list[ProcessSocket]:
    """Those of some sockets that are uncovered, and that it matters for.

    A socket that is not connected has no peer yet. A listener speaks for what it will accept; where the program itself
    covers all that it has accepted there, that is no trouble.
    """
    found = list(found)
    accepted: dict[int, bool] = {}
    for one in found:
        if one.peer is not None:
            accepted[one.local[1]] = accepted.get(one.local[1], True) and one.covered
    return [
        one
        for one in found
        if not one.covered
        and one.tcp_state != TcpState.CLOSE
        and not (one.listening and accepted.get(one.local[1], False))
    ]


def read(
    process: Process, systems: Systems, monitored: Mapping[int, float | None] = MappingProxyType({})
) -> list[ProcessSocket]:
    """The TCP sockets of a process, of which its own monitor bounds some."""
    found = []
    for inode, fd in sorted(process.sockets().items(), key=lambda item: item[1]):
        sock = process.borrow(fd, inode)
        if sock is None:
            continue
        with sock:
            try:
                if platform.is_tcp(sock):
                    found.append(_read_one(process.pid, fd, inode, sock, systems, monitored))
            except OSError as exc:
                raise ProcessError(process.pid, exc.errno or errno.EIO, f"descriptor {fd}: {exc.strerror}") from exc
    return found


def _read_one(
    pid: int, fd: int, inode: int, sock: socket.socket, systems: Systems, monitored: Mapping[int, float | None]
) -> ProcessSocket:
    listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    info = _info(sock)
    return ProcessSocket(
        pid=pid,
        fd=fd,
        inode=inode,
        family=socket.AddressFamily(sock.family),
        mptcp=sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == _IPPROTO_MPTCP,
        local=sock.getsockname(),
        peer=_peer(sock),
        listening=listening,
        state=platform.read(sock),
        tcp_state=TcpState.LISTEN if listening else TcpState.CLOSE if info is None else info.state,
        info=info,
        system=systems.of(sock),
        watched=inode in monitored,
        monitor_bound=monitored.get(inode),
    )


def _peer(sock: socket.socket) -> Any:
    try:
        return sock.getpeername()
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:
            return None
        raise


def _info(sock: socket.socket) -> TcpInfo | None:
    try:
        return platform.tcp_info(sock)
    except OSError:  # MPTCP before Linux 5.16
        return None


def _has_no_memory(pid: int) -> bool:
    """Kernel threads have none, and processes that have ended: neither have sockets (proc(5): statm)."""
    try:
        with open(f"/proc/{pid}/statm", encoding="utf-8") as file:
            return file.read().startswith("0 ")
    except OSError:
        return False
