"""`kaio serve` as a process, for its tests: started, its log read, ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .lines import Lines

PATIENCE = 30.0  # seconds that a busy machine may take for what is quick
ROOT = pathlib.Path(__file__).parent.parent

APP = '''
import asyncio, os, kaio

VERSION = b"one"

async def handler(connection):
    """A line is answered with the process and the version; `hold` after the next one when it drains."""
    async with connection:
        while True:
            try:
                line = await connection.receive_until(b"\\n", 100)
            except Exception:
                return
            if line.startswith(b"hold"):
                await connection.send(b"held\\n")
                await connection.receive_until(b"\\n", 100)
                await connection.draining.wait()
            elif line.startswith(b"forever"):
                await connection.send(b"held\\n")
                while True:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        pass
            elif line.startswith(b"exit"):
                os._exit(7)
            await connection.send(b"%d %s\\n" % (os.getpid(), VERSION))
            if connection.draining:
                return
'''


class Served:
    """A running `kaio serve`, in the current folder."""

    def __init__(
        self,
        *arguments: str,
        bind: str = "127.0.0.1:0",
        terminal: str = os.devnull,
        python: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        command = [sys.executable, *python, "-m", "kaio", "serve"]
        # The first terminal that the leader of a session opens is its controlling terminal.
        on_terminal = ["sh", "-c", 'exec "$@" <"$0"', terminal]
        self.process = subprocess.Popen(
            # What runs the tests may have SIGINT ignored; the command is to have it as in a terminal.
            ["env", "--default-signal=INT,HUP", *on_terminal, *command, "--bind", bind, *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            pass_fds=pass_fds,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert self.process.stderr is not None
        self._log = Lines(self.process.stderr)

    @property
    def lines(self) -> list[str]:
        """The lines of the log that were read."""
        return self._log.seen

    def line(self, pattern: str, within: float = PATIENCE) -> re.Match[str]:
        """Wait for a line of the log; lines before it are read, too."""
        return self._log.find(pattern, within)

    def serving(self) -> int:
        """Wait until it serves; return the port of its TCP address, 0 when it has none."""
        found = self.line(r"serving on (?:tcp://\S+?:(\d+))?")
        return int(found[1] or 0)

    def signal(self, number: int) -> None:
        """Send a signal to the supervisor."""
        self.process.send_signal(number)

    def wait(self, within: float = PATIENCE) -> int:
        """Wait for its end; return the exit code."""
        code = self.process.wait(within)
        with contextlib.suppress(AssertionError):
            self.line("(?!)", within=PATIENCE)
        return code

    def workers(self) -> set[int]:
        """The processes of the workers."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return {int(pid) for pid in children.split()}

    def close(self) -> None:
        """End it and its workers."""
        workers = self.workers() if self.process.poll() is None else set()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in workers:  # this test's own: they were the supervisor's children a moment ago
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._log.join(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def serve(*arguments: str, **more: Any) -> Iterator[Served]:
    """Run `kaio serve` within the block."""
    served = Served(*arguments, **more)
    try:
        yield served
    finally:
        served.close()


class Client:
    """A connection that sends lines, and reads lines."""

    def __init__(self, where: int | str, tls: ssl.SSLContext | None = None) -> None:
        if isinstance(where, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(PATIENCE)
            self.sock.connect(where)
        else:
            self.sock = socket.create_connection(("127.0.0.1", where), timeout=PATIENCE)
        if tls is not None:
            self.sock = tls.wrap_socket(self.sock, server_hostname="127.0.0.1")
        self._file = self.sock.makefile("rb")

    def send(self, line: str) -> None:
        """Send a line."""
        self.sock.sendall(line.encode() + b"\n")

    def line(self) -> str:
        """Read a line; empty at the end."""
        return self._file.readline().decode().rstrip("\n")

    def ask(self, line: str = "what") -> tuple[int, str]:
        """Send a line, and return the process and the version that answer."""
        self.send(line)
        pid, _, version = self.line().partition(" ")
        return int(pid), version

    def close(self) -> None:
        """Close it."""
        self._file.close()
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(where: int | str, tls: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Ask over a connection of its own."""
    with Client(where, tls) as client:
        return client.ask()


def eventually(condition: Callable[[], object], within: float = PATIENCE) -> float:
    """Wait for what no event announces; return how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within
        time.sleep(0.02)
    return time.monotonic() - began


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"
