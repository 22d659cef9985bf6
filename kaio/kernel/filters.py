"""Socket filters: what a socket's kernel does not let it receive (socket(7): SO_ATTACH_FILTER; Linux only).

Rules kept here: classic BPF, in as few instructions as do it.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
import sys
from typing import Final

from .options import SocketLike

__all__ = ["DROP_ALL", "DROP_SYN", "attach_filter", "detach_filter"]

_SO_ATTACH_FILTER: Final = 26
_SO_DETACH_FILTER: Final = 27


class _Program:
    """Instructions, and the struct sock_fprog that points to them."""

    def __init__(self, *instructions: tuple[int, int, int, int]) -> None:
        self._code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in instructions))
        self.pointer: bytes = struct.pack("@HP", len(instructions), ctypes.addressof(self._code))


DROP_ALL: Final = _Program((0x06, 0, 0, 0))  # ret #0
"""Nothing is received."""
DROP_SYN: Final = _Program(
    (0x30, 0, 0, 13),  # ldb [13]: the flags; a TCP socket's filter sees segments from their TCP header on
    (0x54, 0, 0, 0x12),  # and #SYN|ACK
    (0x15, 0, 1, 0x02),  # jeq #SYN
    (0x06, 0, 0, 0),  # ret #0
    (0x06, 0, 0, 0xFFFFFFFF),  # ret #-1
)
"""A listening TCP socket begins no new handshakes; those that have begun can end."""


def attach_filter(sock: SocketLike, program: _Program) -> None:
    """Attach a filter in place of the one that a socket has. Raises OSError."""
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOTSUP, f"{sys.platform} has no socket filters")
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program.pointer)


def detach_filter(sock: SocketLike) -> None:
    """Detach the filter of a socket. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
