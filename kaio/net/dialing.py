"""Connecting a TCP socket, for kaio's own clients and for other libraries on kaio's loop: addresses, attempts, TLS.

Rules kept here: TLS arguments are checked before there is a socket that could be left open. The error of each attempt
is kept, because happy eyeballs raises one of them only. Options are set by whoever makes the socket.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import ssl as ssl_module
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias, TypedDict

import aiohappyeyeballs

from ..policy import MAX_USER_TIMEOUT_MS, Keepalive

__all__ = [
    "AddrInfo",
    "Attempts",
    "BoundedAttempts",
    "DialOptions",
    "Route",
    "SocketAddress",
    "TcpSocketAddress",
    "TlsArguments",
    "bound_handshake",
    "connect_bound",
    "detach_if_closed",
    "dial",
    "find_route",
    "has_scope",
    "loses_scope",
    "resolve",
    "sock_connect",
    "summarize",
    "tls_arguments",
]

TcpSocketAddress: TypeAlias = tuple[Any, ...]
"""A host and a port, and two numbers more for IPv6."""
SocketAddress: TypeAlias = TcpSocketAddress | str
"""What connect() takes: a TCP address, or the path of a Unix socket."""
AddrInfo: TypeAlias = tuple[int, int, int, str, TcpSocketAddress]
"""What getaddrinfo gives for one address: family, type, protocol, canonical name, address."""

_HANDSHAKE: Final = 60.0  # seconds that asyncio and uvloop give a TLS handshake
_ETIMEDOUT: Final = 110 if os.name == "posix" else 10060


# -- TLS


class TlsArguments(TypedDict, total=False):
    """The arguments about TLS of asyncio's functions; empty without TLS."""

    ssl: ssl_module.SSLContext | bool
    server_hostname: str | None
    ssl_handshake_timeout: float | None
    ssl_shutdown_timeout: float | None


def tls_arguments(
    ssl: ssl_module.SSLContext | bool | None,
    server_hostname: str | None,
    host: str | None,
    handshake: float | None,
    shutdown: float | None,
) -> TlsArguments:
    """Check asyncio's TLS arguments by asyncio's rules. Raises ValueError."""
    timeouts = (("ssl_handshake_timeout", handshake), ("ssl_shutdown_timeout", shutdown))
    if not ssl:
        for name, value in (("server_hostname", server_hostname), *timeouts):
            if value is not None:
                raise ValueError(f"{name} is only meaningful with ssl")
        return {}
    for name, timeout in timeouts:
        if timeout is not None and timeout <= 0:
            raise ValueError(f"{name} should be a positive number, got {timeout}")
    if server_hostname is None and not host:
        raise ValueError("You must set server_hostname when using ssl without a host")
    return {
        "ssl": ssl,
        "server_hostname": host if server_hostname is None else server_hostname,
        "ssl_handshake_timeout": handshake,
        "ssl_shutdown_timeout": shutdown,
    }


def bound_handshake(tls: TlsArguments, bound: float | None) -> TlsArguments:
    """Bound the TLS handshake by the user timeout, where the caller has not bounded it.

    This is for a peer whose kernel answers while its program does not. A dead peer is reported by the kernel, whose
    timers fire up to an eighth late (kernel/time/timer.c), so that the handshake gets an eighth and half a second more.
    """
    if not tls or tls.get("ssl_handshake_timeout") is not None or bound is None:
        return tls
    return {**tls, "ssl_handshake_timeout": min(bound * 1.125 + 0.5, _HANDSHAKE)}


# -- addresses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DialOptions:
    """The arguments of asyncio's `create_connection` that are about the way to the peer."""

    family: int = 0
    proto: int = 0
    flags: int = 0
    local_addr: tuple[str, int] | None = None
    happy_eyeballs_delay: float | None = None
    interleave: int | None = None


class Route(NamedTuple):
    """Addresses to connect to, and those to connect from; None: whichever the system takes."""

    remote: list[AddrInfo]
    local: list[AddrInfo] | None


async def find_route(
    loop: asyncio.AbstractEventLoop, host: str | None, port: int | str | None, options: DialOptions
) -> Route:
    """Resolve a host and a port, and the local address that was asked for. Raises OSError, ValueError."""

    async def look_up(host: str | None, port: int | str | None) -> list[AddrInfo]:
        found = await resolve(loop, host, port, family=options.family, proto=options.proto, flags=options.flags)
        if not found:
            raise OSError("getaddrinfo() returned empty list")
        return found

    remote = await look_up(host, port)
    if options.local_addr is None:
        return Route(remote, None)
    if len(options.local_addr) != 2:
        raise ValueError("local_addr must be a tuple of host and port")
    return Route(remote, await look_up(*options.local_addr))


