"""Connects without any event loop, and says how each connection ends: run by test_run, under `kaio run`.

Argument: the port to connect to. For each line of standard input that names a case, a connection is made and written
about on standard output: its local port, then, in a thread of its own, how it ended and after how many seconds. A last
line says what the connections had at the end.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time

PORT = int(sys.argv[1])
socket.setdefaulttimeout(30)  # whoever looks at these sockets must not make them what they are not


def say(*words: object) -> None:
    print(*words, flush=True)


def fill(sock: socket.socket) -> None:
    """Send until the peer takes no more."""
    sock.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while True:
            sock.send(bytes(1 << 16))
    sock.settimeout(None)


def end(case: str, sock: socket.socket) -> None:
    began = time.monotonic()
    try:
        said: object = sock.recv(1)
    except OSError as exc:
        said = f"{type(exc).__name__}:{exc.errno}"
    say("ended", case, said, f"{time.monotonic() - began:.2f}")


def options(sock: socket.socket) -> str:
    return ":".join(
        str(sock.getsockopt(socket.IPPROTO_TCP, option))
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    )


def main() -> None:
    made: dict[str, socket.socket] = {}
    for line in sys.stdin:
        verb, _, case = line.strip().partition(" ")
        if verb == "quit":
            break
        if verb == "make":
            made[case] = sock = socket.create_connection(("127.0.0.1", PORT))
            sock.settimeout(None)
            if case == "own":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 40)
            if case in ("stalled", "shut"):
                fill(sock)
            say("made", case, sock.getsockname()[1])
        elif verb == "options":
            say("options", case, options(made[case]), made[case].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        elif verb == "send":
            made[case].send(b"into the dark")
            say("sent", case)
        elif verb == "wait":
            threading.Thread(target=end, args=(case, made[case]), daemon=True).start()
    for sock in made.values():
        sock.close()


if __name__ == "__main__":
    main()
