"""Make docs/administration.md by doing what it tells of: find, change, watch, undo, for Redis, nginx and PostgreSQL.

    python -m scripts.administration          # as root; writes the page
    python -m scripts.administration --print  # prints it

Rules kept here: the servers are this program's own, in cgroups that bear their units' names, and in a network and a
mount namespace of their own; nothing of this machine's is looked at or changed. What the page shows was printed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Final

from kaio.tools import cgroups
from tests import own_cgroup, servers

__all__ = ["PAGE", "lacking", "main", "normalised"]

ROOT: Final = pathlib.Path(__file__).parent.parent
PAGE: Final = ROOT / "docs/administration.md"
INSIDE: Final = "KAIO_ADMINISTRATION_INSIDE"
WIDTH: Final = 118

HEAD: Final = """\
# An administrator's tasks

Find what is not covered, change it, watch it, and take it back: for Redis, nginx and PostgreSQL as Debian packs them.
Made by running the commands, as root, with `python -m scripts.administration`; process numbers, ports and times differ.

A policy can be given at three places. The program's own setting is the best one where there is one, because it is where
the next administrator looks: `kaio audit` names it. `kaio enforce` gives a policy to what has none, as connections come
into being, and outlives restarts. `kaio attach` sets it on the sockets that exist, without a restart.
"""

TEXTS: Final = {
    "redis": """\
Redis sets times of its own on each connection that it accepts: 300 s until the first probe, and a third of that between
three probes. They stand, whatever is enforced; the setting is where to change them.
""",
    "nginx": """\
nginx sets nothing unless a `listen` says so. Its first process holds the listening socket, and its workers the
connections. Without a restart and without touching its configuration:
""",
    "postgres": """\
PostgreSQL turns keepalive on, with the system's two hours. Its own settings apply to new sessions after a reload; for
those that exist already, `kaio attach`.
""",
}


class Shell:
    """Runs commands, and writes down what they print."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._environment = environment

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.lines += [text.rstrip("\n"), ""]

    def run(self, *commands: str) -> None:
        """Run commands, as one block of the page."""
        self.lines.append("```")
        for number, command in enumerate(commands):
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, check=False, env=self._environment
            )
            output = (done.stdout + done.stderr).rstrip("\n")
            self.lines += [*([""] if number else []), f"$ {command}", *output.splitlines()]
            if done.returncode:
                self.lines.append(f"[exit code {done.returncode}]")
        self.lines += ["```", ""]


def lacking() -> str | None:
    """Why the page cannot be made here; None if it can."""
    return own_cgroup.lacking() or servers.lacking()


def normalised(page: str) -> list[str]:
    """The lines of a page without what differs from run to run: numbers, white space, the order of a table's rows."""
    page = re.sub(r"/sys/fs/cgroup/(unified/)?", "/sys/fs/cgroup/", page)
    return sorted(re.sub(r"[ \t]+", " ", re.sub(r"\d+(\.\d+)?", "N", page)).splitlines())


# -- the servers


@contextlib.contextmanager
def _unit(name: str) -> Iterator[None]:
    """Be in a cgroup that bears a unit's name, with what is started within the block."""
    before = cgroups.of_process()
    with own_cgroup.cgroup(name) as path:
        _move(path)
        try:
            yield
        finally:
            _move(before)


def _move(path: str) -> None:
    with open(os.path.join(path, "cgroup.procs"), "w", encoding="ascii") as procs:
        procs.write("0")


@contextlib.contextmanager
def _server(name: str, start: Callable[[], contextlib.AbstractContextManager[servers.Running]]) -> Iterator[int]:
    """A server in its unit's cgroup, and a client that stays. Yields the server's port."""
    before = cgroups.of_process()
    with _unit(f"{name}.service"), contextlib.ExitStack() as stack:
        running = stack.enter_context(start())
        _move(before)  # the server alone is in the unit
        yield running.port


@contextlib.contextmanager
def _client(port: int, greeting: bytes = b"") -> Iterator[None]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(greeting)
        if greeting:
            client.recv(1)
        yield


