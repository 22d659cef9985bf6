"""Makes event loops in every way that programs make them, and says of each what a connection over it has: run by
test_run, under `kaio run`. It knows nothing of kaio.
"""

from __future__ import annotations

import asyncio
import json
import socket
import warnings
from asyncio import SelectorEventLoop, new_event_loop, run  # held from the start
from collections.abc import Callable
from typing import Any

import uvloop

warnings.simplefilter("ignore", DeprecationWarning)  # policies, since Python 3.14


class Own(asyncio.SelectorEventLoop):
    """A loop of the program's own."""

    def __init__(self, answer: int = 42) -> None:
        super().__init__()
        self.answer = answer


class OwnUvloop(uvloop.Loop):
    """The same over uvloop."""


if hasattr(asyncio, "set_event_loop_policy"):  # up to Python 3.15

    class OwnPolicy(asyncio.DefaultEventLoopPolicy):
        """A policy of the program's own."""

        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return Own()


def has(sock: Any) -> list[int]:
    times = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    return [
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        *(sock.getsockopt(socket.IPPROTO_TCP, option) for option in times),
    ]


async def main() -> list[list[int]]:
    """Both ends of a connection over the running loop."""
    found: list[list[int]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.append(has(writer.get_extra_info("socket")))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    await reader.read()
    found.append(has(writer.get_extra_info("socket")))
    writer.close()
    server.close()
    return found


def by(factory: Callable[[], Any]) -> Any:
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())


def by_hand(loop: Any) -> Any:
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


def by_policy(policy: Any) -> Any:
    asyncio.set_event_loop_policy(policy)
    try:
        return asyncio.run(main())
    finally:
        asyncio.set_event_loop_policy(None)


def own() -> Any:
    loop = Own(answer=43)
    assert loop.answer == 43
    assert isinstance(loop, Own)
    return by_hand(loop)


WAYS: dict[str, Callable[[], Any]] = {
    "asyncio.run": lambda: asyncio.run(main()),
    "run": lambda: run(main()),
    "uvloop.run": lambda: uvloop.run(main()),
    "asyncio.Runner": lambda: by(None),  # type: ignore[arg-type]
    "Runner of a class": lambda: by(asyncio.SelectorEventLoop),
    "Runner of uvloop": lambda: by(uvloop.new_event_loop),
    "asyncio.new_event_loop": lambda: by_hand(asyncio.new_event_loop()),
    "new_event_loop": lambda: by_hand(new_event_loop()),
    "SelectorEventLoop": lambda: by_hand(SelectorEventLoop()),
    "uvloop.Loop": lambda: by_hand(uvloop.Loop()),
    "own": own,
    "own over uvloop": lambda: by_hand(OwnUvloop()),
}
if hasattr(asyncio, "set_event_loop_policy"):
    WAYS |= {
        "default policy": lambda: by_policy(asyncio.DefaultEventLoopPolicy()),
        "uvloop's policy": lambda: by_policy(uvloop.EventLoopPolicy()),
        "own policy": lambda: by_policy(OwnPolicy()),
    }

if __name__ == "__main__":
    print(json.dumps({way: make() for way, make in WAYS.items()}))
