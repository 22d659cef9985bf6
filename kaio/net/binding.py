"""`Binding`: the sockets of one address, from bind() to close().

Rules kept here: all addresses of a host are bound, or none; on one port. A Unix socket's path is removed at the end, if
it is still the one that was made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from typing import Final

from ..addresses import Address, TcpAddress, UnixAddress
from ..kernel.filters import DROP_SYN, attach_filter
from .dialing import AddrInfo, TcpSocketAddress, resolve
from .handed_over import HandedOver

__all__ = ["Binding"]

_ATTEMPTS: Final = 10  # to find a port that is free on all addresses of a host


class Binding:
    """The bound sockets of one address, or those that were handed over."""

    def __init__(
        self,
        address: Address,
        *,
        handed_over: HandedOver | None,
        reuse_address: bool | None,
        reuse_port: bool | None,
        dualstack_ipv6: bool,
    ) -> None:
        self.address = address
        self.sockets: list[socket.socket] = []
        self._handed_over = handed_over
        self._reuse_address = os.name == "posix" if reuse_address is None else reuse_address
        self._reuse_port = bool(reuse_port)
        self._dualstack_ipv6 = dualstack_ipv6
        self._unlink: tuple[str, int] | None = None  # the path that was made here, and its inode

    async def resolve(self) -> list[AddrInfo]:
        """Look up the addresses to bind to."""
        if self._handed_over is not None or not isinstance(self.address, TcpAddress):
            return []
        loop = asyncio.get_running_loop()
        return await resolve(loop, self.address.host, self.address.port, flags=socket.AI_PASSIVE)

    def bind(self, infos: list[AddrInfo]) -> None:
        """Make and bind the sockets. Raises OSError; then `close` is to be called."""
        if self._handed_over is not None:
            self.sockets = self._handed_over.take()
        elif isinstance(self.address, UnixAddress):
            self._bind_unix(self.address.path)
        else:
            self._bind_tcp(self.address, infos)

    def end_handshakes(self) -> bool:
        """Have the kernel begin no new handshakes, and end those that have begun; return whether it does.

        A client that has connected when the socket is closed would be reset. So it is let in, and who comes later
        tries again a second later (RFC 6298: the SYN's timeout), and is refused, or finds another server.
        """
        if self._handed_over is not None or not isinstance(self.address, TcpAddress) or not self.sockets:
            return False
        try:
            for sock in self.sockets:
                attach_filter(sock, DROP_SYN)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the sockets, and remove the path of a Unix socket."""
        sockets, self.sockets = self.sockets, []
        for sock in sockets:
            sock.close()
        if self._handed_over is not None and sockets:
            self._handed_over.release()
        if self._unlink is not None:
            path, inode = self._unlink
            self._unlink = None
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    def _bind_tcp(self, address: TcpAddress, infos: list[AddrInfo]) -> None:
        wanted = list(dict.fromkeys((info[0], info[4]) for info in infos))
        # With port 0 the first socket's port is the others', too; when it is taken there, begin again.
        for attempt in range(_ATTEMPTS):
            try:
                self._bind_all(wanted, address.port)
                break
            except OSError as exc:
                self.close()
                if address.port or exc.errno != errno.EADDRINUSE or attempt == _ATTEMPTS - 1:
                    raise
        self.address = TcpAddress(address.host, self.sockets[0].getsockname()[1])

    def _bind_all(self, wanted: list[tuple[int, TcpSocketAddress]], port: int) -> None:
        for family, where in wanted:
            try:
                # With its protocol said: asyncio sets TCP_NODELAY only where it is.
                sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            except OSError:
                continue  # a family that getaddrinfo knows and the system does not
            self.sockets.append(sock)
            self._set_options(sock)
            host, given, *rest = where
            try:
                sock.bind((host, given or port, *rest))
            except OSError as exc:
                if exc.errno == errno.EADDRNOTAVAIL and len(wanted) > 1:
                    self.sockets.remove(sock)  # IPv6 is compiled in and switched off, say
                    sock.close()
                    continue
                raise OSError(exc.errno, f"cannot bind {TcpAddress(host, given or port)}: {exc.strerror}") from None
            port = port or sock.getsockname()[1]
        if not self.sockets:
            raise OSError(errno.EADDRNOTAVAIL, f"cannot bind {self.address}: this host has none of its addresses")

    def _set_options(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if self._reuse_address:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not self._dualstack_ipv6)

    def _bind_unix(self, path: str) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sockets.append(sock)
        sock.setblocking(False)
        with contextlib.suppress(FileNotFoundError):  # the socket of a process that has ended, as in asyncio
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)
        try:
            sock.bind(path)
        except OSError as exc:
            raise OSError(exc.errno, f"cannot bind {self.address}: {exc.strerror}") from None
        self._unlink = (path, os.stat(path).st_ino)
