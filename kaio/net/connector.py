"""Making one connection: the sockets, their options, the transport, and the error when there is none.

Rules kept here: options are set before connect(), so that the user timeout bounds the handshake too. kaio makes the
sockets itself, because no loop lets options be set that early. A peer that does not answer is a `DeadPeerError`; one
that refuses is not. Whatever fails or is cancelled leaves nothing open.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl as ssl_module
from collections.abc import Awaitable, Callable
from typing import Final, TypedDict, TypeVar, Unpack

from ..addresses import Address, TcpAddress, UnixAddress, make_address
from ..errors import Cause, DeadPeerError, KeepaliveError
from ..kernel.options import SocketLike, platform
from ..kernel.sockets import apply_or_warn, logger, raw_socket, target_state
from ..liveness.causes import DEATHS, NO_WAY, dead_peer
from ..liveness.limits import limits_of
from ..monitor.counters import Event
from ..monitor.error_watch import bare
from ..monitor.monitor import get_monitor
from ..policy import Keepalive, KeepaliveArg
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
from .stream import StreamProtocol
from .transports import KeepaliveTransport

__all__ = ["HAPPY_EYEBALLS_DELAY", "ConnectOptions", "Connector", "connect_tcp", "wrap_socket"]

HAPPY_EYEBALLS_DELAY: Final = 0.25  # seconds, RFC 8305 section 5

P = TypeVar("P", bound=asyncio.BaseProtocol)


class ConnectOptions(TypedDict, total=False):
    """The arguments of `connect` that are about one connection."""

    keepalive: KeepaliveArg
    ssl: ssl_module.SSLContext | bool | None
    server_hostname: str | None
    local_addr: tuple[str, int] | None
    happy_eyeballs_delay: float | None
    ssl_handshake_timeout: float | None
    ssl_shutdown_timeout: float | None


class Connector:
    """Makes connections to one address, each from scratch. Raises what is wrong with its arguments when it is made."""

    def __init__(
        self, host: str | os.PathLike[str] | Address | None, port: int | str | None, **options: Unpack[ConnectOptions]
    ) -> None:
        self._address = address = make_address(host, port)
        self._choice = choose_policy(options.get("keepalive"), address=address)
        self._tls = tls_arguments(
            options.get("ssl"),
            options.get("server_hostname"),
            address.host if isinstance(address, TcpAddress) else None,
            options.get("ssl_handshake_timeout"),
            options.get("ssl_shutdown_timeout"),
        )
        self._options = DialOptions(
            proto=socket.IPPROTO_TCP,
            local_addr=options.get("local_addr"),
            happy_eyeballs_delay=options.get("happy_eyeballs_delay", HAPPY_EYEBALLS_DELAY),
        )

    @property
    def where(self) -> str:
        """The address, for messages."""
        return str(self._address)

    async def __call__(self, protocol_class: type[StreamProtocol] = StreamProtocol) -> Connection:
        """Make a connection. Raises OSError, DeadPeerError."""
        made: list[Connection] = []
        new = attaching(lambda: protocol_class(made.append))
        address = self._address
        if isinstance(address, UnixAddress):
            loop, path = asyncio.get_running_loop(), address.path
            await make_transport(
                lambda factory: loop.create_unix_connection(factory, path, **self._tls),
                lambda: new(Terms(None, None)),
            )
        else:
            await connect_tcp(new, address.host, address.port, self._choice, tls=self._tls, options=self._options)
        return made[0]


async def connect_tcp(
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
        transport, protocol = await wrap_socket(sock, lambda: new(terms), bound_handshake(tls, attempts.bound))
    except OSError as exc:
        if isinstance(exc, ssl_module.SSLError) or (exc.errno not in DEATHS and exc.errno not in NO_WAY):
            raise
        raise _report_unreachable(exc, route, loop.time() - began, policy) from exc
    if not detach_if_closed(sock, transport) and attempts.bound_by_kernel:
        # rloop takes the descriptor out of the socket object.
        end = sock if sock.fileno() >= 0 else raw_socket(transport)
        _end_connect_bound(end, attached_transport(protocol), policy)
    return transport, protocol


async def wrap_socket(sock: socket.socket, new: Callable[[], P], tls: TlsArguments) -> tuple[asyncio.Transport, P]:
    """Make a transport and a protocol over a connected socket."""
    loop = bare(asyncio.get_running_loop())
    return await make_transport(lambda factory: loop.create_connection(factory, sock=sock, **tls), new, sock)


async def make_transport(
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
