"""The other side: plain sockets in the server's namespace, which know nothing of keepalive."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import Any

from kaio.testing import blackhole

from ..namespaces import Routed

__all__ = ["Peer"]


class Peer:
    """One listening socket, and the one connection that it accepts: its port is the name of the connection."""

    def __init__(self, network: Routed) -> None:
        with network.server.entered():
            self._listener = socket.create_server((Routed.SERVER, 0))
        self._listener.settimeout(5)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._sock: Any = None
        self._undo = contextlib.ExitStack()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.address[1]

    @property
    def sock(self) -> Any:
        """Its end of the connection: TLS's socket once that stands."""
        if self._sock is None:
            self._sock, _ = self._listener.accept()
            self._sock.settimeout(5)
        return self._sock

    def shake_hands(self, context: ssl.SSLContext) -> threading.Thread:
        """Be TLS's server from now on, in a thread of its own."""

        def wrap() -> None:
            with contextlib.suppress(OSError):
                self._sock = context.wrap_socket(self.sock, server_side=True)

        thread = threading.Thread(target=wrap, daemon=True)
        thread.start()
        return thread

    def deafen(self) -> None:
        """Hear nothing more, and acknowledge nothing."""
        self._undo.enter_context(blackhole(self.sock))

    def shrink(self) -> None:
        """Have no room for what the window has promised, so that it shuts under a segment in flight."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)

    def close(self) -> None:
        """Be gone, without a word where that is possible."""
        with contextlib.suppress(OSError):
            self._undo.close()
        for each in (self._sock, self._listener):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.close()
