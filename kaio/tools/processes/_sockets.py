"""The options of a process's TCP sockets, and the detection times that follow from them.

Rules kept here: options are read from the kernel each time, and never cached; a socket with several descriptors is
listed once.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import socket
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from ...kernel.options import platform
from ...kernel.tcpinfo import TcpInfo, TcpState
from ...liveness.standing import has_own_times
from ...policy import SocketState
from ..procfs import all_pids, threads
from ..sysctls import Defaults
from ._access import Process, ProcessError
from ._system import Systems, network_of
from ._watched import watched

__all__ = ["COVERED_WITHIN", "ProcessSocket", "Survey", "processes", "read", "sockets", "survey", "uncovered"]

COVERED_WITHIN: Final = 3600.0
"""The longest time in seconds until a dead idle peer is detected, for a socket to count as covered.

Chosen times are usually below this; the system's default of two hours and eleven minutes is above.
"""

_Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int]

_SO_COOKIE: Final = 57
_IPPROTO_MPTCP: Final = 262  # socket.IPPROTO_MPTCP is not in every Python


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSocket:
    """A TCP socket of a running process, at the time of reading."""

    pid: int
    fd: int
    """The descriptor in that process; the lowest if there are several."""
    inode: int
    """Identifies the socket, also in other processes that share it."""
    family: socket.AddressFamily
    mptcp: bool
    """Multipath TCP, which has no user timeout."""
    local: _Address
    """The local address, as from getsockname()."""
    peer: _Address | None
    """The peer's address, as from getpeername(); None if not connected."""
    listening: bool
    state: SocketState
    """The five options."""
    tcp_state: int
    """A `TcpState`, or the number of a state that newer kernels may add."""
    info: TcpInfo | None
    """TCP_INFO; None if the kernel does not provide it."""
    system: Defaults
    """The kernel's defaults in its network namespace."""
    cookie: int = 0
    """The kernel's number of the socket, never used again before the next boot (SO_COOKIE); 0 before Linux 4.12."""
    network: int = 0
    """The kernel's number of its network namespace (SO_NETNS_COOKIE); 0 before Linux 5.14."""
    watched: bool = False
    """Whether kaio's monitor in that process watches it, as the process reports."""
    monitor_bound: float | None = None
    """The monitor's bound on unacknowledged data in seconds, as the process reports; None: only the kernel's bounds."""

    @property
    def chosen(self) -> bool:
        """Whether the program has set its own times: keepalive is on, and any time differs from the system's.

        Neither SO_KEEPALIVE alone nor a user timeout alone counts.
        """
        system = self.system
        return has_own_times(self.state, (system.idle, system.interval, system.count))

    @property
    def idle_detection(self) -> float:
        """Seconds until a dead peer is detected while the connection is idle; `math.inf`: never.

        A user timeout replaces the count, and is checked when a probe is due (net/ipv4/tcp_timer.c).
        """
        state = self.state
        if not state.enabled or state.idle is None or state.interval is None or state.count is None:
            return math.inf
        if state.idle < 0 or state.interval < 0:  # a namespace's defaults may be; the kernel takes them for years
            return math.inf
        intervals = state.count
        if state.user_timeout is not None:
            if not state.interval:
                return max(state.idle, state.user_timeout)
            intervals = max(1, math.ceil((state.user_timeout - state.idle) / state.interval))
        return state.idle + state.interval * intervals

    @property
    def in_flight_detection(self) -> float:
        """Seconds until a dead peer is detected while sent data is unacknowledged, when no keepalive probes are sent.

        Without a user timeout, the shortest time of the kernel's retransmissions, or the bound of kaio's monitor if
        that is shorter. Timeouts within other programs cannot be seen from outside.
        """
        return min(self.monitor_bound or math.inf, self.state.user_timeout or self.system.unacknowledged_time)

    @property
    def window_shut_detection(self) -> float:
        """Seconds until a dead peer with a shut window is detected. With a user timeout, a live one is dropped too.

        The kernel limits the number of window probes, however long the user timeout is (net/ipv4/tcp_timer.c).
        """
        return min(self.in_flight_detection, self.system.unacknowledged_time)

    @property
    def one_lost_probe_kills(self) -> bool:
        """Whether one lost probe ends the connection, because of the user timeout (forbidden by RFC 9293 3.8.4)."""
        state = self.state
        if not state.enabled or state.user_timeout is None or state.idle is None or state.interval is None:
            return False
        return state.count != 1 and state.user_timeout <= state.idle + state.interval

    @property
    def covered(self) -> bool:
        """Whether a dead idle peer is detected within an hour, and one lost probe does not end the connection."""
        return self.idle_detection <= COVERED_WITHIN and not self.one_lost_probe_kills


