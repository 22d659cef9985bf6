"""Connecting: `connect`, and the twins of asyncio's `create_connection` and `open_connection`.

Rules kept here: options are set before connect(), so that the user timeout bounds the handshake too; on every loop,
because kaio makes the sockets itself. A peer that does not answer is a `DeadPeerError`, one that refuses is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl as ssl_module
import warnings
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

import aiohappyeyeballs

from ..addresses import Address, TcpAddress, UnixAddress, make_address
from ..errors import Cause, DeadPeerError, KeepaliveError
from ..kernel.options import platform
from ..kernel.sockets import apply_or_warn, logger, target_state
from ..liveness.causes import DEATHS, NO_WAY, dead_peer
from ..liveness.limits import limits_of
from ..monitor.counters import Event
from ..monitor.error_watch import bare
from ..monitor.monitor import get_monitor
from ..policy import MAX_USER_TIMEOUT_MS, Keepalive, KeepaliveArg
from .connection import Connection, StreamProtocol
from .dialing import BoundedAttempts, bound_handshake, resolve, tls_arguments
from .endpoints import REFUSED, PolicyChoice, Terms, choose_policy, known
from .protocols import KeepaliveProtocol, Watched
from .transports import WatchedTransport

__all__ = ["Pending", "connect", "create_connection", "open_connection"]

HAPPY_EYEBALLS_DELAY: Final = 0.25  # seconds, RFC 8305 section 5

_TCP: Final = (socket.AF_INET, socket.AF_INET6)

P = TypeVar("P", bound=asyncio.BaseProtocol)


class _AsyncCloseable(Protocol):
    async def __aenter__(self) -> Any: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...


C = TypeVar("C", bound=_AsyncCloseable)


class Pending(Generic[C]):
    """What `connect` and `serve` return: await it for the thing, or use it with `async with` to have it closed."""

    def __init__(self, make: Callable[[], Awaitable[C]]) -> None:
        self._make = make
        self._made: C | None = None
        self._used = False

    def __await__(self) -> Generator[Any, Any, C]:
        self._used = True
        return self._make().__await__()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no {name!r} yet: write `await kaio...(...)`, or `async with`")

    def __del__(self) -> None:
        if not self._used:
            warnings.warn("connect() or serve() was never awaited", RuntimeWarning, source=self, stacklevel=2)

    async def __aenter__(self) -> C:
        if self._made is not None:
            raise RuntimeError("this has been entered already")
        self._used = True
        self._made = await self._make()
        await self._made.__aenter__()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._made is not None
        return await self._made.__aexit__(kind, exc, trace)


def connect(
    host: str | os.PathLike[str] | Address | None,
    port: int | str | None = None,
    *,
    keepalive: KeepaliveArg = None,
    ssl: ssl_module.SSLContext | bool | None = None,
    server_hostname: str | None = None,
    local_addr: tuple[str, int] | None = None,
    happy_eyeballs_delay: float | None = HAPPY_EYEBALLS_DELAY,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
) -> Pending[Connection]:
    """Connect, and have the connection as a stream: `await connect(...)`, or `async with connect(...) as conn`.

    Takes a host and a port, or an address as one ("db.example:5432", "[::1]:5432", "unix:/run/db.sock", a path object,
    what `Listener.address` gives). The TLS
    arguments are asyncio's; `happy_eyeballs_delay` is in seconds (RFC 8305; None: one address after the other).

    The policy's user timeout bounds each attempt to connect, and the TLS handshake, whatever `stalled` says. A peer
    that died during the handshake is a `DeadPeerError`; one that is alive and says nothing of TLS is asyncio's
    ConnectionAbortedError, after `ssl_handshake_timeout` seconds (None: the user timeout, an eighth of it and half a
    second, so that the kernel reports a death first; at most asyncio's 60 s).

    Raises `DeadPeerError` when no address answers (cause CONNECTING) or can be reached (UNREACHABLE); OSError for what
    else goes wrong, such as ConnectionRefusedError; `PolicyError`, `AddressError` at once.
    """
    address = make_address(host, port)
    choice = choose_policy(keepalive, address=address)
    tls = tls_arguments(
        ssl,
        server_hostname,
        address.host if isinstance(address, TcpAddress) else None,
        ssl_handshake_timeout,
        ssl_shutdown_timeout,
    )

    async def make() -> Connection:
        made: list[Connection] = []
        new = attaching(lambda: StreamProtocol(made.append))
        if isinstance(address, UnixAddress):
            loop, path = asyncio.get_running_loop(), address.path
            await _stand(
                lambda factory: loop.create_unix_connection(factory, path, **tls),
                lambda: new(Terms(None, None)),
            )
        else:
            await _connect_tcp(
                new,
                address.host,
                address.port,
                choice,
                tls=tls,
                local_addr=local_addr,
                happy_eyeballs_delay=happy_eyeballs_delay,
            )
        return made[0]

    return Pending(make)


async def create_connection(
    protocol_factory: Callable[[], P],
    host: str | None = None,
    port: int | str | None = None,
    *,
    keepalive: KeepaliveArg = None,
    ssl: ssl_module.SSLContext | bool | None = None,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    sock: socket.socket | None = None,
    local_addr: tuple[str, int] | None = None,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    happy_eyeballs_delay: float | None = None,
    interleave: int | None = None,
    all_errors: bool = False,
) -> tuple[asyncio.Transport, P]:
    """asyncio's `loop.create_connection` with a policy.

    The transport is a `KeepaliveTransport` when the protocol is a `KeepaliveProtocol`. A `sock` that is handed over is
    given the policy, and must be connected. Without `keepalive`, the factory's own `keepalive` attribute counts, so
    pass the protocol class itself where you can. Raises what `connect` raises, and ValueError as asyncio does.
    """
    address = None if sock is None or sock.family in _TCP else UnixAddress(str(sock.getsockname()))
    choice = choose_policy(keepalive, factory=protocol_factory, address=address)
    tls = tls_arguments(ssl, server_hostname, host, ssl_handshake_timeout, ssl_shutdown_timeout)
    if (sock is None) == (host is None and port is None):
        raise ValueError("give either host and port, or sock")
    new = attaching(protocol_factory)
    if sock is not None:
        terms = Terms(None, None)
        if choice.policy is not None:
            now = known(choice.policy, apply_or_warn(sock, choice.policy, explicit=choice.explicit))
            terms = Terms(choice.policy, limits_of(now), choice.source, choice.explicit)
            tls = bound_handshake(tls, _bound(now))
        made = await _over(sock, lambda: new(terms), tls)
    else:
        made = await _connect_tcp(
            new,
            host,
            port,
            choice,
            tls=tls,
            family=family,
            proto=proto,
            flags=flags,
            local_addr=local_addr,
            happy_eyeballs_delay=happy_eyeballs_delay,
            interleave=interleave,
            all_errors=all_errors,
        )
    return our_transport(*made), made[1]


async def open_connection(
    host: str | None = None, port: int | str | None = None, *, limit: int = 65536, **kwargs: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """asyncio's `open_connection` with a policy: takes what `create_connection` takes, `keepalive=` with it.

    A dead peer is raised by the reader and the writer as `DeadPeerError`.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = StreamsProtocol(reader, loop=loop)
    await create_connection(lambda: protocol, host, port, **kwargs)
    inner = protocol.inner
    return reader, asyncio.StreamWriter(inner, protocol, reader, loop)


class StreamsProtocol(asyncio.StreamReaderProtocol, KeepaliveProtocol):
    """The protocol of asyncio's streams. They get the loop's own transport, so that `StreamWriter.start_tls` works."""

    inner: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        self.inner = transport.loop_transport
        transport.expect_layer()  # the reader pauses the inner transport past ours, and start_tls puts a layer over it
        super().connection_made(self.inner)  # type: ignore[arg-type,unused-ignore]


# -- what the servers use too


def attaching(factory: Callable[[], P]) -> Callable[[Terms], P]:
    """A factory whose protocols know what their connections start with."""

    kind: Any = factory
    if isinstance(kind, type) and issubclass(kind, Watched):

        def make_new(terms: Terms) -> P:  # a new object, which has no connection yet
            protocol: Any = factory()
            protocol._kaio = terms
            return protocol  # type: ignore[no-any-return]

        return make_new

    def make(terms: Terms) -> P:
        protocol = factory()
        if isinstance(protocol, Watched):
            present = getattr(protocol, "_kaio", None)
            if isinstance(present, WatchedTransport) and not present.ended:
                raise RuntimeError(f"{protocol!r} has a connection already: the factory must make a protocol for each")
            protocol._kaio = terms
        return protocol

    return make


def our_transport(transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
    """The transport that the protocol was given, which is ours if the protocol is."""
    ours = protocol._kaio if isinstance(protocol, Watched) else None
    return ours if isinstance(ours, WatchedTransport) else transport


# -- connecting


async def _connect_tcp(
    new: Callable[[Terms], P],
    host: str | None,
    port: int | str | None,
    choice: PolicyChoice,
    *,
    tls: dict[str, Any],
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    local_addr: tuple[str, int] | None = None,
    happy_eyeballs_delay: float | None = None,
    interleave: int | None = None,
    all_errors: bool = False,
) -> tuple[asyncio.Transport, P]:
    loop = asyncio.get_running_loop()
    infos = await _resolve(loop, host, port, family, proto, flags)
    local = None if local_addr is None else await _resolve(loop, *local_addr, family, proto, flags)
    attempts = BoundedAttempts(bare(loop))
    assert choice.policy is not None
    now = policy = choice.policy

    def make_socket(info: Any) -> socket.socket:
        nonlocal now
        sock = socket.socket(info[0], info[1], info[2])
        try:
            now = known(policy, apply_or_warn(sock, policy, explicit=choice.explicit))  # the same each time
            attempts.bound = bound = _bound(now)
            attempts.bound_by_kernel = bound is not None and platform.set_user_timeout(sock, bound)
        except BaseException:
            sock.close()
            raise
        return sock

    began = loop.time()
    try:
        sock = await aiohappyeyeballs.start_connection(
            infos,
            local_addr_infos=local,
            happy_eyeballs_delay=happy_eyeballs_delay,
            interleave=interleave,
            loop=attempts,  # type: ignore[arg-type]
            socket_factory=make_socket,
        )
    except OSError:
        if all_errors and attempts.errors:
            raise ExceptionGroup("create_connection failed", attempts.errors) from None
        told = _what_tells(attempts.errors, attempts.from_here)
        if told is None:
            raise
        raise _never_reached(told, infos, loop.time() - began, policy, this_host=told in attempts.from_here) from told
    try:
        terms = Terms(policy, limits_of(now), choice.source, choice.explicit)
        transport, protocol = await _over(sock, lambda: new(terms), bound_handshake(tls, attempts.bound))
    except OSError as exc:
        if isinstance(exc, ssl_module.SSLError) or (exc.errno not in DEATHS and exc.errno not in NO_WAY):
            raise
        raise _never_reached(exc, infos, loop.time() - began, policy) from exc
    if transport.is_closing() and not isinstance(loop, asyncio.BaseEventLoop):
        # Closed in connection_made, before uvloop took the socket object over: its descriptor is closed, and may be
        # another's by the time that the object would close it once more.
        sock.detach()
    elif attempts.bound_by_kernel and not transport.is_closing():
        _end_connect_bound(sock, our_transport(transport, protocol), policy)
    return transport, protocol


async def _over(sock: socket.socket, new: Callable[[], P], tls: dict[str, Any]) -> tuple[asyncio.Transport, P]:
    """A transport and a protocol over a connected socket."""
    loop = bare(asyncio.get_running_loop())
    return await _stand(lambda factory: loop.create_connection(factory, sock=sock, **tls), new, sock)


async def _stand(
    create: Callable[[Callable[[], P]], Awaitable[tuple[asyncio.Transport, P]]],
    new: Callable[[], P],
    sock: socket.socket | None = None,
) -> tuple[asyncio.Transport, P]:
    """Let the loop make a connection; when that fails or is cancelled, nothing of it is left."""
    made: list[P] = []

    def factory() -> P:
        made.append(new())
        return made[0]

    try:
        return await create(factory)
    except BaseException:
        if made:
            _abandon(made[0], sock)
        raise


def _abandon(protocol: asyncio.BaseProtocol, sock: socket.socket | None) -> None:
    """Nobody waits for this connection any more, and its loop may not know that."""
    transport = protocol._kaio if isinstance(protocol, Watched) else None
    if isinstance(transport, WatchedTransport):
        # Cancelled in the turn in which connection_made was called. asyncio closes it in good order, which may take TLS
        # half a minute. uvloop has closed its handle, so that abort() does nothing, and calls no connection_lost.
        transport.abort()
        if not transport.is_closing():
            asyncio.get_running_loop().call_soon(protocol.connection_lost, None)
        return
    if isinstance(protocol, Watched):
        protocol._kaio = REFUSED
    if sock is not None and sock.fileno() >= 0:
        # asyncio's TLS layer does not hear of a close() before its handshake has begun, and would go on with it.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _end_connect_bound(sock: socket.socket, transport: asyncio.Transport, policy: Keepalive) -> None:
    """The handshake is over: what remains of the user timeout is what the policy of now leaves to the kernel."""
    if isinstance(transport, WatchedTransport) and transport.keepalive is not None:
        policy = transport.keepalive
    try:
        platform.set_user_timeout(sock, target_state(policy, sock).user_timeout)
    except KeepaliveError as exc:  # it has ended already
        logger.debug("%s", exc)


def _bound(policy: Keepalive) -> float | None:
    """Seconds for one attempt to connect, and for the TLS handshake; None: no bound but the system's."""
    bound = policy.effective_user_timeout if policy.enabled else None
    return None if bound is None else min(bound, MAX_USER_TIMEOUT_MS / 1000)


async def _resolve(
    loop: asyncio.AbstractEventLoop, host: str | None, port: int | str | None, family: int, proto: int, flags: int
) -> list[Any]:
    infos = await resolve(loop, host, port, family=family, proto=proto or socket.IPPROTO_TCP, flags=flags)
    if not infos:
        raise OSError(f"getaddrinfo() returned nothing for {host}:{port}")
    return infos


def _what_tells(errors: list[OSError], from_here: list[OSError]) -> OSError | None:
    """Which error tells that connect() was answered by nobody; None when it was, if only with a refusal.

    `from_here` are the errors that connect() itself gave, before anything had left this host.
    """
    here = NO_WAY - {errno.ECONNREFUSED}
    if not errors or not all(error.errno in DEATHS or (error in from_here and error.errno in here) for error in errors):
        return None
    return next((error for error in errors if isinstance(error, TimeoutError)), errors[0])


def _never_reached(
    exc: OSError, infos: list[Any], silence: float, policy: Keepalive, *, this_host: bool = False
) -> DeadPeerError:
    """The error for a peer that was never reached, which is counted."""
    cause = Cause.CONNECTING if isinstance(exc, TimeoutError) else Cause.UNREACHABLE
    error = dead_peer(exc, cause, None, peername=infos[0][4], policy=policy, silence=silence, this_host=this_host)
    get_monitor().emit(Event("dead", None, None, error))
    return error
