"""Starts processes in every way that Python has, and says of each what its connections have: run by test_run, under
`kaio run`. It knows nothing of kaio.

Argument: the seconds after which a socket that no loop has seen must have been found.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

PATIENCE = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0


def has(sock: socket.socket) -> list[int]:
    times = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    return [
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        *(sock.getsockopt(socket.IPPROTO_TCP, option) for option in times),
    ]


async def over_a_loop(address: tuple[str, int]) -> list[int]:
    _, writer = await asyncio.open_connection(*address)
    found = has(writer.get_extra_info("socket"))
    writer.close()
    await writer.wait_closed()
    return found


def look(patience: float) -> list[list[int]]:
    """A connection over a loop, and one that no loop sees."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = asyncio.run(over_a_loop(listener.getsockname()))
        with socket.create_connection(listener.getsockname()) as sock:
            until = time.monotonic() + patience
            while not has(sock)[0] and time.monotonic() < until:
                time.sleep(0.02)
            return [first, has(sock)]


def forked() -> list[list[int]]:
    """By os.fork."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        with os.fdopen(into, "w") as pipe:
            json.dump(look(PATIENCE), pipe)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        found: list[list[int]] = json.load(pipe)
    assert os.waitpid(child, 0)[1] == 0
    return found


def main() -> None:
    found = {"itself": look(PATIENCE), "os.fork": forked()}
    for method in ("spawn", "forkserver", "fork"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found[method] = pool.apply(look, (PATIENCE,))
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        found["executor"] = executor.submit(look, PATIENCE).result()
    done = subprocess.run([sys.executable, __file__, str(PATIENCE), "look"], capture_output=True, text=True, check=True)
    found["subprocess"] = json.loads(done.stdout)
    found["itself, afterwards"] = look(PATIENCE)
    print(json.dumps(found))


if __name__ == "__main__":
    print(json.dumps(look(PATIENCE))) if sys.argv[2:] == ["look"] else main()
