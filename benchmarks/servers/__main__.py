"""One server: prints its port, serves until its standard input ends, and then tells what its journal has."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import resource
import sys
from collections.abc import Callable
from typing import Final

import uvloop

import kaio

from ..contenders import CONTENDERS
from . import journal

BASES: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


async def serve(contender: str, application: str, policy: str) -> None:
    """Serve until the standard input ends. It does not close anything: that would take long, and tell nothing."""
    module, function = CONTENDERS[contender].server
    start = getattr(importlib.import_module(f".{module}", __package__), function)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def heard() -> None:
        if not os.read(0, 1) and not ended.done():
            ended.set_result(None)

    loop.add_reader(0, heard)
    serving = loop.create_task(start(application, policy, lambda port: print(port, flush=True)))
    await asyncio.wait((ended, serving), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    journal.finish()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    contender, loop, application, policy = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    logging.basicConfig(filename=os.devnull)  # as an application that keeps a log
    factory = BASES[loop]
    if contender == "drop-in":
        factory = kaio.loop_factory(keepalive=policy, base=factory)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(contender, application, policy))


if __name__ == "__main__":
    main()
