"""Draining: an event for each connection that tells it to come to its end, and the signals that a server waits for."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["Draining", "handled"]


class Draining:
    """Whether a connection's server drains: an event, true once it is set.

    `if connection.draining:` and `await connection.draining.wait()`. A handler that sees it finishes what is under way
    and returns; what has not ended by the end of the grace is cancelled.
    """

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters: set[asyncio.Future[None]] = set()

    def is_set(self) -> bool:
        """Return whether the server drains."""
        return self._is_set

    __bool__ = is_set

    async def wait(self) -> None:
        """Wait until the server drains. Returns at once when it does already."""
        if self._is_set:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def set(self) -> None:
        """Set the event. Called by the server, in its loop."""
        self._is_set = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def __repr__(self) -> str:
        return f"<Draining {'set' if self._is_set else 'unset'}>"


@contextlib.contextmanager
def handled(signals: Iterable[int], handler: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Within the block, call `handler` in the loop for each of these signals; afterwards restore what was there before.

    Raises RuntimeError outside of the main thread, and ValueError or OSError for a signal that cannot be handled; then
    nothing has changed.
    """
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as undo:
        for number in map(signal.Signals, signals):
            before = signal.getsignal(number)
            loop.add_signal_handler(number, handler, number)
            undo.callback(_restore, loop, number, before)
        yield


def _restore(loop: asyncio.AbstractEventLoop, number: signal.Signals, before: Any) -> None:
    # The loop puts back the default, and not the handler of asyncio.Runner, by which Ctrl-C cancels the main task.
    loop.remove_signal_handler(number)
    if before is not None:  # None: it was not set by Python
        signal.signal(number, before)
