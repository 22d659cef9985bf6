"""kaio: an asyncio server and client framework in which every TCP connection knows whether its peer is still there.

The map; each row imports only from the rows above it, and from its own without a cycle:

    errors                                the tree of exceptions
    policy addresses tcpinfo verdict      plain data and judgement, no I/O
    _sockopt/linux darwin bsd windows     policy <-> socket options, the only place that knows the platform
    keepalive                             apply, inspect, health on any socket
    monitor                               one per loop: looks after connections that may be in trouble
    transports protocols                  what a connection hands to user code
    connection                            the stream
    listeners client server               accept, connect, serve
    loops                                 the event loop that covers the sockets of any library
    system processes                      the kernel's defaults; sockets of running processes
    testing/ cli/                         tools; nothing above imports them
"""

from __future__ import annotations

from .addresses import TcpAddress, UnixAddress
from .client import connect, create_connection, open_connection
from .connection import Connection
from .errors import AddressError, Cause, DeadPeerError, KaioError, KeepaliveError, PolicyError, ResetError
from .keepalive import apply, health, inspect
from .listeners import Listener
from .monitor import Counters, Event, Monitor, get_monitor
from .policy import AUTO, Keepalive, SocketState, Step
from .protocols import BufferedKeepaliveProtocol, KeepaliveProtocol
from .server import Server, create_server, serve, start_server
from .tcpinfo import TcpInfo, TcpState
from .transports import AliveScope, KeepaliveTransport
from .verdict import Health, State

__all__ = [
    "AUTO",
    "AddressError",
    "AliveScope",
    "BufferedKeepaliveProtocol",
    "Cause",
    "Connection",
    "Counters",
    "DeadPeerError",
    "Event",
    "Health",
    "KaioError",
    "Keepalive",
    "KeepaliveError",
    "KeepaliveProtocol",
    "KeepaliveTransport",
    "Listener",
    "Monitor",
    "PolicyError",
    "ResetError",
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
    "get_monitor",
    "health",
    "inspect",
    "open_connection",
    "serve",
    "start_server",
]

__version__ = "0.1.0"
