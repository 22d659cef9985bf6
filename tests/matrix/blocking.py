"""A program with blocking sockets and a thread for each, which knows nothing of kaio: what a sweep and `attach` guard.

Its only argument is JSON: a list of [state, host, port]. It reads "last", "break" and "end" from standard input, a
line each, when these moments are there, and prints a line of JSON for each thread's end: [state, what, when, errno],
and one for each hook that a thread has done: [state, "done", when, 0].
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time

MOMENTS = {name: threading.Event() for name in ("last", "break")}
DELAYS = {"written at once": 0.0, "written 0.5 s later": 0.5, "written 1.5 s later": 1.5, "our FIN unacked": 0.0}
MEGABYTES = bytes(2_000_000)
SHRUNK = bytes(20_000)


def say(state: str, what: str, number: int | None) -> None:
    """One line, whole."""
    os.write(1, (json.dumps([state, what, time.monotonic(), number]) + "\n").encode())


def live(state: str, address: tuple[str, int]) -> None:
    """One connection, from its beginning to its end."""
    try:
        use(state, address)
        say(state, "ended without an error", None)
    except OSError as exc:
        say(state, f"{type(exc).__name__}: {exc}", exc.errno)


def use(state: str, address: tuple[str, int]) -> None:
    sock = socket.socket()
    if state == "connecting":
        MOMENTS["break"].wait()
        sock.connect(address)
        return
    sock.connect(address)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if state == "our FIN":
        sock.shutdown(socket.SHUT_WR)
    say(state, "done", 0)
    if state in ("in flight", "window shut", "window shrunk"):
        MOMENTS["last"].wait()
        if state == "window shut":
            sock.sendall(MEGABYTES)  # which waits
        else:
            sock.sendall(SHRUNK if state == "window shrunk" else b"x" * 1000)
            say(state, "done", 0)
    elif state in DELAYS:
        MOMENTS["break"].wait()
        time.sleep(DELAYS[state])
        if state == "our FIN unacked":
            sock.shutdown(socket.SHUT_WR)
        else:
            sock.sendall(b"x" * 1000)
    sock.recv(1)


def main() -> None:
    """Open all connections, and wait for the end."""
    for state, host, port in json.loads(sys.argv[1]):
        threading.Thread(target=live, args=(state, (host, port)), daemon=True).start()
    for line in sys.stdin:
        if line.strip() == "end":
            break
        MOMENTS[line.strip()].set()
    os._exit(0)


if __name__ == "__main__":
    main()
