"""A server with workers: `python -m benchmarks.servers.workers LOOP WORKERS own|shared`, until SIGTERM.

It logs its port as `kaio serve` does. Each worker prints at its end how many connections it has had.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

import kaio
from kaio.tools.workers.application import Application
from kaio.tools.workers.logs import log_to_stderr
from kaio.tools.workers.settings import Settings
from kaio.tools.workers.sockets import Sockets
from kaio.tools.workers.supervisor import Supervisor

from ..processes import ROOT


@contextlib.asynccontextmanager
async def counting() -> AsyncIterator[Application]:
    """Greet each connection, and wait for its end."""
    count = 0

    async def handler(connection: kaio.Connection) -> None:
        nonlocal count
        count += 1
        await connection.send(b"x")
        async for _ in connection:
            pass

    yield handler
    os.write(1, b"%d\n" % count)  # at once: print may write the line in two


async def main(loop: str, workers: int, kind: str) -> None:
    """Serve with a socket for each worker, or with one that they share."""
    app = f"{__spec__.name}:{counting.__name__}"
    settings = Settings(app=app, factory=True, app_dir=str(ROOT), loop=loop, workers=workers)
    sockets = Sockets(workers, settings.backlog, spread=kind == "own")
    await sockets.open("127.0.0.1:0")
    await Supervisor(settings, sockets).run()


if __name__ == "__main__":
    log_to_stderr("info")
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
