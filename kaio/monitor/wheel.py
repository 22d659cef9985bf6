"""The wheel: who is looked at when, with one timer of the loop for all of them.

Rules kept here: no look before its time, in ticks of a quarter of a second; a turn ends after a few milliseconds and
goes on in the loop's next one, so that thousands who are due at once do not hold the loop; whoever is discarded is
nowhere in it, and an empty wheel has no timer, because a timer holds its loop.

A heap of ticks with a set for each, and not a heap of connections: most are discarded long before they are due, which
is one removal from a set.
"""

from __future__ import annotations

import asyncio
import heapq
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from .counters import Counters

__all__ = ["TICK", "TURN", "Due", "Wheel"]


class Due(Protocol):
    """What can be in a wheel."""

    due: int
    """The tick at which it is looked at; -1: it is not in the wheel. Set by the wheel."""


D = TypeVar("D", bound=Due)

TURN: Final = 0.005
"""Seconds that work of kaio's own may take in one turn of a loop."""
_TICKS: Final = 4  # a second
TICK: Final = 1 / _TICKS
"""Seconds by which a look may be late."""


class Wheel(Generic[D]):
    """Calls `look` with each connection whose time has come, with the loop and its time."""

    def __init__(
        self,
        loop: weakref.ref[asyncio.AbstractEventLoop],
        counters: Counters,
        look: Callable[[D, asyncio.AbstractEventLoop, float], None],
    ) -> None:
        self._loop = loop
        self._counters = counters
        self._look = look
        self._buckets: dict[int, set[D]] = {}  # tick -> who is due then
        self._ticks: list[int] = []  # heap of the buckets' ticks
        self._timer: asyncio.TimerHandle | None = None
        self._timer_tick = 0  # the tick that it is set for
        self._due: set[D] = set()  # their time has come, and their turn has not
        self._population = 0

    def __iter__(self) -> Iterator[D]:
        return iter(self._due.union(*self._buckets.values()))

    def due_at(self, connection: D) -> float | None:
        """When a connection is due, on the loop's clock; None when it is not in the wheel."""
        return None if connection.due < 0 else (connection.due - 1) / _TICKS

    def add(self, connection: D, loop: asyncio.AbstractEventLoop, at: float) -> None:
        """Let a connection that is not in the wheel be looked at, not before that time."""
        tick = int(at * _TICKS) + 1
        connection.due = tick
        self._population += 1
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.add(connection)
            return
        self._buckets[tick] = {connection}
        heapq.heappush(self._ticks, tick)
        if self._timer is None or tick < self._timer_tick:
            self._set_timer(loop)

    def discard(self, connection: D) -> None:
        """Take a connection out, if it is in the wheel."""
        if connection.due >= 0:
            bucket = self._buckets.get(connection.due, self._due)
            # A bucket may have been made anew for a tick whose turn has come.
            (bucket if connection in bucket else self._due).discard(connection)
            connection.due = -1
            self._population -= 1
            if not self._population:
                self.clear()

    def clear(self) -> None:
        """Nobody is in the wheel: nothing of it need stay, least of all a timer, which holds the loop."""
        self._population = 0
        self._buckets.clear()
        self._ticks.clear()
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._ticks and not self._buckets[self._ticks[0]]:
            del self._buckets[heapq.heappop(self._ticks)]  # all of them have ended
        if self._ticks:
            self._timer_tick = self._ticks[0]
            self._timer = loop.call_at(self._timer_tick / _TICKS, self._turn)

    def _turn(self) -> None:
        """Look at those whose time has come, for a while."""
        loop = self._loop()
        if loop is None:
            return
        self._timer = None
        self._counters.wakeups += 1
        began = now = loop.time()
        tick = int(began * _TICKS)
        while self._ticks and self._ticks[0] <= tick:
            bucket = self._buckets.pop(heapq.heappop(self._ticks))
            self._due = self._due | bucket if self._due else bucket
        try:
            while self._due:
                connection = self._due.pop()
                connection.due = -1
                self._population -= 1
                self._look(connection, loop, now)
                now = loop.time()
                if now - began > TURN:
                    break
        finally:
            if self._due:
                self._timer_tick = 0
                self._timer = loop.call_later(0, self._turn)
            else:
                self._set_timer(loop)
