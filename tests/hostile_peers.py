"""Ten thousand hostile peers at once: memory is bounded, and others are served meanwhile.

`python -m tests.hostile_peers [asyncio|uvloop] [NUMBER]` prints what was measured. The server, the hostile peers and
the others are three processes, so that each has its own descriptors.

Kinds of hostility, in equal parts: handshakes that stop half way, PROXY headers in steps of one byte, requests of one
byte a second, connections that say nothing, and connections that are reset at each of these stages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
import ssl
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import trustme
import uvloop

import kaio

__all__ = ["measure"]

LIMIT: Final = 5.0  # seconds: handshake timeout and idle timeout
ATTACK: Final = 12.0  # seconds
HEADER: Final = b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 443\r\n"
STAGES: Final = ("handshake", "header", "slow", "silent", "reset")


# -- the server


async def answer(connection: kaio.Connection) -> None:
    """Answer lines of at most 100 bytes."""
    while True:
        line = await connection.receive_until(b"\n", 100)
        await connection.send(line + b"\n")


async def serve(directory: str) -> None:
    """Serve until standard input ends; say what is open and how much memory there is when asked."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(f"{directory}/server.pem")
    times: dict[str, Any] = {"handshake_timeout": LIMIT, "idle_timeout": LIMIT, "max_connections": 18_000}
    listeners = [
        kaio.Listener("127.0.0.1:0", **times),
        kaio.Listener("127.0.0.1:0", ssl=tls, **times),
        kaio.Listener("127.0.0.1:0", proxy_protocol=kaio.ProxyProtocol(["127.0.0.1"]), **times),
    ]
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with kaio.serve(answer, listeners=listeners, close_timeout=1) as server:
        print(json.dumps([each.address.port for each in listeners if isinstance(each.address, kaio.TcpAddress)]))
        sys.stdout.flush()
        while await reader.readline():
            print(json.dumps({"open": len(server.connections), "memory": _memory()}), flush=True)


def _memory() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


# -- the hostile


async def attack(ports: list[int], number: int) -> None:
    """Attack, for a while, with so many connections; those that the server has closed are not made again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    end = time.monotonic() + ATTACK
    ways = [_hostile(ports, STAGES[each % len(STAGES)], each, end) for each in range(number)]
    closed = await asyncio.gather(*ways)
    print(json.dumps({stage: sum(closed[at :: len(STAGES)]) for at, stage in enumerate(STAGES)}))


async def _hostile(ports: list[int], stage: str, number: int, end: float) -> bool:
    """One hostile peer; return whether the server has let it go."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(number % 1000 / 1000)
    plain, tls, proxied = ports
    port = {"handshake": tls, "header": proxied}.get(stage, plain if stage != "reset" else ports[number % 3])
    with contextlib.closing(socket.socket()) as sock:
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, ("127.0.0.1", port))
            if stage == "reset":
                await loop.sock_sendall(
                    sock, {plain: b"hel", tls: _HELLO, proxied: HEADER[: number % len(HEADER)]}[port]
                )
                await asyncio.sleep(number % 7)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return True
            if stage == "handshake":
                await loop.sock_sendall(sock, _HELLO)
            at = 0
            while time.monotonic() < end:
                if stage == "header":
                    await loop.sock_sendall(sock, HEADER[at : at + 1])
                elif stage == "slow":
                    await loop.sock_sendall(sock, b"x")
                at += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        return not await loop.sock_recv(sock, 100)
        except OSError:
            return True
    return False


# The beginning of a ClientHello: a record of 512 bytes, of which a few come.
_HELLO: Final = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20)


# -- the others


async def ask(ports: list[int], directory: str, seconds: float) -> list[float]:
    """Connect and ask, again and again, some with TLS and some through the proxy's port; return how long each took."""
    tls = ssl.create_default_context(cafile=f"{directory}/ca.pem")
    took: list[float] = []
    end = time.monotonic() + seconds

    async def go_on(kind: int) -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            secure = {"ssl": tls, "server_hostname": "localhost"} if kind == 1 else {}
            async with kaio.connect("127.0.0.1", ports[kind], **secure) as connection:  # type: ignore[arg-type]
                await connection.send((HEADER if kind == 2 else b"") + b"hello\n")
                assert await connection.receive_exactly(6) == b"hello\n"
            took.append(time.monotonic() - began)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(go_on(each % 3) for each in range(6)))
    return sorted(took)


# -- all together


async def measure(loop: str, number: int) -> dict[str, Any]:
    """Run all three, and return what was measured."""
    with tempfile.TemporaryDirectory() as directory:
        authority = trustme.CA()
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(f"{directory}/server.pem")
        authority.cert_pem.write_to_path(f"{directory}/ca.pem")
        server = await _start("serve", loop, directory)
        try:
            ports = json.loads(await server.stdout.readline())
            quiet = await ask(ports, directory, 2)
            before = await _asked(server)
            attacking = await _start("attack", "asyncio", json.dumps(ports), str(number))
            under_attack = asyncio.create_task(ask(ports, directory, ATTACK))
            peak, most = before["memory"], 0
            while not under_attack.done():
                now = await _asked(server)
                peak, most = max(peak, now["memory"]), max(most, now["open"])
                await asyncio.sleep(0.2)
            busy = await under_attack
            let_go = json.loads(await attacking.stdout.readline())
            await attacking.wait()
            async with asyncio.timeout(30):
                while (await _asked(server))["open"]:
                    await asyncio.sleep(0.1)
            return {
                "number": number,
                "most open": most,
                "let go": let_go,
                "memory per peer": (peak - before["memory"]) / number,
                "served quiet": len(quiet),
                "served under attack": len(busy),
                "p99 quiet": quiet[len(quiet) * 99 // 100],
                "p99 under attack": busy[len(busy) * 99 // 100],
            }
        finally:
            server.stdin.close()
            if await _ends(server):
                server.kill()


async def _start(*arguments: str) -> Any:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.hostile_peers", *arguments, stdin=-1, stdout=-1, cwd=Path(__file__).parent.parent
    )


async def _asked(server: Any) -> Any:
    server.stdin.write(b"\n")
    return json.loads(await server.stdout.readline())


async def _ends(process: Any) -> bool:
    try:
        await asyncio.wait_for(process.wait(), 10)
    except TimeoutError:
        return True
    return False


def main(arguments: list[str]) -> None:
    match arguments:
        case ["serve", loop, directory]:
            logging.getLogger("kaio").setLevel(logging.ERROR)  # thousands of bad headers are a line each
            factory = uvloop.new_event_loop if loop == "uvloop" else None
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(serve(directory))
        case ["attack", _, ports, number]:
            asyncio.run(attack(json.loads(ports), int(number)))
        case _:
            loop, number = [*arguments, "uvloop", "10000"][:2] if len(arguments) != 1 else [arguments[0], "10000"]
            for name, value in asyncio.run(measure(loop, int(number))).items():
                print(f"{name:20} {value}")


if __name__ == "__main__":
    main(sys.argv[1:])
