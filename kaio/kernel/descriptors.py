"""The sockets of this process by their file descriptors, whoever opened them (Linux only).

Rules kept here: reading from a `Descriptor` changes neither its socket nor its flags, and keeps nothing open.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import functools
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias, TypeVar, overload

from ..errors import KeepaliveError, os_error
from .options import platform
from .queues import is_listening
from .sockets import describe

__all__ = [
    "Descriptor",
    "SocketAddress",
    "call_in_network",
    "descriptors",
    "libc",
]

_SO_DOMAIN: Final = 39
_AF_UNKNOWN: Final = -1
_CLONE_NEWNET: Final = 0x40000000

T = TypeVar("T")

SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
"""An address of AF_INET, or of AF_INET6 with its flow information and scope."""


class Descriptor:
    """A socket of this process by its file descriptor, such as one that a C library opened. Linux only.

    Not a `socket.socket`, because creating one after `socket.setdefaulttimeout` makes the descriptor non-blocking, for
    its owner too.
    """

    __slots__ = ("_fd", "family", "inode", "type")

    def __init__(self, fd: int, inode: int) -> None:
        self._fd = fd
        self.inode: int = inode  # the number may be used again for another socket
        self.family: int = self._int(socket.SOL_SOCKET, _SO_DOMAIN, _AF_UNKNOWN)
        self.type: int = self._int(socket.SOL_SOCKET, socket.SO_TYPE, 0)

    @classmethod
    def of(cls, fd: int) -> Descriptor:
        """The socket with this descriptor. Raises OSError: EBADF when it is not open, ENOTSOCK when it is no socket."""
        return cls(fd, os.fstat(fd).st_ino)

    def fileno(self) -> int:
        """Return the number; -1 when the socket was closed, even if the number is used again."""
        try:
            return self._fd if os.fstat(self._fd).st_ino == self.inode else -1
        except OSError:
            return -1

    @property
    def is_tcp(self) -> bool:
        """Whether it is a TCP socket."""
        return platform.is_tcp(self)

    @property
    def is_listening(self) -> bool:
        """Whether it is a listening socket."""
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
        """As `socket.socket.getsockname`."""
        return self._address(libc().getsockname)

    def getpeername(self) -> SocketAddress:
        """As `socket.socket.getpeername`."""
        return self._address(libc().getpeername)

    def _address(self, call: Callable[..., int]) -> SocketAddress:
        """Decode struct sockaddr_in and sockaddr_in6: ip(7), ipv6(7)."""
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
    """The C library; ctypes.get_errno() returns its errno."""
    return ctypes.CDLL(None, use_errno=True)


def call_in_network(namespace: int, function: Callable[[], T]) -> T:
    """Call a function in a network namespace, given by a descriptor, and return its result.

    A temporary thread enters the namespace, since setns(2) changes the calling thread only; no process is forked.
    Raises OSError when it cannot be entered, for which CAP_SYS_ADMIN is needed.
    """

    def enter_and_call() -> T:
        if libc().setns(namespace, _CLONE_NEWNET) != 0:  # os.setns is Python 3.12's
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter the network namespace: {os.strerror(number)}")
        return function()

    with concurrent.futures.ThreadPoolExecutor(1, "kaio-namespace") as thread:
        return thread.submit(enter_and_call).result()


def descriptors() -> Iterator[Descriptor]:
    """Iterate over all TCP sockets of this process, whoever opened them. Raises `KeepaliveError` if not on Linux."""
    if not sys.platform.startswith("linux"):
        raise KeepaliveError(errno.EOPNOTSUPP, f"cannot list the sockets of this process on {sys.platform}")
    for name in os.listdir("/proc/self/fd"):
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/self/fd/{name}"))
            if found is None:
                continue
            descriptor = Descriptor(int(name), int(found[1]))
            if descriptor.is_tcp:
                yield descriptor
        except OSError:  # closed in the meantime
            continue
