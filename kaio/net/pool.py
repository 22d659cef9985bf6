"""`Pool`: connections that are used again and again, of which none is handed out that is known to be dead."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable
from types import EllipsisType, TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar, Unpack

from ..addresses import Address
from ..errors import ConnectionEnded, EndOfStream
from ..policy import check_timeout
from .connection import CLOSE_TIMEOUT, Connection, end_of, is_over
from .connector import ConnectOptions, Connector
from .pooled import PooledConnection, PooledProtocol
from .reconnecting import attempt_in_row
from .retry import Backoff, Retry, check_retry
from .slots import Slots

__all__ = ["Lease", "Pool"]

P = ParamSpec("P")
R = TypeVar("R")

_LONGEST_CHECK: Final = 60.0  # seconds between two looks for connections that nobody uses, or that are old


class Pool:
    """A pool of connections to one address: `async with pool.acquire() as connection`.

    No task is given a connection that is known to be dead or suspect, whose peer has sent EOF, or on which something
    has come that nobody has asked for; it gets a fresh one, which may have a greeting of the server's. Tasks are served
    in the order in which they came.

    A connection goes back into the pool when the block ends, unless the block has raised an exception, the connection
    has ended, or unread bytes are left in it: whoever comes next would get the answer to somebody else's question. It
    is closed then, without waiting.
    """

    def __init__(
        self,
        host: str | os.PathLike[str] | Address | None,
        port: int | str | None = None,
        *,
        min_size: int = 0,
        max_size: int = 10,
        timeout: float | None = 30.0,
        max_idle: float | None = 600.0,
        max_lifetime: float | None = 3600.0,
        on_connect: Callable[[Connection], Awaitable[object]] | None = None,
        retry: Retry | None = None,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """Make a pool, which opens connections once it is entered. Times are in seconds.

        `min_size`: connections that it opens then, and keeps open. `max_size`: the most that there are at a time.
        `timeout`: how long `acquire` waits, opening a connection included; None: for ever. `max_idle`: after that time
        an unused connection is closed, unless fewer than `min_size` would be left; `max_lifetime`: after that time (or
        up to a tenth earlier) any is, when nobody uses it; None: never. `on_connect`: called with each new connection,
        to authenticate for example; what it raises is raised by `acquire`. `retry`: when to try again to open one;
        None: `acquire` raises the first error. The rest are the arguments of `connect`.

        Raises TypeError and ValueError, which name the argument, and what `connect` raises for its own.
        """
        self._connector = Connector(host, port, **options)
        self._min_size = _check_size("min_size", min_size, 0)
        self._slots: Slots[PooledConnection] = Slots(_check_size("max_size", max_size, 1), self._on_freed)
        if min_size > max_size:
            raise ValueError(f"min_size={min_size!r}: must be at most max_size={max_size!r}")
        self._timeout = check_timeout("timeout", timeout)
        self._max_idle = check_timeout("max_idle", max_idle)
        self._max_lifetime = check_timeout("max_lifetime", max_lifetime)
        if on_connect is not None and not callable(on_connect):
            raise TypeError(f"on_connect={on_connect!r}: must be an asynchronous function of a connection")
        self._on_connect = on_connect
        self._retry = check_retry(retry)
        self._loop: asyncio.AbstractEventLoop | None = None  # set when it is entered
        self._is_warm = False  # the first `min_size` connections are open
        self._check: asyncio.TimerHandle | None = None  # the next look for connections that are to be closed
        self._refilling: asyncio.Task[None] | None = None
        self._backoff = Backoff(self._retry or Retry(), 0.0)  # of refilling
        self._backoff.connected()  # once it is warm: what has worked may be mended
        self._filled_at = -math.inf  # when refilling has last opened what was missing, or failed
        self._drained: asyncio.Event = asyncio.Event()  # it is closed, and all connections were given back

    # -- what it is

    @property
    def size(self) -> int:
        """Connections that are open or being opened."""
        return self._slots.size

    @property
    def idle(self) -> int:
        """Connections that nobody uses."""
        return len(self._slots.idle)

    @property
    def waiting(self) -> int:
        """Tasks that wait for a connection to be given back."""
        return len(self._slots.waiting)

    def __repr__(self) -> str:
        state = "closed" if self._slots.closed else f"{self.size} of {self._slots.most}, {self.idle} idle"
        return f"<Pool of {self._connector.where}: {state}, {self.waiting} waiting>"

    # -- opening and closing

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("this pool has been entered already")
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._min_size):
                    self._slots.size += 1
                    group.create_task(self._warm_up())
        except BaseException as exc:
            await self.aclose(timeout=0)
            if isinstance(exc, BaseExceptionGroup):
                raise exc.exceptions[0] from None
            raise
        self._is_warm = True
        self._check_later()
        self._refill()  # one may have ended since
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self, timeout: float | None = CLOSE_TIMEOUT) -> None:
        """Close the pool: nobody gets a connection any more, and whoever waits for one gets `ClosedResourceError`.

        Waits at most `timeout` seconds (None: no limit) until all connections were given back and are closed, then
        aborts those that are left. When cancelled, it aborts them at once.
        """
        slots = self._slots
        if self._check is not None:
            self._check.cancel()
            self._check = None
        if self._refilling is not None:
            self._refilling.cancel()
        left = slots.close()
        if not slots.size:
            self._drained.set()
        try:
            async with asyncio.timeout(timeout):
                await self._drained.wait()
                for pooled in left:
                    await pooled.connection.transport.wait_closed()
        except TimeoutError:
            pass
        finally:
            for pooled in (*left, *slots.leased):
                pooled.connection.abort()

    # -- use

    def acquire(self, timeout: float | EllipsisType | None = ...) -> Lease:
        """Return a context manager whose block has a connection for itself.

        `timeout`: seconds to wait for it, opening one included; None: for ever; by default that of the pool. Raises
        TimeoutError then, `ClosedResourceError` when the pool is closed, what `connect` and `on_connect` raise, and a
        kind of `ConnectionEnded` when a connection ends while it is being opened.
        """
        limit = self._timeout if isinstance(timeout, EllipsisType) else check_timeout("timeout", timeout)
        return Lease(self._slots, self._take, limit)

    async def run(
        self, function: Callable[Concatenate[Connection, P], Awaitable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Return `await function(connection, *args, **kwargs)` with a connection of the pool's.

        If its connection ends, and somebody had used it before, the function is called once more with a fresh one: the
        peer may have closed it in that very moment. So it has to be a function that may be called twice.
        """
        lease = self.acquire()
        async with lease as connection:
            try:
                return await function(connection, *args, **kwargs)
            except ConnectionEnded:
                if not (lease.was_used and is_over(connection)):
                    raise
            return await function(await lease.renew(), *args, **kwargs)

    async def _take(self, timeout: float | None, opened: bool = False) -> PooledConnection:
        """Take a connection, or open one; `opened`: for a slot that is reserved already."""
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("enter the pool first (`async with pool`), and use it in the same loop")
        slots = self._slots
        if not opened:
            slots.check_open()
            pooled = slots.take_idle()
            if pooled is not None:  # nearly always, and without a timer
                return pooled
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return (None if opened else await slots.take()) or await self._open()
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(
                f"no connection to {self._connector.where} within {timeout:g} s: "
                f"{len(slots.leased)} of at most {slots.most} are in use"
            ) from None

    async def _open(self) -> PooledConnection:
        """Open a connection for a slot that is reserved, and free the slot if that fails."""
        try:
            if self._retry is None:
                pooled = await self._connect()
            else:
                backoff = Backoff(self._retry, asyncio.get_running_loop().time())
                pooled = await attempt_in_row(backoff, self._connect, self._connector.where)
        except BaseException:
            self._slots.pass_on(None)
            raise
        self._slots.fill(pooled)
        return pooled

    async def _connect(self) -> PooledConnection:
        connection = await self._connector(PooledProtocol)
        try:
            if self._on_connect is not None:
                await self._on_connect(connection)
            if not is_over(connection):
                pooled = PooledConnection(connection, self._max_lifetime, self._on_end)
                if not pooled.has_hung_up():
                    return pooled
            raise end_of(connection) or EndOfStream("the peer has closed the connection")
        except BaseException:
            connection.abort()
            raise

    # -- keeping order

    def _on_end(self, pooled: PooledConnection) -> None:
        """The peer of a connection has closed it or died: nobody should get it."""
        if pooled in self._slots.idle:
            self._slots.drop(pooled)

    def _on_freed(self) -> None:
        if not self._slots.closed:
            self._refill()
        elif not self._slots.size:
            self._drained.set()

    def _check_later(self) -> None:
        bounds = [bound for bound in (self._max_idle, self._max_lifetime) if bound is not None]
        if bounds and self._loop is not None:
            self._check = self._loop.call_later(min(_LONGEST_CHECK, min(bounds) / 4), self._check_ages)

    def _check_ages(self) -> None:
        """Close the connections that nobody has used for long, and those that are old."""
        assert self._loop is not None
        slots, now = self._slots, self._loop.time()
        for pooled in list(slots.idle):
            unused = self._max_idle is not None and now - pooled.idle_since >= self._max_idle
            if pooled.is_old() or (unused and slots.size > self._min_size):
                slots.drop(pooled)
        self._check_later()

    async def _warm_up(self) -> None:
        self._slots.give_back(await self._open(), broken=False)

    def _refill(self) -> None:
        if self._is_warm and self._slots.size < self._min_size and (self._refilling is None or self._refilling.done()):
            assert self._loop is not None
            self._refilling = self._loop.create_task(self._refill_slowly())

    async def _refill_slowly(self) -> None:
        """Open connections until there are enough again; delays grow while that fails, or what was opened ends soon."""
        assert self._loop is not None
        slots, backoff = self._slots, self._backoff
        if self._loop.time() - self._filled_at >= backoff.retry.lasting:
            backoff.attempts = 0
        while slots.size < self._min_size and not slots.closed:
            await asyncio.sleep(backoff.delay())
            backoff.attempts += 1
            try:
                await self._open_missing()
            except Exception as exc:
                if backoff.failed(exc) or backoff.exhausted():
                    return  # who acquires next hears of it
            self._filled_at = self._loop.time()

    async def _open_missing(self) -> None:
        """Open as many connections as are too few now."""
        slots = self._slots
        for _ in range(self._min_size - slots.size):
            if slots.size >= self._min_size or slots.closed:
                return  # tasks have opened some meanwhile
            slots.size += 1
            try:
                pooled = await self._connect()
            except BaseException:
                slots.pass_on(None)
                raise
            slots.fill(pooled)
            slots.give_back(pooled, broken=False)


