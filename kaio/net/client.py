"""Connecting, once or again and again: `connect`; asyncio's `create_connection` and `open_connection` with a policy.

Rules kept here: options are set before connect(), so that the user timeout bounds the handshake too. kaio makes the
sockets itself, because no loop lets options be set that early. A peer that does not answer is a `DeadPeerError`; one
that refuses is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl as ssl_module
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypedDict, TypeVar, Unpack, overload

from ..addresses import Address, TcpAddress, UnixAddress, make_address
from ..errors import Cause, DeadPeerError, KeepaliveError, format_address
from ..kernel.options import SocketLike, platform
from ..kernel.sockets import apply_or_warn, logger, raw_socket, target_state
from ..liveness.causes import DEATHS, NO_WAY, dead_peer
from ..liveness.limits import limits_of
from ..monitor.counters import Event
from ..monitor.error_watch import bare
from ..monitor.monitor import get_monitor
from ..policy import Keepalive, KeepaliveArg
from .asyncio_streams import StreamsProtocol
from .attachment import attached_transport, attaching, refuse
from .connection import Connection
from .dialing import (
    AddrInfo,
    BoundedAttempts,
    DialOptions,
    Route,
    TlsArguments,
    bound_handshake,
    connect_bound,
    detach_if_closed,
    dial,
    find_route,
    summarize,
    tls_arguments,
)
from .endpoints import PolicyChoice, Terms, choose_policy, with_system_times
from .pending import Pending, Promise
from .protocols import BufferedKeepaliveProtocol, KeepaliveProtocol
from .reconnecting import AgainProtocol, Reconnecting, StreamEnds, TransportEnds, attempt_in_row
from .retry import Backoff, Retry, check_retry
from .stream import StreamProtocol
from .transports import KeepaliveTransport

__all__ = ["connect", "create_connection", "open_connection"]

HAPPY_EYEBALLS_DELAY: Final = 0.25  # seconds, RFC 8305 section 5

_TCP: Final = (socket.AF_INET, socket.AF_INET6)

T = TypeVar("T")
K = TypeVar("K", bound=asyncio.Transport)
P = TypeVar("P", bound=asyncio.BaseProtocol)
W = TypeVar("W", bound=KeepaliveProtocol | BufferedKeepaliveProtocol)


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
    retry: Retry | None = None,
) -> Connecting:
    """Open a connection as a stream: `await connect(...)`, or `async with connect(...) as connection`; or one after the
    other, for as long as it takes:

        async for connection in kaio.connect("broker", 5672):
            async with connection:
                ...

    The inner block ends with its connection, whatever ends it: `ConnectionEnded`, or a group of nothing else. The loop
    then connects again, at once at first, then after growing, random delays (`Retry`). Without the inner block an
    exception leaves the loop, as it leaves any loop: to see it, write `try` and `except kaio.ConnectionEnded` in place
    of that block. Every other exception leaves both, as do `break`, `return` and cancellation, and closes the
    connection.

    Takes a host and a port, or both as one ("db.example:5432", "[::1]:5432", "unix:/run/db.sock", a path object, a
    `Listener.address`). The TLS arguments are asyncio's; `happy_eyeballs_delay` is in seconds (RFC 8305; None: one
    address after the other).

    The policy's user timeout bounds each attempt to connect, and the TLS handshake, also with stalled="keep". A peer
    that dies during the handshake is a `DeadPeerError`. One that is alive and does not speak TLS is asyncio's
    ConnectionAbortedError after `ssl_handshake_timeout` seconds. None means nine eighths of the user timeout and
    half a second, so that the kernel reports a dead peer first; at most asyncio's 60 s.

    `retry` says when to attempt again. None: `Retry()` for the loop, and one attempt otherwise.

    Raises `DeadPeerError` when no address answers (cause CONNECTING) or none can be reached (UNREACHABLE); other
    OSErrors as they are, such as ConnectionRefusedError; `PolicyError`, `AddressError`, ValueError at once.
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

    async def make(protocol_class: type[StreamProtocol] = StreamProtocol) -> Connection:
        made: list[Connection] = []
        new = attaching(lambda: protocol_class(made.append))
        if isinstance(address, UnixAddress):
            loop, path = asyncio.get_running_loop(), address.path
            await _make_transport(
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
                options=DialOptions(
                    proto=socket.IPPROTO_TCP, local_addr=local_addr, happy_eyeballs_delay=happy_eyeballs_delay
                ),
            )
        return made[0]

    return Connecting(make, lambda: make(AgainProtocol), check_retry(retry), str(address))