# -- the page


def _redis(shell: Shell) -> None:
    with _server("redis-server", servers.redis) as port:
        shell.text("## Redis\n\n" + TEXTS["redis"])
        with _client(port, b"PING\r\n"):
            shell.run("kaio audit redis-server.service")
            shell.text("A dead client costs ten minutes. For new connections, at once; and in redis.conf, to keep it:")
            shell.run(f"redis-cli -p {port} config set tcp-keepalive 60")
            with _client(port, b"PING\r\n"):
                shell.run("kaio audit redis-server.service")
                shell.run(f"redis-cli -p {port} config set tcp-keepalive 300")


def _nginx(shell: Shell) -> None:
    with _server("nginx", servers.nginx) as port:
        shell.text("## nginx\n\n" + TEXTS["nginx"])
        request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        with _client(port, request):
            shell.run("kaio audit nginx.service")
            shell.run("kaio enforce --unit nginx.service 20s:10s:4,stalled=drop")
            with _client(port, request):
                shell.text("The connection of before, a new one, and what the kernel has counted:")
                shell.run("kaio audit nginx.service", "kaio enforce status")
                shell.text("To make it last, `--boot` writes files for systemd; `--dry-run` shows them first.")
                shell.text("Who is connected, and how each peer is; without `--once`, the list is updated:")
                shell.run("kaio top --once --filter nginx")
                shell.text("And back:")
                shell.run("kaio enforce --unit nginx.service off", "kaio attach nginx.service --undo")


def _postgres(shell: Shell) -> None:
    with _server("postgresql", servers.postgres) as port:
        shell.text("## PostgreSQL\n\n" + TEXTS["postgres"])
        psql = f"psql -h 127.0.0.1 -p {port} -U kaio -qAt postgres"
        with subprocess.Popen([*psql.split(), "-f", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as session:
            assert session.stdin is not None
            assert session.stdout is not None
            session.stdin.write(b"select 1;\n")
            session.stdin.flush()
            session.stdout.readline()
            shell.run("kaio audit postgresql.service")
            shell.run("kaio attach postgresql.service --keepalive 20s:10s:4")
            shell.text("For new sessions, its own setting:")
            shell.run(
                f"{psql} -c \"alter system set tcp_keepalives_idle = 20\" -c 'select pg_reload_conf()'",
                f"{psql} -c 'show tcp_keepalives_idle'",
            )
            shell.text("And back:")
            shell.run(
                "kaio attach postgresql.service --undo",
                f"{psql} -c 'alter system reset tcp_keepalives_idle' -c 'select pg_reload_conf()'",
            )
            session.stdin.close()
            session.wait(20)


def _page() -> str:
    with tempfile.TemporaryDirectory() as directory:
        kaio = pathlib.Path(directory) / "kaio"
        kaio.write_text(f'#!/bin/sh\nexec {sys.executable} -W error -m kaio "$@"\n')
        kaio.chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{directory}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "KAIO_RUNTIME_DIR": os.path.join(directory, "records"),
        }
        shell = Shell(environment)
        for part in (_redis, _nginx, _postgres):
            part(shell)
        return HEAD + "\n" + "\n".join(shell.lines).rstrip("\n") + "\n"


def main() -> None:
    """Make the page in namespaces of its own."""
    reason = lacking()
    if reason is not None:
        sys.exit(reason)
    if not os.environ.get(INSIDE):
        apart = ["unshare", "--mount", "--net", "--propagation", "private"]
        command = [*apart, sys.executable, "-m", "scripts.administration"]
        done = subprocess.run(
            command, env={**os.environ, INSIDE: "1"}, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        if "--print" in sys.argv[1:]:
            print(done.stdout, end="")
        else:
            PAGE.write_text(done.stdout, encoding="utf-8")
        return
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans of the servers are this process's
    subprocess.run([str(shutil.which("ip") or "/sbin/ip"), "link", "set", "lo", "up"], check=True)
    subprocess.run(["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"], check=True)
    print(_page(), end="")


if __name__ == "__main__":
    main()
