"""The TCP connections of this machine as the kernel lists them (sock_diag(7)), with the processes that hold them.

    _answer     decodes the kernel's reply
    _diag       sends the request
    _holders    which process holds which socket

Rules kept here: listing changes nothing, and needs no permission except to find other users' processes; it must be
possible to list ten thousand connections a second, so rarely used values are calculated on demand. Linux only, with
pyroute2: `lacking` says what is missing. Do not use it within a running event loop: pyroute2 runs its own.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import importlib.util
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple

from ...errors import format_address
from ...kernel.tcpinfo import TcpInfo, TcpState
from ...liveness.health import Health, judge
from ..processes import ProcessError
from ._answer import Answer
from ._holders import Holder, Holders

if TYPE_CHECKING:
    from ._diag import Diag

__all__ = ["Connections", "Holder", "TcpConnection", "Timer", "lacking"]

_MAPPED: Final = bytes(10) + b"\xff\xff"  # the prefix of IPv4-mapped IPv6 addresses (RFC 4291 2.5.5.2)


class Timer(enum.IntEnum):
    """A connection's active timer (net/ipv4/inet_diag.c)."""

    RETRANSMIT = 1
    KEEPALIVE = 2
    TIME_WAIT = 3
    WINDOW_PROBE = 4


class TcpConnection(NamedTuple):
    """A connection at the time of the sample. Times are in seconds."""

    answer: Answer
    """The decoded message."""
    holders: tuple[Holder, ...]
    """The processes that hold it; empty if there are none, or if they cannot be inspected."""
    health: Health

    @property
    def inode(self) -> int:
        """Identifies the socket; 0 if no process holds it: closed but not finished, or not accepted yet."""
        return self.answer.inode

    @property
    def uid(self) -> int:
        """The id of the user who opened it."""
        return self.answer.uid

    @property
    def state(self) -> int:
        """A `TcpState`, or the number of a state that newer kernels may add."""
        return self.answer.state

    @property
    def timer(self) -> Timer | None:
        """The active timer."""
        return _TIMERS.get(self.answer.timer)

    @property
    def expires(self) -> float | None:
        """Seconds until the timer expires."""
        return self.answer.expires / 1000 if self.answer.timer in _TIMERS else None

    @property
    def local(self) -> str:
        """The local address."""
        return _address(self.answer.family, self.answer.source, self.answer.ports[:2])

    @property
    def peer(self) -> str:
        """The peer's address."""
        return _address(self.answer.family, self.answer.destination, self.answer.ports[2:])

    @property
    def unanswered(self) -> int:
        """The number of probes and retransmissions that are unanswered."""
        return (self.health.probes or 0) + (self.health.retransmits or 0)

    @property
    def silence(self) -> float | None:
        """Seconds since anything was received from the peer; None while connecting."""
        return None if self.state == TcpState.SYN_SENT else self.health.silence

    @property
    def unsent(self) -> int:
        """Bytes that are not sent yet."""
        return self.health.unsent or 0

    @property
    def unacknowledged(self) -> int:
        """Bytes that are sent and not acknowledged."""
        return max(0, self.answer.queued - self.unsent)


@functools.lru_cache(maxsize=65536)
def _address(family: int, address: bytes, port: bytes) -> str:
    if family == socket.AF_INET:
        address = address[:4]
    elif address.startswith(_MAPPED):
        family, address = socket.AF_INET, address[12:]
    return format_address((socket.inet_ntop(family, address), int.from_bytes(port)))


class Connections:
    """Samples of the TCP connections of this network namespace, or of some processes.

    Connections of processes in other network namespaces are included. Raises OSError if something is `lacking`, and
    `ProcessError` for a process that does not exist or cannot be inspected.
    """

    def __init__(self, pids: Iterable[int] = ()) -> None:
        reason = lacking()
        if reason is not None:
            raise OSError(errno.ENOTSUP, reason)
        from ._diag import Diag  # noqa: PLC0415 - needs pyroute2

        self.pids: Sequence[int] = tuple(dict.fromkeys(pids))
        self._holders = Holders(self.pids)
        self._kernels: list[Diag] = []
        with contextlib.ExitStack() as undo:
            for network in _networks(self.pids):
                self._kernels.append(Diag(network))
                undo.callback(self._kernels[-1].close)
            undo.pop_all()

    def sample(self) -> list[TcpConnection]:
        """List the current connections in the kernel's order, without listening sockets and those in TIME_WAIT."""
        unwanted = self._holders.unheld if self.pids else ()
        answers = [answer for kernel in self._kernels for answer in kernel.ask(unwanted)]
        self._holders.look_for({answer.inode for answer in answers})
        held = self._holders.held
        return [
            TcpConnection(answer, held.get(answer.inode, ()), judge(TcpInfo.from_bytes(answer.info)))
            for answer in answers
            if not self.pids or answer.inode in held
        ]

    def ended(self) -> list[int]:
        """Return those of `pids` that have exited."""
        return [pid for pid in self.pids if not os.path.exists(f"/proc/{pid}")]

    def close(self) -> None:
        """Close the netlink sockets. Does nothing if they are closed."""
        while self._kernels:
            self._kernels.pop().close()

    def __enter__(self) -> Connections:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_TIMERS: Final = {int(timer): timer for timer in Timer}


def lacking() -> str | None:
    """Why connections cannot be listed on this system, in one line; None if they can be."""
    if not sys.platform.startswith("linux"):
        return f"listing connections needs Linux's sock_diag; this is {sys.platform}"
    if importlib.util.find_spec("pyroute2") is None:
        return "listing connections needs pyroute2: pip install 'kaio-net[cli]'"
    return None


def _networks(pids: Iterable[int]) -> Sequence[str | None]:
    """The paths of the network namespaces of some processes, and None for the current one."""
    found: dict[int, str | None] = {os.stat("/proc/thread-self/ns/net").st_ino: None}
    for pid in pids:
        path = f"/proc/{pid}/ns/net"
        try:
            inode = os.stat(path).st_ino
        except OSError as exc:
            raise _refused(pid, exc) from None
        found.setdefault(inode, path)
    return list(found.values())


def _refused(pid: int, exc: OSError) -> ProcessError:
    """The error for a process that cannot be inspected."""
    if exc.errno in (errno.ENOENT, errno.ESRCH):
        return ProcessError(pid, errno.ESRCH, "there is no such process")
    return ProcessError(pid, exc.errno or errno.EIO, f"cannot be inspected ({exc.strerror}): run as root")
