"""The sockets of one loop: the policy for each, and the monitor for the connections among them.

Rules kept here: options set by the application are never changed. A connection is registered with the monitor only
after some seconds, with the others made meanwhile, by a look at the loop's own table of transports: most connections of
a busy server do not live that long, and nothing is done for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final

from ..errors import KeepaliveError
from ..kernel.descriptors import Descriptor
from ..kernel.options import SocketLike, platform
from ..kernel.queues import is_listening
from ..kernel.sockets import logger
from ..kernel.tcpinfo import TcpState
from ..liveness.limits import limits_of
from ..liveness.standing import Standing, adopt
from ..monitor.monitor import Monitor, get_monitor
from ..monitor.wheel import TURN
from ..net.dialing import connect_bound
from ..net.internals import protocols_above, transports_of
from ..net.protocols import Watched
from ..policy import Keepalive, SocketState
from .foreign import ForeignDescriptor, ForeignTransport, read_state

__all__ = ["Coverage"]

_REGISTERED_AFTER: Final = 5.0  # seconds, at most, until a connection is registered with the monitor


class Coverage:
    """The sockets of one loop: gives them the policy, and registers their connections with the monitor."""

    def __init__(self, loop: asyncio.AbstractEventLoop, policy: Keepalive) -> None:
        self._loop = weakref.ref(loop)
        self.policy: Keepalive = policy
        self.active: bool = policy.enabled
        self.connect_bound: float | None = connect_bound(policy)
        self._seen: dict[int, int] = {}  # descriptors that add_reader and its kin have met, and their inodes
        # The loop's own table: descriptor -> weak reference.
        self._transports: Mapping[int, weakref.ref[asyncio.Transport]] | None = None
        self._descriptors: list[tuple[Descriptor, SocketState]] = []  # not registered with the monitor yet
        # What was done about each descriptor.
        self._known: dict[int, ForeignTransport | ForeignDescriptor | _NotWatched] = {}
        self.up_to_date: bool = self.active  # whether nothing was made since the last registration
        self._since = 0.0  # when the first of it was made
        self._warned = False

    # -- options

    def apply_policy(self, sock: SocketLike) -> tuple[Standing, SocketState] | None:
        """Give a socket the policy unless the application has set options; None when it is not TCP or is closed."""
        try:
            if not platform.is_tcp(sock):
                return None
            return adopt(sock, self.policy)
        except KeepaliveError as exc:
            if sock.fileno() >= 0 and not self._warned:  # once: thousands would say the same
                self._warned = True
                logger.warning("cannot apply the keepalive policy %s: %s", self.policy, exc.strerror)
        except (OSError, ValueError, AttributeError, TypeError):  # closed, or no socket at all: the base says so
            pass
        return None

    def accept_queue_length(self, sock: SocketLike) -> int:
        """Return the length of the accept queue of a listening socket: those connections have the options it had."""
        try:
            if platform.is_tcp(sock) and is_listening(sock):
                return platform.tcp_info(sock).unacked or 0  # net/ipv4/tcp.c: tcpi_unacked is sk_ack_backlog there
        except (OSError, KeepaliveError, AttributeError, TypeError, ValueError):  # no socket at all: the base says so
            pass
        return 0

    @contextlib.asynccontextmanager
    async def bound_connect(self, sock: SocketLike) -> AsyncIterator[None]:
        """Bound connect() within the block by the policy's user timeout, unless the application has set one."""
        found = self.apply_policy(sock)
        bound = self.connect_bound
        if found is None or found[0] is not Standing.POLICY or found[1].user_timeout or bound is None:
            yield
            return
        try:
            bounded = platform.set_user_timeout(sock, bound)
        except KeepaliveError:  # MPTCP
            bounded = False
        try:
            yield
        finally:
            if bounded:
                with contextlib.suppress(OSError, KeepaliveError, ValueError):
                    platform.set_user_timeout(sock, None)

    # -- first sight

    def on_descriptor(self, fileobj: Any) -> None:
        """A library waits for a descriptor with add_reader or the like: cover it when it is new."""
        try:
            fd = fileobj if type(fileobj) is int else fileobj.fileno()
            inode = os.fstat(fd).st_ino
        except (OSError, AttributeError, TypeError, ValueError):  # the loop says what is wrong
            return
        if type(fd) is int and self._seen.get(fd) != inode:
            self._seen[fd] = inode
            self._cover_descriptor(fd, inode)

    def _cover_descriptor(self, fd: int, inode: int) -> None:
        """Give the policy to a descriptor that is new to the loop."""
        if not sys.platform.startswith("linux"):
            return
        try:
            descriptor = Descriptor(fd, inode)
            found = self.apply_policy(descriptor)
            if found is not None and not is_listening(descriptor):
                self._descriptors.append((descriptor, found[1]))
                self.on_connection()
        except OSError:  # a pipe, say
            return

    # -- the monitor

    def on_connection(self) -> None:
        """A connection was made: register it with the monitor later, if it still exists. Most of a server's do not."""
        loop = self._loop()
        if self.up_to_date and loop is not None:
            self.up_to_date = False
            self._since = loop.time()
            limits = limits_of(self.policy)
            delay = _REGISTERED_AFTER if limits is None else min(limits.first_look / 2, _REGISTERED_AFTER)
            loop.call_later(delay, self._register_all)

    def _register_all(self) -> None:
        loop = self._loop()
        if loop is None:
            return
        if self._transports is None:
            self._transports = transports_of(loop)
        for fd, known in self._known.copy().items():
            if known.ended:
                del self._known[fd]
        self.up_to_date = True
        self._run_in_turns(loop, self._registrations(loop, self._since))

    def _run_in_turns(self, loop: asyncio.AbstractEventLoop, steps: Iterator[None]) -> None:
        until = loop.time() + TURN
        for _ in steps:
            if loop.time() > until:
                loop.call_soon(self._run_in_turns, loop, steps)
                return

    def _registrations(self, loop: asyncio.AbstractEventLoop, since: float) -> Iterator[None]:
        """Transports first: a descriptor may belong to one by now."""
        monitor = get_monitor(loop)
        # A copy in one step: listing the items would make tuples, upon which the garbage collector may run, and remove
        # transports from the table.
        for fd, reference in dict(self._transports or {}).items():
            known, transport = self._known.get(fd), reference()
            if transport is not None and (known is None or not known.is_of(transport)):
                self._retire(known)
                self._register(fd, transport, monitor, since)
            del transport  # it is not to be kept alive while others have their turn
            yield
        descriptors, self._descriptors = self._descriptors, []
        for descriptor, state in descriptors:
            fd = descriptor.fileno()
            known = self._known.get(fd)
            if fd >= 0 and state.enabled and (known is None or known.ended or isinstance(known, ForeignDescriptor)):
                self._retire(known)
                monitor.watch(ForeignDescriptor(descriptor, self.policy, state, monitor, self._known, fd), since)
            yield

    def _register(self, fd: int, transport: asyncio.Transport, monitor: Monitor, since: float) -> None:
        self._known[fd] = _NotWatched(transport)
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # it has ended
            sock = transport.get_extra_info("socket")
            if (
                sock is not None
                and sock.fileno() >= 0
                and platform.is_tcp(sock)
                and not any(isinstance(each, Watched) for each in protocols_above(transport))
            ):
                state = read_state(sock, self.policy)
                if state.enabled and platform.tcp_info(sock).state != TcpState.CLOSE:
                    monitor.watch(ForeignTransport(transport, self.policy, state, monitor, self._known, fd), since)

    @staticmethod
    def _retire(known: ForeignTransport | ForeignDescriptor | _NotWatched | None) -> None:
        """The descriptor belongs to another connection now."""
        if isinstance(known, (ForeignTransport, ForeignDescriptor)):
            known.stop()


class _NotWatched:
    """A transport that is not registered: it is not TCP, or is kaio's own, which the monitor knows already."""

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = weakref.ref(transport)

    @property
    def ended(self) -> bool:
        return self._transport() is None

    def is_of(self, transport: object) -> bool:
        return self._transport() is transport
