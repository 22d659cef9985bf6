"""Serves with uvicorn as its users do, after `kaio.install`: run by test_loops.

Arguments: what `uvicorn.run` is told of the loop, and the policy. The port is in uvicorn's log. An answer says what
the kernel has for the connection that the request came by.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from typing import Any

import uvicorn
import uvloop

import kaio


def options_of(peer: tuple[str, int]) -> list[int]:
    """Whether keepalive is on, and its times, for this process's socket that is connected to an address."""
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            sock = socket.socket(fileno=os.dup(number))
        except OSError:  # no socket, or closed since
            continue
        with sock:
            if sock.family == socket.AF_INET and sock.getsockname()[1] and _peer(sock) == peer:
                times = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                return [
                    sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    *(sock.getsockopt(socket.IPPROTO_TCP, option) for option in times),
                ]
    raise LookupError(peer)


def _peer(sock: socket.socket) -> tuple[str, int] | None:
    try:
        host, port = sock.getpeername()
    except OSError:  # it listens
        return None
    return host, port


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the loop's class and the options."""
    loop = asyncio.get_running_loop()
    answer = {"uvloop": isinstance(loop, uvloop.Loop), "options": options_of(tuple(scope["client"]))}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


if __name__ == "__main__":
    kaio.install(sys.argv[2])
    uvicorn.run(app, host="127.0.0.1", port=0, loop=sys.argv[1], lifespan="off")