def sockets(pid: int) -> list[ProcessSocket]:
    """List all TCP sockets of a process by descriptor: connections, listening sockets, and unconnected ones.

    Each is duplicated for the microseconds that reading takes. Raises `ProcessError`.
    """
    with Process(pid) as process:
        return read(process, Systems(), watched(pid))


def processes() -> list[int]:
    """List the processes that have TCP sockets and can be read."""
    return sorted({found.pid for found in survey().sockets})


class Survey(NamedTuple):
    """The TCP sockets of several processes."""

    sockets: list[ProcessSocket]
    processes: int
    """How many processes were read."""
    refused: list[ProcessError]
    """The processes that could not be read."""
    unreadable: list[str]
    """Single sockets that could not be read, each with the reason."""


def survey(pids: Iterable[int] | None = None) -> Survey:
    """List the TCP sockets of these processes, by default all, as far as they can be read.

    A process of those given that does not exist is among the refused ones.
    """
    result = Survey([], 0, [], [])
    number = 0
    systems = Systems()
    for pid in all_pids() if pids is None else pids:
        if pids is None and _has_no_memory(pid):
            continue
        try:
            with Process(pid) as process:
                result.sockets.extend(read(process, systems, watched(pid)))
                result.unreadable.extend(process.unreadable)
                number += 1
        except ProcessError as exc:
            if pids is not None or exc.errno != errno.ESRCH:  # else it has exited in the meantime
                result.refused.append(exc)
    return result._replace(processes=number)


def uncovered(found: Iterable[ProcessSocket], *, sets_own_times: bool = False) -> list[ProcessSocket]:
    """Select the sockets of a process that need coverage and have none.

    An unconnected socket has no peer yet. A listening socket counts because accepted connections inherit its options,
    unless the program has covered all the connections that it accepted there. Without any, `sets_own_times` says
    whether the program is known to cover them.
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
        and not (one.listening and accepted.get(one.local[1], sets_own_times))
    ]


def read(
    process: Process, systems: Systems, monitored: Mapping[int, float | None] = MappingProxyType({})
) -> list[ProcessSocket]:
    """Read the TCP sockets of a process, some of which its own monitor watches. Raises `ProcessError`.

    A socket that cannot be read costs itself only: it is listed in `unreadable` of the process.
    """
    found = []
    process.unreadable.clear()
    for inode, fd in sorted(process.sockets().items(), key=lambda item: item[1]):
        sock = process.duplicate(fd, inode)
        if sock is None:
            continue
        with sock:
            try:
                found.append(_read_one(process.pid, fd, inode, sock, systems, monitored))
            except OSError as exc:
                process.unreadable.append(f"process {process.pid}, descriptor {fd}: {exc.strerror or exc}")
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
        cookie=_cookie(sock),
        network=network_of(sock),
        watched=inode in monitored,
        monitor_bound=monitored.get(inode),
    )


def _cookie(sock: socket.socket) -> int:
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
    except OSError:
        return 0


def _peer(sock: socket.socket) -> _Address | None:
    try:
        peer: _Address = sock.getpeername()
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:
            return None
        raise
    return peer


def _info(sock: socket.socket) -> TcpInfo | None:
    try:
        return platform.tcp_info(sock)
    except OSError:  # MPTCP before Linux 5.16
        return None


def _has_no_memory(pid: int) -> bool:
    """Whether it is a kernel thread or has exited, and so has no sockets (proc(5): statm).

    A process whose first thread alone has ended looks like that too, but has more threads.
    """
    try:
        with open(f"/proc/{pid}/statm", encoding="utf-8") as file:
            return file.read().startswith("0 ") and len(threads(pid)) == 1
    except OSError:
        return False
