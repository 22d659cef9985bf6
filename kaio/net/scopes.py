"""What waits for the end of a connection: `AliveScope`, a block that is cancelled then, and `Closed`, a future."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ..errors import ClosedResourceError, EndOfStream, as_stream_error

if TYPE_CHECKING:
    from .transports import WatchedTransport

__all__ = ["AliveScope", "Closed", "Scope"]


class Scope(Protocol):
    """What a transport tells of its end."""

    def ended(self, error: BaseException | None) -> None:
        """The connection has ended, or its end is known: connection_lost may still be to come."""
        ...

    def lost(self) -> None:
        """connection_lost is being called, or another protocol has the connection."""
        ...


class Closed:
    """A future that is done when the connection is lost."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ended(self, error: BaseException | None) -> None:
        """Do nothing: what was received before may still be to be read."""

    def lost(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class AliveScope:
    """An asynchronous context manager that cancels its block when the connection ends."""

    __slots__ = ("_cancelling", "_fired", "_reason", "_task", "_transport")

    def __init__(self, transport: WatchedTransport) -> None:
        self._transport = transport
        self._task: asyncio.Task[object] | None = None
        self._cancelling: int = 0  # cancellations requested before it was entered
        self._fired: bool = False
        self._reason: BaseException | None = None

    async def __aenter__(self) -> AliveScope:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("while_alive() must be used in a task")
        if self._task is not None:
            raise RuntimeError("this scope has been entered already")
        transport = self._transport
        if transport.ended or transport.verdict is not None or transport.closer:
            raise as_stream_error(transport.verdict) or ClosedResourceError()
        self._task = task
        self._cancelling = task.cancelling()
        if transport.scopes is None:
            transport.scopes = []
        transport.scopes.append(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        scopes = self._transport.scopes
        if scopes is not None and self in scopes:
            scopes.remove(self)
        if self._fired:
            assert self._task is not None
            # As in asyncio.timeout: a cancellation from outside, besides this one, stays a cancellation.
            if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
                reason, self._reason = self._reason, None
                assert reason is not None
                try:
                    raise reason.with_traceback(None) from reason.__cause__
                finally:
                    del reason  # its traceback refers to this frame

    def ended(self, error: BaseException | None) -> None:
        """Cancel the block because the connection has ended, and keep what it is to raise."""
        closed_here = self._transport.closer
        if self._fired or (error is None and closed_here is self._task):  # the block has closed its own connection
            return
        self._fired = True
        # Without an error it was closed: by this side, if `closer` says so, else by the peer.
        clean: BaseException = ClosedResourceError() if closed_here else EndOfStream()
        self._reason = as_stream_error(error) or clean
        assert self._task is not None
        self._task.cancel()

    def lost(self) -> None:
        """Do nothing: `ended` came before."""
