"""What connecting takes whoever asks for it: `client`, and the loop that other libraries ask.

Rules kept here: a mistake in the TLS arguments shows before there is a socket that could be left open; how each attempt
failed is remembered.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl as ssl_module
from typing import Any, Final

__all__ = [
    "Attempts",
    "BoundedAttempts",
    "bound_handshake",
    "has_scope",
    "loses_scope",
    "resolve",
    "sock_connect",
    "tls_arguments",
]

_HANDSHAKE: Final = 60.0  # seconds that asyncio and uvloop give a TLS handshake
_ETIMEDOUT: Final = 110 if os.name == "posix" else 10060


def tls_arguments(
    ssl: ssl_module.SSLContext | bool | None,
    server_hostname: str | None,
    host: str | None,
    handshake: float | None,
    shutdown: float | None,
) -> dict[str, Any]:
    """asyncio's TLS arguments, by asyncio's rules. Raises ValueError."""
    if not ssl:
        for name, value in (
            ("server_hostname", server_hostname),
            ("ssl_handshake_timeout", handshake),
            ("ssl_shutdown_timeout", shutdown),
        ):
            if value is not None:
                raise ValueError(f"{name} is only meaningful with ssl")
        return {}
    for name, value in (("ssl_handshake_timeout", handshake), ("ssl_shutdown_timeout", shutdown)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} should be a positive number, got {value}")
    if server_hostname is None and host is None:
        raise ValueError("You must set server_hostname when using ssl without a host")
    return {
        "ssl": ssl,
        "server_hostname": host if server_hostname is None else server_hostname,
        "ssl_handshake_timeout": handshake,
        "ssl_shutdown_timeout": shutdown,
    }


async def resolve(
    loop: asyncio.AbstractEventLoop,
    host: str | None,
    port: int | str | None,
    *,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
) -> list[Any]:
    """What getaddrinfo says of a host and a port for streams, with the scope of a link-local address."""
    if has_scope(host):  # uvloop's getaddrinfo loses it. Only the interface is looked up, so this does not wait.
        flags |= socket.AI_NUMERICHOST
        return socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, proto, flags)
    return await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, proto=proto, flags=flags)


def has_scope(host: object) -> bool:
    """Whether this is a link-local IPv6 address with its interface, such as "fe80::1%eth0"."""
    return isinstance(host, str) and "%" in host


def loses_scope(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether a loop connects and binds to such an address without its interface: uvloop, of all that are known."""
    return not isinstance(loop, asyncio.BaseEventLoop)


async def sock_connect(loop: Any, sock: socket.socket, address: Any) -> None:
    """The loop's `sock_connect`. uvloop's looks an address up once more, and loses its scope by that."""
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


def bound_handshake(tls: dict[str, Any], bound: float | None) -> dict[str, Any]:
    """The TLS arguments with the handshake bounded by the user timeout, where the caller has not bounded it.

    That is for a peer whose kernel answers while its program is mute. A dead one is the kernel's to report, whose
    timers are up to an eighth late: it is given the time to say so first.
    """
    if not tls or tls["ssl_handshake_timeout"] is not None or bound is None:
        return tls
    return {**tls, "ssl_handshake_timeout": min(bound * 1.125 + 0.5, _HANDSHAKE)}


class Attempts:
    """The loop as happy eyeballs sees it: it remembers how each attempt failed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.errors: list[OSError] = []

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """The loop's."""
        try:
            await self._connect(sock, address)
        except TimeoutError as exc:
            self.errors.append(exc if exc.errno else TimeoutError(_ETIMEDOUT, os.strerror(_ETIMEDOUT)))
            raise self.errors[-1] from None
        except OSError as exc:
            self.errors.append(exc)
            raise

    async def _connect(self, sock: socket.socket, address: Any) -> None:
        await sock_connect(self._loop, sock, address)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class BoundedAttempts(Attempts):
    """Attempts of kaio's own, within a bound. An error of this host is told apart from an answer of the network."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.bound: float | None = None  # seconds for each attempt
        self.bound_by_kernel: bool = False  # else by a timer here
        self.from_here: list[OSError] = []  # those of the errors that this host gave, and nobody else

    async def _connect(self, sock: socket.socket, address: Any) -> None:
        try:
            sock.connect(address)
        except (BlockingIOError, InterruptedError):
            pass  # under way: the loop's own attempt finds that, and waits
        except OSError as exc:  # nothing has left this host: no route, no address to send from, a filter
            self.from_here.append(exc)
            raise
        else:
            return
        if self.bound is None or self.bound_by_kernel:
            await super()._connect(sock, address)
        else:
            async with asyncio.timeout(self.bound):
                await super()._connect(sock, address)
