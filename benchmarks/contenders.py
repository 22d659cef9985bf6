"""The contenders: the ways to write a server that are compared."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["CONTENDERS", "LOOPS", "NATIVE", "Contender"]

LOOPS: Final = ("uvloop", "asyncio")
NATIVE: Final = "C"


class Contender(NamedTuple):
    """A way to write a server."""

    label: str
    server: tuple[str, str]
    """Its module in `servers`, and the function."""


CONTENDERS: Final[dict[str, Contender]] = {
    NATIVE: Contender("epoll in C: the machine's limit", ("", "")),
    "bare": Contender("asyncio.Protocol, bare loop", ("protocols", "bare")),
    "drop-in": Contender("asyncio.Protocol, kaio's loop", ("protocols", "bare")),
    "protocol": Contender("kaio.KeepaliveProtocol", ("protocols", "protocol")),
    "unwatched": Contender("kaio.KeepaliveProtocol, keepalive off", ("protocols", "unwatched")),
    "connection": Contender("kaio.Connection", ("connections", "connection")),
    "timed": Contender("kaio.Connection, idle timeout", ("connections", "timed")),
    "heartbeat": Contender("kaio.Connection, heartbeat each", ("connections", "beating")),
    "streams": Contender("asyncio streams", ("streams", "streams")),
    "timeout": Contender("asyncio streams, timeout per read", ("streams", "timeout")),
    "anyio": Contender("anyio TCP streams", ("anyio_streams", "streams")),
    "kernel": Contender("asyncio.Protocol, SO_KEEPALIVE alone", ("protocols", "kernel")),
    "ping": Contender("asyncio.Protocol, ping task each", ("supervised", "pings")),
    "read-timeout": Contender("asyncio streams, timeout and ping", ("supervised", "read_timeouts")),
}