class Lease:
    """What `Pool.acquire` returns: `async with` gives its block a connection for itself."""

    __slots__ = ("_pooled", "_slots", "_take", "_timeout")

    def __init__(
        self, slots: Slots[PooledConnection], take: Callable[..., Awaitable[PooledConnection]], timeout: float | None
    ) -> None:
        self._slots = slots
        self._take = take
        self._timeout = timeout
        self._pooled: PooledConnection | None = None

    @property
    def was_used(self) -> bool:
        """Whether somebody has used the connection before."""
        return self._pooled is not None and self._pooled.used

    async def __aenter__(self) -> Connection:
        if self._pooled is not None:
            raise RuntimeError("this has been entered already")
        self._pooled = pooled = await self._take(self._timeout)
        return pooled.connection

    async def renew(self) -> Connection:
        """Open another connection in place of this one, which is closed."""
        pooled, self._pooled = self._pooled, None
        assert pooled is not None
        self._slots.discard(pooled)
        self._pooled = pooled = await self._take(self._timeout, opened=True)
        return pooled.connection

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        pooled, self._pooled = self._pooled, None
        if pooled is not None:
            pooled.on_give_back()
            self._slots.give_back(pooled, broken=exc is not None)


def _check_size(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: must be a whole number")
    if value < least:
        raise ValueError(f"{name}={value!r}: must be at least {least}")
    return value
