"""Connects to a port of this machine as often and as fast as it can, also before anybody listens there: run by
test_loops.

Arguments: the port, and how many connections are to be made. Each of them is reset once it stands.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time

GIVE_UP = 30.0  # seconds


def main(port: int, count: int) -> None:
    print("ready", flush=True)
    deadline = time.monotonic() + GIVE_UP
    made = 0
    while made < count and time.monotonic() < deadline:
        with socket.socket() as sock, contextlib.suppress(ConnectionRefusedError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.connect(("127.0.0.1", port))
            made += 1
    sys.exit(made < count)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
