"""The queues of any socket: what was received and not read, what was sent and not acknowledged; and what close() does.

Rules kept here: one system call each, and none changes anything but what it is called for.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import sys

from .options import SocketLike

__all__ = ["is_listening", "reset_on_close", "take_unread", "unacknowledged", "unread"]

if os.name == "posix":
    import fcntl
    import termios


def is_listening(sock: SocketLike) -> bool:
    """Return whether a socket is listening; False where SO_ACCEPTCONN cannot be read, as on macOS."""
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def reset_on_close(sock: SocketLike) -> None:
    """Make close() discard unsent data and send a reset (SO_LINGER 0), so that the kernel stops retransmitting."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def unread(sock: SocketLike) -> int:
    """Return the number of bytes in the receive queue (FIONREAD); 0 where that is unknown. Raises OSError."""
    return _count(sock, termios.FIONREAD) if os.name == "posix" else 0


def unacknowledged(sock: SocketLike) -> int:
    """Return the number of bytes in the send queue, sent or not, that are not acknowledged; 0 where unknown.

    SIOCOUTQ of tcp(7) and unix(7), to which Linux gives the number of TIOCOUTQ. Raises OSError.
    """
    return _count(sock, termios.TIOCOUTQ) if sys.platform.startswith("linux") else 0


def _count(sock: SocketLike, request: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), request, count)
    return count[0]


def take_unread(sock: SocketLike) -> bytes:
    """Read the receive queue without blocking; b"" where `unread` does not work. Raises OSError.

    It reads through a duplicate of the descriptor, because uvloop's PseudoSocket has no recv().
    """
    parts = []
    if unread(sock):
        with socket.socket(fileno=os.dup(sock.fileno())) as twin:
            twin.setblocking(False)  # as the loop left it; socket.setdefaulttimeout may have changed it
            with contextlib.suppress(BlockingIOError):
                while more := unread(twin):
                    parts.append(twin.recv(more))
    return b"".join(parts)
