"""Accepting connections: what a listener does with its sockets once they are bound.

There are two ways. `AcceptLoop` is kaio's own accept loop: on asyncio's selector loops, because theirs calls the
exception handler once for every free place in the queue when descriptors run out; and wherever a connection is looked
at before its protocol is made. `LoopServers` has the loop accept: uvloop in C, Windows' Proactor by completion ports.
uvloop's accept costs half of ours, but it knows no limit, and closes what it has no descriptor for without a word; so
near a limit, and while descriptors are few, the accept loop takes over.

Rules kept here: a connection that cannot be set up costs only itself. An accepted socket has inherited the policy and
is not touched, except where the platform does not inherit, and for connections that were in the queue before the
listening socket had the policy. What may not be accepted waits in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl as ssl_module
import sys
from collections.abc import Iterable
from typing import Any, Final, TypedDict

from ..addresses import Address
from ..errors import KaioError, format_address
from ..kernel.options import platform
from ..kernel.sockets import apply_or_warn
from ..monitor.error_watch import bare
from .endpoints import Arrival, AttachingFactory, Endpoint, Handshake, ProtocolFactory, Terms
from .exhaustion import Exhaustion, free_descriptors
from .gate import Gate, peer_key
from .proxied import receive_header
from .proxy_protocol import ProxyError, ProxyProtocol

__all__ = ["AcceptLoop", "AcceptOptions", "AcceptTls", "LoopServers", "make_acceptor"]

logger: Final = logging.getLogger("kaio")

_AT_ONCE: Final = 128  # connections that are accepted before the loop does something else
_LONGEST_QUEUE: Final = 65536  # net.core.somaxconn is rarely more
_RETRY: Final = 0.25  # seconds between attempts to accept while descriptors are used up
_SETTLED: Final = 0.1  # seconds after which a limit that was reached is logged
_FEW: Final = 128  # free descriptors, or connections up to the limit, at which kaio accepts in the loop's place
_PAUSE: Final = 1.0  # seconds between two checks whether the loop may accept again


class AcceptTls(TypedDict, total=False):
    """The arguments about TLS of asyncio's functions that accept; empty without TLS."""

    ssl: ssl_module.SSLContext
    ssl_handshake_timeout: float | None
    ssl_shutdown_timeout: float | None


class AcceptOptions:
    """How a listener accepts. The listener changes it, and new connections follow."""

    __slots__ = ("handshake_timeout", "proxy_protocol", "tls")

    def __init__(self, tls: AcceptTls, handshake_timeout: float, proxy_protocol: ProxyProtocol | None) -> None:
        self.tls: AcceptTls = tls
        self.handshake_timeout: float = handshake_timeout  # for the PROXY header; that of TLS is in `tls`
        self.proxy_protocol: ProxyProtocol | None = proxy_protocol


