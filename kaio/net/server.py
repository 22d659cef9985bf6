"""Serving: `serve`, and the twins of asyncio's `create_server` and `start_server`.

Rules kept here: a handler that fails costs only its connection, and is logged with it. Leaving the server's `async
with` leaves nothing behind: listeners closed, handlers ended, connections closed within the close timeout or aborted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket as socket_module
import ssl as ssl_module
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final

from anyio import BrokenResourceError, EndOfStream, IncompleteRead

from ..addresses import Address, make_address, tcp_address
from ..monitor.counters import Counters
from ..policy import KeepaliveArg
from .asyncio_streams import StreamsProtocol
from .attachment import ProtocolFactory, attaching
from .connection import CLOSE_TIMEOUT, Connection, StreamProtocol, finish
from .endpoints import Endpoint, PolicyChoice, choose_policy
from .listeners import Listener
from .pending import Pending
from .protocols import Watched
from .transports import KeepaliveTransport

__all__ = ["Server", "create_server", "serve", "start_server"]

logger: Final = logging.getLogger("kaio")

Handler = Callable[[Connection], Awaitable[object]]

_LAST_WORDS: Final = 1.0  # seconds, after the close timeout, that who was aborted has to end
_GO_ON: Final = (asyncio.CancelledError, SystemExit, KeyboardInterrupt)  # no failures of a handler


class Server:
    """Listeners and their live connections; what `serve`, `create_server` and `start_server` return.

    It has the methods of `asyncio.Server`. `async with` closes it at its end: the listeners; then the handlers are
    cancelled, and the connections have `close_timeout` seconds for what was written to leave, until they are aborted. A
    handler that goes on all the same is left behind a second later, and named in the log.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        factory: ProtocolFactory | None,
        *,
        handler: Handler | None = None,
        close_timeout: float = CLOSE_TIMEOUT,
        policy: PolicyChoice | None = None,
    ) -> None:
        self._listeners = tuple(listeners)
        self._factory = factory
        self._handler = handler
        self._close_timeout = close_timeout
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[object], Connection] = {}  # handlers that run
        self._serving = False
        self._closed = False
        self._forever: asyncio.Future[None] | None = None
        self._waiting: asyncio.Future[None] | None = None  # wait_closed
        self._counters = Counters()
        self._endpoints: list[Endpoint] = []  # one for each listener
        try:
            for listener in self._listeners:
                endpoint = listener.acquire(self, policy)
                endpoint.on_empty = self._check_ended
                endpoint.counters = self._counters
                self._endpoints.append(endpoint)
        except RuntimeError:
            for listener in self._listeners:
                listener.release(self)
            raise

    # -- what it has

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """The listeners, in the order in which they were given."""
        return self._listeners

    @property
    def sockets(self) -> tuple[socket_module.socket, ...]:
        """The listening sockets of all listeners; empty after `close`."""
        return tuple(sock for listener in self._listeners for sock in listener.sockets)

    @property
    def connections(self) -> frozenset[Any]:
        """The connections that are open now: each a `Connection` where a handler serves it, else a transport."""
        return frozenset().union(*(endpoint.live for endpoint in self._endpoints))

    @property
    def counters(self) -> Counters:
        """Suspects, recoveries and deaths of this server's connections since its start, and how many it has now."""
        self._counters.watched = sum(len(endpoint.live) for endpoint in self._endpoints)
        return self._counters

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that it runs on."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether new connections are accepted."""
        return self._serving

    def __repr__(self) -> str:
        state = "serving" if self._serving else "closed" if self._closed else "bound"
        where = ", ".join(str(listener.address) for listener in self._listeners)
        return f"<Server {where} {state} connections={len(self.connections)}>"

    # -- starting and stopping

    async def start_serving(self) -> None:
        """Begin to accept. Harmless when it has begun already; RuntimeError after `close`."""
        self._check_open()
        if self._serving:
            return
        self._serving = True
        make = attaching(self._factory or self._handled)
        try:
            for listener in self._listeners:
                if not listener.sockets:
                    await listener.bind()
            self._check_open()
            for listener in self._listeners:
                await listener.start(make)
                self._check_open()
        except BaseException:
            self.close()
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self!r} is closed")

    async def serve_forever(self) -> None:
        """Accept until cancelled or closed; then `close` has been called. RuntimeError when it is running already."""
        if self._forever is not None:
            raise RuntimeError(f"serve_forever() is running already on {self!r}")
        self._forever = forever = self._loop.create_future()
        try:
            await self.start_serving()
            await forever
        finally:
            self._forever = None
            self.close()

    def close(self) -> None:
        """Stop accepting. The connections that stand go on: see `close_clients`, `abort_clients`, `wait_closed`."""
        self._closed = True
        self._serving = False
        for listener in self._listeners:
            listener.release(self)
        if self._forever is not None and not self._forever.done():
            self._forever.set_result(None)
        self._check_ended()

    def close_clients(self) -> None:
        """End all connections gently: handlers are cancelled, what was written still leaves."""
        for task in list(self._tasks):
            task.cancel()
        for connection in self.connections:
            if isinstance(connection, KeepaliveTransport):
                connection.close()

    def abort_clients(self) -> None:
        """End all connections at once: handlers are cancelled, what has not left yet is dropped."""
        for task in list(self._tasks):
            task.cancel()
        for connection in self.connections:
            connection.abort()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and its last connection and handler have ended."""
        await asyncio.sleep(0)  # what uvloop has accepted in this turn is known in the next
        while not self._ended():
            if self._waiting is None or self._waiting.done():
                self._waiting = self._loop.create_future()
            await asyncio.shield(self._waiting)

    def _ended(self) -> bool:
        return self._closed and not self._tasks and all(endpoint.is_empty() for endpoint in self._endpoints)

    def _check_ended(self) -> None:
        if self._waiting is not None and not self._waiting.done() and self._ended():
            self._waiting.set_result(None)

    async def __aenter__(self) -> Server:
        await self.start_serving()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        for endpoint in self._endpoints:
            endpoint.refuse()
        self.close_clients()
        try:
            if not await self._closed_within(self._close_timeout):
                self.abort_clients()
                if not await self._closed_within(_LAST_WORDS):
                    self._log_stragglers()
        except BaseException:
            self.abort_clients()
            raise

    async def _closed_within(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self.wait_closed()
        except TimeoutError:
            return False
        return True

    def _log_stragglers(self) -> None:
        """Say who is left behind."""
        name = getattr(self._handler, "__qualname__", self._handler)
        for connection in self._tasks.values():
            message = "handler %s of %r ignores that it is cancelled, and is left behind"
            logger.error(message, name, connection, extra={"connection": connection})
        for connection in self.connections.difference(self._tasks.values()):
            message = "%r does not end although it was aborted, and is left behind"
            logger.error(message, connection, extra={"connection": connection})

    # -- handlers

    def _handled(self) -> StreamProtocol:
        return StreamProtocol(self._start_handler)

    def _start_handler(self, connection: Connection) -> None:
        assert self._handler is not None
        try:
            handling = self._handler(connection)
        except BaseException as exc:
            self._handler_ended(connection, exc)
            if isinstance(exc, (SystemExit, KeyboardInterrupt)):
                raise
            return
        task = self._loop.create_task(handling if asyncio.iscoroutine(handling) else _wait_for(handling))
        self._tasks[task] = connection
        task.add_done_callback(self._handler_done)

    def _handler_done(self, task: asyncio.Task[object]) -> None:
        connection = self._tasks.pop(task)
        self._handler_ended(connection, None if task.cancelled() else task.exception())
        if not self._tasks:
            self._check_ended()

    def _handler_ended(self, connection: Connection, exc: BaseException | None) -> None:
        if exc is not None and not isinstance(exc, _GO_ON):
            _log_failure(connection, exc)
        finish(connection, self._close_timeout)


async def _wait_for(handling: Awaitable[object]) -> None:
    await handling


_ENDS: Final = (BrokenResourceError, EndOfStream, IncompleteRead)  # DeadPeerError and ResetError are the first


def _log_failure(connection: Connection, exc: BaseException) -> None:
    """A traceback for what the handler did; what the network did is no failure, and a death is in the log already."""
    ended = exc.split(_ENDS) if isinstance(exc, BaseExceptionGroup) else None
    if ended is not None and ended[0] is not None and ended[1] is None:
        exc = _first(ended[0])
    extra = {"connection": connection}
    if isinstance(exc, _ENDS):
        logger.debug("%r: ended by its peer: %r", connection, exc, extra=extra)
    else:
        logger.error("handler failed for %r", connection, exc_info=exc, extra=extra)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    leaf: Any = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf  # type: ignore[no-any-return]


def serve(
    handler: Handler | type[Watched],
    host: str | os.PathLike[str] | Address | None = None,
    port: int | str | None = None,
    *,
    listeners: Iterable[Listener] | None = None,
    keepalive: KeepaliveArg = None,
    ssl: ssl_module.SSLContext | None = None,
    backlog: int = 4096,
    reuse_port: bool | None = None,
    close_timeout: float = CLOSE_TIMEOUT,
) -> Pending[Server]:
    """Serve connections: `async with serve(handler, "0.0.0.0", 9000) as server`, or `server = await serve(...)`.

    `handler` is an async function of a `Connection`, which is closed when it returns; or a `KeepaliveProtocol` class.
    Give a host and a port, one address as text ("[::]:9000", "unix:/run/app.sock"), or `listeners`. `keepalive` is for
    every TCP listener that has no policy of its own. `close_timeout` is in seconds.

    Raises `PolicyError`, `AddressError`, TypeError at once; OSError when it cannot listen, and RuntimeError when one of
    the listeners is in use by another server or was given twice: then none of them is bound.
    """
    protocol = handler if isinstance(handler, type) else None
    if protocol is not None and not issubclass(protocol, Watched):
        raise TypeError(f"handler must be an async function or a KeepaliveProtocol class, got {protocol!r}")
    if not callable(handler):
        raise TypeError(f"handler must be an async function or a KeepaliveProtocol class, got {handler!r}")
    if listeners is not None:
        if host is not None or port is not None or ssl is not None:
            raise ValueError("host, port and ssl belong to each Listener when listeners= is given")
        given = [listeners] if isinstance(listeners, Listener) else list(listeners)
        if not given:
            raise ValueError("listeners= is empty")
        for each in given:
            if not isinstance(each, Listener):
                raise TypeError(f"listeners= takes kaio.Listener objects, got {each!r}")
        choice = choose_policy(keepalive, factory=protocol)
    else:
        if host is None and port is None:
            raise ValueError("give host and port, an address, or listeners=")
        address = make_address(host, port)
        choice = choose_policy(keepalive, factory=protocol, address=address)
        given = [Listener(address, ssl=ssl, backlog=backlog, reuse_port=reuse_port)]

    async def make() -> Server:
        server = Server(
            given,
            protocol,  # type: ignore[arg-type]
            handler=None if protocol is not None else handler,  # type: ignore[arg-type]
            close_timeout=close_timeout,
            policy=choice,
        )
        await server.start_serving()
        return server

    return Pending(make)


async def create_server(
    protocol_factory: ProtocolFactory,
    host: str | Sequence[str] | None = None,
    port: int | str | None = None,
    *,
    keepalive: KeepaliveArg = None,
    sock: socket_module.socket | None = None,
    backlog: int = 100,
    ssl: ssl_module.SSLContext | None = None,
    reuse_address: bool | None = None,
    reuse_port: bool | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
) -> Server:
    """asyncio's `loop.create_server` with a policy; without `family` and `flags`, which the host says.

    Without `keepalive`, the factory's own `keepalive` attribute counts, so pass the protocol class itself where you
    can: from another factory's protocols it is only known when they are made, and each socket is then set by itself.
    A protocol that is no `KeepaliveProtocol` gets sockets with the policy, and hears of death as on the bare loop; its
    connections are not in `connections`. Raises OSError, `PolicyError`, `AddressError`, ValueError as asyncio does.
    """
    options: dict[str, Any] = {
        "ssl": ssl,
        "backlog": backlog,
        "reuse_address": reuse_address,
        "reuse_port": reuse_port,
        "ssl_handshake_timeout": ssl_handshake_timeout,
        "ssl_shutdown_timeout": ssl_shutdown_timeout,
    }
    if (sock is None) == (host is None and port is None):
        raise ValueError("give either host and port, or sock")
    if sock is not None:
        listeners = [Listener(sock, **options)]
    else:
        hosts: Sequence[str | None] = [host] if host is None or isinstance(host, str) else host
        listeners = [Listener(tcp_address(each, port or 0), **options) for each in dict.fromkeys(hosts)]
    # One that is handed over may be a Unix socket.
    choice = choose_policy(keepalive, factory=protocol_factory, address=listeners[0].address if sock else None)
    server = Server(listeners, protocol_factory, policy=choice)
    if start_serving:
        await server.start_serving()
    else:
        try:
            for listener in listeners:
                await listener.bind()
        except BaseException:
            server.close()
            raise
    return server


async def start_server(
    client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None],
    host: str | Sequence[str] | None = None,
    port: int | str | None = None,
    *,
    limit: int = 65536,
    **kwargs: Any,
) -> Server:
    """asyncio's `start_server` with a policy: takes what `create_server` takes, `keepalive=` with it.

    A dead peer is raised by the reader and the writer as `DeadPeerError`.
    """
    loop = asyncio.get_running_loop()

    def factory() -> StreamsProtocol:
        return StreamsProtocol(asyncio.StreamReader(limit=limit, loop=loop), client_connected_cb, loop=loop)

    return await create_server(factory, host, port, **kwargs)
