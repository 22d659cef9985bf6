"""`Channel`: either end of the pair of sockets between the supervisor and a worker. Each message is a line of JSON."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any, Final

__all__ = ["Channel"]

_AT_ONCE: Final = 65536  # bytes that are read at a time


class Channel:
    """Sends and receives messages. The end of the other process is the end of the channel, and no error."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = b""  # the beginning of a message

    def fileno(self) -> int:
        """Return the descriptor, for `loop.add_reader`."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close this end."""
        self._sock.close()

    def send(self, message: object) -> None:
        """Send a message, if the other process still lives. It fits into the socket's buffer."""
        with contextlib.suppress(OSError):
            self._sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Any:
        """Wait for a message, and return it. Raises EOFError."""
        while b"\n" not in self._received:
            data = self._sock.recv(_AT_ONCE)
            if not data:
                raise EOFError
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def received(self) -> list[Any] | None:
        """Return all messages that have come, without waiting; None when there are none and no more will come."""
        has_ended = False
        try:
            while data := self._sock.recv(_AT_ONCE, socket.MSG_DONTWAIT):
                self._received += data
            has_ended = True
        except BlockingIOError:
            pass
        except OSError:
            has_ended = True
        *lines, self._received = self._received.split(b"\n")
        return None if has_ended and not lines else [json.loads(line) for line in lines]