class AcceptLoop:
    """kaio's own accept loop, on loops that have `add_reader`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint, address: Address, options: AcceptOptions
    ) -> None:
        assert endpoint.gate is not None
        self._loop = loop
        self._bare_loop = bare(loop)
        self._endpoint = endpoint
        self._gate: Gate = endpoint.gate
        self._address = address
        self._options = options
        self._exhaustion = Exhaustion(address)
        self._untrusted = 0  # connections that were refused since that was logged
        self._untrusted_after = 0.0  # the loop's time before which it is not logged again
        self._inherits = platform.INHERITS  # whether an accepted socket has its policy already
        self._sockets: list[socket.socket] = []
        self._is_full = False  # and does not accept
        self._log_timer: asyncio.TimerHandle | None = None
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}  # sockets that wait for free descriptors

    async def start(self, sock: socket.socket, backlog: int) -> None:
        """Listen, and accept connections. Raises OSError."""
        sock.listen(backlog)
        self._sockets.append(sock)
        self._start_reading([sock])

    def close(self) -> None:
        """Stop accepting. The sockets are their owner's to close."""
        if self._log_timer is not None:
            self._log_timer.cancel()
        for handle in self._retries.values():
            handle.cancel()
        self._retries.clear()
        self._stop_reading()
        self._sockets.clear()

    def restart(self) -> None:
        """The options or the limit have changed."""
        if self._is_full:
            self._endpoint.on_leave = None
            self._resume()

    def _start_reading(self, sockets: Iterable[socket.socket]) -> None:
        for sock in sockets:
            if sock not in self._retries and sock.fileno() >= 0 and not self._loop.is_closed():
                self._bare_loop.add_reader(sock, self._accept, sock)

    def _stop_reading(self) -> None:
        for sock in self._sockets:
            if sock.fileno() >= 0 and not self._loop.is_closed():
                self._bare_loop.remove_reader(sock)

    def _accept(self, sock: socket.socket) -> None:
        """Accept what is in the queue of a listening socket that is readable."""
        for _ in range(_AT_ONCE):
            if self._gate.is_full():
                self._pause()
                return
            if not self._accept_one(sock, covered=self._inherits):
                return

    # -- as many as may be

    def _pause(self) -> None:
        """Stop accepting until there is room. A connection that is being made counts twice for a moment."""
        self._is_full = True
        self._stop_reading()
        self._gate.wait_for_room(self._resume)
        if self._log_timer is None:
            self._log_timer = self._loop.call_later(_SETTLED, self._log_limit)

    def _resume(self) -> None:
        self._is_full = False
        self._start_reading(self._sockets)

    def _log_limit(self) -> None:
        """Log that the limit is reached, and look again whether it still is, as long as there was any trouble."""
        self._log_timer = None
        self._gate.log_reached()
        self._gate.log_ended()
        if self._gate.is_reached and self._sockets:
            self._log_timer = self._loop.call_later(_PAUSE, self._log_limit)

    # -- no descriptors

    def _accept_failed(self, sock: socket.socket, exc: OSError) -> None:
        """Stop listening for a while: a socket with a full queue would wake the loop in every turn."""
        self._exhaustion.begin(exc)
        if sock not in self._retries:
            self._bare_loop.remove_reader(sock)
            self._retries[sock] = self._loop.call_later(_RETRY, self._retry, sock)

    def _retry(self, sock: socket.socket) -> None:
        del self._retries[sock]
        if not self._is_full:
            self._start_reading([sock])

    # -- one connection

    def accept_queued(self, sock: socket.socket) -> None:
        """Accept the connections in the queue. Some may have come before the socket had its policy: each gets it."""
        for _ in range(_LONGEST_QUEUE):
            if self._gate.is_full() or not self._accept_one(sock, covered=False):
                break
        if self._exhaustion.is_active or self._gate.is_full():
            self._inherits = False  # some of them are still in the queue

    def _accept_one(self, sock: socket.socket, *, covered: bool) -> bool:
        """Accept a connection; return False when none is in the queue or none can be accepted now."""
        try:
            conn, peername = sock.accept()
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
        arrival, is_trusted = None, False
        if _looks(self._options, self._gate):
            proxy = self._options.proxy_protocol
            is_trusted = proxy is not None and proxy.is_trusted(peername)
            if proxy is not None and not is_trusted and proxy.mode == "require":
                self._log_untrusted(peername)
                conn.close()
                return True
            arrival = Arrival(terms, None, None)
            if not is_trusted and not self._enter(arrival, peername):
                conn.close()
                return True
        if terms.policy is not None and not covered:
            try:
                apply_or_warn(conn, terms.policy, explicit=terms.explicit)
            except KaioError as exc:  # closed by its peer already, most likely
                logger.debug("%s: %s", self._address, exc)
        make = endpoint.make
        if is_trusted:
            assert arrival is not None
            setting_up = self._set_up_proxied(conn, peername, arrival, make)
        else:
            setting_up = self._set_up(conn, terms if arrival is None else arrival, make, self._options.tls)
        task = self._loop.create_task(setting_up)
        endpoint.setup_tasks.add(task)
        task.add_done_callback(functools.partial(_set_up_done, endpoint, conn, arrival))
        return True

    def _enter(self, arrival: Arrival, peername: Any) -> bool:
        """Count a connection among those of its peer; return False when it has as many as it may."""
        key = peer_key(peername) if self._gate.max_per_peer is not None else None
        if key is not None:
            if not self._gate.enter(key):
                return False
            arrival.key = key
        return True

    async def _set_up_proxied(
        self, conn: socket.socket, proxy: Any, arrival: Arrival, make: AttachingFactory | None
    ) -> None:
        """Read the header that a proxy sends first, then set the connection up."""
        options, began = self._options, self._loop.time()
        assert options.proxy_protocol is not None
        try:
            async with asyncio.timeout(options.handshake_timeout):
                header = await receive_header(self._bare_loop, conn, options.proxy_protocol)
        except (ProxyError, TimeoutError, OSError, EOFError) as exc:
            conn.close()
            if isinstance(exc, TimeoutError):
                exc = TimeoutError(f"no PROXY header within {options.handshake_timeout:g} s")
            self._log_no_header(proxy, exc)
            return
        except BaseException:
            conn.close()
            raise
        source = None if header is None else header.source
        arrival.header = header
        if not self._enter(arrival, source or proxy):
            conn.close()
            return
        tls = options.tls
        if tls:
            left = options.handshake_timeout - (self._loop.time() - began)
            tls = tls.copy()
            tls["ssl_handshake_timeout"] = max(0.1, left)
        await self._set_up(conn, arrival, make, tls)

    def _log_untrusted(self, peername: Any) -> None:
        """Log that a connection was refused, once a second at most: anybody may try."""
        self._untrusted += 1
        if self._loop.time() >= self._untrusted_after:
            who = format_address(peername)
            others = f", and {self._untrusted - 1} others before" if self._untrusted > 1 else ""
            logger.warning("%s: %s is not trusted to send a PROXY header%s; closed", self._address, who, others)
            self._untrusted = 0
            self._untrusted_after = self._loop.time() + _PAUSE

    def _log_no_header(self, proxy: Any, exc: Exception) -> None:
        """Health checks of load balancers connect and close: that is no mistake."""
        level = logging.DEBUG if isinstance(exc, (EOFError, ConnectionResetError)) else logging.WARNING
        logger.log(level, "%s: a connection from %s was closed: %s", self._address, format_address(proxy), exc)

    async def _set_up(
        self, conn: socket.socket, terms: Terms | Arrival, make: AttachingFactory | None, tls: AcceptTls
    ) -> None:
        """Make the protocol and the transport of an accepted connection, with its TLS handshake."""
        assert make is not None
        try:
            protocol = make(terms)
        except Exception:
            logger.exception("%s: the protocol factory failed for an accepted connection", self._address)
            conn.close()
            return
        try:
            await self._bare_loop.connect_accepted_socket(lambda: protocol, conn, **tls)
        except (OSError, asyncio.CancelledError) as exc:
            logger.debug("%s: an accepted connection ended before it was set up: %r", self._address, exc)
        except Exception:
            logger.exception("%s: an accepted connection could not be set up", self._address)


