"""The methods that cover a base's event loop: every TCP socket that a library opens or accepts gets the policy.

Rules kept here: the loop behaves exactly like its base, except that TCP sockets get the policy and dead peers are
reported sooner. Listening sockets get their options before they listen, so that accepted ones inherit them; outgoing
ones before they connect; sockets that a library made itself when the loop first sees their descriptor. Options set by
the application are never changed. Nothing is done per message.
"""

from __future__ import annotations

import asyncio
import socket
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..kernel.options import platform
from ..monitor.monitor import close_monitor
from ..net.dialing import (
    Attempts,
    DialOptions,
    SocketAddress,
    detach_if_closed,
    dial,
    find_route,
    has_scope,
    loses_scope,
    sock_connect,
    summarize,
    tls_arguments,
)
from ..net.protocols import Watched
from ..policy import Keepalive, as_policy
from .coverage import Coverage

ProtocolFactory = Callable[[], asyncio.BaseProtocol]

__all__ = ["Covering", "cover_loop", "loop_class"]


if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

    _Base = asyncio.SelectorEventLoop
else:
    _Base = object


class _QueuedProtocol(asyncio.Protocol):
    """Sets the policy on a connection that was in the accept queue before its listening socket had the policy."""

    __slots__ = ("_cover", "_protocol")

    def __init__(self, cover: Coverage, protocol: asyncio.BaseProtocol) -> None:
        self._cover = cover
        self._protocol = protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        protocol = self._protocol
        self._cover.apply_policy(transport.get_extra_info("socket"))
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


class Covering(_Base):
    """What is put over any loop class."""

    _kaio_cover: Coverage

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kaio_cover = Coverage(self, as_policy(None))

    @property
    def _kaio_bare(self) -> asyncio.AbstractEventLoop:
        return super()  # type: ignore[return-value]

    @property
    def keepalive(self) -> Keepalive:
        """The policy that sockets get."""
        return self._kaio_cover.policy

    def close(self) -> None:
        super().close()
        if self.is_closed():
            close_monitor(self)

    # -- by hand

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        cover = self._kaio_cover
        if not cover.active:
            await sock_connect(super(), sock, address)
            return
        async with cover.bound_connect(sock):
            await sock_connect(super(), sock, address)
        cover.on_descriptor(sock)

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, SocketAddress]:
        cover = self._kaio_cover
        if not cover.active:
            return await super().sock_accept(sock)
        cover.on_descriptor(sock)
        conn, address = await super().sock_accept(sock)
        cover.on_descriptor(conn)
        return conn, address

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[..., object], *args: object) -> None:
        if self._kaio_cover.active:
            self._kaio_cover.on_descriptor(fd)
        super().add_reader(fd, callback, *args)

    def add_writer(self, fd: FileDescriptorLike, callback: Callable[..., object], *args: object) -> None:
        if self._kaio_cover.active:
            self._kaio_cover.on_descriptor(fd)
        super().add_writer(fd, callback, *args)

    # -- servers

    async def create_server(
        self,
        protocol_factory: ProtocolFactory,
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
            cover.apply_policy(sock)  # and only then count: what comes in between has the policy
            waiting = cover.accept_queue_length(sock)
        if cover.active:
            protocol_factory = self._accepting(protocol_factory, waiting)
        server = await super().create_server(protocol_factory, host, port, start_serving=False, **kwargs)
        try:
            for listening in server.sockets:
                if keep_alive and platform.is_tcp(listening):
                    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if cover.active and keep_alive is not False:
                    cover.apply_policy(listening)
            if start_serving:
                await server.start_serving()
        except BaseException:
            server.close()
            raise
        return server

    def _accepting(self, factory: ProtocolFactory, waiting: int) -> ProtocolFactory:
        """The factory by which a server makes its protocols; so many of its first connections waited in the queue."""
        cover, left = self._kaio_cover, waiting

        def make() -> asyncio.BaseProtocol:
            nonlocal left
            if cover.up_to_date:
                cover.on_connection()
            if left:
                left -= 1
                protocol = factory()
                return protocol if isinstance(protocol, Watched) else _QueuedProtocol(cover, protocol)
            return factory()

        return make

    async def connect_accepted_socket(
        self, protocol_factory: ProtocolFactory, sock: socket.socket, **kwargs: Any
    ) -> Any:
        if self._kaio_cover.active:
            self._kaio_cover.apply_policy(sock)
            self._kaio_cover.on_connection()
        return await super().connect_accepted_socket(protocol_factory, sock, **kwargs)


class _CoveringSelector(Covering):
    """Over asyncio's selector loops, which connect by `sock_connect`."""

    async def create_connection(
        self, protocol_factory: ProtocolFactory, host: Any = None, port: Any = None, **kwargs: Any
    ) -> Any:
        cover, sock = self._kaio_cover, kwargs.get("sock")
        if sock is not None and host is None and port is None and cover.active:
            cover.apply_policy(sock)
        made = await super().create_connection(protocol_factory, host, port, **kwargs)
        cover.on_connection()
        return made


class _CoveringOther(Covering):
    """Over uvloop and its kin, which make a connection's socket where no option can be set before it connects."""

    async def create_connection(
        self,
        protocol_factory: ProtocolFactory,
        host: Any = None,
        port: Any = None,
        *,
        sock: socket.socket | None = None,
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
            cover.apply_policy(sock)
        kwargs["sock"] = sock
        made = await super().create_connection(protocol_factory, host, port, **kwargs)
        cover.on_connection()
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
        self._kaio_cover.on_connection()
        return transport, protocol

    async def create_server(
        self, protocol_factory: ProtocolFactory, host: Any = None, port: Any = None, **kwargs: Any
    ) -> Any:
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
        """Bind to a known-local address with its scope, which uvloop loses."""
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
    """Return a covering class derived from a loop class. Its loops have the default policy."""
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


def cover_loop(loop: asyncio.AbstractEventLoop, policy: Keepalive) -> None:
    """Change the class of a new loop to one that covers its sockets. Raises TypeError where that is impossible."""
    if not isinstance(loop, Covering):
        try:
            loop.__class__ = loop_class(type(loop))
        except TypeError as exc:
            raise TypeError(f"kaio cannot cover the sockets of {loop!r}: {exc}") from None
    assert isinstance(loop, Covering)
    loop._kaio_cover = Coverage(loop, policy)
