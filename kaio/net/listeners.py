"""`Listener`: one address to accept on, with its own policy.

Rules kept here: the policy goes on the listening socket between bind and listen, so that accepted sockets inherit it
and cost no system call; where the platform does not inherit, and for connections that were in the queue before the
policy was, each accepted socket is set by hand. Running out of descriptors costs one log record and never a busy loop.

How connections are accepted depends on the loop. On asyncio's selector loops it is done here, because theirs calls the
exception handler once for every free place in the queue when descriptors run out. Elsewhere the loop does it: uvloop
in C, Windows' Proactor by completion ports. uvloop then closes what it has no descriptor for without a word; kaio says
so in the log when the last descriptor is given away.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import socket
import ssl as ssl_module
import stat
import sys
from collections.abc import Collection
from typing import Any, Final

from ..addresses import Address, TcpAddress, UnixAddress, parse_address
from ..errors import AddressError, KaioError, KeepaliveError
from ..kernel.descriptors import is_listening
from ..kernel.options import platform
from ..kernel.sockets import apply, apply_or_warn
from ..monitor.error_watch import bare
from ..monitor.monitor import get_monitor
from ..policy import Keepalive, KeepaliveArg, as_policy
from .attachment import AttachingFactory, ProtocolFactory, attach_handshake
from .dialing import resolve
from .endpoints import Endpoint, PolicyChoice, Terms, choose_policy

__all__ = ["Listener"]

logger: Final = logging.getLogger("kaio")

_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_LONGEST_QUEUE: Final = 65536  # net.core.somaxconn is rarely more
_RETRY: Final = 0.25  # seconds between attempts to accept while descriptors are used up


class Listener:
    """An address to accept connections on, with the policy that they get.

    `address` is text such as "0.0.0.0:9000", "[::]:9443", ":9000" (every interface, IPv4 and IPv6),
    "unix:/run/app.sock", a path object, a `TcpAddress` or `UnixAddress`; or a socket, bound or already listening, which
    then belongs to the listener. `keepalive` takes what every `keepalive=` takes; a Unix socket has none, and giving
    one is a `PolicyError`. A listener belongs to one server at a time.

    `ssl` is an SSLContext; `backlog` the length of the queue (the system caps it: net.core.somaxconn); `reuse_port` and
    `reuse_address` are asyncio's; `dualstack_ipv6` lets an IPv6 address take IPv4 too, as in `socket.create_server`.

    Raises `AddressError`, `PolicyError`; what the system says to binding comes as OSError when the server starts.
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
        self._sockets: list[socket.socket] = []
        self._handed_over: list[socket.socket] = []
        if isinstance(address, socket.socket):
            self._handed_over.append(address)
            self._address = _address_of(address)
        elif isinstance(address, (TcpAddress, UnixAddress)):
            self._address = address
        else:
            self._address = parse_address(address)
        if ssl is not None and not isinstance(ssl, ssl_module.SSLContext):
            raise TypeError(f"ssl must be an SSLContext or None, got {ssl!r}")
        self._choice: PolicyChoice | None = None  # None: the server's
        if keepalive is not None or isinstance(self._address, UnixAddress):
            self._choice = choose_policy(keepalive, address=self._address)
        self._endpoint = Endpoint(self._choice or PolicyChoice(None))
        self._ssl = ssl
        self._backlog = backlog
        self._reuse_address = os.name == "posix" if reuse_address is None else reuse_address
        self._reuse_port = bool(reuse_port)
        self._dualstack_ipv6 = dualstack_ipv6
        self._tls_timeouts: dict[str, Any] = {}
        if ssl is not None:
            self._tls_timeouts["ssl_handshake_timeout"] = ssl_handshake_timeout
            self._tls_timeouts["ssl_shutdown_timeout"] = ssl_shutdown_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inherits = platform.INHERITS  # whether all that is accepted has its policy already
        self._native: list[asyncio.AbstractServer] = []  # the loop's servers, where the loop accepts
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}  # where accepting waits for descriptors
        self._out_of_descriptors = False  # said so, and not yet accepted again
        self._watch_from = 0  # connections from which on the last descriptor may be near (native accepting)
        self._watch_at = 0.0  # and the time before which it is not looked at again
        self._owner: object = None  # the server that it belongs to
        self._unlink: tuple[str, int] | None = None  # the path that we made, and its inode

    # -- what a user sees

    @property
    def address(self) -> Address:
        """Where it listens; a port given as 0 is the one that the system chose once the server has started."""
        return self._address

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; empty before the start and after the close."""
        return tuple(self._sockets)

    @property
    def keepalive(self) -> Keepalive | None:
        """The policy that new connections get; None for a Unix socket.

        Until the listener has a server, the environment's when it was given none.
        Setting it is for new connections, and for those that wait to be accepted; the present ones keep theirs. Raises
        `PolicyError`, `KeepaliveError`; then nothing has changed.
        """
        policy = self._endpoint.terms.policy
        if policy is None and isinstance(self._address, TcpAddress):
            return choose_policy(None).policy
        return policy

    @keepalive.setter
    def keepalive(self, keepalive: KeepaliveArg) -> None:
        choice = choose_policy(as_policy(keepalive), address=self._address)
        policy, before = choice.policy, self._endpoint.terms.policy
        if policy is None:
            return
        done: list[socket.socket] = []
        state = None
        try:
            for sock in self._sockets:
                state = apply(sock, policy)
                done.append(sock)
        except KaioError:
            for sock in done:
                apply(sock, before)
            raise
        self._choice = choice
        self._endpoint.take(choice, state)
        if self._endpoint.make is not None:
            for sock in self._sockets:
                self._drain(sock)

    def set_all(self, keepalive: KeepaliveArg) -> int:
        """Set the policy for new connections and for all present ones; return how many of those have it now.

        Raises `PolicyError`, `KeepaliveError` as setting `keepalive` does, before any connection was changed. A
        connection that ends meanwhile is passed over.
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
        state = "listening" if self._endpoint.make is not None else "bound" if self._sockets else "closed"
        return f"<Listener {self._address} keepalive={str(self.keepalive)!r} {state}>"

    # -- for the server

    def claim(self, owner: object, default: PolicyChoice | None) -> Endpoint:
        """Belong to a server until it lets go, and return what its connections will have in common.

        `default` is for a listener that has no policy of its own. Raises RuntimeError when it belongs to a server
        already.
        """
        if self._owner is not None:
            why = "was given twice" if self._owner is owner else "is in use by another server already"
            raise RuntimeError(f"{self!r} {why}")
        self._owner = owner
        # A new one: the connections of the server before may still be open.
        self._endpoint = Endpoint(self._choice or default or choose_policy(None))
        return self._endpoint

    def release(self, owner: object) -> None:
        """Stop listening for a server. Harmless when it belongs to another one by now."""
        if self._owner is owner:
            self._owner = None
            self.close()

    async def bind(self) -> None:
        """Make and bind the sockets, with their policy. Raises OSError, `KeepaliveError`; then nothing is bound.

        RuntimeError when its server lets go of it meanwhile.
        """
        if self._sockets:
            raise RuntimeError(f"{self!r} is in use already")
        address, owner = self._address, self._owner
        infos: Collection[Any] = ()
        if isinstance(address, TcpAddress) and not self._handed_over:
            loop = asyncio.get_running_loop()
            infos = await resolve(loop, address.host, address.port, flags=socket.AI_PASSIVE)
            if self._owner is not owner:
                raise RuntimeError(f"{self!r} was closed while it started")
        try:
            if self._handed_over:
                self._sockets, self._handed_over = self._handed_over, []
                for sock in self._sockets:
                    sock.setblocking(False)
            elif isinstance(address, UnixAddress):
                self._bind_unix(address.path)
            else:
                self._bind_tcp(address, infos)
            choice = self._endpoint.choice
            for sock in self._sockets:
                if choice.policy is not None:
                    self._endpoint.take(choice, apply_or_warn(sock, choice.policy, explicit=choice.explicit))
        except BaseException:
            self.close()
            raise

    async def start(self, make: AttachingFactory) -> None:
        """Listen, and give each connection a protocol."""
        self._loop = loop = asyncio.get_running_loop()
        endpoint = self._endpoint
        endpoint.make, endpoint.loop, endpoint.monitor = make, loop, get_monitor()
        for sock in self._sockets:
            if is_listening(sock):
                self._drain(sock)
            if _loop_accepts(loop):
                endpoint.by_hand = not platform.INHERITS
                await self._start_native(loop, sock)
            else:
                sock.listen(self._backlog)
                bare(loop).add_reader(sock, self._accept, sock)

    def close(self) -> None:
        """Stop listening. What is in the queue is refused; what was accepted goes on."""
        self._endpoint.make = None
        for handle in self._retries.values():
            handle.cancel()
        self._retries.clear()
        sockets, self._sockets = self._sockets, []
        native, self._native = self._native, []
        for server in native:
            server.close()
        for sock in sockets:
            if sock.fileno() >= 0 and self._loop is not None and not native and not self._loop.is_closed():
                bare(self._loop).remove_reader(sock)
            sock.close()
        if self._unlink is not None:
            path, inode = self._unlink
            self._unlink = None
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)

    # -- binding

    def _bind_tcp(self, address: TcpAddress, infos: Collection[Any]) -> None:
        wanted = list(dict.fromkeys((info[0], info[4]) for info in infos))
        # With port 0 the first socket's port is the others', too; when it is taken there, begin again.
        for attempt in range(10):
            try:
                self._bind_all(wanted, address.port)
                break
            except OSError as exc:
                for sock in self._sockets:
                    sock.close()
                self._sockets = []
                if address.port or exc.errno != errno.EADDRINUSE or attempt == 9:
                    raise
        self._address = TcpAddress(address.host, self._sockets[0].getsockname()[1])

    def _bind_all(self, wanted: Collection[tuple[int, Any]], port: int) -> None:
        for family, where in wanted:
            try:
                # With its protocol said: asyncio sets TCP_NODELAY only where it is.
                sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            except OSError:
                continue  # a family that getaddrinfo knows and the system does not
            self._sockets.append(sock)
            sock.setblocking(False)
            if self._reuse_address:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not self._dualstack_ipv6)
            host, given, *rest = where
            try:
                sock.bind((host, given or port, *rest))
            except OSError as exc:
                if exc.errno == errno.EADDRNOTAVAIL and len(wanted) > 1:
                    self._sockets.remove(sock)  # IPv6 is compiled in and switched off, say
                    sock.close()
                    continue
                raise OSError(exc.errno, f"cannot bind {TcpAddress(host, given or port)}: {exc.strerror}") from None
            port = port or sock.getsockname()[1]
        if not self._sockets:
            raise OSError(errno.EADDRNOTAVAIL, f"no address of {self._address} can be bound")

    def _bind_unix(self, path: str) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sockets.append(sock)
        sock.setblocking(False)
        with contextlib.suppress(FileNotFoundError):  # a socket that a dead process left, as in asyncio
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)
        try:
            sock.bind(path)
        except OSError as exc:
            raise OSError(exc.errno, f"cannot bind {self._address}: {exc.strerror}") from None
        self._unlink = (path, os.stat(path).st_ino)

    # -- accepting by the loop

    async def _start_native(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        create: Any = loop.create_unix_server if isinstance(self._address, UnixAddress) else bare(loop).create_server
        factory = self._native_factory(loop, self._endpoint)
        self._native.append(
            await create(factory, sock=sock, ssl=self._ssl, backlog=self._backlog, **self._tls_timeouts)
        )

    def _native_factory(self, loop: asyncio.AbstractEventLoop, endpoint: Endpoint) -> ProtocolFactory:
        live, make, shakes_hands = endpoint.live, endpoint.make, self._ssl is not None
        assert make is not None
        self._watch_from = _free_descriptors() // 2

        def factory() -> asyncio.BaseProtocol:
            if len(live) >= self._watch_from and loop.time() >= self._watch_at:
                self._look_at_descriptors(loop)
            try:
                protocol = make(endpoint.terms)
            except Exception:  # uvloop would stop listening
                logger.exception("%s: a connection could not be set up", self._address)
                return _TurnAway()
            if shakes_hands:
                attach_handshake(protocol, endpoint.terms)
            return protocol

        return factory

    def _look_at_descriptors(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say once that the last descriptor goes; look again when half of what is left is gone."""
        free = _free_descriptors()
        self._watch_from = len(self._endpoint.live) + free // 2
        if free < 4:
            self._watch_at = loop.time() + 1.0
            if not self._out_of_descriptors:
                self._out_of_descriptors = True
                logger.warning(
                    "%s: file descriptors are used up; until some are free, this event loop accepts and closes new"
                    " connections without a word",
                    self._address,
                )
        elif self._out_of_descriptors:
            self._out_of_descriptors = False
            logger.info("%s: file descriptors are free again", self._address)

    # -- accepting by hand

    def _accept(self, sock: socket.socket) -> None:
        """The listening socket is readable: take what waits, and let the loop turn now and then."""
        for _ in range(128):
            if not self._accept_one(sock, covered=self._inherits):
                return

    def _drain(self, sock: socket.socket) -> None:
        """Take the connections that came before the policy was there, and set each."""
        for _ in range(_LONGEST_QUEUE):
            if not self._accept_one(sock, covered=False):
                break
        if self._out_of_descriptors:
            self._inherits = False  # some still wait in the queue

    def _accept_one(self, sock: socket.socket, *, covered: bool) -> bool:
        """Accept a connection; False when none waits or none can be had now."""
        try:
            conn, _ = sock.accept()
        except BlockingIOError:
            if self._out_of_descriptors:  # not before the queue is empty: else each free descriptor would say so
                self._out_of_descriptors = False
                logger.info("%s: accepting again", self._address)
            return False
        except (InterruptedError, ConnectionAbortedError):
            return False
        except OSError as exc:
            self._pause_accepting(sock, exc)
            return False
        conn.setblocking(False)
        endpoint = self._endpoint
        terms = endpoint.terms
        if terms.policy is not None and not covered:
            try:
                apply_or_warn(conn, terms.policy, explicit=terms.explicit)
            except KaioError as exc:  # it was gone already, most likely
                logger.debug("%s: %s", self._address, exc)
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._admit(loop, conn, terms))
        endpoint.admitting.add(task)
        task.add_done_callback(functools.partial(_admitted, endpoint, conn))
        return True

    async def _admit(self, loop: asyncio.AbstractEventLoop, conn: socket.socket, terms: Terms) -> None:
        """Make the transport of an accepted connection; a handshake that fails costs only itself."""
        assert terms.endpoint is not None
        make = terms.endpoint.make
        if make is None:  # closed meanwhile
            conn.close()
            return
        try:
            protocol = make(terms)
        except Exception:
            logger.exception("%s: a connection could not be set up", self._address)
            conn.close()
            return
        try:
            await bare(loop).connect_accepted_socket(lambda: protocol, conn, ssl=self._ssl, **self._tls_timeouts)
        except (OSError, asyncio.CancelledError) as exc:
            logger.debug("%s: a connection failed before it stood: %r", self._address, exc)
        except Exception:
            logger.exception("%s: a connection could not be set up", self._address)

    def _pause_accepting(self, sock: socket.socket, exc: OSError) -> None:
        loop = asyncio.get_running_loop()
        if not self._out_of_descriptors:
            self._out_of_descriptors = True
            what = "descriptors are free" if exc.errno in _OUT_OF_DESCRIPTORS else "it works again"
            logger.warning("%s: accepting waits, and connections with it, until %s: %s", self._address, what, exc)
        if not _loop_accepts(loop) and sock not in self._retries:
            bare(loop).remove_reader(sock)
            self._retries[sock] = loop.call_later(_RETRY, self._resume_accepting, sock)

    def _resume_accepting(self, sock: socket.socket) -> None:
        del self._retries[sock]
        bare(asyncio.get_running_loop()).add_reader(sock, self._accept, sock)


def _admitted(endpoint: Endpoint, conn: socket.socket, task: asyncio.Task[None]) -> None:
    endpoint.admitting.discard(task)
    if task.cancelled():  # before its first step: nobody else has the socket
        conn.close()
    if endpoint.make is None:  # closed, and somebody may wait for the last to end
        endpoint.check_empty()


class _TurnAway(asyncio.Protocol):
    """The protocol of a connection whose own could not be made."""

    def connection_made(self, transport: Any) -> None:
        transport.abort()


def _loop_accepts(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether accepting is the loop's own affair."""
    if isinstance(loop, asyncio.SelectorEventLoop):
        return False
    if platform.INHERITS:
        return True
    try:
        loop.remove_reader(-1)
    except NotImplementedError:
        return True  # Proactor
    except (OSError, ValueError):
        pass
    return False


def _address_of(sock: socket.socket) -> Address:
    """The address of a socket that was handed over."""
    if sock.type != socket.SOCK_STREAM:
        raise AddressError(sock, "must be a stream socket")
    name = sock.getsockname()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return TcpAddress(name[0], name[1])
    return UnixAddress(os.fsdecode(name))


def _free_descriptors() -> int:
    """How many more descriptors this process may open; a large number where that cannot be told."""
    try:
        import resource  # noqa: PLC0415 - not on Windows

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit == resource.RLIM_INFINITY:
            return sys.maxsize
        return max(0, limit - len(os.listdir("/proc/self/fd")))
    except (ImportError, OSError):
        return sys.maxsize