def _set_up_done(endpoint: Endpoint, conn: socket.socket, arrival: Arrival | None, task: asyncio.Task[None]) -> None:
    endpoint.setup_tasks.discard(task)
    if task.cancelled():  # before its first step: nobody else has the socket
        conn.close()
    if arrival is not None and not arrival.is_made:
        arrival.leave()
    endpoint.left()


class LoopServers(AcceptLoop):
    """The loop's own servers, on loops that accept better than kaio could; near a limit the accept loop.

    A server has a duplicate of the listening socket, so that it can be closed while the queue stays.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint, address: Address, options: AcceptOptions
    ) -> None:
        super().__init__(loop, endpoint, address, options)
        self._servers: list[asyncio.AbstractServer] = []
        self._starting: asyncio.Task[None] | None = None
        self._backlogs: dict[socket.socket, int] = {}
        self._check_at = 0  # connections from which on limits and descriptors are looked at
        self._by_hand = False  # whether kaio accepts
        self._check_after = 0.0  # the loop's time before which it goes on accepting
        endpoint.by_hand = not platform.INHERITS

    async def start(self, sock: socket.socket, backlog: int) -> None:
        self._backlogs[sock] = backlog
        if self._by_hand or self._is_near():
            self._take_over()
            await super().start(sock, backlog)
        else:
            self._sockets.append(sock)
            await self._start_server(sock)

    async def _start_server(self, sock: socket.socket) -> None:
        factory, backlog, tls = self._make_factory(), self._backlogs[sock], self._options.tls
        twin = sock.dup() if _CAN_TAKE_OVER else sock
        try:
            if sock.family == _AF_UNIX:
                server = await self._create_unix_server(factory, sock=twin, backlog=backlog, **tls)
            else:
                server = await self._bare_loop.create_server(factory, sock=twin, backlog=backlog, **tls)
        except BaseException:
            if twin is not sock:
                twin.close()
            raise
        self._servers.append(server)
        if self._endpoint.make is None or self._by_hand:  # closed or taken over meanwhile
            self._close_servers()

    async def _create_unix_server(self, factory: ProtocolFactory, **options: Any) -> asyncio.AbstractServer:
        """Create a server that leaves the socket's path alone when it is closed: from Python 3.13 on it would not."""
        create: Any = self._loop.create_unix_server
        try:
            server = await create(factory, cleanup_socket=False, **options)
        except TypeError:  # a loop that does not know it
            server = await create(factory, **options)
        return server  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        self._close_servers()
        super().close()

    def restart(self) -> None:
        super().restart()
        if not self._by_hand:
            self._take_over()

    def _close_servers(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()

    def _make_factory(self) -> ProtocolFactory:
        endpoint = self._endpoint
        live, make, has_tls = endpoint.live, endpoint.make, bool(self._options.tls)
        assert make is not None

        def factory() -> asyncio.BaseProtocol:
            if len(live) + len(endpoint.handshakes) >= self._check_at and self._is_near():
                self._loop.call_soon(self._take_over)
            try:
                return make(Handshake(endpoint.terms) if has_tls else endpoint.terms)
            except Exception:  # uvloop would stop listening
                logger.exception("%s: the protocol factory failed for an accepted connection", self._address)
                return _Aborting()

        return factory

    # -- who accepts

    def _is_near(self, margins: int = 1) -> bool:
        """Return whether a limit, or the last descriptor, is near; else note when that is to be looked at again."""
        if not _CAN_TAKE_OVER:
            self._check_at = sys.maxsize
            return False
        count = self._gate.count()
        # A connection may cost its handler three descriptors more.
        left = (free_descriptors() - margins * _FEW) // 4
        limit = self._gate.max_connections
        if limit is not None:
            left = min(left, limit - count - margins * min(_FEW, 2 + limit // 8))
        self._check_at = count + max(1, left)
        return left <= 0

    def _take_over(self) -> None:
        """Accept in the loop's place."""
        if not self._by_hand:
            self._by_hand = True
            self._check_after = self._loop.time() + _PAUSE
            self._close_servers()
            self._start_reading(self._sockets)

    def _accept(self, sock: socket.socket) -> None:
        if self._loop.time() >= self._check_after:
            self._check_after = self._loop.time() + _PAUSE
            if self._starting is None and not self._is_near(2):
                self._starting = self._loop.create_task(self._hand_back())
                return
        super()._accept(sock)

    def _retry(self, sock: socket.socket) -> None:
        if self._by_hand:
            super()._retry(sock)
        else:  # the loop accepts again
            self._retries.pop(sock, None)

    async def _hand_back(self) -> None:
        """Have the loop accept again."""
        self._by_hand = False
        self._stop_reading()
        try:
            for sock in self._sockets:
                await self._start_server(sock)
        except OSError as exc:  # no descriptor for a duplicate
            logger.debug("%s: the loop cannot accept: %s", self._address, exc)
            self._take_over()
        finally:
            self._starting = None


_AF_UNIX: Final = getattr(socket, "AF_UNIX", None)  # Windows has none
_CAN_TAKE_OVER: Final = sys.platform != "win32"  # Proactor has no add_reader


class _Aborting(asyncio.Protocol):
    """Aborts a connection whose own protocol could not be made."""

    def connection_made(self, transport: Any) -> None:
        transport.abort()


def make_acceptor(
    loop: asyncio.AbstractEventLoop, endpoint: Endpoint, address: Address, options: AcceptOptions
) -> AcceptLoop:
    """Choose how connections are accepted on a loop."""
    assert endpoint.gate is not None
    kind = LoopServers if _loop_accepts(loop) and not _looks(options, endpoint.gate) else AcceptLoop
    return kind(loop, endpoint, address, options)


def _looks(options: AcceptOptions, gate: Gate) -> bool:
    """Return whether each connection is looked at before its protocol is made."""
    return options.proxy_protocol is not None or gate.max_per_peer is not None


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
