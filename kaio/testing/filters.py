"""Let one end of a loopback connection play dead.

Rules kept here: the peer is a real one whose kernel really drops what arrives (a socket filter that accepts nothing,
socket(7): SO_ATTACH_FILTER), so that our own kernel's timers decide. Whatever was changed is put back at the end.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

from ..kernel.filters import DROP_ALL, attach_filter, detach_filter
from ..kernel.options import SocketLike
from ..kernel.sockets import raw_socket

__all__ = ["blackhole", "lacking"]


@contextlib.contextmanager
def blackhole(*endpoints: Any) -> Iterator[None]:
    """Within the block, the given ends of connections play dead; afterwards they are back.

    Takes whatever `kaio.apply` takes, of this process; also a listening socket, which then ignores new connections.
    An end that plays dead hears nothing, answers nothing, and sends no probes of its own. What it had in flight it goes
    on retransmitting, which its peer's kernel takes for a sign of life: give both ends when that can be.

    Raises PermissionError with the remedy when the kernel forbids it (it takes CAP_NET_ADMIN), OSError where there
    are no socket filters (Linux has them).
    """
    with contextlib.ExitStack() as back:
        for endpoint in endpoints:
            sock = raw_socket(endpoint)
            _attach(sock)
            back.callback(_detach, sock)
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
                back.callback(_quietly, sock, socket.SO_KEEPALIVE, 1)
        yield


def lacking() -> str | None:
    """Why `blackhole` cannot work here, in one line; None when it can."""
    with socket.socket() as probe:
        try:
            _attach(probe)
        except OSError as exc:
            return str(exc.strerror)
    return None


def _attach(sock: SocketLike) -> None:
    try:
        attach_filter(sock, DROP_ALL)
    except PermissionError:
        raise PermissionError(
            errno.EPERM,
            "blackhole needs CAP_NET_ADMIN for its socket filter: run as root, or inside `unshare -Urn`",
        ) from None


def _detach(sock: SocketLike) -> None:
    with contextlib.suppress(OSError, ValueError):  # it may be closed by now, and that is as good
        detach_filter(sock)


def _quietly(sock: SocketLike, option: int, value: int) -> None:
    """Put an option back; the socket may be closed by now (uvloop: ValueError), and that is as good."""
    with contextlib.suppress(OSError, ValueError):
        sock.setsockopt(socket.SOL_SOCKET, option, value)
