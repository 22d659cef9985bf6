"""What is put over an event loop, so that whatever a library opens or accepts through it gets the policy.

Rules kept here: the loop is its base to the letter, but for the options of TCP sockets and for how soon a death is
heard. Listening sockets get their options before they listen, so that what they accept costs nothing; outgoing ones
before they connect; a socket that a library made itself when the loop first sees its descriptor. What the application
chose itself stands (`standing`). Nothing is added to a message, and a connection is known to the monitor only once it
has lived for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..errors import KeepaliveError
from ..kernel.descriptors import Descriptor, is_listening
from ..kernel.options import SocketLike, platform
from ..kernel.sockets import logger
from ..kernel.tcpinfo import TcpState
from ..liveness.limits import limits_of
from ..liveness.standing import Standing, adopt
from ..monitor.monitor import Monitor, close_monitor, get_monitor
from ..monitor.wheel import TURN
from ..net.dialing import (
    Attempts,
    DialOptions,
    connect_bound,
    detach_if_closed,
    dial,
    find_route,
    has_scope,
    loses_scope,
    sock_connect,
    summarize,
    tls_arguments,
)
from ..net.internals import protocols_above, transports_of
from ..net.protocols import Watched
from ..policy import Keepalive, SocketState, as_policy
from .foreign import DescriptorLink, TransportLink, state_of

__all__ = ["Covering", "loop_class", "take_over"]

_INTRODUCTION: Final = 5.0  # seconds, at most, after which the monitor is told of a connection that still stands

if TYPE_CHECKING:
    _Base = asyncio.SelectorEventLoop
else:
    _Base = object


class _Cover:
    """What one loop knows of its sockets."""

    def __init__(self, loop: asyncio.AbstractEventLoop, policy: Keepalive) -> None:
        self._loop = weakref.ref(loop)
        self.policy: Keepalive = policy
        self.active: bool = policy.enabled
        self.connect_bound = connect_bound(policy)
        self._seen: dict[int, int] = {}  # descriptors that add_reader and its kin have met, and their inodes
        self._transports: Mapping[int, weakref.ref[asyncio.Transport]] | None = (
            None  # the loop's own table of them: descriptor -> weak reference
        )
        self._descriptors: list[tuple[Descriptor, SocketState]] = []  # met, and not yet known to the monitor
        self._known: dict[int, TransportLink | DescriptorLink | _Ignored] = {}  # by descriptor: who is known to it
        self.resting: bool = self.active  # whether nothing was made since the monitor was told last
        self._since = 0.0  # when the first of it was
        self._complained = False

    # -- options

    def adopt(self, sock: SocketLike) -> tuple[Standing, SocketState] | None:
        """Give a socket the policy, unless the application chose for it; None when it is not TCP or is closed."""
        try:
            if not platform.is_tcp(sock):
                return None
            return adopt(sock, self.policy)
        except KeepaliveError as exc:
            if sock.fileno() >= 0 and not self._complained:  # once: thousands would say the same
                self._complained = True
                logger.warning("the policy %s cannot be had: %s", self.policy, exc.strerror)
        except (OSError, ValueError, AttributeError, TypeError):  # closed, or no socket at all: the base says so
            pass
        return None

    def queued(self, sock: SocketLike) -> int:
        """How many connections wait at a listening socket: they have what it had when they came."""
        try:
            if platform.is_tcp(sock) and is_listening(sock):
                return platform.tcp_info(sock).unacked or 0  # net/ipv4/tcp.c: tcpi_unacked is sk_ack_backlog there
        except (OSError, KeepaliveError, AttributeError, TypeError, ValueError):  # no socket at all: the base says so
            pass
        return 0

    @contextlib.asynccontextmanager
    async def connecting(self, sock: SocketLike) -> AsyncIterator[None]:
        """Within the block, the policy's user timeout bounds the handshake, where the application has none."""
        found = self.adopt(sock)
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

    def sight(self, fileobj: Any) -> None:
        """A library waits for a socket by itself: cover it, if it was not seen before."""
        try:
            fd = fileobj if type(fileobj) is int else fileobj.fileno()
            inode = os.fstat(fd).st_ino
        except (OSError, AttributeError, TypeError, ValueError):  # the loop says what is wrong
            return
        if type(fd) is int and self._seen.get(fd) != inode:
            self._seen[fd] = inode
            self.meet(fd, inode)

    def meet(self, fd: int, inode: int) -> None:
        """Cover a descriptor that the loop has not seen."""
        if not sys.platform.startswith("linux"):
            return
        try:
            descriptor = Descriptor(fd, inode)
            found = self.adopt(descriptor)
            if found is not None and not is_listening(descriptor):
                self._descriptors.append((descriptor, found[1]))
                self.stir()
        except OSError:  # a pipe, say
            return

    # -- the monitor

    def stir(self) -> None:
        """A connection is made: in a while, tell the monitor of those that still stand. Most of a server's do not."""
        loop = self._loop()
        if self.resting and loop is not None:
            self.resting = False
            self._since = loop.time()
            limits = limits_of(self.policy)
            delay = _INTRODUCTION if limits is None else min(limits.first_look / 2, _INTRODUCTION)
            loop.call_later(delay, self._introduce_all)

    def _introduce_all(self) -> None:
        loop = self._loop()
        if loop is None:
            return
        if self._transports is None:
            self._transports = transports_of(loop)
        for fd in [fd for fd, link in self._known.items() if link.ended]:
            del self._known[fd]
        self.resting = True
        self._work_on(loop, self._introductions(loop, self._since))

    def _work_on(self, loop: asyncio.AbstractEventLoop, steps: Iterator[None]) -> None:
        until = loop.time() + TURN
        for _ in steps:
            if loop.time() > until:
                loop.call_soon(self._work_on, loop, steps)
                return

    def _introductions(self, loop: asyncio.AbstractEventLoop, since: float) -> Iterator[None]:
        """The transports first: a descriptor may have become one's meanwhile."""
        monitor = get_monitor(loop)
        for fd, reference in list((self._transports or {}).items()):
            known, transport = self._known.get(fd), reference()
            if transport is not None and (known is None or not known.is_of(transport)):
                self._forget(known)
                self._introduce(fd, transport, monitor, since)
            del transport  # it is not to be kept alive while others have their turn
            yield
        descriptors, self._descriptors = self._descriptors, []
        for descriptor, state in descriptors:
            fd = descriptor.fileno()
            known = self._known.get(fd)
            if fd >= 0 and state.enabled and (known is None or known.ended or isinstance(known, DescriptorLink)):
                self._forget(known)
                monitor.watch(DescriptorLink(descriptor, self.policy, state, monitor, self._known, fd), since)
            yield

    def _introduce(self, fd: int, transport: asyncio.Transport, monitor: Monitor, since: float) -> None:
        self._known[fd] = _Ignored(transport)
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # it has ended
            sock = transport.get_extra_info("socket")
            if (
                sock is not None
                and sock.fileno() >= 0
                and platform.is_tcp(sock)
                and not any(isinstance(each, Watched) for each in protocols_above(transport))
            ):
                state = state_of(sock, self.policy)
                if state.enabled and platform.tcp_info(sock).state != TcpState.CLOSE:
                    monitor.watch(TransportLink(transport, self.policy, state, monitor, self._known, fd), since)

    @staticmethod
    def _forget(link: TransportLink | DescriptorLink | _Ignored | None) -> None:
        """The descriptor is another connection's."""
        if isinstance(link, (TransportLink, DescriptorLink)):
            link.retire()


