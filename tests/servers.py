"""Real servers for tests: PostgreSQL, redis-server and nginx, as Debian packs them.

Rules kept here: each server is a process of the test's own, on a free port, with all its files in a directory that goes
with it; nothing that runs on this machine already is touched. Within a network namespace, that is where it listens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

__all__ = [
    "Running",
    "all_servers",
    "free_port",
    "haproxy",
    "lacking",
    "nats",
    "nginx",
    "nginx_stream",
    "postgres",
    "redis",
]

LOOPBACK: Final = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that is ready for connections."""

    host: str
    port: int
    pid: int


def lacking() -> str | None:
    """Which of the servers are not installed, in one line; None when all are."""
    absent = [command for command in ("haproxy", "nats-server", "nginx", "redis-server") if _find(command) is None]
    if not _postgres_programs():
        absent.append("initdb")
    return f"no {' and no '.join(absent)} here: run scripts/install-system-packages" if absent else None


@contextlib.contextmanager
def postgres(host: str = LOOPBACK) -> Iterator[Running]:
    """PostgreSQL, with a superuser `kaio` who needs no password, and keepalive as the system has it."""
    programs = _postgres_programs()
    user = _unprivileged()
    with _directory(user) as directory:
        data = f"{directory}/data"
        subprocess.run(
            [f"{programs}/initdb", "-D", data, "-U", "kaio", "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=directory,
            **user,
        )
        with open(f"{data}/pg_hba.conf", "w") as access:
            access.write("host all kaio all trust\n")
        port = free_port(host)
        settings = {"listen_addresses": host, "port": port, "unix_socket_directories": "", "fsync": "off"}
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [f"{programs}/postgres", "-D", data, *options]
        with _serving(directory, command, host, port, signal.SIGQUIT, _said("ready to accept"), **user) as server:
            yield server


@contextlib.contextmanager
def redis(host: str = LOOPBACK, *options: str, port: int | None = None) -> Iterator[Running]:
    """redis-server, which saves nothing by itself; on a free port, unless one is given. `options` are its own."""
    with _directory() as directory:
        port = port or free_port(host)
        command = ["redis-server", "--port", str(port), "--bind", host, "--save", "", "--protected-mode", "no"]
        command += options
        with _serving(directory, command, host, port, signal.SIGTERM, _said("Ready to accept")) as server:
            yield server


@contextlib.contextmanager
def nginx(host: str = LOOPBACK) -> Iterator[Running]:
    """nginx: any path tells the client's port, and connections are kept for an hour."""
    with _configured(["nginx", "-p", ".", "-e", "stderr", "-c"], host, _NGINX) as server:
        yield server


@contextlib.contextmanager
def nats(host: str = LOOPBACK) -> Iterator[Running]:
    """nats-server, with nothing on disk."""
    with _directory() as directory:
        port = free_port(host)
        command = [str(_find("nats-server")), "--addr", host, "--port", str(port)]
        with _serving(directory, command, host, port, signal.SIGTERM, _said("Server is ready")) as server:
            yield server


_NGINX: Final = """
daemon off;
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 1000; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_timeout 1h;
    server {{
        listen {host}:{port};
        location / {{ return 200 "$remote_port"; }}
    }}
}}
"""


@contextlib.contextmanager
def nginx_stream(backend: int, options: str = "", host: str = LOOPBACK) -> Iterator[Running]:
    """nginx as a TCP proxy, which sends a PROXY header of version 1; `options` are of its `server`."""
    settings = {"backend": backend, "options": options}
    with _configured(["nginx", "-p", ".", "-e", "stderr", "-c"], host, _NGINX_STREAM, **settings) as server:
        yield server


_NGINX_STREAM: Final = """
daemon off;
worker_processes 1;
pid nginx.pid;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events {{ worker_connections 1000; }}
stream {{
    server {{
        listen {host}:{port} {options};
        proxy_pass {host}:{backend};
        proxy_protocol on;
    }}
}}
"""


@contextlib.contextmanager
def haproxy(backend: int, send: str = "", bind: str = "", mode: str = "tcp", host: str = LOOPBACK) -> Iterator[Running]:
    """HAProxy: `send` is send-proxy or send-proxy-v2 with its options, `bind` options such as `ssl crt`."""
    settings = {"backend": backend, "send": send, "bind": bind, "mode": mode}
    with _configured(["haproxy", "-db", "-f"], host, _HAPROXY, **settings) as server:
        yield server


_HAPROXY: Final = """
global
    tune.ssl.default-dh-param 2048
defaults
    mode {mode}
    timeout connect 10s
    timeout client 1h
    timeout server 1h
frontend in
    bind {host}:{port} {bind}
    default_backend out
backend out
    server kaio {host}:{backend} {send}
"""


@contextlib.contextmanager
def all_servers(host: str = LOOPBACK) -> Iterator[dict[str, Running]]:
    """Run one server of each kind; return them by name."""
    with postgres(host) as first, redis(host) as second, nginx(host) as third:
        yield {"postgres": first, "redis": second, "nginx": third}


# -- starting and stopping


@contextlib.contextmanager
def _configured(command: list[str], host: str, template: str, **settings: object) -> Iterator[Running]:
    """Run a server on a free port with a configuration file, whose name ends its command."""
    with _directory() as directory:
        port = free_port(host)
        path = f"{directory}/configuration"
        with open(path, "w") as file:
            file.write(template.format(host=host, port=port, **settings))
        full = [str(_find(command[0])), *command[1:], path]
        with _serving(directory, full, host, port, signal.SIGTERM, _accepts(host, port)) as server:
            yield server


@contextlib.contextmanager
def _serving(
    directory: str,
    command: list[str],
    host: str,
    port: int,
    stop: signal.Signals,
    ready: Callable[[str], bool],
    **user: Any,
) -> Iterator[Running]:
    """Run a server for the block, from when it is ready; its log is in the message when it never is."""
    path = f"{directory}/log"
    with (
        open(path, "w+") as log,
        subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **user
        ) as process,
    ):
        try:
            end = time.monotonic() + 30
            while not ready(path):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{command[0]} is not ready: {_text(path)}")
                time.sleep(0.01)
            yield Running(host, port, process.pid)
        finally:
            process.send_signal(stop)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _said(words: str) -> Callable[[str], bool]:
    return lambda path: words in _text(path)


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _accepts(host: str, port: int) -> Callable[[str], bool]:
    def ready(_: str) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
            return True
        return False

    return ready


def free_port(host: str = LOOPBACK) -> int:
    """A port that nothing listens on, and that no outgoing connection will have taken a moment later."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
        lowest = int(file.read().split()[0])
    for port in random.sample(range(10_000, max(lowest, 20_000)), 100):
        with contextlib.suppress(OSError), socket.create_server((host, port)):
            return port
    raise RuntimeError(f"no free port at {host}")


@contextlib.contextmanager
def _directory(user: dict[str, Any] | None = None) -> Iterator[str]:
    """A directory for the block, which belongs to the user. pytest's own lie where only their maker may go."""
    directory = tempfile.mkdtemp(prefix="kaio-")
    try:
        if user:
            os.chown(directory, user["user"], user["group"])
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _unprivileged() -> dict[str, Any]:
    """For Popen: somebody else than root, as whom PostgreSQL does not run."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _postgres_programs() -> str | None:
    """Where the newest PostgreSQL is: Debian keeps its programs out of PATH."""
    found = glob.glob("/usr/lib/postgresql/*/bin/initdb")
    return os.path.dirname(max(found, key=lambda path: int(path.split("/")[4]))) if found else None


def _find(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
