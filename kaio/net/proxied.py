"""Reading a PROXY header from an accepted socket, before it has a transport.

Rules kept here: the header is looked at in the socket (MSG_PEEK) and taken only once it is whole, and nothing beyond
it: what follows belongs to TLS or to the protocol, and in mode "accept" a connection without a header loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from typing import Final

from .proxy_protocol import HeaderParser, NoHeader, ProxyHeader, ProxyProtocol

__all__ = ["receive_header"]

_AGAIN: Final = 0.02  # seconds between two looks, where the system reports each time that a part is there
_MOST: Final = 65536  # bytes that are looked at; the parser refuses a header that is too long before


async def receive_header(
    loop: asyncio.AbstractEventLoop, conn: socket.socket, proxy: ProxyProtocol
) -> ProxyHeader | None:
    """Receive the PROXY header of a connection; None when there is none, which mode "accept" allows.

    Raises `ProxyError`, OSError, and EOFError when the peer closes before.
    """
    parser = HeaderParser(mode=proxy.mode)
    seen = 0
    try:
        while True:
            try:
                data = conn.recv(_MOST, socket.MSG_PEEK)
            except BlockingIOError:
                await _readable(loop, conn)
                continue
            if len(data) == seen:
                if not data or _has_ended(conn):
                    if proxy.mode == "accept":
                        return None
                    raise EOFError(f"the connection ended after {seen} bytes of a PROXY header")
                await asyncio.sleep(_AGAIN)  # a Unix socket, where SO_RCVLOWAT does not count
                continue
            header = parser.feed(data[seen:])
            seen = len(data)
            if header is None:
                _wake_at(conn, seen + 1)
                await _readable(loop, conn)
                continue
            if isinstance(header, NoHeader):
                return None
            conn.recv(seen - len(parser.rest))
            return header
    finally:
        with contextlib.suppress(OSError, ValueError):  # closed
            _wake_at(conn, 1)


def _has_ended(conn: socket.socket) -> bool:
    """Return whether no more data will come after what was seen."""
    poll = select.poll()
    poll.register(conn, getattr(select, "POLLRDHUP", 0))  # Linux has it
    return bool(poll.poll(0))


def _wake_at(conn: socket.socket, count: int) -> None:
    """Have the socket readable only when it holds that many bytes, or no more will come."""
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)


async def _readable(loop: asyncio.AbstractEventLoop, conn: socket.socket) -> None:
    """Wait until a socket is readable."""
    readable = loop.create_future()
    loop.add_reader(conn, _set, readable)
    try:
        await readable
    finally:
        loop.remove_reader(conn)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