async def resolve(
    loop: asyncio.AbstractEventLoop,
    host: str | None,
    port: int | str | None,
    *,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
) -> list[AddrInfo]:
    """Look up a host and a port for streams. A link-local address keeps its scope."""
    found: list[AddrInfo] = []
    if has_scope(host):  # uvloop's getaddrinfo loses it. Only the interface is looked up, so this does not wait.
        flags |= socket.AI_NUMERICHOST
        found += socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, proto, flags)
    else:
        found += await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, proto=proto, flags=flags)
    return found


def has_scope(host: object) -> bool:
    """Whether a host is a link-local IPv6 address with its interface, such as "fe80::1%eth0"."""
    return isinstance(host, str) and "%" in host


def loses_scope(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether a loop connects and binds to such an address without its interface: uvloop does, asyncio does not."""
    return not isinstance(loop, asyncio.BaseEventLoop)


# -- attempts


def connect_bound(policy: Keepalive) -> float | None:
    """Seconds for one attempt to connect, and for the TLS handshake; None: no bound but the system's."""
    bound = policy.effective_user_timeout if policy.enabled else None
    return None if bound is None else min(bound, MAX_USER_TIMEOUT_MS / 1000)


async def dial(
    attempts: Attempts,
    route: Route,
    options: DialOptions,
    make_socket: Callable[[AddrInfo], socket.socket] | None = None,
) -> socket.socket:
    """Connect to the first address that answers (RFC 8305), with sockets of `make_socket`. Raises OSError.

    How each attempt failed is in `attempts.errors` then.
    """
    return await aiohappyeyeballs.start_connection(
        route.remote,
        local_addr_infos=route.local,
        happy_eyeballs_delay=options.happy_eyeballs_delay,
        interleave=options.interleave,
        loop=attempts,  # type: ignore[arg-type] # it needs sock_connect and little else
        socket_factory=make_socket,
    )


class Attempts:
    """Stands in for the loop in happy eyeballs, and keeps the error of each attempt."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.errors: list[OSError] = []

    async def sock_connect(self, sock: socket.socket, address: SocketAddress) -> None:
        """Connect as the loop's `sock_connect` does."""
        try:
            await self._connect(sock, address)
        except TimeoutError as exc:
            self.errors.append(exc if exc.errno else TimeoutError(_ETIMEDOUT, os.strerror(_ETIMEDOUT)))
            raise self.errors[-1] from None
        except OSError as exc:
            self.errors.append(exc)
            raise

    async def _connect(self, sock: socket.socket, address: SocketAddress) -> None:
        await sock_connect(self._loop, sock, address)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)


class BoundedAttempts(Attempts):
    """Attempts with a time limit each. An error that connect() gave at once is told apart from the network's answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.bound: float | None = None  # seconds for each attempt
        self.bound_by_kernel: bool = False  # else by a timer here
        self.from_here: list[OSError] = []  # the errors that this host gave before it sent anything

    async def _connect(self, sock: socket.socket, address: SocketAddress) -> None:
        try:
            sock.connect(address)
        except (BlockingIOError, InterruptedError):
            pass  # under way: the loop's own attempt finds that, and waits
        except OSError as exc:  # no route, no address to send from, a filter
            self.from_here.append(exc)
            raise
        else:
            return
        if self.bound is None or self.bound_by_kernel:
            await super()._connect(sock, address)
        else:
            async with asyncio.timeout(self.bound):
                await super()._connect(sock, address)


async def sock_connect(loop: Any, sock: socket.socket, address: SocketAddress) -> None:
    """Connect as the loop's `sock_connect` does. uvloop's looks the address up again, and loses its scope by that."""
    scoped = isinstance(address, tuple) and len(address) == 4 and address[3]
    if not scoped or not loses_scope(asyncio.get_running_loop()):
        await loop.sock_connect(sock, address)
        return
    try:
        sock.connect(address)
        return
    except (BlockingIOError, InterruptedError):
        pass
    fd = sock.fileno()
    writable = asyncio.Event()
    loop.add_writer(fd, writable.set)
    try:
        await writable.wait()
    finally:
        loop.remove_writer(fd)
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, f"Connect call failed {address}")


def summarize(exc: OSError, errors: list[OSError], *, all_errors: bool) -> Exception:
    """Return what asyncio's `create_connection` raises for these attempts; `exc` is what happy eyeballs raised."""
    if all_errors:
        return ExceptionGroup("create_connection failed", errors or [exc])
    if not errors:
        return exc
    if all((type(error), error.errno) == (type(errors[0]), errors[0].errno) for error in errors):
        return errors[0]
    return OSError(f"Multiple exceptions: {', '.join(map(str, errors))}")


# -- afterwards


def detach_if_closed(sock: socket.socket, transport: asyncio.BaseTransport) -> bool:
    """Detach a socket whose transport was closed in connection_made; return whether it was.

    uvloop has closed the descriptor then, before it took the socket object over: the object would close the descriptor
    once more, which may be another's by that time. asyncio's transports hold the object and close it themselves.
    """
    if not transport.is_closing():
        return False
    if not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
        sock.detach()
    return True
