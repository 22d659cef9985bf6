"""The kernel's TCP defaults in a socket's network namespace.

Rules kept here: the calling thread never leaves its network namespace: `call_in_network` reads in another one.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from ...kernel.descriptors import call_in_network
from ..sysctls import Defaults
from ..sysctls import read as read_here

__all__ = ["Systems", "network_of"]

_SO_NETNS_COOKIE: Final = 71  # Linux 5.14
_SIOCGSKNS: Final = 0x894C  # linux/sockios.h: returns a descriptor of a socket's network namespace


class Systems:
    """A cache of the values by network namespace. Raises `SysctlError`, OSError."""

    def __init__(self) -> None:
        with socket.socket() as ours:
            self._known = {network_of(ours): read_here()}

    def of(self, sock: socket.socket) -> Defaults:
        """Return the values in a socket's network namespace."""
        cookie = network_of(sock)
        if cookie not in self._known:
            self._known[cookie] = _read_there(sock)
        return self._known[cookie]


def network_of(sock: socket.socket) -> int:
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

    try:
        namespace = fcntl.ioctl(sock, _SIOCGSKNS)
        try:
            return call_in_network(namespace, read_here)
        finally:
            os.close(namespace)
    except OSError:
        return Defaults()
