"""Connecting, once or again and again: `connect`; asyncio's `create_connection` and `open_connection` with a policy.

Rules kept here: mistakes in the arguments of `connect` are raised at once, those of asyncio's twins when they are
awaited, as asyncio does.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl as ssl_module
from collections.abc import Callable
from typing import Any, Final, TypedDict, TypeVar, Unpack, overload

from ..addresses import Address, UnixAddress
from ..errors import format_address
from ..kernel.sockets import apply_or_warn
from ..liveness.limits import limits_of
from ..policy import KeepaliveArg
from .asyncio_streams import StreamsProtocol
from .attachment import attached_transport, attaching
from .connector import HAPPY_EYEBALLS_DELAY, Connector, connect_tcp, wrap_socket
from .dialing import (
    DialOptions,
    bound_handshake,
    connect_bound,
    tls_arguments,
)
from .endpoints import Terms, choose_policy, with_system_times
from .protocols import BufferedKeepaliveProtocol, KeepaliveProtocol
from .reconnecting import AgainProtocol, Connecting, ConnectingTransport
from .retry import Retry, check_retry
from .transports import KeepaliveTransport

__all__ = ["connect", "create_connection", "open_connection"]

_TCP: Final = (socket.AF_INET, socket.AF_INET6)

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
    connector = Connector(
        host,
        port,
        keepalive=keepalive,
        ssl=ssl,
        server_hostname=server_hostname,
        local_addr=local_addr,
        happy_eyeballs_delay=happy_eyeballs_delay,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
    )
    return Connecting(connector, lambda: connector(AgainProtocol), check_retry(retry), connector.where)


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
    again with a new protocol. Neither can be had with `sock`, which raises ValueError.
    """
    if check_retry(retry) is not None and sock is not None:
        raise ValueError("retry is only meaningful with host and port: a sock cannot be connected again")

    async def make() -> tuple[asyncio.Transport, P]:
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
            made = await wrap_socket(sock, lambda: new(terms), tls)
        else:
            made = await connect_tcp(
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

    return ConnectingTransport(make, retry, None if sock is not None else format_address((host, port)))


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
