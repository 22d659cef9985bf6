"""The TCP connections of this machine as its kernel lists them (sock_diag(7)), with the processes that hold them.

    _answer     what the kernel answers, decoded
    _diag       asks the kernel
    _holders    which process holds which socket

Rules kept here: looking changes nothing, and takes no permission but to see whose a socket is; ten thousand connections
can be looked at every second, so what few ask for is made when it is asked for; no terminal. Linux only, and needs
pyroute2: `lacking` says what is missing. Not to be used where an event loop is running: pyroute2 runs one of its own.
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

_MAPPED: Final = bytes(10) + b"\xff\xff"  # an IPv4 address in IPv6's clothes (RFC 4291 2.5.5.2)


class Timer(enum.IntEnum):
    """What the kernel waits for on a connection (net/ipv4/inet_diag.c)."""

    RETRANSMIT = 1
    KEEPALIVE = 2
    TIME_WAIT = 3
    WINDOW_PROBE = 4


class TcpConnection(NamedTuple):
    """A connection as the kernel had it when it was asked. Times are seconds."""

    answer: Answer
    """What the kernel said."""
    holders: tuple[Holder, ...]
    """The processes that hold it; none when they may not be seen, or when no process does."""
    health: Health

    @property
    def inode(self) -> int:
        """What tells sockets apart; 0 for one that no process holds: closed and not done yet, or not accepted yet."""
        return self.answer.inode

    @property
    def uid(self) -> int:
        """The user who opened it."""
        return self.answer.uid

    @property
    def state(self) -> int:
        """A `TcpState`, or a number that a newer kernel has."""
        return self.answer.state

    @property
    def timer(self) -> Timer | None:
        """What the kernel waits for."""
        return _TIMERS.get(self.answer.timer)

    @property
    def expires(self) -> float | None:
        """Seconds until the timer goes off."""
        return self.answer.expires / 1000 if self.answer.timer in _TIMERS else None

    @property
    def local(self) -> str:
        """Its own address."""
        return _address(self.answer.family, self.answer.source, self.answer.ports[:2])

    @property
    def peer(self) -> str:
        """The other end's address."""
        return _address(self.answer.family, self.answer.destination, self.answer.ports[2:])

    @property
    def unanswered(self) -> int:
        """Probes and retransmissions that went unanswered so far."""
        return (self.health.probes or 0) + (self.health.retransmits or 0)

    @property
    def silence(self) -> float | None:
        """Seconds since the peer was last heard; None when it never was."""
        return None if self.state == TcpState.SYN_SENT else self.health.silence

    @property
    def unsent(self) -> int:
        """Bytes that were not sent yet."""
        return self.health.unsent or 0

    @property
    def unacknowledged(self) -> int:
        """Bytes that were sent and are not acknowledged."""
        return max(0, self.answer.queued - self.unsent)


@functools.lru_cache(maxsize=65536)
def _address(family: int, address: bytes, port: bytes) -> str:
    if family == socket.AF_INET:
        address = address[:4]
    elif address.startswith(_MAPPED):
        family, address = socket.AF_INET, address[12:]
    return format_address((socket.inet_ntop(family, address), int.from_bytes(port)))


class Connections:
    """Looks at connections again and again: those of this network, or those that some processes hold.

    Processes in another network namespace are looked at there, too. Raises OSError with what is `lacking`, and
    `ProcessError` for a process that there is not, or that may not be looked into.
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
        """All connections as they are now, in the kernel's order. Listeners and TIME_WAIT are not among them."""
        unwanted = self._holders.nobodys if self.pids else ()
        answers = [answer for kernel in self._kernels for answer in kernel.ask(unwanted)]
        self._holders.look_for({answer.inode for answer in answers})
        held = self._holders.held
        return [
            TcpConnection(answer, held.get(answer.inode, ()), judge(TcpInfo.from_bytes(answer.info)))
            for answer in answers
            if not self.pids or answer.inode in held
        ]

    def ended(self) -> list[int]:
        """Which of the processes that were asked for are no more."""
        return [pid for pid in self.pids if not os.path.exists(f"/proc/{pid}")]

    def close(self) -> None:
        """Let go of the kernel. Harmless when it is done."""
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
    """Why connections cannot be looked at here, in one line; None when they can."""
    if not sys.platform.startswith("linux"):
        return f"connections are listed by Linux's sock_diag; {sys.platform} has none"
    if importlib.util.find_spec("pyroute2") is None:
        return "connections are listed by way of pyroute2: pip install 'kaio-net[cli]'"
    return None


def _networks(pids: Iterable[int]) -> Sequence[str | None]:
    """Our own network namespace, for which None stands, and those of some processes."""
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
    """Why a process cannot be looked at."""
    if exc.errno in (errno.ENOENT, errno.ESRCH):
        return ProcessError(pid, errno.ESRCH, "there is no such process")
    return ProcessError(pid, exc.errno or errno.EIO, f"may not be looked into ({exc.strerror}): run as root")
