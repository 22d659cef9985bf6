"""Link-local IPv6 addresses, which name their interface: in a network namespace with one of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

import kaio
from kaio.loop.covering import cover_loop

from . import namespaces
from .conftest import Recorder, echo

HOST = "fe80::1%wire"
POLICY = kaio.Keepalive(5, 2, 3)


@pytest.fixture
def link_local(_networks: str | None) -> Iterator[None]:
    """This thread is in a namespace where `HOST` is, on an interface that is not the first."""
    if _networks is not None:
        pytest.skip(_networks)
    host = namespaces.Namespace("local")
    try:
        host.ip("link add other type veth peer name wire", "link set other up", "link set wire up")
        host.ip("address add fe80::1/64 dev wire nodad")
        with host.entered():
            yield
    finally:
        host.close()


@pytest.mark.usefixtures("link_local")
async def test_serve_and_connect_know_the_interface() -> None:
    """By `serve` and `connect`, by the twins, with a local address; a refusal is one."""
    async with kaio.serve(echo, f"[{HOST}]:0", keepalive=POLICY) as server:
        port = server.listeners[0].address[1]  # type: ignore[misc]
        assert server.sockets[0].getsockname()[3] == socket.if_nametoindex("wire")
        async with (
            kaio.connect(HOST, port, keepalive=POLICY) as one,
            kaio.connect(f"[{HOST}]:{port}", local_addr=(HOST, 0)) as other,
        ):
            for client in (one, other):
                await client.send(b"x")
                assert await client.receive() == b"x"
        transport, protocol = await kaio.create_connection(Recorder, HOST, port)
        transport.close()
        await protocol.lost
    with pytest.raises(ConnectionRefusedError):
        await kaio.connect(HOST, port)


@pytest.mark.usefixtures("link_local")
async def test_the_drop_in_loop_knows_the_interface() -> None:
    """create_server, create_connection and sock_connect of kaio's loop over this one."""
    cover_loop(asyncio.get_running_loop(), POLICY)
    loop: Any = asyncio.get_running_loop()
    server = await loop.create_server(Recorder, HOST, 0, reuse_address=True)
    async with server:
        name = server.sockets[0].getsockname()
        assert name[3] == socket.if_nametoindex("wire")
        assert kaio.inspect(server.sockets[0]).idle == 5
        transport, protocol = await loop.create_connection(Recorder, HOST, name[1])
        assert kaio.inspect(transport).idle == 5
        transport.close()
        await protocol.lost
        with socket.socket(socket.AF_INET6) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, name)
            assert sock.getpeername() == name
        with pytest.raises(OSError, match="error while attempting to bind"):
            await loop.create_server(Recorder, HOST, name[1])
        with pytest.raises(TypeError):
            await loop.create_server(Recorder, HOST, 0, ssl=True)
    with pytest.raises(ConnectionRefusedError):
        await loop.create_connection(Recorder, HOST, name[1])
    with pytest.raises(socket.gaierror):
        await loop.create_connection(Recorder, "fe80::1%nowhere", 1)
