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
from ..kernel.descriptors import is_listening
from ..kernel.sockets import apply, apply_or_warn
from ..monitor.monitor import get_monitor
from ..policy import Keepalive, KeepaliveArg, as_policy
from .accepting import Acceptor, AcceptTls, make_acceptor
from .binding import Binding, address_of
from .endpoints import AttachingFactory, Endpoint, PolicyChoice, choose_policy

__all__ = ["Listener"]

logger: Final = logging.getLogger("kaio")


class Listener:
    """An address to accept connections on, and the policy that they get.

    `address` is text such as "0.0.0.0:9000", "[::]:9443", ":9000" (every interface, IPv4 and IPv6),
    "unix:/run/app.sock", a path object, a `TcpAddress` or `UnixAddress`; or a socket, bound or already listening, which
    the listener closes. `keepalive` takes what every `keepalive=` takes; None is the server's. A Unix socket has no
    policy, and giving it one is a `PolicyError`. A listener belongs to one server at a time.

    `ssl` is an SSLContext; `backlog` the length of the queue (net.core.somaxconn at most); `reuse_port` and
    `reuse_address` are asyncio's; `dualstack_ipv6` lets an IPv6 address accept IPv4 too, as in `socket.create_server`.

    Raises `AddressError`, `PolicyError`, TypeError. An address that cannot be bound is an OSError when the server
    starts.
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
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> None:
        sock = address if isinstance(address, socket.socket) else None
        where = _address_of(address)
        if ssl is not None and not isinstance(ssl, ssl_module.SSLContext):
            raise TypeError(f"ssl must be an SSLContext or None, got {ssl!r}")
        self._binding = Binding(
            where,
            sock=sock,
            reuse_address=reuse_address,
            reuse_port=reuse_port,
            dualstack_ipv6=dualstack_ipv6,
        )
        self._tls: AcceptTls = {}
        if ssl is not None:
            self._tls = {
                "ssl": ssl,
                "ssl_handshake_timeout": ssl_handshake_timeout,
                "ssl_shutdown_timeout": ssl_shutdown_timeout,
            }
        self._backlog = backlog
        self._choice: PolicyChoice | None = None  # None: the server's
        if keepalive is not None or isinstance(where, UnixAddress):
            self._choice = choose_policy(keepalive, address=where)
        self._endpoint = Endpoint(self._choice or PolicyChoice(None))
        self._acceptor: Acceptor | None = None  # None: it does not listen
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
        self._endpoint = Endpoint(self._choice or default or choose_policy(None))
        return self._endpoint

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
        self._acceptor = acceptor = make_acceptor(loop, endpoint, self.address, self._tls)
        for sock in self.sockets:
            if is_listening(sock):  # handed over, with a queue that may hold connections already
                acceptor.accept_queued(sock)
            await acceptor.start(sock, self._backlog)

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


def _address_of(address: str | os.PathLike[str] | Address | socket.socket) -> Address:
    if isinstance(address, socket.socket):
        return address_of(address)
    return address if isinstance(address, (TcpAddress, UnixAddress)) else parse_address(address)
