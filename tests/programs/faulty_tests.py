"""Tests that conftest.py must not let pass, and how each would; test_runner.py runs them."""

from __future__ import annotations

import asyncio

import pytest

from tests import conftest

kept: list[object] = []


@pytest.fixture(autouse=True)
def _little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "TIME", 0.5)


def fail() -> None:
    raise RuntimeError("a callback's")


async def test_a_callback_fails() -> None:
    asyncio.get_running_loop().call_soon(fail)
    await asyncio.sleep(0.01)


@pytest.mark.complains
async def test_a_callback_fails_on_purpose() -> None:
    asyncio.get_running_loop().call_soon(fail)
    await asyncio.sleep(0.01)


async def test_a_task_fails_while_the_loop_is_closed() -> None:
    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            fail()

    kept.append(asyncio.create_task(wait()))
    await asyncio.sleep(0)


async def test_the_time_is_up() -> None:
    await asyncio.sleep(60)


@pytest.mark.loops({"uvloop": conftest.LOOPS["uvloop"]})
async def test_a_failure_leaves_a_transport_open() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
    await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname())
    raise AssertionError("the test's")
