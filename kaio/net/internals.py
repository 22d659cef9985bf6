"""What kaio relies on inside asyncio's and uvloop's loops, beyond `asyncio.Transport` and `asyncio.AbstractEventLoop`.

Rules kept here: each function names what it relies on, and does without where a loop has nothing of the kind. When a
loop that kaio knows has lost it, one warning in the log says what is lost with it; the sockets keep their options,
which need nothing of this. Nothing here is called per message, nor per connection while all is well.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import socket
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ..errors import Cause
from ..kernel.options import SocketLike
from ..liveness.causes import NO_WAY

__all__ = [
    "below_tls",
    "end_reading",
    "force_close",
    "is_closed",
    "is_held_back",
    "is_sending_file",
    "protocols_above",
    "stop_sending_file",
    "take_error",
    "transports_of",
    "with_reason",
]

logger: Final = logging.getLogger("kaio")

_missed: Final[set[tuple[type, str]]] = set()  # what was said already


def _miss(owner: object, what: str, consequence: str) -> None:
    """Say once for each class that it has lost what kaio relies on, and what follows from that."""
    if (type(owner), what) not in _missed:
        _missed.add((type(owner), what))
        logger.warning("%s.%s has no %s: %s", type(owner).__module__, type(owner).__qualname__, what, consequence)


def _is_asyncios(owner: object, module: str) -> bool:
    """Return whether an object is of a class of asyncio's own, or of one derived from it."""
    return any(each.__module__ == f"asyncio.{module}" for each in type(owner).__mro__)


def transports_of(loop: asyncio.AbstractEventLoop) -> Mapping[int, weakref.ref[asyncio.Transport]]:
    """Return a loop's own table of its transports: descriptor to weak reference. Empty when it cannot be found.

    asyncio has it as `_transports` (asyncio/selector_events.py); uvloop has it as a C attribute (uvloop/loop.pyx,
    `_transports`), which the garbage collector knows. A loop keeps one table for all its life.
    """
    table = getattr(loop, "_transports", None)
    for found in [table] if table is not None else gc.get_referents(loop):
        if type(found) is weakref.WeakValueDictionary:
            return found.data  # type: ignore[attr-defined,no-any-return]
    _miss(loop, "table of its transports", "its sockets have the policy, and no monitor")
    return {}


def protocols_above(transport: asyncio.Transport) -> list[object]:
    """Return the protocol of a transport; of a TLS layer's transport, those that may be above the layer.

    asyncio's layer has it as `_app_protocol` (asyncio/sslproto.py), uvloop's as a C attribute of the same name
    (uvloop/sslproto.pyx), which the garbage collector knows.
    """
    protocol = transport.get_protocol()
    if type(protocol).__name__ != "SSLProtocol":
        return [protocol]
    above = getattr(protocol, "_app_protocol", None)
    if above is not None:
        return [above]
    if hasattr(protocol, "_app_protocol"):  # asyncio's, whose TLS has ended
        return []
    # Of the types: looking up connection_lost on a kaio protocol itself reads TCP_INFO (see `_ConnectionLost`).
    found = [each for each in gc.get_referents(protocol) if hasattr(type(each), "connection_lost")]
    if not found and not transport.is_closing():
        _miss(protocol, "_app_protocol", "a kaio protocol over TLS may be watched twice")
    return found


def force_close(transport: Any, exc: BaseException | None) -> None:
    """Close a transport at once: `connection_lost(exc)` comes in the next turn, through TLS too.

    Both loops do it for their own fatal errors (asyncio/selector_events.py, asyncio/sslproto.py;
    uvloop/handles/basetransport.pyx, uvloop/sslproto.pyx: `_force_close`). It also fails a layer's handshake. A
    transport that has no such method is aborted, which reports no error.
    """
    method = getattr(transport, "_force_close", None)
    if method is None:
        _miss(transport, "_force_close", "connection_lost is called without the error")
        transport.abort()
        return
    try:
        method(exc)
    except (AttributeError, TypeError):  # in 3.11 asyncio's own TLS transport gets it wrong
        transport.abort()


