"""Who of many tasks has one of few members: the order, and what cancelled tasks leave. No connections are needed."""

from __future__ import annotations

import asyncio
import random

import pytest

from kaio import ClosedResourceError
from kaio.net.slots import Slots


class Member:
    """What has a slot."""

    def __init__(self) -> None:
        self.healthy = True
        self.closed = False

    def is_usable(self) -> bool:
        return self.healthy

    def is_healthy(self) -> bool:
        return self.healthy

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class Owner:
    """Slots, with the members that were made for them."""

    def __init__(self, most: int) -> None:
        self.freed = 0
        self.slots: Slots[Member] = Slots(most, self._on_freed)
        self.made: list[Member] = []

    def _on_freed(self) -> None:
        self.freed += 1

    async def take(self) -> Member:
        """Take a member, or make one."""
        member = await self.slots.take()
        if member is None:
            self.made.append(Member())
            member = self.made[-1]
            self.slots.fill(member)
        return member

    def check(self) -> None:
        """Nothing is lost, and nothing is there twice."""
        slots = self.slots
        assert 0 <= slots.size <= slots.most
        assert not slots.leased & slots.idle.keys()
        held = slots.leased | slots.idle.keys()
        assert {member for member in self.made if not member.closed} == held
        assert len(held) <= slots.size


async def test_the_first_to_wait_is_the_first_to_be_served() -> None:
    """Nobody overtakes, not even who asks in the moment in which one is given back."""
    owner = Owner(1)
    member = await owner.take()
    served: list[int] = []

    async def use(number: int) -> None:
        taken = await owner.take()
        served.append(number)
        await asyncio.sleep(0)
        owner.slots.give_back(taken, broken=False)

    tasks = [asyncio.ensure_future(use(number)) for number in range(10)]
    await asyncio.sleep(0)
    owner.slots.give_back(member, broken=False)
    late = asyncio.ensure_future(use(10))
    await asyncio.gather(*tasks, late)
    assert served == list(range(11))
    assert len(owner.made) == 1


async def test_the_one_that_was_used_last_is_taken_first() -> None:
    """The others become old."""
    owner = Owner(3)
    members = [await owner.take() for _ in range(3)]
    for member in members:
        owner.slots.give_back(member, broken=False)
    assert await owner.take() is members[-1]
    owner.check()


@pytest.mark.parametrize("when", ["idle", "given back", "on its way"])
async def test_what_is_not_healthy_is_not_handed_out(when: str) -> None:
    """It is closed, and its slot serves for another one."""
    owner = Owner(1)
    member = await owner.take()
    waiting = asyncio.ensure_future(owner.take())
    await asyncio.sleep(0)
    if when == "given back":
        member.healthy = False
    owner.slots.give_back(member, broken=False)
    if when == "on its way":
        member.healthy = False
    other = await waiting
    if when == "idle":
        assert other is member
        owner.slots.give_back(member, broken=False)
        member.healthy = False
        other = await owner.take()
    assert other is not member
    assert member.closed
    owner.check()


async def test_a_broken_one_makes_room_for_another() -> None:
    """For whoever waits; without anybody the slot is free."""
    owner = Owner(1)
    member = await owner.take()
    waiting = asyncio.ensure_future(owner.take())
    await asyncio.sleep(0)
    owner.slots.give_back(member, broken=True)
    other = await waiting
    assert owner.made == [member, other]
    owner.slots.give_back(other, broken=True)
    assert (owner.slots.size, owner.freed) == (0, 1)


@pytest.mark.parametrize("gives", ["a member", "a slot"])
async def test_who_is_cancelled_when_served_passes_it_on(gives: str) -> None:
    """In the very turn."""
    owner = Owner(1)
    member = await owner.take()
    first, second = (asyncio.ensure_future(owner.take()) for _ in range(2))
    await asyncio.sleep(0)
    owner.slots.give_back(member, broken=gives == "a slot")
    first.cancel()
    assert (await second is member) is (gives == "a member")
    assert first.cancelled()
    owner.check()


async def test_who_is_cancelled_while_waiting_waits_no_more() -> None:
    """And is given nothing."""
    owner = Owner(1)
    member = await owner.take()
    waiting = asyncio.ensure_future(owner.take())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    assert not owner.slots.waiting
    owner.slots.give_back(member, broken=False)
    assert list(owner.slots.idle) == [member]


async def test_closing() -> None:
    """Idle members are closed, who waits hears of it, what is in use is closed when it is given back."""
    owner = Owner(2)
    idle, used = await owner.take(), await owner.take()
    waiting = asyncio.ensure_future(owner.take())
    await asyncio.sleep(0)
    served = asyncio.ensure_future(owner.take())
    await asyncio.sleep(0)
    owner.slots.give_back(idle, broken=False)  # to the first, who has not run yet
    assert owner.slots.close() == []
    for task in (waiting, served):
        with pytest.raises(ClosedResourceError):
            await task
    assert idle.closed
    assert not used.closed
    owner.slots.give_back(used, broken=False)
    assert used.closed
    assert owner.slots.size == 0
    with pytest.raises(ClosedResourceError):
        await owner.take()
    reserved = Owner(1)
    assert await reserved.slots.take() is None
    reserved.slots.close()
    late = Member()
    with pytest.raises(ClosedResourceError):
        reserved.slots.fill(late)
    assert late.closed
    assert reserved.slots.size == 0


@pytest.mark.parametrize("seed", range(20))
async def test_any_order_of_events_loses_nothing(seed: int) -> None:
    """Tasks that take, wait, fail and are cancelled at random, and members that die at random."""
    chance = random.Random(seed)
    owner = Owner(chance.choice([1, 2, 5]))
    users: set[Member] = set()

    async def use() -> None:
        for _ in range(5):
            member = await owner.take()
            assert member not in users
            users.add(member)
            try:
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
            finally:
                users.discard(member)
                member.healthy = chance.random() > 0.2
                owner.slots.give_back(member, broken=chance.random() < 0.2)
            owner.check()

    tasks = [asyncio.ensure_future(use()) for _ in range(30)]
    while not all(task.done() for task in tasks):
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
        for member in list(owner.slots.idle):
            member.healthy = chance.random() > 0.1
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.exception() for task in tasks if not task.cancelled()].count(None) > 0
    assert not owner.slots.leased
    assert not owner.slots.waiting
    assert owner.slots.size == len(owner.slots.idle)
    owner.check()
