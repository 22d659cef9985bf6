"""Client libraries side by side on one loop, which do what standard input says, and print how each of them fared.

Arguments: a base loop, and where the servers are, as JSON. With a policy as a third, the loop is one of kaio's own
factory. Each line that comes is a step, and each library answers it with a line:

    open      real work; connections that then stay idle, and their ports
    request   a request that is not answered for half a minute; there is a line when it has begun, too
    send      a short request
    use       the next use of a plain connection that was idle
    again     the next use of a pool, or what else stands for many connections
    sweep     kaio.sweep()
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import uvloop

import kaio

from .lib_databases import Asyncpg, Psycopg, Redis
from .lib_web import Aiohttp, Grpc, Httpx, Websockets

LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def tell(library: Any, step: str, error: BaseException | None = None, result: object = None) -> None:
    """CLOCK_MONOTONIC is every process's."""
    name = None if error is None else type(error).__name__
    line = {"library": library.name, "step": step, "error": name, "result": result, "at": time.monotonic()}
    print(json.dumps(line), flush=True)


async def carry_out(library: Any, step: str) -> None:
    arguments = [lambda: tell(library, "begun")] if step == "request" else []
    try:
        tell(library, step, result=await getattr(library, step)(*arguments))
    except Exception as exc:
        tell(library, step, exc)


async def main(peers: dict[str, Any], policy: str | None) -> None:
    libraries = [each(peers) for each in (Asyncpg, Psycopg, Redis, Aiohttp, Httpx, Websockets, Grpc)]
    async with asyncio.TaskGroup() as tasks:
        while step := (await asyncio.to_thread(sys.stdin.readline)).strip():
            if step == "sweep":
                kaio.sweep(policy)
            else:
                for library in libraries:
                    tasks.create_task(carry_out(library, step))


if __name__ == "__main__":
    base, policy = LOOPS[sys.argv[1]], sys.argv[3] if len(sys.argv) > 3 else None
    with asyncio.Runner(loop_factory=kaio.loop_factory(policy, base=base) if policy else base) as runner:
        runner.run(main(json.loads(sys.argv[2]), policy))
