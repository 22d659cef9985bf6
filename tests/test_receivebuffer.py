"""The receive buffer alone: what it finds and takes, and what that costs."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

import kaio
from kaio.net.receivebuffer import EMPTY, ReceiveBuffer

from .conftest import until


def buffer_of(chunks: list[bytes]) -> ReceiveBuffer:
    """A buffer that has these chunks."""
    buffer = ReceiveBuffer()
    for chunk in chunks:
        buffer.append(chunk)
    return buffer


@given(
    st.lists(st.binary(min_size=1, max_size=6).map(lambda b: bytes(x % 3 for x in b)), max_size=8),
    st.binary(min_size=1, max_size=4).map(lambda b: bytes(x % 3 for x in b)),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_find_and_take_exactly_agree_with_bytes(chunks: list[bytes], delimiter: bytes, taken: int, start: int) -> None:
    """find() and take_exactly() over chunks agree with bytes.find() and slicing."""
    whole = b"".join(chunks)
    buffer = buffer_of(chunks)
    taken = min(taken, len(whole))
    assert buffer.take_exactly(taken) == whole[:taken]
    rest = whole[taken:]
    start = min(start, len(rest))
    expected = rest.find(delimiter, start)
    found = buffer.find(delimiter, start)
    assert found == expected
    assert buffer.take_exactly(len(rest)) == rest
    assert buffer.size == 0


@given(st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=8), st.integers(1, 8))
def test_take_returns_bytes_up_to_the_end_of_a_chunk(chunks: list[bytes], most: int) -> None:
    """take() never returns more than it was asked for, nor an empty or a mutable object."""
    buffer = buffer_of(chunks)
    buffer.find(b"\n", 0)
    parts = []
    while buffer.size:
        before = buffer.size
        parts.append(buffer.take(most))
        assert type(parts[-1]) is bytes
        assert 0 < len(parts[-1]) <= most
        assert buffer.size == before - len(parts[-1])
    assert b"".join(parts) == b"".join(chunks)


def test_searching_a_line_received_byte_by_byte_takes_linear_time() -> None:
    """The buffer copies each byte a bounded number of times: 100,000 one-byte chunks are searched in no time."""
    buffer = ReceiveBuffer()
    for _ in range(100_000):
        buffer.append(b"x")
        assert buffer.find(b"\n", max(0, buffer.size - 1)) == -1
    buffer.append(b"\n")
    assert buffer.find(b"\n", 0) == 100_000
    assert buffer.take_exactly(100_001) == b"x" * 100_000 + b"\n"


def test_an_empty_buffer_finds_nothing() -> None:
    """Neither in the shared one nor in one of its own."""
    for buffer in (EMPTY, ReceiveBuffer()):
        assert buffer.find(b"x", 0) == -1
        assert buffer.take_exactly(0) == b""
        assert buffer.size == 0


async def test_connections_share_one_buffer_until_they_keep_something() -> None:
    """Data that a waiting task is handed needs no buffer; what nobody waits for gets one."""
    accepted: asyncio.Future[kaio.Connection] = asyncio.get_running_loop().create_future()

    async def handler(connection: kaio.Connection) -> None:
        accepted.set_result(connection)
        async for data in connection:
            await connection.send(data)

    async with (
        kaio.serve(handler, "127.0.0.1", 0, close_timeout=0.2) as server,
        kaio.connect(str(server.listeners[0].address)) as client,
    ):
        for _ in range(3):
            await client.send(b"x")
            await client.receive_exactly(1)
        assert (await accepted)._protocol.buffer is EMPTY
        await client.send(b"yz")
        await until(lambda: client._protocol.buffer.size == 2)
        assert client._protocol.buffer is not EMPTY
        assert EMPTY.size == 0
