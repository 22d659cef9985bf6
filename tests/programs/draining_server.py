"""A server that drains on SIGTERM: for test_draining. Arguments: the loop, and what its handler is like."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

import kaio

ANSWER = b"x" * 20_000
GRACE = 8.0


async def answering(connection: kaio.Connection) -> None:
    """Answer requests, each after a while, until the server drains and the last is answered."""
    while not connection.draining:
        request = await connection.receive_until(b"\n", 100)
        await asyncio.sleep(float(request))
        await connection.send(ANSWER)


async def stubborn(connection: kaio.Connection) -> None:
    """Answer, and then stay, whoever cancels."""
    await answering(connection)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass


async def main() -> None:
    handler = {"answering": answering, "stubborn": stubborn}[sys.argv[2]]
    async with kaio.serve(handler, "127.0.0.1", 0, close_timeout=1) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        received = await server.serve_until(signal.SIGTERM, grace=GRACE, delay=1)
        print(repr(received), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if sys.argv[1] == "uvloop" else None) as runner:
        try:
            runner.run(asyncio.wait_for(main(), 60))
        finally:
            sys.stdout.flush()
            if sys.argv[2] == "stubborn":  # asyncio.run would wait for its tasks for ever
                import os

                os._exit(0)
