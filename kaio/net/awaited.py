"""A protocol that a task awaits as if it were a future.

A future, its callback and another iteration of the loop would double the cost of a message. So the task that waits for
data awaits the protocol itself, whose `data_received` resumes it directly (docs/decisions/direct-wakeup.md).
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Final

from .protocols import KeepaliveProtocol

__all__ = ["RETURN_NONE", "AwaitedProtocol"]

RETURN_NONE: Final = type(None)
"""A call of it returns None; faster than any function in Python."""


class AwaitedProtocol(KeepaliveProtocol):
    """The part of a future's interface that asyncio's tasks and anyio use. A subclass initializes the attributes."""

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_loop",
        "_needed",
        "_woken",
        "handed",
        "receivable",
        "result",
        "sends_since_wait",
    )

    _asyncio_future_blocking: bool
    _callback: Callable[[AwaitedProtocol], object] | None  # resumes the receiver; None: none waits
    _context: Context | None  # in which `_callback` is called
    _loop: asyncio.AbstractEventLoop
    _needed: int  # bytes that the receiver waits for; 0: any number
    _woken: bool  # whether the receiver is to be resumed in the next iteration of the loop
    handed: bytes | None  # bytes for the receiver that is being resumed
    receivable: bool  # whether receiving can wait for data without any other check
    result: Callable[[], None]  # called by the task when it is resumed
    sends_since_wait: int  # sends since the last wait for data or iteration of the loop

    def update_flags(self) -> None:
        """Called after each wait, which may have changed `receivable`."""
        raise NotImplementedError

    @types.coroutine
    def wait(self, needed: int) -> Generator[object, None, bytes | None]:
        """Wait for the next data and return it, or None once the buffer has that many bytes or no more will come."""
        self._needed = needed
        self.sends_since_wait = 0  # other callbacks run meanwhile
        self.receivable = False
        self._asyncio_future_blocking = True
        try:
            yield self
        finally:
            self._needed = 0
            self.stop_waiting()
        handed, self.handed = self.handed, None
        return handed

    @property
    def receiving(self) -> bool:
        """Whether a task waits for data, or is about to be resumed."""
        return self._callback is not None or self._woken

    def stop_waiting(self) -> None:
        """Reset the state of a wait that has ended."""
        self._callback = None
        self._woken = False
        self.update_flags()

    def add_done_callback(
        self, callback: Callable[[AwaitedProtocol], object], *, context: Context | None = None
    ) -> None:
        """Called by the task that awaits this object, as `Future.add_done_callback` is."""
        self._callback = callback
        self._context = context

    def done(self) -> bool:
        """Whether no task waits, as `Future.done`; called by anyio."""
        return self._callback is None

    def cancel(self, msg: object = None) -> bool:
        """Called when the task is cancelled, as `Future.cancel` is."""
        if self._callback is None:  # about to be resumed: the task then raises CancelledError by itself
            return False
        self.result = _Cancelled(self, msg)
        self._wake_receiver()
        return True

    def _wake_receiver(self) -> None:
        """Resume the receiver in the next iteration of the loop."""
        callback, self._callback = self._callback, None
        if callback is not None:
            self._woken = True
            self._loop.call_soon(callback, self, context=self._context)


class _Cancelled:
    """The `result` of a cancelled wait: raises CancelledError when called."""

    __slots__ = ("_message", "_protocol")

    def __init__(self, protocol: AwaitedProtocol, message: object) -> None:
        self._protocol = protocol
        self._message = message

    def __call__(self) -> None:
        self._protocol.result = RETURN_NONE
        raise asyncio.CancelledError if self._message is None else asyncio.CancelledError(self._message)
