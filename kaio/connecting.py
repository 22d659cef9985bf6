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

__all__ = ["Attempts", "tls_arguments"]

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
        await self._loop.sock_connect(sock, address)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class BoundedAttempts(Attempts):
    """Attempts of kaio's own, within a bound. An error of this host is told apart from an answer of the network."""

    def __init__(self, loop: asyncio.AbstractEventLoop, bound: float | None) -> None:
        super().__init__(loop)
        self._bound = bound  # seconds for each attempt
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
        if self._bound is None or self.bound_by_kernel:
            await self._loop.sock_connect(sock, address)
        else:
            async with asyncio.timeout(self._bound):
                await self._loop.sock_connect(sock, address)
