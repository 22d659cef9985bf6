"""Base loops beside asyncio's and uvloop's, where they are installed: docs/loops.md has the table."""

from __future__ import annotations

import asyncio
import importlib
import socket
import warnings
from typing import Any

import pytest

import kaio

SPEC = "7s:3s:5"


@pytest.fixture(params=["zuvloop", "rloop", "winloop"])
def base(request: pytest.FixtureRequest) -> Any:
    """The factory of another loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(request.param).new_event_loop


@pytest.mark.may_skip
@pytest.mark.filterwarnings("ignore")  # of the base
def test_connected_and_accepted_sockets_have_the_policy(base: Any) -> None:
    """asyncio's streams, and kaio's own over the same loop."""

    async def main() -> list[str]:
        accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        found = [str(kaio.inspect(each)) for each in (writer, await accepted)]
        for each in (writer, accepted.result()):
            each.close()
        server.close()

        async def handler(connection: kaio.Connection) -> None:
            async for data in connection:
                await connection.send(data)

        async with kaio.serve(handler, "127.0.0.1", 0, keepalive=SPEC) as serving:
            address = serving.listeners[0].address
            assert isinstance(address, kaio.TcpAddress)
            async with kaio.connect(address, keepalive=SPEC) as connection:
                await connection.send(b"hello")
                assert await connection.receive() == b"hello"
                found.append(str(kaio.inspect(connection)))
        return found

    assert kaio.run(main(), keepalive=SPEC, base=base) == [SPEC] * 3


def test_kaio_defines_no_private_name_that_a_base_loop_may_have() -> None:
    """What kaio adds to a loop's class begins with _kaio: zuvloop has a _make_transport of its own, say."""
    covering = importlib.import_module("kaio.loop.covering")
    known = {
        *vars(asyncio.AbstractEventLoop),
        *vars(object),
        "__module__",
        "__dict__",
        "__weakref__",
        "__annotations__",
    }
    for each in (covering.Covering, *covering.Covering.__subclasses__()):
        for name in set(vars(each)) - {"keepalive"}:
            assert name.startswith(("_kaio", "__")) or name in known, name


def test_a_socket_of_no_loop_is_left_alone() -> None:
    """The twin: a loop over another base gives its policy to nothing that it was not given."""
    with socket.socket() as sock:
        kaio.run(asyncio.sleep(0), keepalive=SPEC)
        assert not kaio.inspect(sock).enabled
