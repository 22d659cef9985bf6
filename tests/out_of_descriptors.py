"""A server whose process has few descriptors, and more clients than that: run by test_server.

Its arguments are the loop's name and the number of descriptors."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
import time

import uvloop

import kaio

LIMIT = int(sys.argv[2])
CLIENTS = LIMIT * 3 // 2


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.levelname} {record.getMessage()}")


async def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, hard))
    records = Records()
    logging.getLogger("kaio").addHandler(records)
    logging.getLogger("kaio").setLevel(logging.INFO)
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async def handler(connection: kaio.Connection) -> None:
        async for data in connection:
            await connection.send(data)

    async with kaio.serve(handler, "127.0.0.1", 0, keepalive="5s:2s:3", close_timeout=1) as server:
        # The clients are another process's: its descriptors are its own.
        clients = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            f"import resource, socket, sys\n"
            f"resource.setrlimit(resource.RLIMIT_NOFILE, ({hard}, {hard}))\n"
            f"held = [socket.create_connection({tuple(server.listeners[0].address)!r}) for _ in range({CLIENTS})]\n"
            f"print('held', flush=True); sys.stdin.readline(); [s.close() for s in held[:{CLIENTS} // 2]]\n"
            f"print('half', flush=True); sys.stdin.readline()",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert clients.stdin is not None
        assert clients.stdout is not None
        assert await clients.stdout.readline() == b"held\n"
        await asyncio.sleep(0.5)
        used = len(server.connections)
        assert LIMIT // 2 < used < LIMIT, used

        cpu, began = time.process_time(), time.monotonic()
        await asyncio.sleep(1.5)
        busy = (time.process_time() - cpu) / (time.monotonic() - began)
        assert busy < 0.2, f"busy loop: {busy:.0%} of a core"
        said = [text for text in records.texts if text.startswith("WARNING")]
        assert len(said) == 1, records.texts
        assert "descriptors" in said[0]
        assert not complaints, complaints

        # Half of the clients go: those that waited are accepted, and new ones.
        clients.stdin.write(b"\n")
        assert await clients.stdout.readline() == b"half\n"
        expected = CLIENTS - CLIENTS // 2
        async with asyncio.timeout(5):
            while len(server.connections) != expected:
                await asyncio.sleep(0.02)
        async with kaio.connect(str(server.listeners[0].address)) as client:
            await client.send(b"served")
            assert await client.receive() == b"served"
        for connection in server.connections:
            assert kaio.inspect(connection).idle == 5
        assert len([text for text in records.texts if text.startswith("WARNING")]) == 1
        clients.stdin.write(b"\n")
        await clients.wait()
    print(f"{used} accepted, {busy:.1%} of a core while out of descriptors; {records.texts}")


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if sys.argv[1] == "uvloop" else None) as runner:
        runner.run(main())