class _Ignored:
    """A transport that is none of the monitor's affair: not TCP, or kaio's own, which is there already."""

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = weakref.ref(transport)

    @property
    def ended(self) -> bool:
        return self._transport() is None

    def is_of(self, transport: object) -> bool:
        return self._transport() is transport


class _FromQueue(asyncio.Protocol):
    """Stands in for a protocol until its connection stands, which waited before its listening socket had the policy."""

    __slots__ = ("_cover", "_protocol")

    def __init__(self, cover: _Cover, protocol: Any) -> None:
        self._cover = cover
        self._protocol = protocol

    def connection_made(self, transport: Any) -> None:
        protocol = self._protocol
        self._cover.adopt(transport.get_extra_info("socket"))
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


class Covering(_Base):
    """What is put over any loop class."""

    _kaio_cover: _Cover

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kaio_cover = _Cover(self, as_policy(None))

    @property
    def _kaio_bare(self) -> Any:
        return super()

    @property
    def keepalive(self) -> Keepalive:
        """The policy that sockets get."""
        return self._kaio_cover.policy

    def close(self) -> None:
        super().close()
        if self.is_closed():
            close_monitor(self)

    # -- by hand

    async def sock_connect(self, sock: Any, address: Any) -> None:
        cover = self._kaio_cover
        if not cover.active:
            await sock_connect(super(), sock, address)
            return
        async with cover.connecting(sock):
            await sock_connect(super(), sock, address)
        cover.sight(sock)

    async def sock_accept(self, sock: Any) -> Any:
        cover = self._kaio_cover
        if not cover.active:
            return await super().sock_accept(sock)
        cover.sight(sock)
        conn, address = await super().sock_accept(sock)
        cover.sight(conn)
        return conn, address

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> Any:  # type: ignore[override]
        if self._kaio_cover.active:
            self._kaio_cover.sight(fd)
        return super().add_reader(fd, callback, *args)

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> Any:  # type: ignore[override]
        if self._kaio_cover.active:
            self._kaio_cover.sight(fd)
        return super().add_writer(fd, callback, *args)

    # -- servers

    async def create_server(
        self,
        protocol_factory: Any,
        host: Any = None,
        port: Any = None,
        *,
        keep_alive: bool | None = None,
        start_serving: bool = True,
        **kwargs: Any,
    ) -> Any:
        cover = self._kaio_cover
        sock = kwargs.get("sock")
        waiting = 0
        if sock is not None and host is None and port is None and cover.active and keep_alive is not False:
            cover.adopt(sock)  # and only then count: what comes in between has the policy
            waiting = cover.queued(sock)
        if cover.active:
            protocol_factory = self._accepting(protocol_factory, waiting)
        server = await super().create_server(protocol_factory, host, port, start_serving=False, **kwargs)
        try:
            for listening in server.sockets:
                if keep_alive and platform.is_tcp(listening):
                    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if cover.active and keep_alive is not False:
                    cover.adopt(listening)
            if start_serving:
                await server.start_serving()
        except BaseException:
            server.close()
            raise
        return server

    def _accepting(self, factory: Any, waiting: int) -> Any:
        """The factory by which a server makes its protocols; so many of its first connections waited in the queue."""
        cover, left = self._kaio_cover, waiting

        def make() -> Any:
            nonlocal left
            if cover.resting:
                cover.stir()
            if left:
                left -= 1
                protocol = factory()
                return protocol if isinstance(protocol, Watched) else _FromQueue(cover, protocol)
            return factory()

        return make

    async def connect_accepted_socket(self, protocol_factory: Any, sock: Any, **kwargs: Any) -> Any:
        if self._kaio_cover.active:
            self._kaio_cover.adopt(sock)
            self._kaio_cover.stir()
        return await super().connect_accepted_socket(protocol_factory, sock, **kwargs)