class Connecting(Pending[Connection]):
    """What `connect` returns: a connection to be awaited or entered, or connections to iterate over."""

    def __init__(
        self,
        make: Callable[[], Awaitable[Connection]],
        make_again: Callable[[], Awaitable[Connection]],
        retry: Retry | None,
        where: str,
    ) -> None:
        super().__init__(_retrying(make, retry, where))
        self._make_again = make_again
        self._retry = retry
        self._where = where

    def __aiter__(self) -> AsyncIterator[Connection]:
        self._used = True
        return Reconnecting(self._make_again, StreamEnds, self._retry, self._where)


class ConnectingTransport(Promise[tuple[K, P]]):
    """What `create_connection` returns: a coroutine, and transports and protocols to iterate over."""

    def __init__(self, make: Callable[[], Awaitable[tuple[K, P]]], retry: Retry | None, where: str) -> None:
        super().__init__(_retrying(make, retry, where))
        self._make_one = make
        self._retry = retry
        self._where = where

    def __aiter__(self) -> AsyncIterator[tuple[K, P]]:
        self._used = True
        return Reconnecting(self._make_one, TransportEnds, self._retry, self._where)


def _retrying(make: Callable[[], Awaitable[T]], retry: Retry | None, where: str) -> Callable[[], Awaitable[T]]:
    if retry is None:
        return make
    return lambda: attempt_in_row(Backoff(retry, asyncio.get_running_loop().time()), make, where)


class _ConnectionOptions(TypedDict, total=False):
    """The arguments of `create_connection` for its overloads."""

    keepalive: KeepaliveArg
    ssl: ssl_module.SSLContext | bool | None
    family: int
    proto: int
    flags: int
    sock: socket.socket | None
    local_addr: tuple[str, int] | None
    server_hostname: str | None
    ssl_handshake_timeout: float | None
    ssl_shutdown_timeout: float | None
    happy_eyeballs_delay: float | None
    interleave: int | None
    all_errors: bool
    retry: Retry | None


@overload
def create_connection(
    protocol_factory: Callable[[], W],
    host: str | None = None,
    port: int | str | None = None,
    **options: Unpack[_ConnectionOptions],
) -> ConnectingTransport[KeepaliveTransport, W]: ...


@overload
def create_connection(
    protocol_factory: Callable[[], P],
    host: str | None = None,
    port: int | str | None = None,
    **options: Unpack[_ConnectionOptions],
) -> ConnectingTransport[asyncio.Transport, P]: ...


def create_connection(
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
    retry: Retry | None = None,
) -> ConnectingTransport[Any, Any]:
    """Open a connection as asyncio's `loop.create_connection` does, with a policy; or one after the other:

        async for transport, protocol in kaio.create_connection(Client, "broker", 1883):
            await transport.wait_closed()

    The transport is a `KeepaliveTransport` when the protocol is a `KeepaliveProtocol`. A `sock` must be connected, and
    gets the policy. Without `keepalive`, the factory's own `keepalive` attribute is the policy: pass the protocol class
    itself where you can. Raises what `connect` raises, and ValueError as asyncio does, when it is awaited.

    `retry` is that of `connect`, and so is the loop: it closes a transport that the block has left open, and connects
    again with a new protocol. It cannot be had with `sock`.
    """
    check_retry(retry)

    async def make() -> tuple[asyncio.Transport, P]:
        return await _create_connection(
            protocol_factory,
            host,
            port,
            keepalive=keepalive,
            ssl=ssl,
            family=family,
            proto=proto,
            flags=flags,
            sock=sock,
            local_addr=local_addr,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
            happy_eyeballs_delay=happy_eyeballs_delay,
            interleave=interleave,
            all_errors=all_errors,
        )

    return ConnectingTransport(make, retry, format_address((host, port)))


