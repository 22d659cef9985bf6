"""Accepts connections under several policies and keeps them: run by test_audit, which looks at it from outside.

Arguments: `serve` (kaio's server), `loop` (asyncio's, on a loop of kaio's for each policy) or `block` (no loop at all);
the base loop; the policies. Prints a port for each policy in a line.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import sys
import threading
from typing import Any

import uvloop

import kaio

KIND, BASE, *POLICIES = sys.argv[1:]
FACTORIES: dict[str, Any] = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


async def keep(connection: kaio.Connection) -> None:
    await connection.receive()


async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def serve() -> None:
    listeners = [kaio.Listener("127.0.0.1:0", keepalive=policy) for policy in POLICIES]
    async with kaio.serve(keep, listeners=listeners) as server:
        print(*(listener.sockets[0].getsockname()[1] for listener in listeners), flush=True)
        await server.serve_forever()


async def listen(ports: queue.Queue[int]) -> None:
    server = await asyncio.start_server(read, "127.0.0.1", 0)
    ports.put(server.sockets[0].getsockname()[1])
    await asyncio.Event().wait()


def loop(policy: str, ports: queue.Queue[int]) -> None:
    with asyncio.Runner(loop_factory=kaio.loop_factory(keepalive=policy, base=FACTORIES[BASE])) as runner:
        runner.run(listen(ports))


def main() -> None:
    if KIND == "serve":
        with asyncio.Runner(loop_factory=FACTORIES[BASE]) as runner:
            runner.run(serve())
    elif KIND == "loop":
        found = []
        for policy in POLICIES:
            ports: queue.Queue[int] = queue.Queue()
            threading.Thread(target=loop, args=(policy, ports), daemon=True).start()
            found.append(ports.get())
        print(*found, flush=True)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            print(listener.getsockname()[1], flush=True)
            with listener.accept()[0] as accepted:
                accepted.recv(1)
    sys.stdin.read()


if __name__ == "__main__":
    main()
