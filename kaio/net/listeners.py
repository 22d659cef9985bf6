"""`Listener`: one address to accept on, with its own policy.

Rules kept here: the policy goes on the listening socket between bind and listen, so that accepted sockets inherit it
and cost no system call. A change that one socket refuses changes none. The sockets are `binding`'s, and accepting is
`accepting`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl as ssl_module
from typing import Final

from ..addresses import Address, TcpAddress, UnixAddress, parse_address
from ..errors import KaioError, KeepaliveError, PolicyError
from ..kernel.queues import is_listening
from ..kernel.sockets import apply, apply_or_warn
from ..monitor.monitor import get_monitor
from ..policy import Keepalive, KeepaliveArg, as_policy, check_timeout
from .accepting import AcceptLoop, AcceptOptions, AcceptTls, make_acceptor
from .binding import Binding
from .endpoints import AttachingFactory, Endpoint, PolicyChoice, choose_policy
from .gate import Gate, check_limit
from .handed_over import HandedOver
from .proxy_protocol import ProxyProtocol

__all__ = ["Listener"]

logger: Final = logging.getLogger("kaio")

_HANDSHAKE_TIMEOUT: Final = 60.0  # seconds, as asyncio's for TLS


class Listener:
    """An address to accept connections on, and the policy that they get.

    `address` is text such as "0.0.0.0:9000", "[::]:9443", ":9000" (every interface, IPv4 and IPv6),
    "unix:/run/app.sock", a path object, a `TcpAddress` or `UnixAddress`; or a socket, bound or already listening,
    which the listener closes. "systemd:web" are the sockets that systemd hands over under that name ("systemd:" all
    of them; sd_listen_fds(3)), "fd:3" is a descriptor that was inherited: these go on listening elsewhere.
    `keepalive` takes what every `keepalive=` takes; None is the server's. A Unix socket has no policy, and giving
    it one is a `PolicyError`. A listener belongs to one server at a time.

    `ssl` is an SSLContext; `backlog` the length of the queue (net.core.somaxconn at most); `reuse_port` and
    `reuse_address` are asyncio's; `dualstack_ipv6` lets an IPv6 address accept IPv4 too, as in `socket.create_server`.

    `max_connections` is the number of connections, TLS handshakes included, at which the listener stops accepting: the
    kernel's queue holds the others until some end. Without it the free file descriptors are the limit.
    `max_connections_per_peer` closes what one IPv4 address, or one IPv6 /64, opens beyond that number; accepting then
    costs more on uvloop. Reaching a limit is logged once, and once when it ends.

    `handshake_timeout` is in seconds (default: 60, asyncio's) for a TLS handshake and the PROXY header before it.
    `idle_timeout` and `send_timeout` are those of each new connection: see `Connection.idle_timeout` and
    `Connection.send_timeout`. `proxy_protocol` is a `ProxyProtocol`: the connections of its trusted networks begin with
    a PROXY header, and `peername` is the client that it names.

    Raises `AddressError`, `PolicyError`, TypeError, ValueError. An address that cannot be bound is an OSError when the
    server starts.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | Address | socket.socket,
        *,
        keepalive: KeepaliveArg = None,
        ssl: ssl_module.SSLContext | None = None,
        backlog: int = 4096,
        reuse_address: bool | None = None,
        reuse_port: bool | None = None,
        dualstack_ipv6: bool = False,
        ssl_shutdown_timeout: float | None = None,
        max_connections: int | None = None,
        max_connections_per_peer: int | None = None,
        handshake_timeout: float | None = None,
        idle_timeout: float | None = None,
        send_timeout: float | None = None,
        proxy_protocol: ProxyProtocol | None = None,
    ) -> None:
        handed_over = HandedOver.asked_for(address)
        where = _address_of(address) if handed_over is None else handed_over.address
        _check_context(ssl)
        if proxy_protocol is not None and not isinstance(proxy_protocol, ProxyProtocol):
            raise TypeError(f"proxy_protocol must be a ProxyProtocol or None, got {proxy_protocol!r}")
        self._max_connections = check_limit("max_connections", max_connections)
        self._max_per_peer = check_limit("max_connections_per_peer", max_connections_per_peer)
        self._idle_timeout = check_timeout("idle_timeout", idle_timeout)
        self._send_timeout = check_timeout("send_timeout", send_timeout)
        handshake_timeout = check_timeout("handshake_timeout", handshake_timeout)
        if isinstance(where, UnixAddress) and max_connections_per_peer is not None and proxy_protocol is None:
            raise ValueError(
                f"max_connections_per_peer={max_connections_per_peer!r}: clients of {where} have no address"
            )
        self._binding = Binding(
            where,
            handed_over=handed_over,
            reuse_address=reuse_address,
            reuse_port=reuse_port,
            dualstack_ipv6=dualstack_ipv6,
        )
        tls: AcceptTls = {}
        if ssl is not None:
            tls = {
                "ssl": ssl,
                "ssl_handshake_timeout": handshake_timeout,
                "ssl_shutdown_timeout": ssl_shutdown_timeout,
            }
        self._options = AcceptOptions(tls, handshake_timeout or _HANDSHAKE_TIMEOUT, proxy_protocol)
        self._backlog = backlog
        self._choice: PolicyChoice | None = None  # None: the server's
        if keepalive is not None or isinstance(where, UnixAddress):
            self._choice = choose_policy(keepalive, address=where)
        self._endpoint = Endpoint(self._choice or PolicyChoice(None))
        self._acceptor: AcceptLoop | None = None  # None: it does not listen
        self._server: object = None  # the one that it belongs to

    # -- what a user sees

    @property
    def address(self) -> Address:
        """The address to listen on. Once the server has started, port 0 is replaced by the port that was bound."""
        return self._binding.address

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; empty before the server starts and after it is closed."""
        return tuple(self._binding.sockets)

    @property
    def keepalive(self) -> Keepalive | None:
        """The policy of new connections; None for a Unix socket.

        A listener that was given none has its server's; before it has a server, the environment's. Setting it changes
        new connections and those that wait to be accepted; open ones keep theirs. Raises `PolicyError`,
        `KeepaliveError`; then nothing has changed.
        """
        policy = self._endpoint.terms.policy
        if policy is None and isinstance(self.address, TcpAddress):
            return choose_policy(None).policy
        return policy

    @keepalive.setter
    def keepalive(self, keepalive: KeepaliveArg) -> None:
        choice = choose_policy(as_policy(keepalive), address=self.address)
        policy, before = choice.policy, self._endpoint.terms.policy
        if policy is None:
            return
        done: list[socket.socket] = []
        state = None
        try:
            for sock in self._binding.sockets:
                state = apply(sock, policy)
                done.append(sock)
        except KaioError:
            for sock in done:
                apply(sock, before)
            raise
        self._choice = choice
        self._endpoint.set_policy(choice, state)
        self.accept_queued()

    @property
    def ssl(self) -> ssl_module.SSLContext | None:
        """The TLS context of new connections; None without TLS.

        Set it to a context with another certificate, for example: handshakes that have begun and open connections keep
        the one before. Raises TypeError, and ValueError when that would put TLS on or off.
        """
        return self._options.tls.get("ssl")

    @ssl.setter
    def ssl(self, context: ssl_module.SSLContext | None) -> None:
        _check_context(context)
        tls = self._options.tls.copy()
        if bool(tls) is (context is None):
            raise ValueError(f"ssl={context!r}: {self!r} was made {'with' if tls else 'without'} TLS")
        if context is None:
            return
        tls["ssl"] = context
        self._options.tls = tls
        if self._acceptor is not None:
            self._acceptor.restart()

    @property
    def max_connections(self) -> int | None:
        """The number of connections at which it stops accepting; None: as many as there are descriptors for.

        It can be set while the listener serves. Raises TypeError, ValueError.
        """
        return self._max_connections

    @max_connections.setter
    def max_connections(self, limit: int | None) -> None:
        self._max_connections = limit = check_limit("max_connections", limit)
        if self._endpoint.gate is not None:
            self._endpoint.gate.max_connections = limit
        if self._acceptor is not None:
            self._acceptor.restart()

    @property
    def idle_timeout(self) -> float | None:
        """The idle timeout of new connections in seconds. Raises TypeError, ValueError when it is set."""
        return self._idle_timeout

    @idle_timeout.setter
    def idle_timeout(self, timeout: float | None) -> None:
        self._idle_timeout = self._endpoint.idle_timeout = check_timeout("idle_timeout", timeout)

    @property
    def send_timeout(self) -> float | None:
        """The send timeout of new connections in seconds. Raises TypeError, ValueError when it is set."""
        return self._send_timeout

    @send_timeout.setter
    def send_timeout(self, timeout: float | None) -> None:
        self._send_timeout = self._endpoint.send_timeout = check_timeout("send_timeout", timeout)

    def set_all(self, keepalive: KeepaliveArg) -> int:
        """Set the policy of new connections and of all open ones; return how many of those have it now.

        Raises `PolicyError`, `KeepaliveError` as setting `keepalive` does, before any connection was changed. A
        connection that ends meanwhile is not counted.
        """
        self.keepalive = keepalive
        policy = self.keepalive
        changed = 0
        for entry in list(self._endpoint.live) if policy is not None else ():
            try:
                entry.keepalive = policy
            except KeepaliveError as exc:
                logger.debug("%r: %s", entry, exc)
            else:
                changed += 1
        return changed

    def __repr__(self) -> str:
        state = "listening" if self._acceptor is not None else "bound" if self.sockets else "closed"
        try:
            policy = str(self.keepalive)
        except PolicyError:  # the environment's
            policy = "invalid"
        return f"<Listener {self.address} keepalive={policy!r} {state}>"

    # -- for the server

    def acquire(self, server: object, default: PolicyChoice | None) -> Endpoint:
        """Belong to a server until `release`, and return what its connections will have in common.

        `default` is the policy of a listener that was given none. Raises RuntimeError when it belongs to a server
        already.
        """
        if self._server is not None:
            why = "was given twice" if self._server is server else "is in use by another server already"
            raise RuntimeError(f"{self!r} {why}")
        self._server = server
        # A new one: connections of the server before may still be open.
        self._endpoint = endpoint = Endpoint(self._choice or default or choose_policy(None))
        endpoint.owners = (server, self)
        endpoint.idle_timeout, endpoint.send_timeout = self._idle_timeout, self._send_timeout
        return endpoint

    def release(self, server: object) -> None:
        """Stop listening for a server. Does nothing when the listener belongs to another one."""
        if self._server is server:
            self._server = None
            self.close()

    async def bind(self) -> None:
        """Make and bind the sockets, and give them the policy. Raises OSError, `KeepaliveError`; then none is open.

        Raises RuntimeError when its server is closed meanwhile.
        """
        if self.sockets:
            raise RuntimeError(f"{self!r} is in use already")
        server = self._server
        infos = await self._binding.resolve()
        if self._server is not server:
            raise RuntimeError(f"{self!r} was closed while it started")
        try:
            self._binding.bind(infos)
            choice = self._endpoint.choice
            if choice.policy is not None:
                for sock in self._binding.sockets:
                    self._endpoint.set_policy(choice, apply_or_warn(sock, choice.policy, explicit=choice.explicit))
        except BaseException:
            self.close()
            raise

    async def start(self, make: AttachingFactory) -> None:
        """Listen, and have each connection's protocol made by `make`. Raises OSError."""
        loop, endpoint = asyncio.get_running_loop(), self._endpoint
        endpoint.make, endpoint.loop, endpoint.monitor = make, loop, get_monitor()
        endpoint.gate = Gate(self.address, endpoint, self._max_connections, self._max_per_peer)
        self._acceptor = acceptor = make_acceptor(loop, endpoint, self.address, self._options)
        for sock in self.sockets:
            if is_listening(sock):  # handed over, with a queue that may hold connections already
                acceptor.accept_queued(sock)
            await acceptor.start(sock, self._backlog)

    def end_handshakes(self) -> bool:
        """Have the kernel end the handshakes that have begun, and begin no others; return whether it does."""
        return self._binding.end_handshakes()

    def accept_queued(self) -> None:
        """Accept the connections that wait in the queue now."""
        if self._acceptor is not None:
            for sock in self._binding.sockets:
                self._acceptor.accept_queued(sock)

    def close(self) -> None:
        """Stop listening. The system resets the connections in the queue; those that were accepted stay open."""
        self._endpoint.make = None
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        self._binding.close()


def _check_context(context: object) -> None:
    if context is not None and not isinstance(context, ssl_module.SSLContext):
        raise TypeError(f"ssl must be an SSLContext or None, got {context!r}")


def _address_of(address: str | os.PathLike[str] | Address | socket.socket) -> Address:
    assert not isinstance(address, socket.socket)  # it is handed over
    return address if isinstance(address, (TcpAddress, UnixAddress)) else parse_address(address)
