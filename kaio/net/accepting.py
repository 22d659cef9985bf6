"""Accepting connections: what a listener does with its sockets once they are bound.

There are two ways. On asyncio's selector loops the accept loop is kaio's own (`AcceptLoop`), because theirs calls the
exception handler once for every free place in the queue when descriptors run out. Elsewhere the loop accepts
(`LoopServers`): uvloop in C, Windows' Proactor by completion ports. uvloop closes what it has no descriptor for and
tells nobody; kaio logs it when the last descriptor is given away.

Rules kept here: a connection that cannot be set up costs only itself. An accepted socket has inherited the policy and
is not touched, except where the platform does not inherit, and for connections that were in the queue before the
listening socket had the policy.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl as ssl_module
from typing import Any, Final, TypedDict

from ..addresses import Address, UnixAddress
from ..errors import KaioError
from ..kernel.options import platform
from ..kernel.sockets import apply_or_warn
from ..monitor.error_watch import bare
from .endpoints import AttachingFactory, Endpoint, Handshake, ProtocolFactory, Terms
from .exhaustion import Exhaustion

__all__ = ["AcceptLoop", "AcceptTls", "Acceptor", "LoopServers", "make_acceptor"]

logger: Final = logging.getLogger("kaio")

_AT_ONCE: Final = 128  # connections that are accepted before the loop does something else
_LONGEST_QUEUE: Final = 65536  # net.core.somaxconn is rarely more
_RETRY: Final = 0.25  # seconds between attempts to accept while descriptors are used up


class AcceptTls(TypedDict, total=False):
    """The arguments about TLS of asyncio's functions that accept; empty without TLS."""

    ssl: ssl_module.SSLContext
    ssl_handshake_timeout: float | None
    ssl_shutdown_timeout: float | None


class Acceptor:
    """What both ways to accept have in common: accepting one connection, and setting it up."""

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint, address: Address, tls: AcceptTls) -> None:
        self._loop = loop
        self._bare_loop = bare(loop)
        self._endpoint = endpoint
        self._address = address
        self._tls = tls
        self._exhaustion = Exhaustion(address)
        self._inherits = platform.INHERITS  # whether an accepted socket has its policy already

    async def start(self, sock: socket.socket, backlog: int) -> None:
        """Listen, and accept connections. Raises OSError."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop accepting. The sockets are their owner's to close."""
        raise NotImplementedError

    def accept_queued(self, sock: socket.socket) -> None:
        """Accept the connections in the queue. Some may have come before the socket had its policy: each gets it."""
        for _ in range(_LONGEST_QUEUE):
            if not self._accept_one(sock, covered=False):
                break
        if self._exhaustion.is_active:
            self._inherits = False  # some of them are still in the queue

    def _accept_one(self, sock: socket.socket, *, covered: bool) -> bool:
        """Accept a connection; return False when none is in the queue or none can be accepted now."""
        try:
            conn, _ = sock.accept()
        except BlockingIOError:
            if self._exhaustion.is_active:  # not before the queue is empty, or each free descriptor would be logged
                self._exhaustion.end()
            return False
        except (InterruptedError, ConnectionAbortedError):
            return False
        except OSError as exc:
            self._accept_failed(sock, exc)
            return False
        conn.setblocking(False)
        endpoint = self._endpoint
        terms = endpoint.terms
        if terms.policy is not None and not covered:
            try:
                apply_or_warn(conn, terms.policy, explicit=terms.explicit)
            except KaioError as exc:  # closed by its peer already, most likely
                logger.debug("%s: %s", self._address, exc)
        task = self._loop.create_task(self._set_up(conn, terms, endpoint.make))
        endpoint.setup_tasks.add(task)
        task.add_done_callback(functools.partial(_set_up_done, endpoint, conn))
        return True

    def _accept_failed(self, sock: socket.socket, exc: OSError) -> None:
        self._exhaustion.begin(exc)

    async def _set_up(self, conn: socket.socket, terms: Terms, make: AttachingFactory | None) -> None:
        """Make the protocol and the transport of an accepted connection, with its TLS handshake."""
        assert make is not None
        try:
            protocol = make(terms)
        except Exception:
            logger.exception("%s: the protocol factory failed for an accepted connection", self._address)
            conn.close()
            return
        try:
            await self._bare_loop.connect_accepted_socket(lambda: protocol, conn, **self._tls)
        except (OSError, asyncio.CancelledError) as exc:
            logger.debug("%s: an accepted connection ended before it was set up: %r", self._address, exc)
        except Exception:
            logger.exception("%s: an accepted connection could not be set up", self._address)


