"""Serving: `serve`, and asyncio's `create_server` and `start_server` with a policy.

Rules kept here: a handler that fails ends only its connection, and is logged with it. At the end of the server's `async
with`, its listeners are closed, its handlers have ended, and its connections are closed within the close timeout or
aborted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal as signal_module
import socket as socket_module
import ssl as ssl_module
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, overload

from anyio import BrokenResourceError, EndOfStream, IncompleteRead

from ..addresses import Address, UnixAddress, make_address, tcp_address
from ..monitor.counters import Counters
from ..policy import KeepaliveArg
from .asyncio_streams import StreamsProtocol
from .attachment import attaching
from .connection import CLOSE_TIMEOUT, Connection, finish
from .current import handled_connection
from .draining import handled
from .endpoints import Endpoint, PolicyChoice, ProtocolFactory, choose_policy
from .handed_over import HandedOver
from .listeners import Listener
from .notify import Notifier
from .pending import Pending
from .protocols import Watched
from .stream import StreamProtocol
from .transports import KeepaliveTransport

__all__ = ["Server", "create_server", "serve", "start_server"]

logger: Final = logging.getLogger("kaio")

Handler = Callable[[Connection], Awaitable[object]]

GRACE: Final = 30.0
"""The default time in seconds that draining gives to handlers."""

_TELL_INTERVAL: Final = 0.05  # seconds between two groups of connections that are told
_LAST_HANDSHAKES: Final = 0.2  # seconds for handshakes that have begun when draining begins
_ABORT_TIMEOUT: Final = 1.0  # seconds for handlers and connections to end that were aborted
_NO_FAILURES: Final = (asyncio.CancelledError, SystemExit, KeyboardInterrupt)  # of a handler

if TYPE_CHECKING:  # typing's own has no default before Python 3.13
    from typing_extensions import TypeVar

    C_co = TypeVar("C_co", covariant=True, default=Any)
else:
    from typing import TypeVar

    C_co = TypeVar("C_co", covariant=True)


class Server(Generic[C_co]):
    """Listeners and their open connections; what `serve`, `create_server` and `start_server` return.

    `Server[Connection]` where a handler serves the connections, `Server[KeepaliveTransport]` where protocols do.

    It has the methods of `asyncio.Server`. The end of `async with` closes the listeners and cancels the handlers.
    Connections then have `close_timeout` seconds to send what was written, and are aborted. A handler that still runs a
    second later is logged by name, and no longer waited for.
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
        self._draining = False  # or about to
        self._closed = False
        self._forever: asyncio.Future[None] | None = None
        self._waiting: asyncio.Future[None] | None = None  # wait_closed
        self._counters = Counters()
        self._endpoints: list[Endpoint] = []  # one for each listener
        try:
            for listener in self._listeners:
                if handler is None and isinstance(listener.address, UnixAddress):
                    _refuse_timeouts(listener)
                endpoint = listener.acquire(self, policy)
                endpoint.on_empty = self._check_ended
                endpoint.counters = self._counters
                self._endpoints.append(endpoint)
        except BaseException:
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
    def connections(self) -> frozenset[C_co]:
        """The open connections: each a `Connection` where a handler serves it, else a `KeepaliveTransport`."""
        return frozenset().union(*(endpoint.live for endpoint in self._endpoints))

    @property
    def counters(self) -> Counters:
        """Suspect, recovered and dead peers of this server since it was made, and its open connections."""
        self._counters.watched = sum(len(endpoint.live) for endpoint in self._endpoints)
        return self._counters

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the server runs on."""
        return self._loop

    def is_serving(self) -> bool:
        """Whether new connections are accepted."""
        return self._serving

    @property
    def ready(self) -> bool:
        """Whether new connections are welcome: accepted, and no end is in sight. For a load balancer's health check.

        It is False from the first signal of `serve_until` on, also during its `delay`.
        """
        return self._serving and not self._draining

    def __repr__(self) -> str:
        state = "serving" if self._serving else "closed" if self._closed else "bound"
        where = ", ".join(str(listener.address) for listener in self._listeners)
        return f"<Server {where} {state} connections={len(self.connections)}>"

    # -- starting and stopping

    async def start_serving(self) -> None:
        """Start accepting connections; does nothing when the server accepts already. RuntimeError after `close`."""
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
        """Accept connections until this is cancelled or the server is closed; close it in either case.

        Raises RuntimeError when serve_forever() is running already.
        """
        if self._forever is not None:
            raise RuntimeError(f"serve_forever() is running already on {self!r}")
        self._forever = forever = self._loop.create_future()
        try:
            await self.start_serving()
            await forever
        finally:
            self._forever = None
            self.close()

    async def serve_until(
        self, *signals: int, grace: float = GRACE, delay: float = 0.0, spread: float = 0.0
    ) -> signal_module.Signals | None:
        """Accept connections until one of the signals arrives, then drain; return the signal, None after `close`.

        During `delay` seconds `ready` is False and connections are still accepted: load balancers need time to look
        elsewhere. `grace` and `spread` are those of `drain`. A further signal aborts all connections at once. Needs
        the main thread; the handlers that the signals had before are restored. A service manager that asks for it
        (sd_notify(3)) is told when the server is ready and when it stops, and its watchdog that the loop still runs.

        Raises ValueError, TypeError without a signal, OSError for one that cannot be handled, and RuntimeError when
        serve_forever() is running already or outside of the main thread.
        """
        if not signals:
            raise TypeError("serve_until() needs at least one signal")
        _check_times(grace, spread, delay)
        if self._forever is not None:
            raise RuntimeError(f"serve_forever() is running already on {self!r}")
        self._forever = stop = self._loop.create_future()
        received: list[signal_module.Signals] = []
        hurry: asyncio.Timeout | None = None

        def on_signal(number: signal_module.Signals) -> None:
            received.append(number)
            if hurry is not None:
                hurry.reschedule(self._loop.time())
            elif not stop.done():
                stop.set_result(None)

        try:
            with handled(signals, on_signal), Notifier() as notifier:
                await self.start_serving()
                notifier.ready()
                await stop
                if not received:
                    return None
                self._draining = True
                notifier.stopping(delay + grace + self._close_timeout + 2 * _ABORT_TIMEOUT)
                try:
                    async with asyncio.timeout(0 if len(received) > 1 else None) as hurry:
                        await asyncio.sleep(delay)
                        await self.drain(grace, spread=spread)
                except TimeoutError:
                    hurry = None
                    await self._abort()
                hurry = None
                return received[0]
        finally:
            self._forever = None
            self.close()

    async def drain(self, grace: float = GRACE, *, spread: float = 0.0) -> None:
        """Stop accepting, and let the connections come to their end; returns when all have.

        Clients that have connected are accepted first, for the most part (on Linux; a listener that is full leaves them
        in the queue, whose end resets them). Handlers are told by `Connection.draining`, protocols by
        `draining()`: at once, or one after the other over `spread` seconds, so that clients do not all connect again
        in the same moment. Those that still run after `grace` seconds are cancelled, and their connections closed;
        they have the close timeout and a second for it, whatever they do. Cancelling drain() aborts all connections.

        Raises ValueError when a time is negative or not a number, or `spread` is longer than `grace`.
        """
        _check_times(grace, spread)
        self._draining = True
        end = self._loop.time() + grace
        telling = self._loop.create_task(self._tell(spread))
        try:
            await self._accept_last(min(_LAST_HANDSHAKES, grace))
            if not await self._closed_within(max(0.0, end - self._loop.time())):
                await self._end()
        except BaseException:
            self._refuse()
            self.abort_clients()
            raise
        finally:
            telling.cancel()

    async def _accept_last(self, timeout: float) -> None:
        """Accept those who have connected, or are about to, and close."""
        if not self._closed:
            ending = [listener.end_handshakes() for listener in self._listeners]
            if any(ending):
                await asyncio.sleep(timeout)
            for listener in self._listeners:
                listener.accept_queued()
        self.close()

    async def _tell(self, spread: float) -> None:
        """Tell every connection that the server drains, also those whose handshake ends only now."""
        told: set[Any] = set()
        waiting: list[Any] = list(self.connections)
        random.shuffle(waiting)
        # Nobody at once: a handler whose connection has just been made shall have begun with its request.
        await asyncio.sleep(_TELL_INTERVAL)
        began = self._loop.time()
        for number, connection in enumerate(waiting):
            due = began + spread * number / len(waiting)
            if due > self._loop.time():
                await asyncio.sleep(max(_TELL_INTERVAL, due - self._loop.time()))
            connection._kaio_drain()
        told.update(waiting)
        late: set[Any] = set()
        while not self._ended():
            for connection in late:
                connection._kaio_drain()
            told |= late
            late = set(self.connections) - told
            await asyncio.sleep(_TELL_INTERVAL)

    def close(self) -> None:
        """Stop accepting. Open connections stay open: see `close_clients`, `abort_clients`, `wait_closed`."""
        self._closed = True
        self._serving = False
        for listener in self._listeners:
            listener.release(self)
        if self._forever is not None and not self._forever.done():
            self._forever.set_result(None)
        self._check_ended()

    def close_clients(self) -> None:
        """Cancel the handlers, and close all connections; what was written is still sent."""
        for task in list(self._tasks):
            task.cancel()
        for connection in self.connections:
            if isinstance(connection, KeepaliveTransport):
                connection.close()

    def abort_clients(self) -> None:
        """Cancel the handlers, and close all connections at once; what is not sent yet is dropped."""
        for task in list(self._tasks):
            task.cancel()
        for connection in self.connections:
            assert isinstance(connection, (Connection, KeepaliveTransport))
            connection.abort()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and its last connection and handler have ended."""
        await asyncio.sleep(0)  # uvloop calls connection_made one turn after it has accepted
        while not self._ended():
            if self._waiting is None or self._waiting.done():
                self._waiting = self._loop.create_future()
            await asyncio.shield(self._waiting)

    def _ended(self) -> bool:
        return self._closed and not self._tasks and all(endpoint.is_empty() for endpoint in self._endpoints)

    def _check_ended(self) -> None:
        if self._waiting is not None and not self._waiting.done() and self._ended():
            self._waiting.set_result(None)

    async def __aenter__(self) -> Server[C_co]:
        await self.start_serving()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    def _refuse(self) -> None:
        """Stop accepting, and abort connections that are being made."""
        self.close()
        for endpoint in self._endpoints:
            endpoint.refuse()

    async def _end(self) -> None:
        """Close everything that is open; return within the close timeout and a second."""
        self._refuse()
        self.close_clients()
        try:
            if not await self._closed_within(self._close_timeout):
                await self._abort()
        except BaseException:
            self.abort_clients()
            raise

    async def _abort(self) -> None:
        """Abort everything that is open; return within a second."""
        self._refuse()
        self.abort_clients()
        if not await self._closed_within(_ABORT_TIMEOUT):
            self._log_stragglers()

    async def _closed_within(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self.wait_closed()
        except TimeoutError:
            return False
        return True

    def _log_stragglers(self) -> None:
        """Log the handlers and connections that have not ended."""
        name = getattr(self._handler, "__qualname__", self._handler)
        for connection in self._tasks.values():
            message = "handler %s of %r was cancelled and has not ended; no longer waiting for it"
            logger.error(message, name, connection, extra={"connection": connection})
        for stuck in self.connections.difference(self._tasks.values()):
            message = "%r was aborted and has not ended; no longer waiting for it"
            logger.error(message, stuck, extra={"connection": stuck})

    # -- handlers

    def _handled(self) -> StreamProtocol:
        return StreamProtocol(self._start_handler)

    def _start_handler(self, connection: Connection) -> None:
        assert self._handler is not None
        token = handled_connection.set(connection)
        try:
            handling = self._handler(connection)
            task = self._loop.create_task(handling if asyncio.iscoroutine(handling) else _wait_for(handling))
        except BaseException as exc:
            self._handler_ended(connection, exc)
            if isinstance(exc, (SystemExit, KeyboardInterrupt)):
                raise
            return
        finally:
            handled_connection.reset(token)
        self._tasks[task] = connection
        task.add_done_callback(self._handler_done)

    def _handler_done(self, task: asyncio.Task[object]) -> None:
        connection = self._tasks.pop(task)
        self._handler_ended(connection, None if task.cancelled() else task.exception())
        if not self._tasks:
            self._check_ended()

    def _handler_ended(self, connection: Connection, exc: BaseException | None) -> None:
        if exc is not None and not isinstance(exc, _NO_FAILURES):
            _log_failure(connection, exc)
        finish(connection, self._close_timeout)


def _refuse_timeouts(listener: Listener) -> None:
    """Raise ValueError for timeouts of a protocol on a Unix socket, which cannot be had."""
    for name, value in {"idle_timeout": listener.idle_timeout, "send_timeout": listener.send_timeout}.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r}: of a protocol on {listener.address} nobody tells when data came or went"
            )


