"""A program whose connections live: the peers' process, which knows nothing of keepalive.

Its arguments are an address and the ways in which its connections read. It listens on a port for each, prints those as
JSON, and obeys lines on standard input: "go on" ends all reluctance, and "deaf N" lets it hear nothing for N seconds.
When a connection's other side has sent all, it is told the SHA-256 of what it was sent, and of what it has sent itself,
and the connection is closed.

    all      reads what comes
    none     reads nothing
    drip     reads a byte now and then
    shrunk   has no room any more for what its window had promised
    chatty   reads what comes, and says something now and then
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import sys

from kaio.testing import blackhole

NOW_AND_THEN = 0.5
SAYS = b"still here"


class Peers:
    """The peers of all connections."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.open: set[socket.socket] = set()

    async def accept(self, listener: socket.socket, way: str) -> None:
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        listener.close()
        self.open.add(sock)
        await self.serve(sock, way)

    async def serve(self, sock: socket.socket, way: str) -> None:
        loop = asyncio.get_running_loop()
        heard, said = hashlib.sha256(), hashlib.sha256()
        try:
            if way == "shrunk":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            if way in ("none", "shrunk"):
                await self.released.wait()
            if way == "shrunk":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            while way == "drip" and not self.released.is_set():
                heard.update(await loop.sock_recv(sock, 1))
                await asyncio.sleep(NOW_AND_THEN)
            chat = asyncio.create_task(self.chat(sock, said)) if way == "chatty" else None
            while data := await loop.sock_recv(sock, 1 << 16):
                heard.update(data)
            if chat is not None:
                chat.cancel()
            await loop.sock_sendall(sock, f"{said.hexdigest()}{heard.hexdigest()}".encode())
        except OSError:
            pass
        finally:
            self.open.discard(sock)
            sock.close()

    @staticmethod
    async def chat(sock: socket.socket, said: hashlib._Hash) -> None:
        while True:
            await asyncio.get_running_loop().sock_sendall(sock, SAYS)
            said.update(SAYS)
            await asyncio.sleep(NOW_AND_THEN)

    async def deafen(self, seconds: float) -> None:
        with blackhole(*self.open):
            await asyncio.sleep(seconds)


async def main(host: str, *ways: str) -> None:
    """Serve until standard input ends."""
    peers = Peers()
    listeners = [socket.create_server((host, 0)) for _ in ways]
    for listener in listeners:
        listener.setblocking(False)
    tasks = {asyncio.create_task(peers.accept(*each)) for each in zip(listeners, ways, strict=True)}
    print(json.dumps([listener.getsockname()[1] for listener in listeners]), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line.strip() == "go on":
            peers.released.set()
        else:
            tasks.add(asyncio.create_task(peers.deafen(float(line.split()[1]))))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
