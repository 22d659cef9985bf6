"""The other side: plain sockets in the server's namespace, which know nothing of keepalive."""

from __future__ import annotations

import array
import contextlib
import fcntl
import socket
import ssl
import termios
import threading
import time
from typing import Any

from kaio.testing import blackhole

from ..namespaces import Routed

__all__ = ["Peer"]


class Peer:
    """One listening socket, and the one connection that it accepts: its port is the name of the connection."""

    def __init__(self, network: Routed) -> None:
        with network.server.entered():
            self._listener = socket.create_server((Routed.SERVER, 0))
        self._listener.settimeout(20)  # a program that is to connect may start slowly
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._sock: Any = None
        self._undo = contextlib.ExitStack()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.address[1]

    @property
    def sock(self) -> Any:
        """Its end of the connection: TLS's socket once that stands."""
        if self._sock is None:
            self._sock, _ = self._listener.accept()
            self._sock.settimeout(20)
        return self._sock

    def shake_hands(self, context: ssl.SSLContext) -> threading.Thread:
        """Start TLS as the server, in a thread of its own."""

        def wrap() -> None:
            with contextlib.suppress(OSError):
                self._sock = context.wrap_socket(self.sock, server_side=True)

        thread = threading.Thread(target=wrap, daemon=True)
        thread.start()
        return thread

    def send(self, data: bytes) -> None:
        """Send, and wait until all has been acknowledged."""
        self.sock.sendall(data)
        until = time.monotonic() + 2
        while self._unacknowledged and time.monotonic() < until:
            time.sleep(0.002)

    @property
    def _unacknowledged(self) -> int:
        count = array.array("i", [0])
        fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, count)
        return count[0]

    def wait_for_data(self) -> None:
        """Wait until data has arrived, and leave it in the socket."""
        self.sock.recv(1, socket.MSG_PEEK)

    def deafen(self) -> None:
        """Drop every packet that arrives from now on, so that nothing is acknowledged."""
        self._undo.enter_context(blackhole(self.sock))

    def shrink(self) -> None:
        """Shrink the receive window below what was advertised, so that it shuts under a segment in flight."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)

    def close(self) -> None:
        """Close the sockets, without a reset where that is possible."""
        with contextlib.suppress(OSError):
            self._undo.close()
        for each in (self._sock, self._listener):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.close()