class _CoveringSelector(Covering):
    """Over asyncio's selector loops, which connect by `sock_connect`."""

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **kwargs: Any) -> Any:
        cover, sock = self._kaio_cover, kwargs.get("sock")
        if sock is not None and host is None and port is None and cover.active:
            cover.adopt(sock)
        made = await super().create_connection(protocol_factory, host, port, **kwargs)
        cover.stir()
        return made


class _CoveringOther(Covering):
    """Over uvloop and its kin, which make a connection's socket where no option can be set before it connects."""

    async def create_connection(
        self,
        protocol_factory: Any,
        host: Any = None,
        port: Any = None,
        *,
        sock: Any = None,
        happy_eyeballs_delay: float | None = None,
        interleave: int | None = None,
        all_errors: bool = False,
        **kwargs: Any,
    ) -> Any:
        cover = self._kaio_cover
        named = sock is None and (host is not None or port is not None)
        if named and (cover.active or happy_eyeballs_delay is not None):
            names = ("ssl", "server_hostname", "ssl_handshake_timeout", "ssl_shutdown_timeout")
            ssl, server_hostname, handshake, shutdown = (kwargs.pop(name, None) for name in names)
            tls = tls_arguments(ssl, server_hostname, host, handshake, shutdown)
            options = DialOptions(
                **{name: kwargs.pop(name) for name in ("family", "proto", "flags", "local_addr") if name in kwargs},
                happy_eyeballs_delay=happy_eyeballs_delay,
                interleave=interleave,
            )
            protocol = protocol_factory()
            sock = await self._dial(host, port, options, all_errors=all_errors)
            return await self._make_transport(sock, protocol, {**tls, **kwargs})
        if sock is not None and host is None and port is None and cover.active:
            cover.adopt(sock)
        kwargs["sock"] = sock
        made = await super().create_connection(protocol_factory, host, port, **kwargs)
        cover.stir()
        return made

    async def _dial(
        self, host: str | None, port: int | str | None, options: DialOptions, *, all_errors: bool
    ) -> socket.socket:
        """Connect by this loop's `sock_connect`: the base would make the socket where no option can be set."""
        route = await find_route(self, host, port, options)
        attempts = Attempts(self)
        try:
            return await dial(attempts, route, options)
        except OSError as exc:
            # Without the traceback, or it would refer to itself.
            raise summarize(exc, attempts.errors, all_errors=all_errors).with_traceback(None) from None
        finally:
            attempts.errors = []  # they hold this frame, by their tracebacks

    async def _make_transport(
        self, sock: socket.socket, protocol: asyncio.BaseProtocol, options: dict[str, Any]
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Let the base make a transport over a connected socket."""
        try:
            transport, protocol = await super().create_connection(lambda: protocol, sock=sock, **options)
        except OSError:  # a handshake that failed: the base has closed it
            raise
        except (TypeError, ValueError):  # an argument that it does not take: it has not touched the socket
            sock.close()
            raise
        detach_if_closed(sock, transport)
        self._kaio_cover.stir()
        return transport, protocol

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **kwargs: Any) -> Any:
        if not has_scope(host) or kwargs.get("sock") is not None or not loses_scope(self):
            return await super().create_server(protocol_factory, host, port, **kwargs)
        sock = await self._bind(host, port, **{name: kwargs.pop(name) for name in _BINDING if name in kwargs})
        try:
            return await super().create_server(protocol_factory, sock=sock, **kwargs)
        except BaseException:
            sock.close()
            raise

    async def _bind(
        self,
        host: str,
        port: int | str | None,
        family: int = 0,
        flags: int = socket.AI_PASSIVE,
        reuse_address: bool | None = None,
        reuse_port: bool | None = None,
    ) -> socket.socket:
        """Bind to a link-local address with its scope, which uvloop loses."""
        route = await find_route(self, host, port, DialOptions(family=family, flags=flags))
        family, kind, proto, _, address = route.remote[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address is not False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, bool(reuse_port))
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, True)
            sock.bind(address)
        except OSError as exc:
            sock.close()
            message = f"error while attempting to bind on address {address!r}: {(exc.strerror or '').lower()}"
            raise OSError(exc.errno, message) from None
        return sock


_BINDING: Final = ("family", "flags", "reuse_address", "reuse_port")  # arguments of create_server that are for bind()


# -- classes

_classes: Final[weakref.WeakKeyDictionary[type, type]] = weakref.WeakKeyDictionary()


def loop_class(base: type[asyncio.AbstractEventLoop]) -> type[asyncio.AbstractEventLoop]:
    """A loop class over another one, with that one's constructor. Its loops have the default policy."""
    if issubclass(base, Covering):
        return base
    made = _classes.get(base)
    if made is not None:
        return made
    selector = issubclass(base, asyncio.SelectorEventLoop)
    mixed = _CoveringSelector if selector else _CoveringOther
    names = {"__doc__": f"{base.__name__} whose TCP sockets have keepalive.", "__module__": base.__module__}
    _classes[base] = made = type(f"Kaio{base.__name__}", (mixed, base), names)
    return made


def take_over(loop: asyncio.AbstractEventLoop, policy: Keepalive) -> None:
    """Make a loop that its base has just made one of kaio's. Raises TypeError for a loop that lets nobody."""
    if not isinstance(loop, Covering):
        try:
            loop.__class__ = loop_class(type(loop))
        except TypeError as exc:
            raise TypeError(f"kaio cannot cover the sockets of {loop!r}: {exc}") from None
    assert isinstance(loop, Covering)
    loop._kaio_cover = _Cover(loop, policy)
