"""The kernel's TCP defaults in a socket's network namespace.

Rules kept here: the calling thread never leaves its network namespace; a temporary thread enters another one, reads the
values there and ends.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from typing import Final

from ...kernel.descriptors import libc
from ..sysctls import Defaults
from ..sysctls import read as read_here

__all__ = ["Systems"]

_SO_NETNS_COOKIE: Final = 71  # Linux 5.14
_SIOCGSKNS: Final = 0x894C  # linux/sockios.h: returns a descriptor of a socket's network namespace
_CLONE_NEWNET: Final = 0x40000000


class Systems:
    """A cache of the values by network namespace. Raises `SysctlError`, OSError."""

    def __init__(self) -> None:
        with socket.socket() as ours:
            self._known = {_cookie(ours): read_here()}

    def of(self, sock: socket.socket) -> Defaults:
        """Return the values in a socket's network namespace."""
        cookie = _cookie(sock)
        if cookie not in self._known:
            self._known[cookie] = _read_there(sock)
        return self._known[cookie]


def _cookie(sock: socket.socket) -> int:
    """The id of a socket's network namespace; 0 before Linux 5.14, where all are taken for this process's."""
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")
    except OSError as exc:
        if exc.errno == errno.ENOPROTOOPT:
            return 0
        raise


def _read_there(sock: socket.socket) -> Defaults:
    """Read the values in a socket's network namespace. Entering one needs root; otherwise return a new one's values."""
    import fcntl  # noqa: PLC0415 - not on Windows

    found = [Defaults()]

    def look() -> None:
        try:
            namespace = fcntl.ioctl(sock, _SIOCGSKNS)
            try:
                # os.setns is Python 3.12's
                if libc().setns(namespace, _CLONE_NEWNET) == 0:
                    found[0] = read_here()
            finally:
                os.close(namespace)
        except OSError:
            pass

    thread = threading.Thread(target=look, name="kaio-namespace")
    thread.start()
    thread.join()
    return found[0]
