"""The error watch: sockets registered for errors alone, in an epoll instance inside the loop's own.

It tells of what the loop does not: of a connection whose reading is paused, or whose peer has closed its half, the loop
takes the descriptor out of its epoll, and with it the news that the kernel has ended the connection.

Rules kept here: never level-triggered, which would wake the loop for ever; SO_ERROR is not read here, because that
takes the error away and the transport then reports a clean end.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable
from typing import Any

from .watched import WatchedConnection

__all__ = ["ErrorWatch", "bare"]


def bare(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """The methods of a loop without what kaio's own loop adds: kaio's own connections have their policy already."""
    return getattr(loop, "_kaio_bare", loop)


class ErrorWatch:
    """Sockets registered for errors only, in an epoll that the loop's own epoll watches; kqueue where there is none."""

    def __init__(self, loop: asyncio.AbstractEventLoop, report: Callable[[list[WatchedConnection]], None]) -> None:
        self._report = report
        self.connections: dict[int, WatchedConnection] = {}
        self._poll: Any = _Epoll() if hasattr(select, "epoll") else _Kqueue()
        try:
            bare(loop).add_reader(self._poll.fileno(), self._ready)
        except BaseException:
            self._poll.close()
            raise

    def add(self, fd: int, connection: WatchedConnection) -> None:
        """Register a connection. One that had the descriptor before is closed, and out of the poll by that."""
        self._poll.register(fd)
        self.connections[fd] = connection
        connection.watched_fd = fd

    def discard(self, connection: WatchedConnection) -> None:
        """Forget a connection. Its descriptor may be another one's by now, which stays."""
        if self.connections.get(connection.watched_fd) is connection:
            del self.connections[connection.watched_fd]
            self._poll.unregister(connection.watched_fd)
        connection.watched_fd = -1

    def close(self, loop: asyncio.AbstractEventLoop | None) -> None:
        if loop is not None and not loop.is_closed():
            bare(loop).remove_reader(self._poll.fileno())
        self._poll.close()

    def _ready(self) -> None:
        self._report([self.connections[fd] for fd in self._poll.ready() if fd in self.connections])


class _Epoll:
    """epoll(7): ERR and HUP are reported whatever was asked for, and edge-triggered they come once."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.fileno = self._epoll.fileno
        self.close = self._epoll.close

    def register(self, fd: int) -> None:
        try:
            self._epoll.register(fd, select.EPOLLET)
        except FileExistsError:
            self._epoll.modify(fd, select.EPOLLET)

    def unregister(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # closed already, and out of the epoll by that
            self._epoll.unregister(fd)

    def ready(self) -> list[int]:
        return [fd for fd, _ in self._epoll.poll(0)]


class _Kqueue:
    """kqueue(2), never run: a read filter whose low-water mark no data reaches fires on the end alone."""

    def __init__(self) -> None:
        self._select: Any = select  # typed for the platform that this is
        self._kqueue: Any = self._select.kqueue()
        self.fileno = self._kqueue.fileno
        self.close = self._kqueue.close

    def _control(self, fd: int, flags: int) -> None:
        lowat = 0x0001  # NOTE_LOWAT
        event = self._select.kevent(fd, self._select.KQ_FILTER_READ, flags, lowat, 2**31 - 1)
        self._kqueue.control([event], 0)

    def register(self, fd: int) -> None:
        self._control(fd, self._select.KQ_EV_ADD | self._select.KQ_EV_CLEAR)

    def unregister(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            self._control(fd, self._select.KQ_EV_DELETE)

    def ready(self) -> list[int]:
        return [event.ident for event in self._kqueue.control(None, 1024, 0)]