async def _create_connection(
    protocol_factory: Callable[[], P],
    host: str | None,
    port: int | str | None,
    *,
    keepalive: KeepaliveArg,
    ssl: ssl_module.SSLContext | bool | None,
    family: int,
    proto: int,
    flags: int,
    sock: socket.socket | None,
    local_addr: tuple[str, int] | None,
    server_hostname: str | None,
    ssl_handshake_timeout: float | None,
    ssl_shutdown_timeout: float | None,
    happy_eyeballs_delay: float | None,
    interleave: int | None,
    all_errors: bool,
) -> tuple[asyncio.Transport, P]:
    address = None if sock is None or sock.family in _TCP else UnixAddress(str(sock.getsockname()))
    choice = choose_policy(keepalive, factory=protocol_factory, address=address)
    tls = tls_arguments(ssl, server_hostname, host, ssl_handshake_timeout, ssl_shutdown_timeout)
    if (sock is None) == (host is None and port is None):
        raise ValueError("give either host and port, or sock")
    new = attaching(protocol_factory)
    if sock is not None:
        terms = Terms(None, None)
        if choice.policy is not None:
            now = with_system_times(choice.policy, apply_or_warn(sock, choice.policy, explicit=choice.explicit))
            terms = Terms(choice.policy, limits_of(now), choice.source, choice.explicit)
            tls = bound_handshake(tls, connect_bound(now))
        made = await _wrap_socket(sock, lambda: new(terms), tls)
    else:
        made = await _connect_tcp(
            new,
            host,
            port,
            choice,
            tls=tls,
            options=DialOptions(
                family=family,
                proto=proto or socket.IPPROTO_TCP,
                flags=flags,
                local_addr=local_addr,
                happy_eyeballs_delay=happy_eyeballs_delay,
                interleave=interleave,
            ),
            all_errors=all_errors,
        )
    transport, protocol = made
    return attached_transport(protocol) or transport, protocol


