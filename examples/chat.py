"""A chat server: lines of text, one room. Try it with `nc`.

    python examples/chat.py --port 9000

A member whose machine has vanished does not sit in the room for ever: the room is told. One who does not read holds
nobody up: each has an outbox. One whose line never ends fills no memory: a line has a limit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import anyio

import kaio

LONGEST_LINE = 4096
OUTBOX = 100  # lines that wait for one member
room: dict[str, asyncio.Queue[str]] = {}


def broadcast(line: str) -> None:
    """Put a line into every outbox; who is that far behind misses it."""
    for outbox in room.values():
        with contextlib.suppress(asyncio.QueueFull):
            outbox.put_nowait(line)


async def deliver(connection: kaio.Connection, outbox: asyncio.Queue[str]) -> None:
    """Send what is in a member's outbox, as fast as that member takes it."""
    with contextlib.suppress(kaio.ConnectionEnded):  # listen() hears of it too, and says so
        while True:
            await connection.send(f"{await outbox.get()}\n".encode())


async def listen(connection: kaio.Connection, name: str) -> str:
    """Pass on what a member says; return how it ended."""
    try:
        while True:
            line = await connection.receive_until(b"\n", LONGEST_LINE)
            broadcast(f"{name}: {line.decode(errors='replace').rstrip()}")
            await asyncio.sleep(0)  # lines that have arrived together are had without waiting: let the others work
    except kaio.DeadPeerError as error:
        return f"is gone: nothing heard for {error.silence:.0f} s"
    except anyio.DelimiterNotFound:
        return "was shown out: too long a line"
    except kaio.ConnectionEnded:
        return "has left"


async def chat(connection: kaio.Connection) -> None:
    """One member, from the name to the farewell."""
    await connection.send(b"Your name?\n")
    try:
        name = (await connection.receive_until(b"\n", 64)).decode(errors="replace").strip()
    except (kaio.ConnectionEnded, anyio.DelimiterNotFound):
        return None  # somebody who looked in, or speaks something else
    if not name or name in room:
        return await connection.send(b"That one is taken.\n")
    room[name] = outbox = asyncio.Queue[str](OUTBOX)
    broadcast(f"* {name} has come")
    delivering = asyncio.create_task(deliver(connection, outbox))
    farewell = "has left"
    try:
        farewell = await listen(connection, name)
    finally:
        delivering.cancel()
        del room[name]
        broadcast(f"* {name} {farewell}")


async def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--keepalive", default="detect=30s")
    options = parser.parse_args()
    async with kaio.serve(chat, "0.0.0.0", options.port, keepalive=options.keepalive, close_timeout=1) as server:
        print(f"listening on {server.listeners[0].address}", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        kaio.run(main())
