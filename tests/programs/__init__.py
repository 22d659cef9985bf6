"""Programs of others, for tests to look at from outside: what they are written in, and how they are started.

The servers print their port, then a line for each connection that an error ended: its peer's port and the error. What
they are sent they throw away; a connection that sent something is sent a byte now and then.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["MPTCP", "Program", "Puppet", "node", "puppet", "python", "redis", "run_alone", "static", "tell_of_missing"]

HERE: Final = pathlib.Path(__file__).parent
COMMANDS: Final = ("gcc", "node", "redis-server")


def tell_of_missing() -> str | None:
    """What is not installed of what the programs need; None when all is."""
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    return f"no {' and no '.join(absent)} here: run scripts/install-system-packages" if absent else None


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python where there are no processes but its own, since the machine's are many. It takes root."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    top = HERE.parent.parent
    return subprocess.run(command, capture_output=True, text=True, timeout=40, check=False, cwd=top)


def _multipath() -> int:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()
    except OSError:
        return 0
    return 262


MPTCP: Final = _multipath()
"""The protocol number of Multipath TCP; 0, which is TCP, where the kernel has none."""


class Program:
    """A program that runs, and what it prints."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self.port = 0
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            self._ready.set()
        self._ready.set()

    def has_begun(self) -> None:
        """Wait for its port, which is the first that it prints."""
        assert self._ready.wait(20)
        self.port = int(self.lines.pop(0))

    def connect(self) -> socket.socket:
        """A client of it."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def end(self) -> None:
        """End it, and wait until it has."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def _running(*command: str) -> Iterator[Program]:
    program = Program(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True))
    try:
        program.has_begun()
        yield program
    finally:
        program.end()


def python(*before: str) -> contextlib.AbstractContextManager[Program]:
    """A server in Python, on asyncio."""
    return _running(*before, sys.executable, str(HERE / "server.py"))


def node(*before: str) -> contextlib.AbstractContextManager[Program]:
    """A server in JavaScript."""
    return _running(*before, "node", str(HERE / "server.js"))


def static(directory: pathlib.Path, *before: str) -> contextlib.AbstractContextManager[Program]:
    """A server in C, linked statically: no library could be slipped under it."""
    executable = directory / "server"
    source = HERE / "server.c"
    subprocess.run(["gcc", "-Wall", "-Werror", "-O", "-static", "-D_GNU_SOURCE", "-o", executable, source], check=True)
    return _running(*before, str(executable))


@contextlib.contextmanager
def redis(directory: pathlib.Path, *options: str, before: tuple[str, ...] = ()) -> Iterator[Program]:
    """redis-server, with nothing on disk. `before` is a command that starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*before, "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    command += ["--save", "", "--appendonly", "no", "--loglevel", "warning", *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    program = Program(process)
    program.port = port
    try:
        _answers(program)
        yield program
    finally:
        program.end()


def _answers(program: Program) -> None:
    """Wait until it answers; nothing tells that it will."""
    for _ in range(2000):
        assert program.process.poll() is None, program.lines
        with contextlib.suppress(OSError), program.connect() as client:
            client.sendall(b"PING\r\n")
            client.sendall(b"QUIT\r\n")
            while client.recv(100):
                pass
            return
        threading.Event().wait(0.01)
    raise AssertionError("redis-server does not answer")


class Puppet:
    """A Python process that does what it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def __call__(self, code: str) -> Any:
        """Run some statements; what they leave in `it` comes back, by way of JSON."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextlib.contextmanager
def puppet(*before: str) -> Iterator[Puppet]:
    """A process that has `os`, `socket` and `TCP` (its option level) at hand, and makes no sockets unless told.

    `before` is a command that starts it.
    """
    command = [*before, sys.executable, str(HERE / "puppet.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Puppet(process)
        finally:
            process.kill()
