"""A program whose connections are kaio's, of every kind that a loop has, with peers that live: see `live`.

Its only argument is JSON. It obeys lines on standard input: "begin" lets each connection do what it is to do in the
time of trouble, "block N" keeps the loop from running for N seconds, "end" lets each send its last, and compare.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import sys
import time
from typing import Any, Final

import kaio

from .cells import Cell
from .crowd import BASES, Ledger
from .ends import ENDS, End
from .states import MEGABYTES, SHRUNK

__all__ = ["Lived"]

LARGE: Final = bytes(20_000)  # several full segments
_PATIENCE: Final = 45.0  # seconds for all bytes to arrive, after the kernel's back-off in the time of trouble


@dataclasses.dataclass(slots=True)
class Lived:
    """The outcome of a connection whose peer is alive."""

    cell: Cell
    alive: bool
    all_arrived: bool
    after: float | None
    """Seconds from "begin" to the first word of its end."""
    error: str
    cause: str | None
    logged: int
    counted: int


class _Connection:
    """One connection, what it sends, and what it hears."""

    def __init__(self, end: End) -> None:
        self.end = end
        self._sent = hashlib.sha256()
        self.began = 0.0

    def send(self, data: bytes) -> None:
        self._sent.update(data)
        self.end.write(data)

    async def act(self, ending: asyncio.Event) -> None:
        """Do what this life does while the fault lasts."""
        self.began = time.monotonic()
        does = self.end.cell.state
        if "window shut" in does or "now and then" in does:
            self.send(MEGABYTES)
        elif "window shrunk" in does:
            self.send(SHRUNK)
        elif "large" in does:
            self.send(LARGE)
        elif "in flight" in does:
            self.send(b"x" * 1000)
        while "talks" in does and not ending.is_set() and not self.dead:
            self.send(b"x" * 100)
            await asyncio.sleep(0.25)

    @property
    def dead(self) -> BaseException | None:
        return next((exc for _, _, exc in self.end.events if isinstance(exc, OSError)), None)

    async def finish(self) -> bool:
        """Check that all bytes have arrived, in both directions."""
        if self.dead:
            return False
        self.send(b"the last")
        await self.end.drained()
        if self.dead:
            return False
        self.end.write_eof()
        heard = self.end.heard
        until = time.monotonic() + _PATIENCE
        while not self._complete(heard) and time.monotonic() < until and not self.dead:
            await asyncio.sleep(0.05)
        return self._complete(heard)

    def _complete(self, heard: bytearray) -> bool:
        said, digests = heard[:-128], heard[-128:].decode(errors="replace")
        return digests == hashlib.sha256(said).hexdigest() + self._sent.hexdigest()

    def lived(self, ledger: Ledger, arrived: bool) -> Lived:
        exc, events = self.dead, self.end.events
        port = self.end.address[1]
        found = ledger.events[port]
        cause = exc.cause.name if isinstance(exc, kaio.DeadPeerError) else None
        if cause is None and found and found[0].error is not None:
            cause = found[0].error.cause.name
        return Lived(
            self.end.cell,
            exc is None,
            arrived,
            None if exc is None else events[0][1] - self.began,
            "" if exc is None else f"{type(exc).__name__}: {exc}",
            cause,
            ledger.logged[port],
            len(found),
        )


async def main(task: dict[str, Any]) -> None:
    """Run all connections, and print their outcomes."""
    ledger = Ledger(asyncio.get_running_loop())
    keepalive = kaio.Keepalive.parse(task["keepalive"])
    connections = []
    for fields, port in task["connections"]:
        cell = Cell(**fields)
        end = ENDS[cell.kind](cell, (task["host"], port), keepalive)
        await end.connect()
        connections.append(_Connection(end))
    ending = asyncio.Event()
    print("connected", flush=True)
    acting: list[asyncio.Task[None]] = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        words = line.split()
        if words[0] == "begin":
            acting = [asyncio.create_task(connection.act(ending)) for connection in connections]
            await asyncio.sleep(0.1)  # the first of it is sent
        elif words[0] == "block":
            time.sleep(float(words[1]))  # noqa: ASYNC251 - that is the point
        else:
            break
    ending.set()
    await asyncio.gather(*acting)
    arrived = await asyncio.gather(*(connection.finish() for connection in connections))
    for connection, all_arrived in zip(connections, arrived, strict=True):
        print(json.dumps(dataclasses.asdict(connection.lived(ledger, all_arrived))))
    for complaint in dict.fromkeys(ledger.complaints):
        print(json.dumps({"complaint": complaint}))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    what = json.loads(sys.argv[1])
    factory = kaio.loop_factory(keepalive=what["keepalive"], base=BASES[what["loop"]])
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(what))
