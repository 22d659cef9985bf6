"""`ConnectionEnded`: whatever ends a connection, and whoever uses it then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest

import kaio
from kaio.testing import blackhole

from .conftest import reset, until

POLICY = "1s:1s:2"

Use = Callable[[kaio.Connection], Awaitable[object]]


async def scope(connection: kaio.Connection) -> None:
    async with connection.while_alive():
        await asyncio.sleep(30)


async def send_until_it_fails(connection: kaio.Connection) -> None:
    while True:
        await connection.send(b"x" * 65536)


RECEIVING: dict[str, Use] = {
    "receive": lambda connection: connection.receive(),
    "receive_exactly": lambda connection: connection.receive_exactly(9),
    "receive_until": lambda connection: connection.receive_until(b"\n", 100),
}
USES: dict[str, Use] = {**RECEIVING, "send": send_until_it_fails, "while_alive": scope}


@contextlib.asynccontextmanager
async def pair(client: ssl.SSLContext | None, server: ssl.SSLContext | None) -> AsyncIterator[Any]:
    """A connection, and the peer's end of it."""
    ends: asyncio.Queue[kaio.Connection] = asyncio.Queue()
    done = asyncio.Event()

    async def handler(connection: kaio.Connection) -> None:
        ends.put_nowait(connection)
        await done.wait()

    listener = kaio.Listener("127.0.0.1:0", ssl=server)
    async with (
        kaio.serve(handler, listeners=[listener], close_timeout=0) as running,
        kaio.connect(
            running.listeners[0].address,
            keepalive=POLICY,
            ssl=client,
            server_hostname=None if client is None else "localhost",
        ) as connection,
    ):
        yield connection, await ends.get()
        done.set()
        connection.abort()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
@pytest.mark.parametrize("end", ["reset", "closed", "closed here", "idle timeout"])
async def test_every_end_is_one(
    end: str, tls: bool, use: str, client_tls: ssl.SSLContext, server_tls: ssl.SSLContext
) -> None:
    """And still anyio's: nothing that was caught before stops being caught."""
    if (end, tls, use) == ("closed", False, "while_alive"):
        return  # an EOF alone: the peer may still read
    async with pair(*((client_tls, server_tls) if tls else (None, None))) as (connection, peer):
        waiting = asyncio.ensure_future(USES[use](connection))
        await asyncio.sleep(0.02)
        if end == "reset":
            reset(peer.transport.get_extra_info("socket"))
            peer.abort()
        elif end == "closed":
            await peer.aclose(timeout=5 if use != "send" else 0)
        elif end == "closed here":
            connection.abort()
        elif use in RECEIVING:
            connection.idle_timeout = 0.1
        else:
            connection.transport.end_dead(kaio.IdleTimeoutError(0.1), None, None)
        with pytest.raises(kaio.ConnectionEnded) as caught:
            await asyncio.wait_for(waiting, 20)
        old = (anyio.BrokenResourceError, anyio.EndOfStream, anyio.IncompleteRead, anyio.ClosedResourceError)
        assert isinstance(caught.value, old)
        for again in USES.values():  # and whatever is done afterwards
            with pytest.raises(kaio.ConnectionEnded):
                await asyncio.wait_for(again(connection), 20)


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
async def test_a_death_is_one(use: str, dead_peers: None) -> None:
    """Of a peer that answers no more."""
    async with pair(None, None) as (connection, peer):
        with blackhole(peer.transport), pytest.raises(kaio.ConnectionEnded) as caught:
            await asyncio.wait_for(USES[use](connection), 20)
        assert isinstance(caught.value, kaio.DeadPeerError)


async def test_sending_after_ones_own_eof_is_not_an_end() -> None:
    """The connection goes on: to begin anew would hide the mistake."""
    async with pair(None, None) as (connection, peer):
        await connection.send_eof()
        with pytest.raises(anyio.ClosedResourceError) as caught:
            await connection.send(b"more")
        assert not isinstance(caught.value, kaio.ConnectionEnded)
        await peer.send(b"still here")
        assert await connection.receive() == b"still here"


async def test_iteration_ends_with_the_stream() -> None:
    """`async for` takes the peer's EOF for its end, as everywhere."""
    async with pair(None, None) as (connection, peer):
        await peer.send(b"all")
        await peer.send_eof()
        assert [data async for data in connection] == [b"all"]


async def test_an_error_of_tls_is_an_end(client_tls: ssl.SSLContext, server_tls: ssl.SSLContext) -> None:
    """Rubbish between the records."""
    async with pair(client_tls, server_tls) as (connection, peer):
        raw = peer.transport.get_extra_info("socket")
        await connection.send(b"x")
        await peer.receive()
        os.write(raw.fileno(), b"this is no record of TLS, by far")
        with pytest.raises(kaio.ConnectionEnded) as caught:
            await connection.receive()
        assert isinstance(caught.value, kaio.BrokenResourceError | kaio.ResetError | kaio.EndOfStream)
        await until(lambda: connection.transport.is_closing())