def is_closed(transport: asyncio.Transport) -> bool:
    """Return whether a transport has closed its socket: connection_lost has been called, or is in this turn."""
    try:
        if not transport.is_closing():
            return False
        sock = transport.get_extra_info("socket")
        return sock is None or sock.fileno() < 0
    except (OSError, ValueError, AttributeError, RuntimeError):  # asyncio's TLS transport without the one below
        return True


def is_sending_file(transport: object) -> bool:
    """Return whether asyncio's `loop.sendfile` is at work on a transport.

    It has paused reading then, and waits for the descriptor by itself: a transport that is closed meanwhile closes the
    descriptor, and it waits for ever (asyncio/selector_events.py: `_empty_waiter`, `_sendfile_native`).
    """
    try:
        return transport._empty_waiter is not None  # type: ignore[attr-defined]  # noqa: SLF001
    except AttributeError:  # uvloop has no sendfile
        if _is_asyncios(transport, "selector_events"):
            _miss(transport, "_empty_waiter", "loop.sendfile may not end when its peer dies")
        return False


def is_held_back(transport: asyncio.Transport) -> bool:
    """Return whether reading is paused and a TLS layer in or above a transport may hold data back.

    asyncio's layer has `_app_reading_paused` (asyncio/sslproto.py); uvloop's does not say.
    """
    if not transport.is_reading():
        return transport.get_extra_info("sslcontext") is not None
    protocol: Any = transport.get_protocol()
    try:
        return bool(protocol._app_reading_paused)  # noqa: SLF001
    except AttributeError:
        if _is_asyncios(protocol, "sslproto"):
            _miss(protocol, "_app_reading_paused", "data that TLS holds back may be lost when the peer dies")
        return False


def stop_sending_file(sock: SocketLike) -> None:
    """Make the next attempt of `loop.sendfile` fail: shut down the sending half of the socket."""
    with _twin(sock) as twin:
        twin.shutdown(socket.SHUT_WR)


def end_reading(sock: SocketLike) -> None:
    """Let an end of file follow the data that a socket holds. Raises OSError when the socket is closed."""
    with _twin(sock) as twin:
        twin.shutdown(socket.SHUT_RD)


@contextlib.contextmanager
def _twin(sock: SocketLike) -> Iterator[socket.socket]:
    """Duplicate a socket as one that has shutdown(), which TransportSocket and PseudoSocket lack."""
    with socket.socket(fileno=os.dup(sock.fileno())) as twin, contextlib.suppress(OSError):  # ENOTCONN: it does already
        yield twin


def take_error(sock: SocketLike) -> int:
    """Return the pending error of a socket, else the last soft error (ICMP, this host's routes); 0: none.

    Reading it clears it: only for a connection whose end is decided (net/core/sock.c: SO_ERROR, sk_err_soft).
    """
    try:
        return int(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    except (OSError, ValueError, AttributeError):
        return 0


def with_reason(sock: SocketLike, exc: OSError, cause: Cause) -> tuple[OSError, Cause | None]:
    """Return the error and cause of a verdict, with the socket's own error where it has one.

    The cause is None where that error is no death: the connection was reset in this moment.
    """
    number = take_error(sock)
    if number in NO_WAY:
        return OSError(number, os.strerror(number)), Cause.UNREACHABLE
    if number in (0, errno.ETIMEDOUT):
        return exc, cause
    return OSError(number, os.strerror(number)), None


def below_tls(transport: asyncio.Transport) -> asyncio.Transport | None:
    """Return the transport that uvloop's TLS reads from; None for any other transport, and once TLS has ended.

    uvloop (sslproto.pyx) has both `_ssl_protocol` and its `_transport` as C attributes, which only the garbage
    collector knows. Where they are not found, reading is paused in the TLS layer alone, as with asyncio's TLS.
    """
    if type(transport).__name__ != "_SSLProtocolTransport" or not type(transport).__module__.startswith("uvloop"):
        return None
    for protocol in gc.get_referents(transport):
        if type(protocol).__name__ == "SSLProtocol":
            for found in gc.get_referents(protocol):
                if found is not transport and hasattr(found, "pause_reading"):
                    return found  # type: ignore[no-any-return]
    if transport.get_extra_info("socket") is not None:  # the layer has a transport, so TLS has not ended
        _miss(transport, "_ssl_protocol", "data that TLS holds back may be lost at the end")
    return None