def _set_up_done(endpoint: Endpoint, conn: socket.socket, task: asyncio.Task[None]) -> None:
    endpoint.setup_tasks.discard(task)
    if task.cancelled():  # before its first step: nobody else has the socket
        conn.close()
    if endpoint.make is None:  # closed, and somebody may wait for the last to end
        endpoint.check_empty()


class AcceptLoop(Acceptor):
    """kaio's own accept loop, on loops that have `add_reader`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint, address: Address, tls: AcceptTls) -> None:
        super().__init__(loop, endpoint, address, tls)
        self._sockets: list[socket.socket] = []
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}  # sockets that wait for free descriptors

    async def start(self, sock: socket.socket, backlog: int) -> None:
        sock.listen(backlog)
        self._sockets.append(sock)
        self._bare_loop.add_reader(sock, self._accept, sock)

    def close(self) -> None:
        for handle in self._retries.values():
            handle.cancel()
        self._retries.clear()
        for sock in self._sockets:
            if sock.fileno() >= 0 and not self._loop.is_closed():
                self._bare_loop.remove_reader(sock)
        self._sockets.clear()

    def _accept(self, sock: socket.socket) -> None:
        """Accept what is in the queue of a listening socket that is readable."""
        for _ in range(_AT_ONCE):
            if not self._accept_one(sock, covered=self._inherits):
                return

    def _accept_failed(self, sock: socket.socket, exc: OSError) -> None:
        """Stop listening for a while: a socket with a full queue would wake the loop in every turn."""
        super()._accept_failed(sock, exc)
        if sock not in self._retries:
            self._bare_loop.remove_reader(sock)
            self._retries[sock] = self._loop.call_later(_RETRY, self._retry, sock)

    def _retry(self, sock: socket.socket) -> None:
        del self._retries[sock]
        self._bare_loop.add_reader(sock, self._accept, sock)


class LoopServers(Acceptor):
    """The loop's own servers, on loops that accept better than kaio could."""

    def __init__(self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint, address: Address, tls: AcceptTls) -> None:
        super().__init__(loop, endpoint, address, tls)
        self._servers: list[asyncio.AbstractServer] = []
        endpoint.by_hand = not platform.INHERITS

    async def start(self, sock: socket.socket, backlog: int) -> None:
        factory = self._make_factory()
        if isinstance(self._address, UnixAddress):
            server = await self._loop.create_unix_server(factory, sock=sock, backlog=backlog, **self._tls)
        else:
            server = await self._bare_loop.create_server(factory, sock=sock, backlog=backlog, **self._tls)
        self._servers.append(server)
        if self._endpoint.make is None:  # closed meanwhile
            self.close()

    def close(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()

    def _make_factory(self) -> ProtocolFactory:
        loop, endpoint, exhaustion = self._loop, self._endpoint, self._exhaustion
        live, make, has_tls = endpoint.live, endpoint.make, bool(self._tls)
        assert make is not None
        exhaustion.start_counting()

        def factory() -> asyncio.BaseProtocol:
            if len(live) >= exhaustion.count_at:
                exhaustion.count(len(live), loop.time())
            try:
                return make(Handshake(endpoint.terms) if has_tls else endpoint.terms)
            except Exception:  # uvloop would stop listening
                logger.exception("%s: the protocol factory failed for an accepted connection", self._address)
                return _Aborting()

        return factory


class _Aborting(asyncio.Protocol):
    """Aborts a connection whose own protocol could not be made."""

    def connection_made(self, transport: Any) -> None:
        transport.abort()


def make_acceptor(loop: asyncio.AbstractEventLoop, endpoint: Endpoint, address: Address, tls: AcceptTls) -> Acceptor:
    """Choose how connections are accepted on a loop."""
    kind = LoopServers if _loop_accepts(loop) else AcceptLoop
    return kind(loop, endpoint, address, tls)


def _loop_accepts(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether accepting is better left to the loop, or possible only there."""
    if isinstance(loop, asyncio.SelectorEventLoop):
        return False
    if platform.INHERITS:
        return True
    try:
        loop.remove_reader(-1)
    except NotImplementedError:
        return True  # Proactor
    except (OSError, ValueError):
        pass
    return False
