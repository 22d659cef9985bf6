"""What kaio knows of the transports of asyncio's and uvloop's loops beyond `asyncio.Transport`.

Rules kept here: each function says what it relies on, and does without where a loop has nothing of the kind. All of
them are for the end of a connection; none is called while all is well.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

from ..errors import Cause
from ..kernel.options import SocketLike
from ..liveness.causes import NO_WAY

__all__ = [
    "end_reading",
    "force_close",
    "is_closed",
    "is_held_back",
    "is_sending_file",
    "stop_sending_file",
    "take_error",
    "with_reason",
]


def force_close(transport: Any, exc: BaseException | None) -> None:
    """Let connection_lost(exc) come in the next turn, through TLS too; what a layer's handshake waits for gets it too.

    It is what both loops' own fatal errors do. A loop that has no such method aborts.
    """
    try:
        transport._force_close(exc)  # noqa: SLF001 - asyncio and uvloop have no public name for it
    except (AttributeError, TypeError):  # TypeError: in 3.11 asyncio's own TLS transport gets it wrong
        transport.abort()


def is_closed(transport: asyncio.Transport) -> bool:
    """Whether a transport has closed its socket: its own protocol has heard of that, or does in this turn."""
    try:
        if not transport.is_closing():
            return False
        sock = transport.get_extra_info("socket")
        return sock is None or sock.fileno() < 0
    except (OSError, ValueError, AttributeError, RuntimeError):  # asyncio's TLS transport without the one below
        return True


def is_sending_file(transport: object) -> bool:
    """Whether asyncio's `loop.sendfile` is at work on a transport.

    It has reading paused then, and waits for the descriptor by itself: a transport that is closed meanwhile closes the
    descriptor under it, and it waits for ever (asyncio/selector_events.py: `_empty_waiter`, `_sendfile_native`).
    """
    return getattr(transport, "_empty_waiter", None) is not None


def is_held_back(transport: asyncio.Transport) -> bool:
    """Whether the application has paused reading, and a TLS layer in or over a transport may hold data for it.

    uvloop does not say that of a layer over it.
    """
    if not transport.is_reading():
        return transport.get_extra_info("sslcontext") is not None
    return bool(getattr(transport.get_protocol(), "_app_reading_paused", False))


def stop_sending_file(sock: SocketLike) -> None:
    """Let `loop.sendfile` find at its next attempt, which is now, that nothing can be sent any more."""
    with _twin(sock) as twin:
        twin.shutdown(socket.SHUT_WR)


def end_reading(sock: SocketLike) -> None:
    """Let an end of file follow what a socket holds. Raises OSError when the socket is closed."""
    with _twin(sock) as twin:
        twin.shutdown(socket.SHUT_RD)


@contextlib.contextmanager
def _twin(sock: SocketLike) -> Iterator[socket.socket]:
    """The same socket as an object that has shutdown(), which the loops' stand-ins lack."""
    with socket.socket(fileno=os.dup(sock.fileno())) as twin, contextlib.suppress(OSError):  # ENOTCONN: it does already
        yield twin


def take_error(sock: SocketLike) -> int:
    """The error that a socket waits to report, else what the network or this host has said of late; 0: nothing.

    Reading it takes it away: only for a connection whose end is decided (net/core/sock.c: SO_ERROR, sk_err_soft).
    """
    try:
        return int(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    except (OSError, ValueError, AttributeError):
        return 0


def with_reason(sock: SocketLike, exc: OSError, cause: Cause) -> tuple[OSError, Cause | None]:
    """A verdict of kaio's own, with what the network or this host has said last, where they have said anything.

    No cause: it is no death, for the connection was reset in this very moment.
    """
    number = take_error(sock)
    if number in NO_WAY:
        return OSError(number, os.strerror(number)), Cause.UNREACHABLE
    if number in (0, errno.ETIMEDOUT):
        return exc, cause
    return OSError(number, os.strerror(number)), None
