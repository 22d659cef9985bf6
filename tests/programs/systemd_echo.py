"""An echo service on a socket that systemd hands over: for test_handed_over. Its argument is the loop."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

import kaio


async def echo(connection: kaio.Connection) -> None:
    """Send back what comes."""
    async for data in connection:
        await connection.send(data)


async def main() -> None:
    async with kaio.serve(echo, listeners=[kaio.Listener("systemd:web")]) as server:
        await server.serve_until(signal.SIGTERM, grace=5)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if sys.argv[1] == "uvloop" else None) as runner:
        runner.run(main())
