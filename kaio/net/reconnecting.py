"""Connecting again: a row of attempts, and the connections that an `async for` loop gets one after the other.

Rules kept here: each attempt begins from scratch, so names are resolved anew. The connection before is closed before
the next attempt begins. Whoever leaves the loop, by `break`, an exception or cancellation, leaves no connection open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, ClassVar, Final, Generic, TypeVar

import anyio

from ..errors import ConnectionEnded, EndOfStream, as_stream_error
from .connection import CLOSE_TIMEOUT, Connection, end_of, finish, is_over
from .pending import Pending, Promise
from .retry import Backoff, Retry
from .stream import StreamProtocol
from .transports import WatchedTransport

__all__ = ["AgainProtocol", "Connecting", "ConnectingTransport", "attempt_in_row"]

logger: Final = logging.getLogger("kaio")

T = TypeVar("T")
K_co = TypeVar("K_co", bound=asyncio.Transport, covariant=True)
P_co = TypeVar("P_co", bound=asyncio.BaseProtocol, covariant=True)

# What ends a block with its connection; anyio's own come from streams that are put around a `Connection`.
_ENDS: Final = (
    ConnectionEnded,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
    anyio.IncompleteRead,
)


async def attempt_in_row(backoff: Backoff, attempt: Callable[[], Awaitable[T]], where: str) -> T:
    """Attempt until one succeeds. Raises the last error when there may be no other attempt, and any that is final."""
    loop = asyncio.get_running_loop()
    while True:
        delay, left = backoff.delay(), backoff.left(loop.time())
        if backoff.exhausted() or (left is not None and left <= delay):
            raise backoff.error or _timed_out(where, backoff.retry)
        if backoff.error is not None:
            logger.info(
                "connecting to %s again in %.2f s: %s",
                where,
                delay,
                backoff.error,
                extra={"event": "reconnect", "attempt": backoff.attempts + 1, "delay": delay, "peer": where},
            )
        if delay:
            await asyncio.sleep(delay)
        backoff.attempts += 1
        limit = asyncio.timeout(None if left is None else left - delay)
        try:
            async with limit:
                made = await attempt()
        except Exception as exc:
            if limit.expired():
                raise backoff.error or _timed_out(where, backoff.retry) from None
            if backoff.failed(exc):
                raise
        else:
            backoff.connected()
            return made


def _timed_out(where: str, retry: Retry) -> TimeoutError:
    return TimeoutError(f"no connection to {where} within {retry.timeout:g} s")


# -- one connection after the other


class StreamEnds:
    """How the connections of `connect` end."""

    @staticmethod
    async def close(connection: Connection) -> None:
        await connection.aclose()

    @staticmethod
    def abandon(connection: Connection) -> None:
        """Close without waiting."""
        finish(connection, CLOSE_TIMEOUT)

    @staticmethod
    def error(connection: Connection) -> BaseException | None:
        """Return what has ended the connection; None: one of both sides in good order."""
        return end_of(connection)


class TransportEnds:
    """How the transports of `create_connection` end."""

    @staticmethod
    async def close(made: tuple[asyncio.Transport, Any]) -> None:
        transport = made[0]
        transport.close()
        if isinstance(transport, WatchedTransport):
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await transport.wait_closed()
            except TimeoutError:
                transport.abort()
            except BaseException:
                transport.abort()
                raise

    @staticmethod
    def abandon(made: tuple[asyncio.Transport, Any]) -> None:
        transport = made[0]
        if not transport.is_closing():
            if transport.get_write_buffer_size():
                asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, transport.abort)
            transport.close()

    @staticmethod
    def error(made: tuple[asyncio.Transport, Any]) -> BaseException | None:
        transport = made[0]
        return as_stream_error(transport.verdict) if isinstance(transport, WatchedTransport) else None


class Reconnecting(AsyncIterator[T], Generic[T]):
    """The iterator of `async for connection in kaio.connect(...)`."""

    def __init__(self, attempt: Callable[[], Awaitable[T]], ends: Any, retry: Retry | None, where: str) -> None:
        self._attempt = attempt
        self._ends = ends
        self._retry = retry or Retry()
        self._where = where
        self._backoff: Backoff | None = None  # since the first attempt
        self._made: T | None = None  # the connection that the block has
        self._made_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __anext__(self) -> T:
        self._loop = loop = asyncio.get_running_loop()
        backoff = self._backoff
        if backoff is None:
            self._backoff = backoff = Backoff(self._retry, loop.time())
        made, self._made = self._made, None
        if made is not None:
            now = loop.time()
            await self._ends.close(made)
            error = self._ends.error(made) or EndOfStream("the connection was closed")
            del made
            if backoff.ended(error, now - self._made_at, now):
                raise error
        made = await attempt_in_row(backoff, self._attempt, self._where)
        if isinstance(made, AgainConnection):
            made.is_final = backoff.is_final_end
        self._made, self._made_at = made, loop.time()
        return made

    def __del__(self) -> None:
        made, loop = self._made, self._loop
        if made is None or loop is None or loop.is_closed():
            return
        # The loop was left: in CPython this is called at once, by the statement that leaves it.
        with contextlib.suppress(RuntimeError):  # no loop runs
            if asyncio.get_running_loop() is loop:
                self._ends.abandon(made)
                return
        loop.call_soon_threadsafe(self._ends.abandon, made)


class AgainConnection(Connection):
    """A connection of such a loop. `async with connection:` ends with it, and leaves its end to the loop."""

    __slots__ = ("is_final",)

    is_final: Callable[[Exception], bool]

    async def __aexit__(  # type: ignore[override] # anyio's does not swallow
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> bool:
        over = is_over(self)
        await self.aclose()
        if not over or not isinstance(exc, Exception):
            return False
        if isinstance(exc, ExceptionGroup):
            ended, others = exc.split(_ENDS)
            return ended is not None and others is None and not any(map(self.is_final, _leaves(ended)))
        return isinstance(exc, _ENDS) and not self.is_final(exc)


def _leaves(group: ExceptionGroup[Any]) -> list[Exception]:
    """The exceptions of a group and of the groups in it."""
    found: list[Exception] = []
    for exc in group.exceptions:
        found += _leaves(exc) if isinstance(exc, ExceptionGroup) else [exc]
    return found


class AgainProtocol(StreamProtocol):
    """The protocol of such a connection."""

    __slots__ = ()

    connection_class: ClassVar[type[Connection]] = AgainConnection


# -- what connect and create_connection return


class Connecting(Pending[Connection]):
    """What `connect` returns: a connection to be awaited or entered, or connections to iterate over."""

    def __init__(
        self,
        make: Callable[[], Awaitable[Connection]],
        make_again: Callable[[], Awaitable[Connection]],
        retry: Retry | None,
        where: str,
    ) -> None:
        super().__init__(_retrying(make, retry, where))
        self._make_again = make_again
        self._retry = retry
        self._where = where

    def __aiter__(self) -> AsyncIterator[Connection]:
        self._used = True
        return Reconnecting(self._make_again, StreamEnds, self._retry, self._where)


class ConnectingTransport(Promise[tuple[K_co, P_co]]):
    """What `create_connection` returns: a coroutine, and transports and protocols to iterate over."""

    def __init__(
        self, make: Callable[[], Awaitable[tuple[K_co, P_co]]], retry: Retry | None, where: str | None
    ) -> None:
        super().__init__(_retrying(make, retry, where or ""))
        self._make_one = make
        self._retry = retry
        self._where = where

    def __aiter__(self) -> AsyncIterator[tuple[K_co, P_co]]:
        self._used = True
        if self._where is None:
            raise ValueError("give host and port to iterate over connections: a sock cannot be connected again")
        return Reconnecting(self._make_one, TransportEnds, self._retry, self._where)


def _retrying(make: Callable[[], Awaitable[T]], retry: Retry | None, where: str) -> Callable[[], Awaitable[T]]:
    if retry is None:
        return make
    return lambda: attempt_in_row(Backoff(retry, asyncio.get_running_loop().time()), make, where)
