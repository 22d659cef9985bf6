"""`Slots`: who of many tasks may use, or open, one of few connections.

Rules kept here: no I/O. A slot is free, or reserved by exactly one task, or has one member, which is idle or leased;
whoever fails or is cancelled passes on what it has. Whoever waits longest is served first, and nobody overtakes. The
idle member that was used last is taken first, so that those that nobody needs become old.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from ..errors import ClosedResourceError

__all__ = ["Slots"]


class _Member(Protocol):
    """What has a slot."""

    def is_usable(self) -> bool:
        """Return whether it is worth keeping."""
        ...

    def is_healthy(self) -> bool:
        """Return whether it can be handed out now."""
        ...

    def close(self) -> None:
        """Close it without waiting."""
        ...


M = TypeVar("M", bound=_Member)


class Slots(Generic[M]):
    """At most `most` members, and the queue of those who wait for one."""

    def __init__(self, most: int, on_freed: Callable[[], None]) -> None:
        self.most = most
        self.size: int = 0  # slots that are not free
        self.idle: OrderedDict[M, None] = OrderedDict()  # the longest idle first
        self.leased: set[M] = set()
        self.waiting: OrderedDict[asyncio.Future[M | None], None] = OrderedDict()
        self.closed: bool = False
        self._on_freed = on_freed  # called when a slot is free, and nobody waits for it

    async def take(self) -> M | None:
        """Take a healthy member, or reserve a slot and return None; wait until either can be had.

        Raises `ClosedResourceError` when it is closed.
        """
        self.check_open()
        if self.waiting or not (self.idle or self.size < self.most):
            member = await self._wait()
            if member is not None and not member.is_healthy():  # something has happened since it was given
                self.discard(member)
                return None
            return member
        member = self.take_idle()
        if member is None:
            self.size += 1
        return member

    def take_idle(self) -> M | None:
        """Take the idle member that was used last, unless others wait; drop those that are not healthy."""
        while self.idle and not self.waiting:
            member, _ = self.idle.popitem(last=True)
            if member.is_healthy():
                self.leased.add(member)
                return member
            self.drop(member)
        return None

    def check_open(self) -> None:
        """Raise `ClosedResourceError` when it is closed."""
        if self.closed:
            raise ClosedResourceError("the pool is closed")

    async def _wait(self) -> M | None:
        waiter: asyncio.Future[M | None] = asyncio.get_running_loop().create_future()
        self.waiting[waiter] = None
        try:
            member = await waiter
        except BaseException:
            self.waiting.pop(waiter, None)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.pass_on(waiter.result())  # cancelled in the turn in which it was served
            raise
        if self.closed:
            self.pass_on(member)
            self.check_open()
        return member

    def fill(self, member: M) -> None:
        """Put a new member, which its opener uses, into the slot that was reserved for it."""
        self.leased.add(member)
        if self.closed:
            self.drop(member)
            self.check_open()

    def give_back(self, member: M, *, broken: bool) -> None:
        """Take a member back, for whoever waits, or to be idle; drop it if it is broken or of no use."""
        if broken or not member.is_usable():
            self.drop(member)
        else:
            self.pass_on(member)

    def pass_on(self, member: M | None) -> None:
        """Give a member, or a reserved slot (None), to whoever has waited longest."""
        if self.closed:
            if member is not None:
                self.discard(member)
            self._free()
            return
        while self.waiting:
            waiter, _ = self.waiting.popitem(last=False)
            if not waiter.done():
                if member is not None:
                    self.leased.add(member)
                waiter.set_result(member)
                return
        if member is None:
            self._free()
        else:
            self.leased.discard(member)
            self.idle[member] = None

    def discard(self, member: M) -> None:
        """Close a member; its slot stays reserved."""
        self.leased.discard(member)
        self.idle.pop(member, None)
        member.close()

    def drop(self, member: M) -> None:
        """Close a member; its slot goes to whoever has waited longest."""
        self.discard(member)
        self.pass_on(None)

    def _free(self) -> None:
        self.size -= 1
        self._on_freed()

    def close(self) -> list[M]:
        """Close it and the idle members, which are returned; whoever waits gets `ClosedResourceError`."""
        self.closed = True
        while self.waiting:
            waiter, _ = self.waiting.popitem(last=False)
            if not waiter.done():
                waiter.set_exception(ClosedResourceError("the pool is closed"))
        idle = list(self.idle)
        for member in idle:
            self.drop(member)
        return idle
