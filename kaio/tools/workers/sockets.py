"""The listening sockets of `kaio serve`, and which worker gets which.

Rules kept here: the supervisor opens the sockets once, before the first worker, and holds them until it stops. While
they are open, the kernel accepts connections into their queues whether or not a worker runs, so that a reload or a
death refuses nobody.

With several workers a TCP port has a socket for each slot (SO_REUSEPORT), over which the kernel spreads connections by
a hash of their addresses. Unix sockets, and sockets that were handed over, are shared by all workers.
docs/decisions/workers.md has the measurements.
"""

from __future__ import annotations

import socket
from typing import Final

import kaio

__all__ = ["Sockets", "check_address", "complete", "describe"]

_HANDED_OVER: Final = ("systemd:", "fd:")
"""What begins the address of a socket that was bound by somebody else."""


class Sockets:
    """Listening sockets for a number of slots."""

    def __init__(self, slots: int, backlog: int, *, spread: bool = True) -> None:
        self._slots: list[list[socket.socket]] = [[] for _ in range(slots)]
        self._listeners: list[kaio.Listener] = []
        self._backlog = backlog
        self._spread = spread and slots > 1  # False: every socket is shared

    async def open(self, address: str) -> None:
        """Bind an address, and listen. Raises OSError, `kaio.AddressError`; then `close` is to be called."""
        if not self._spread or not _has_port(address):
            shared = await self._bind(address)
            for slot in self._slots:
                slot.extend(shared)
            return
        parsed = kaio.Listener(address).address
        if isinstance(parsed, kaio.TcpAddress) and parsed.port:
            # With SO_REUSEPORT, a port that another server of the same user has is bound without an error.
            probe = kaio.Listener(parsed)
            await probe.bind()
            probe.close()
        for slot in self._slots:
            slot.extend(await self._bind(parsed, reuse_port=True))
            parsed = self._listeners[-1].address  # with port 0 the first one's port is the others', too

    async def _bind(
        self, address: str | kaio.TcpAddress | kaio.UnixAddress, *, reuse_port: bool = False
    ) -> list[socket.socket]:
        listener = kaio.Listener(address, reuse_port=reuse_port)
        self._listeners.append(listener)
        await listener.bind()
        for sock in listener.sockets:
            sock.listen(self._backlog)
        return list(listener.sockets)

    def of(self, slot: int) -> list[socket.socket]:
        """The sockets of a slot's worker."""
        return self._slots[slot]

    @property
    def all(self) -> list[socket.socket]:
        """All sockets, each once."""
        return list(dict.fromkeys(sock for slot in self._slots for sock in slot))

    def stop_listening(self) -> None:
        """Close the sockets in this process. Workers that still have them can accept what is in the queues.

        Where they are nobody else's, no handshakes begin any more.
        """
        for listener in self._listeners:
            listener.end_handshakes()
        for sock in self.all:
            sock.close()

    def close(self) -> None:
        """Close the sockets, and remove the paths of Unix sockets."""
        for listener in self._listeners:
            listener.close()


def complete(address: str) -> str:
    """Return an address with what may be left out: a port alone is one of 127.0.0.1."""
    return f"127.0.0.1:{address}" if address.isdecimal() else address


def check_address(address: str) -> None:
    """Raise `kaio.AddressError` for text that is no address."""
    if not address.startswith(_HANDED_OVER):  # those are looked at when they are opened
        kaio.Listener(address)


def describe(sock: socket.socket) -> str:
    """Where a socket listens: `tcp://127.0.0.1:9000`, `unix:/run/app.sock`."""
    name = sock.getsockname()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return f"tcp://{kaio.TcpAddress(name[0], name[1])}"
    return f"unix:{name if isinstance(name, str) else ascii(name)}"


def _has_port(address: str) -> bool:
    """Whether it is a TCP address that is bound here."""
    return not address.startswith(_HANDED_OVER) and isinstance(kaio.Listener(address).address, kaio.TcpAddress)
