"""The sockets of this process by their descriptors, whoever opened them (Linux only); what any socket can be asked.

Rules kept here: a look at a descriptor changes nothing of it, and holds nothing open.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import functools
import os
import re
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias, overload

from ..errors import KeepaliveError, os_error
from .options import SocketLike, platform
from .sockets import describe

__all__ = [
    "Descriptor",
    "SocketAddress",
    "descriptors",
    "is_listening",
    "libc",
    "reset_on_close",
    "take_unread",
    "unacknowledged",
    "unread",
]

if os.name == "posix":
    import fcntl
    import termios

_SO_DOMAIN: Final = 39
_AF_UNKNOWN: Final = -1

SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
"""An address of AF_INET, or of AF_INET6 with its flow information and scope."""


class Descriptor:
    """A socket of this process by its number: what libraries in C open and what only its owner has an object of.

    Making a `socket.socket` of it would be no mere look: under `socket.setdefaulttimeout` that makes the descriptor
    non-blocking, for its owner too. Linux only.
    """

    __slots__ = ("_fd", "family", "inode", "type")

    def __init__(self, fd: int, inode: int) -> None:
        self._fd = fd
        self.inode: int = inode  # tells it from others that have its number later
        self.family: int = self._int(socket.SOL_SOCKET, _SO_DOMAIN, _AF_UNKNOWN)
        self.type: int = self._int(socket.SOL_SOCKET, socket.SO_TYPE, 0)

    @classmethod
    def of(cls, fd: int) -> Descriptor:
        """Raises OSError when there is no such descriptor; ENOTSOCK when it is none of a socket."""
        return cls(fd, os.fstat(fd).st_ino)

    def fileno(self) -> int:
        """Its number; -1 once that is another's."""
        try:
            return self._fd if os.fstat(self._fd).st_ino == self.inode else -1
        except OSError:
            return -1

    @property
    def is_tcp(self) -> bool:
        """Whether keepalive means anything on it."""
        return platform.is_tcp(self)

    @property
    def is_listening(self) -> bool:
        """Whether it accepts connections."""
        return is_listening(self)

    @overload
    def getsockopt(self, level: int, optname: int, /) -> int: ...
    @overload
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...

    def getsockopt(self, level: int, optname: int, buflen: int | None = None, /) -> int | bytes:
        """As `socket.socket.getsockopt`."""
        if buflen is None:
            return self._int(level, optname, None)
        buffer = ctypes.create_string_buffer(buflen)
        length = self._get(level, optname, buffer, buflen)
        return buffer.raw[:length]

    def setsockopt(self, level: int, optname: int, value: int | bytes, /) -> None:
        """As `socket.socket.setsockopt`."""
        raw = value if isinstance(value, bytes) else bytes(ctypes.c_int(value))
        if libc().setsockopt(self._fd, level, optname, raw, len(raw)) != 0:
            raise os_error(ctypes.get_errno())

    def getsockname(self) -> SocketAddress:
        """Its own address."""
        return self._address(libc().getsockname)

    def getpeername(self) -> SocketAddress:
        """Its peer's address."""
        return self._address(libc().getpeername)

    def _address(self, call: Callable[..., int]) -> SocketAddress:
        """struct sockaddr_in and sockaddr_in6: ip(7), ipv6(7)."""
        buffer = ctypes.create_string_buffer(28)
        length = ctypes.c_uint(28)
        if call(self._fd, buffer, ctypes.byref(length)) != 0:
            raise os_error(ctypes.get_errno())
        raw = buffer.raw
        port = int.from_bytes(raw[2:4], "big")
        if self.family == socket.AF_INET:
            return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
        flow, scope = int.from_bytes(raw[4:8], "big"), int.from_bytes(raw[24:28], sys.byteorder)
        return socket.inet_ntop(socket.AF_INET6, raw[8:24]), port, flow, scope

    def _int(self, level: int, option: int, otherwise: int | None) -> int:
        number = ctypes.c_int()
        try:
            self._get(level, option, ctypes.byref(number), ctypes.sizeof(number))
        except OSError as exc:
            if otherwise is None or exc.errno in (errno.EBADF, errno.ENOTSOCK):
                raise
            return otherwise
        return number.value

    def _get(self, level: int, option: int, buffer: object, size: int) -> int:
        length = ctypes.c_uint(size)
        if libc().getsockopt(self._fd, level, option, buffer, ctypes.byref(length)) != 0:
            raise os_error(ctypes.get_errno())
        return length.value

    def __repr__(self) -> str:
        return f"<Descriptor {self._fd} {describe(self)}>"


@functools.cache
def libc() -> ctypes.CDLL:
    """The C library, whose errno ctypes.get_errno() gives."""
    return ctypes.CDLL(None, use_errno=True)


def descriptors() -> Iterator[Descriptor]:
    """Every TCP socket of this process, whoever opened it. Raises `KeepaliveError` on systems without /proc."""
    if not sys.platform.startswith("linux"):
        raise KeepaliveError(errno.EOPNOTSUPP, f"a process's own sockets cannot be listed on {sys.platform}")
    for name in os.listdir("/proc/self/fd"):
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/self/fd/{name}"))
            if found is None:
                continue
            descriptor = Descriptor(int(name), int(found[1]))
            if descriptor.is_tcp:
                yield descriptor
        except OSError:  # closed meanwhile
            continue


def is_listening(sock: SocketLike) -> bool:
    """Whether a socket accepts connections; False where that cannot be told, as on macOS."""
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def reset_on_close(sock: SocketLike) -> None:
    """Let closing drop what is unsent and reset: nobody is there to take it, and the kernel need not go on trying."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def unread(sock: SocketLike) -> int:
    """How many bytes a socket holds that were not read yet; 0 where that cannot be told. Raises OSError."""
    return _count(sock, termios.FIONREAD) if os.name == "posix" else 0


def unacknowledged(sock: SocketLike) -> int:
    """How many bytes that a socket was given to send were not acknowledged yet; 0 where that cannot be told.

    SIOCOUTQ of tcp(7) and unix(7), which Linux has under this name, too. Raises OSError.
    """
    return _count(sock, termios.TIOCOUTQ) if sys.platform.startswith("linux") else 0


def _count(sock: SocketLike, request: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), request, count)
    return count[0]


def take_unread(sock: SocketLike) -> bytes:
    """Read all that a socket holds, and wait for nothing; nothing where `unread` cannot tell. Raises OSError.

    Through a descriptor of its own: uvloop's stand-in for a socket has no recv().
    """
    parts = []
    if unread(sock):
        with socket.socket(fileno=os.dup(sock.fileno())) as twin:
            twin.setblocking(False)  # as the loop has it, whatever socket.setdefaulttimeout says
            with contextlib.suppress(BlockingIOError):
                while more := unread(twin):
                    parts.append(twin.recv(more))
    return b"".join(parts)
