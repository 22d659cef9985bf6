"""What the tests of the drop-in loop share: its bases, policies, and protocols that know nothing of kaio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

import kaio

from .conftest import until


class OwnLoop(asyncio.SelectorEventLoop):
    """A loop of the application's own, over asyncio's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class OwnUvloop(uvloop.Loop):
    """A loop of the application's own, over uvloop's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


BASES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
OWN_BASES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "own": lambda: OwnLoop("own"),
    "own uvloop": lambda: OwnUvloop("own"),
}
ALL_BASES = BASES | OWN_BASES
POLICIES = hasattr(asyncio, "set_event_loop_policy")  # Python 3.16 has none

POLICY = kaio.Keepalive(7, 3, 5)


def has(idle: int, interval: int, count: int, user_timeout: float | None = None) -> kaio.SocketState:
    """What a socket has whose keepalive is on."""
    return kaio.SocketState(enabled=True, idle=idle, interval=interval, count=count, user_timeout=user_timeout)


HAS_POLICY = has(7, 3, 5)
QUICK = kaio.Keepalive(1, 1, 2)
DROP = kaio.Keepalive(1, 1, 2, stalled="drop")
BOUND = 3.0  # the detection time of both
SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h
LATEST = BOUND + 1 + 1.5  # seconds after which a death must have been heard: policy, interval, and some slack

TCP = socket.IPPROTO_TCP


def on_kaio(policy: Any, bases: dict[str, Callable[[], asyncio.AbstractEventLoop]] = BASES) -> pytest.MarkDecorator:
    """Let an asynchronous test run on kaio's loops, over each base; it may ask for the `base`'s name."""
    return pytest.mark.loops({name: kaio.loop_factory(policy, base=base) for name, base in bases.items()})


class Plain(asyncio.Protocol):
    """A protocol of somebody who never heard of kaio; it writes down what it is told, and what its socket has."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.events: list[str] = []
        self.received = b""
        self.lost_at = 0.0
        self.made: asyncio.Future[asyncio.Transport] = loop.create_future()
        self.lost: asyncio.Future[Exception | None] = loop.create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport: Any = transport
        self.events.append("made")
        self.state = kaio.inspect(transport)
        self.made.set_result(transport)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> bool:
        self.events.append("eof")
        return self.transport.get_extra_info("sslcontext") is None

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_at = asyncio.get_running_loop().time()
        self.events.append("lost")
        if not self.lost.done():
            self.lost.set_result(exc)


class Accepted:
    """A factory of protocols that keeps them."""

    def __init__(self) -> None:
        self.protocols: list[Plain] = []

    def __call__(self) -> Plain:
        self.protocols.append(Plain())
        return self.protocols[-1]

    async def states(self, count: int) -> list[kaio.SocketState]:
        """What the first accepted sockets had in connection_made."""
        await until(lambda: sum(each.made.done() for each in self.protocols) >= count)
        return [each.state for each in self.protocols if each.made.done()]

    def close(self) -> None:
        for each in self.protocols:
            if each.made.done():
                each.transport.abort()


@contextlib.contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    """A listening socket of somebody else, without keepalive; nobody accepts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as sock:
        sock.setblocking(False)
        yield sock


@contextlib.contextmanager
def connected_to(address: Any, count: int) -> Iterator[list[socket.socket]]:
    """Connections of somebody else to an address."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address[:2])) for _ in range(count)]


def choose(
    sock: socket.socket, *, idle: int | None = None, interval: int | None = None, count: int | None = None
) -> None:
    """What an application does that knows of keepalive."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, idle),
        (socket.TCP_KEEPINTVL, interval),
        (socket.TCP_KEEPCNT, count),
    ):
        if value is not None:
            sock.setsockopt(TCP, option, value)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
