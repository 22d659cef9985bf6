"""Thousands of connections at once."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import socket
from typing import Any

import pytest

import kaio
from kaio.testing import blackhole

from .conftest import until

COUNT = 5_000
QUICK = kaio.Keepalive(1, 1, 2)


class Counted(kaio.KeepaliveProtocol):
    """Counts its callbacks."""

    def __init__(self) -> None:
        self.dead = 0
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: Any) -> None:
        self.peername = transport.get_extra_info("peername")

    def peer_dead(self, error: kaio.DeadPeerError) -> None:
        self.dead += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


def _has(server: kaio.Server, connections: int) -> bool:
    return len(server.connections) == connections


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.alone  # thousands of deaths are to be told in time
@pytest.mark.usefixtures("dead_peers")
async def test_each_of_thousands_of_dead_peers_is_reported_once_and_no_live_one() -> None:
    """Of 5,000 connections half are blackholed at once."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * COUNT + 100:
        pytest.skip("needs 10,100 file descriptors")
    loop = asyncio.get_running_loop()
    made: list[Counted] = []

    def factory() -> Counted:
        made.append(Counted())
        return made[-1]

    with contextlib.ExitStack() as clients:
        async with await kaio.create_server(factory, "127.0.0.1", 0, keepalive=QUICK, backlog=2048) as server:
            address = server.sockets[0].getsockname()
            theirs: list[socket.socket] = []
            for wanted in range(500, COUNT + 1, 500):
                theirs += [clients.enter_context(socket.create_connection(address)) for _ in range(500)]
                await until(functools.partial(_has, server, wanted))
            by_name = {protocol.peername: protocol for protocol in made}
            doomed = {by_name[sock.getsockname()] for sock in theirs[::2]}

            began = loop.time()
            with blackhole(*theirs[::2]):
                await until(lambda: len(server.connections) == COUNT // 2, within=15)
                took = loop.time() - began
                await asyncio.sleep(1)
            for protocol in made:
                if protocol in doomed:
                    assert protocol.dead == 1
                    (error,) = protocol.lost
                    assert isinstance(error, kaio.DeadPeerError)
                    assert error.cause is kaio.Cause.KEEPALIVE
                else:
                    assert protocol.dead == 0
                    assert protocol.lost == []
            assert len(server.connections) == COUNT // 2
            clients.close()
    print(f"{COUNT // 2} of {COUNT} dead: the last reported {took:.2f} s after the cut")
    assert took < 3 + 2.5