def _check_times(grace: float, spread: float, delay: float = 0.0) -> None:
    for name, value in {"grace": grace, "spread": spread, "delay": delay}.items():
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: must be a number of seconds, at least 0")
    if spread > grace:
        raise ValueError(f"spread={spread!r}: must be at most grace={grace!r}")


async def _wait_for(handling: Awaitable[object]) -> None:
    await handling


# What ends a handler when the connection ends; DeadPeerError and ResetError are BrokenResourceErrors.
_CONNECTION_ENDED: Final = (BrokenResourceError, EndOfStream, IncompleteRead)


def _log_failure(connection: Connection, exc: BaseException) -> None:
    """Log a handler's exception with its traceback; an end of its connection only for debugging."""
    if isinstance(exc, BaseExceptionGroup):
        ended, others = exc.split(_CONNECTION_ENDED)
        if ended is not None and others is None:
            exc = _first(ended)
    extra = {"connection": connection}
    if isinstance(exc, _CONNECTION_ENDED):
        logger.debug("%r: the handler ended with its connection: %r", connection, exc, extra=extra)
    else:
        logger.error("handler failed for %r", connection, exc_info=exc, extra=extra)


def _first(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


# -- functions


@overload
def serve(
    handler: type[Watched],
    host: str | os.PathLike[str] | Address | None = None,
    port: int | str | None = None,
    *,
    listeners: Iterable[Listener] | None = None,
    keepalive: KeepaliveArg = None,
    ssl: ssl_module.SSLContext | None = None,
    backlog: int = 4096,
    reuse_port: bool | None = None,
    close_timeout: float = CLOSE_TIMEOUT,
) -> Pending[Server[KeepaliveTransport]]: ...


@overload
def serve(
    handler: Handler,
    host: str | os.PathLike[str] | Address | None = None,
    port: int | str | None = None,
    *,
    listeners: Iterable[Listener] | None = None,
    keepalive: KeepaliveArg = None,
    ssl: ssl_module.SSLContext | None = None,
    backlog: int = 4096,
    reuse_port: bool | None = None,
    close_timeout: float = CLOSE_TIMEOUT,
) -> Pending[Server[Connection]]: ...


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

    `handler` is an async function that takes a `Connection`, which is closed when it returns; or a `KeepaliveProtocol`
    class. Give a host and a port, an address as one text ("[::]:9000", "unix:/run/app.sock", "systemd:web"), or
    `listeners`. `keepalive` is the policy of every TCP listener that was given none. `close_timeout` is in seconds.

    Raises `PolicyError`, `AddressError`, TypeError, ValueError at once. When it is awaited or entered: OSError when an
    address cannot be bound, and RuntimeError when a listener belongs to another server or was given twice; then nothing
    is bound.
    """
    factory, function = _factory_or_handler(handler)
    if listeners is None:
        if host is None and port is None:
            raise ValueError("give host and port, an address, or listeners=")
        what = host if port is None and HandedOver.is_meant(host) else make_address(host, port)
        assert what is not None
        given = [Listener(what, ssl=ssl, backlog=backlog, reuse_port=reuse_port)]
        choice = choose_policy(keepalive, factory=factory, address=given[0].address)
    else:
        if host is not None or port is not None or ssl is not None:
            raise ValueError("host, port and ssl belong to each Listener when listeners= is given")
        given = _checked([listeners] if isinstance(listeners, Listener) else list(listeners))
        choice = choose_policy(keepalive, factory=factory)

    async def make() -> Server:
        server = Server[Any](given, factory, handler=function, close_timeout=close_timeout, policy=choice)
        await server.start_serving()
        return server

    return Pending(make)


def _factory_or_handler(handler: Handler | type[Watched]) -> tuple[ProtocolFactory | None, Handler | None]:
    """Tell a protocol class from a handler. Raises TypeError for anything else."""
    if isinstance(handler, type) and issubclass(handler, Watched) and issubclass(handler, asyncio.BaseProtocol):
        return handler, None
    if isinstance(handler, type) or not callable(handler):
        raise TypeError(f"handler must be an async function or a KeepaliveProtocol class, got {handler!r}")
    return None, handler


def _checked(listeners: list[Listener]) -> list[Listener]:
    """Return listeners that were given by a caller. Raises ValueError, TypeError."""
    if not listeners:
        raise ValueError("listeners= is empty")
    for each in listeners:
        if not isinstance(each, Listener):
            raise TypeError(f"listeners= takes kaio.Listener objects, got {each!r}")
    return listeners


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
) -> Server[KeepaliveTransport]:
    """Create a server as asyncio's `loop.create_server` does, with a policy. There is no `family` and no `flags`.

    Without `keepalive`, the factory's own `keepalive` attribute is the policy: pass the protocol class itself where you
    can. The attribute of another factory's protocols is known only when they are made, and each socket is then set by
    itself. A protocol that is no `KeepaliveProtocol` gets sockets with the policy and is told of a dead peer as on the
    bare loop; its connections are not in `connections`. Raises OSError, `PolicyError`, `AddressError`, ValueError as
    asyncio does.
    """
    if (sock is None) == (host is None and port is None):
        raise ValueError("give either host and port, or sock")

    def listener(address: Address | socket_module.socket) -> Listener:
        return Listener(
            address,
            ssl=ssl,
            backlog=backlog,
            reuse_address=reuse_address,
            reuse_port=reuse_port,
            handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )

    if sock is not None:
        listeners = [listener(sock)]
    else:
        hosts: Sequence[str | None] = [host] if host is None or isinstance(host, str) else host
        listeners = [listener(tcp_address(each, port or 0)) for each in dict.fromkeys(hosts)]
    # A socket that is handed over may be a Unix socket.
    address = listeners[0].address if sock is not None else None
    choice = choose_policy(keepalive, factory=protocol_factory, address=address)
    server = Server[KeepaliveTransport](listeners, protocol_factory, policy=choice)
    if start_serving:
        await server.start_serving()
    else:
        try:
            for each in listeners:
                await each.bind()
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
    keepalive: KeepaliveArg = None,
    sock: socket_module.socket | None = None,
    backlog: int = 100,
    ssl: ssl_module.SSLContext | None = None,
    reuse_address: bool | None = None,
    reuse_port: bool | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    start_serving: bool = True,
) -> Server[KeepaliveTransport]:
    """Start a server as asyncio's `start_server` does, with a policy; the other arguments are `create_server`'s.

    The reader and the writer raise `DeadPeerError` when the peer is dead.
    """
    loop = asyncio.get_running_loop()

    def factory() -> StreamsProtocol:
        return StreamsProtocol(asyncio.StreamReader(limit=limit, loop=loop), client_connected_cb, loop=loop)

    return await create_server(
        factory,
        host,
        port,
        keepalive=keepalive,
        sock=sock,
        backlog=backlog,
        ssl=ssl,
        reuse_address=reuse_address,
        reuse_port=reuse_port,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
        start_serving=start_serving,
    )