async def open_connection(
    host: str | None = None,
    port: int | str | None = None,
    *,
    limit: int = 65536,
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
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection as asyncio's `open_connection` does, with a policy; the arguments are `create_connection`'s.

    The reader and the writer raise `DeadPeerError` when the peer is dead.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = StreamsProtocol(reader, loop=loop)
    await create_connection(
        lambda: protocol,
        host,
        port,
        keepalive=keepalive,
        ssl=ssl,
        family=family,
        proto=proto,
        flags=flags,
        sock=sock,
        local_addr=local_addr,
        server_hostname=server_hostname,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
        happy_eyeballs_delay=happy_eyeballs_delay,
        interleave=interleave,
        all_errors=all_errors,
    )
    return reader, asyncio.StreamWriter(protocol.loop_transport, protocol, reader, loop)


# -- connecting


async def _connect_tcp(
    new: Callable[[Terms], P],
    host: str | None,
    port: int | str | None,
    choice: PolicyChoice,
    *,
    tls: TlsArguments,
    options: DialOptions,
    all_errors: bool = False,
) -> tuple[asyncio.Transport, P]:
    loop = asyncio.get_running_loop()
    route = await find_route(loop, host, port, options)
    attempts = BoundedAttempts(bare(loop))
    assert choice.policy is not None
    now = policy = choice.policy

    def make_socket(info: AddrInfo) -> socket.socket:
        nonlocal now
        sock = socket.socket(info[0], info[1], info[2])
        try:
            now = with_system_times(policy, apply_or_warn(sock, policy, explicit=choice.explicit))  # the same each time
            attempts.bound = bound = connect_bound(now)
            attempts.bound_by_kernel = bound is not None and platform.set_user_timeout(sock, bound)
        except BaseException:
            sock.close()
            raise
        return sock

    began = loop.time()
    try:
        sock = await dial(attempts, route, options, make_socket)
    except OSError as exc:
        if all_errors and attempts.errors:
            raise summarize(exc, attempts.errors, all_errors=True) from None
        unanswered = _unanswered(attempts.errors, attempts.from_here)
        if unanswered is None:
            raise
        silence, this_host = loop.time() - began, unanswered in attempts.from_here
        raise _report_unreachable(unanswered, route, silence, policy, this_host=this_host) from unanswered
    try:
        terms = Terms(policy, limits_of(now), choice.source, choice.explicit)
        transport, protocol = await _wrap_socket(sock, lambda: new(terms), bound_handshake(tls, attempts.bound))
    except OSError as exc:
        if isinstance(exc, ssl_module.SSLError) or (exc.errno not in DEATHS and exc.errno not in NO_WAY):
            raise
        raise _report_unreachable(exc, route, loop.time() - began, policy) from exc
    if not detach_if_closed(sock, transport) and attempts.bound_by_kernel:
        # rloop takes the descriptor out of the socket object.
        end = sock if sock.fileno() >= 0 else raw_socket(transport)
        _end_connect_bound(end, attached_transport(protocol), policy)
    return transport, protocol


async def _wrap_socket(sock: socket.socket, new: Callable[[], P], tls: TlsArguments) -> tuple[asyncio.Transport, P]:
    """Make a transport and a protocol over a connected socket."""
    loop = bare(asyncio.get_running_loop())
    return await _make_transport(lambda factory: loop.create_connection(factory, sock=sock, **tls), new, sock)


async def _make_transport(
    create: Callable[[Callable[[], P]], Awaitable[tuple[asyncio.Transport, P]]],
    new: Callable[[], P],
    sock: socket.socket | None = None,
) -> tuple[asyncio.Transport, P]:
    """Let the loop make a transport; when that fails or is cancelled, leave nothing open."""
    made: list[P] = []

    def factory() -> P:
        made.append(new())
        return made[0]

    try:
        return await create(factory)
    except BaseException:
        if made:
            _discard(made[0], sock)
        raise


def _discard(protocol: asyncio.BaseProtocol, sock: socket.socket | None) -> None:
    """End a connection whose creation has failed or was cancelled, of which the loop may not know."""
    transport = attached_transport(protocol)
    if transport is not None:
        # Cancelled in the turn in which connection_made was called. asyncio closes it in good order, which may take TLS
        # half a minute. uvloop has closed its handle, so that abort() does nothing, and calls no connection_lost.
        transport.abort()
        if not transport.is_closing():
            asyncio.get_running_loop().call_soon(protocol.connection_lost, None)
        return
    refuse(protocol)
    if sock is not None and sock.fileno() >= 0:
        # asyncio's TLS layer does not hear of a close() before its handshake has begun, and would go on with it.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _end_connect_bound(sock: SocketLike, transport: KeepaliveTransport | None, policy: Keepalive) -> None:
    """Give the socket the user timeout of its policy in place of the handshake's."""
    if transport is not None and transport.keepalive is not None:  # connection_made may have changed it
        policy = transport.keepalive
    try:
        platform.set_user_timeout(sock, target_state(policy, sock).user_timeout)
    except KeepaliveError as exc:  # it has ended already
        logger.debug("%s", exc)


def _unanswered(errors: list[OSError], from_here: list[OSError]) -> OSError | None:
    """The error to report when no attempt was answered; None when one was, if only with a refusal.

    `from_here` are the errors that connect() itself gave, before anything had left this host.
    """
    here = NO_WAY - {errno.ECONNREFUSED}
    if not errors or not all(error.errno in DEATHS or (error in from_here and error.errno in here) for error in errors):
        return None
    return next((error for error in errors if isinstance(error, TimeoutError)), errors[0])


def _report_unreachable(
    exc: OSError, route: Route, silence: float, policy: Keepalive, *, this_host: bool = False
) -> DeadPeerError:
    """Count and log a peer that did not answer, and return the error to raise."""
    cause = Cause.CONNECTING if isinstance(exc, TimeoutError) else Cause.UNREACHABLE
    error = dead_peer(
        exc, cause, None, peername=route.remote[0][4], policy=policy, silence=silence, this_host=this_host
    )
    get_monitor().emit(Event("dead", None, None, error))
    return error
