"""kaio: an asyncio server and client framework in which every TCP connection knows whether its peer is still there.

The map; each row imports only from the rows above it, and from its own without a cycle:

    errors                                the tree of exceptions
    policy/ addresses asgi                plain data; the ASGI middleware, which needs nothing else of kaio
    kernel/                               socket options by platform, TCP_INFO, any socket, descriptors of this process
    liveness/                             pure judgement: health, the watch, whose options a socket has
    monitor/                              what watches: the monitor of a loop, the sweep of a process, who watches what
    net/                                  asyncio: transports, protocols, streams; who dials, accepts and serves
    loop/                                 the event loop that covers the sockets of any library
    tools/                                what the commands do, as functions
    testing/ cli/                         for the tests of others; the commands, one a file
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .addresses import TcpAddress, UnixAddress
    from .errors import (
        AddressError,
        BrokenResourceError,
        Cause,
        ClosedResourceError,
        ConnectionEnded,
        ContentTimeoutError,
        DeadPeerError,
        EndOfStream,
        IdleTimeoutError,
        IncompleteRead,
        KaioError,
        KeepaliveError,
        PolicyError,
        ResetError,
        SendTimeoutError,
    )
    from .kernel.sockets import apply, inspect
    from .kernel.tcpinfo import TcpInfo, TcpState
    from .liveness.health import Health, State
    from .liveness.sample import health
    from .loop.factories import EventLoopPolicy, install, loop_factory, new_event_loop, report, run
    from .monitor.counters import Counters, Event
    from .monitor.heartbeats import Heartbeat
    from .monitor.monitor import Monitor, get_monitor
    from .monitor.survey import Report, sweep
    from .net.client import connect, create_connection, open_connection
    from .net.connection import Connection
    from .net.current import ConnectionFilter, current_connection
    from .net.listeners import Listener
    from .net.notify import notify
    from .net.pool import Pool
    from .net.protocols import BufferedKeepaliveProtocol, KeepaliveProtocol
    from .net.proxy_protocol import ProxyError, ProxyHeader, ProxyProtocol, ProxyTls
    from .net.retry import Retry
    from .net.scopes import AliveScope
    from .net.server import Server, create_server, serve, start_server
    from .net.transports import KeepaliveTransport
    from .policy import AUTO, Keepalive, SocketState, Step

__all__ = [
    "AUTO",
    "AddressError",
    "AliveScope",
    "BrokenResourceError",
    "BufferedKeepaliveProtocol",
    "Cause",
    "ClosedResourceError",
    "Connection",
    "ConnectionEnded",
    "ConnectionFilter",
    "ContentTimeoutError",
    "Counters",
    "DeadPeerError",
    "EndOfStream",
    "Event",
    "EventLoopPolicy",
    "Health",
    "Heartbeat",
    "IdleTimeoutError",
    "IncompleteRead",
    "KaioError",
    "Keepalive",
    "KeepaliveError",
    "KeepaliveProtocol",
    "KeepaliveTransport",
    "Listener",
    "Monitor",
    "PolicyError",
    "Pool",
    "ProxyError",
    "ProxyHeader",
    "ProxyProtocol",
    "ProxyTls",
    "Report",
    "ResetError",
    "Retry",
    "SendTimeoutError",
    "Server",
    "SocketState",
    "State",
    "Step",
    "TcpAddress",
    "TcpInfo",
    "TcpState",
    "UnixAddress",
    "apply",
    "connect",
    "create_connection",
    "create_server",
    "current_connection",
    "get_monitor",
    "health",
    "inspect",
    "install",
    "loop_factory",
    "new_event_loop",
    "notify",
    "open_connection",
    "report",
    "run",
    "serve",
    "start_server",
    "sweep",
]

__version__ = "0.1.0"

# Where each name is from. A module is imported when a name of it is first asked for, as in anyio: a program that only
# connects need not wait for the server.
_HOMES: Final = {
    "addresses": ("TcpAddress", "UnixAddress"),
    "net.client": ("connect", "create_connection", "open_connection"),
    "net.connection": ("Connection",),
    "errors": (
        "AddressError",
        "BrokenResourceError",
        "Cause",
        "ClosedResourceError",
        "ConnectionEnded",
        "ContentTimeoutError",
        "DeadPeerError",
        "EndOfStream",
        "IdleTimeoutError",
        "IncompleteRead",
        "KaioError",
        "KeepaliveError",
        "PolicyError",
        "ResetError",
        "SendTimeoutError",
    ),
    "kernel.sockets": ("apply", "inspect"),
    "net.current": ("ConnectionFilter", "current_connection"),
    "net.listeners": ("Listener",),
    "loop.factories": ("EventLoopPolicy", "install", "loop_factory", "new_event_loop", "report", "run"),
    "monitor.counters": ("Counters", "Event"),
    "monitor.heartbeats": ("Heartbeat",),
    "monitor.monitor": ("Monitor", "get_monitor"),
    "policy": ("AUTO", "Keepalive", "SocketState", "Step"),
    "net.proxy_protocol": ("ProxyError", "ProxyHeader", "ProxyProtocol", "ProxyTls"),
    "net.notify": ("notify",),
    "net.pool": ("Pool",),
    "net.protocols": ("BufferedKeepaliveProtocol", "KeepaliveProtocol"),
    "net.server": ("Server", "create_server", "serve", "start_server"),
    "monitor.survey": ("Report", "sweep"),
    "kernel.tcpinfo": ("TcpInfo", "TcpState"),
    "net.retry": ("Retry",),
    "net.scopes": ("AliveScope",),
    "net.transports": ("KeepaliveTransport",),
    "liveness.health": ("Health", "State"),
    "liveness.sample": ("health",),
}
_HOME: Final = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name from where it is, once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
