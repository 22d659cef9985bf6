"""Streams at their end: nothing that arrived is lost, nothing that was sent is thrown away, and nothing stays behind."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import pytest

import kaio

from .conftest import until


@pytest.mark.parametrize("kind", ["path", "pair"])
async def test_a_unix_connection_can_still_be_asked_after_its_end(kind: str, tmp_path: Any) -> None:
    """repr, peername and keepalive of both ends: an address or None, KeepaliveError, and never AttributeError."""
    ends: list[kaio.KeepaliveTransport] = []

    class Protocol(kaio.KeepaliveProtocol):
        def connection_made(self, transport: Any) -> None:
            ends.append(transport)

    if kind == "path":
        async with kaio.serve(Protocol, f"unix:{tmp_path}/socket"):
            connection = await kaio.connect(f"unix:{tmp_path}/socket")
            ends.append(connection.transport)
            await until(lambda: len(ends) == 2)
            await connection.aclose()
            assert connection.peername == f"{tmp_path}/socket"
            assert "closed" in repr(connection)
            with pytest.raises(kaio.KeepaliveError, match="closed"):
                connection.keepalive = "5s:2s:3"
    else:
        for sock in socket.socketpair():
            await kaio.create_connection(Protocol, sock=sock)
        ends[0].close()
    await until(lambda: all(end._ended for end in ends))
    await asyncio.sleep(0.01)  # uvloop closes the descriptor in a later turn
    for end in ends:
        assert "closed" in repr(end)
        assert isinstance(end.peername, str)
        with pytest.raises(kaio.KeepaliveError, match="closed"):
            end.keepalive = "5s:2s:3"
        with pytest.raises(kaio.KeepaliveError, match="closed"):
            kaio.inspect(end)


async def test_the_handlers_own_failure_is_logged_after_the_end_of_a_unix_connection(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The log's record has the handler's traceback, and the connection's repr can be made."""

    async def fail(connection: kaio.Connection) -> None:
        await connection.receive()
        await connection.aclose()
        await asyncio.sleep(0.01)
        raise LookupError("the handler's own")

    with caplog.at_level(logging.ERROR, "kaio"):
        async with kaio.serve(fail, f"unix:{tmp_path}/socket"), kaio.connect(f"unix:{tmp_path}/socket") as client:
            await client.send(b"x")
            await until(lambda: caplog.records)
    assert "the handler's own" in caplog.text
    assert "<Connection to unix:" in caplog.text
