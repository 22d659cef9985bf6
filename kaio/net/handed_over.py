"""Listening sockets that another process has made: systemd's (sd_listen_fds(3)), a supervisor's, or the caller's own.

Rules kept here: what was asked for is looked up when the listener is made, so that a mistake is an error there; the
sockets are taken when it binds, and a descriptor by one listener at a time. They are closed here at the end, and go on
listening wherever else they are open: nobody is refused meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable
from typing import Final

from ..addresses import Address, TcpAddress, UnixAddress
from ..errors import AddressError

__all__ = ["HandedOver", "address_of"]

_SYSTEMD: Final = "systemd:"
_DESCRIPTOR: Final = "fd:"
_FIRST: Final = 3  # of systemd's descriptors (SD_LISTEN_FDS_START)
_AF_UNIX: Final = getattr(socket, "AF_UNIX", None)  # Windows has none

_taken: Final[set[int]] = set()
"""Descriptors that a listener has; those of systemd for good, because a number that is closed means something else."""


class HandedOver:
    """Sockets that were handed over, under one name."""

    def __init__(
        self,
        what: object,
        *,
        sock: socket.socket | None = None,
        descriptors: Iterable[int] = (),
        are_systemds: bool = False,
    ) -> None:
        self._what = what  # as it was asked for
        self._sock = sock
        self._descriptors = tuple(descriptors)
        self._are_systemds = are_systemds
        addresses = [address_of(sock)] if sock is not None else [_look_at(what, each) for each in self._descriptors]
        if len({type(each) for each in addresses}) > 1:
            raise AddressError(what, "its sockets must be all TCP, or all Unix")
        self.address: Address = addresses[0]

    @staticmethod
    def is_meant(address: object) -> bool:
        """Whether an address is text that stands for sockets that were handed over."""
        return isinstance(address, str) and address.startswith((_SYSTEMD, _DESCRIPTOR))

    @staticmethod
    def asked_for(address: object) -> HandedOver | None:
        """Return the sockets that an address stands for; None when it is another kind of address.

        Raises `AddressError` when they are not there, or are no sockets to accept on.
        """
        if isinstance(address, socket.socket):
            return HandedOver(address, sock=address)
        if not isinstance(address, str):
            return None
        if address.startswith(_SYSTEMD):
            return HandedOver(address, descriptors=_from_systemd(address), are_systemds=True)
        if address.startswith(_DESCRIPTOR):
            number = address.removeprefix(_DESCRIPTOR)
            if not (number.isascii() and number.isdigit() and len(number) < 10):
                raise AddressError(address, "must have the number of a file descriptor; write 'fd:3'")
            return HandedOver(address, descriptors=[int(number)])
        return None

    def take(self) -> list[socket.socket]:
        """Return the sockets, which are the caller's to close, and then to `release`. Raises `AddressError`."""
        if self._sock is not None:
            self._sock.setblocking(False)
            return [self._sock]
        for each in self._descriptors:
            _look_at(self._what, each)
        _taken.update(self._descriptors)
        sockets = []
        for each in self._descriptors:
            os.set_inheritable(each, False)
            sock = socket.socket(fileno=each)
            sock.setblocking(False)
            sockets.append(sock)
        return sockets

    def release(self) -> None:
        """The sockets are closed: the numbers of their descriptors mean something else from now on."""
        if not self._are_systemds:
            _taken.difference_update(self._descriptors)


def _from_systemd(address: str) -> list[int]:
    """Find systemd's sockets of a name, all of them where there is no name."""
    name = address.removeprefix(_SYSTEMD)
    environ = os.environ
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        raise AddressError(address, "no sockets were handed over to this process (LISTEN_FDS and LISTEN_PID tell)")
    descriptors = range(_FIRST, _FIRST + int(count[:6]))
    for each in descriptors:  # as sd_listen_fds does: none of them is a child's
        with contextlib.suppress(OSError):
            os.set_inheritable(each, False)
    given = environ.get("LISTEN_FDNAMES", "").split(":") if environ.get("LISTEN_FDNAMES") else []
    names = [given[at] if at < len(given) else "unknown" for at in range(len(descriptors))]
    found = [each for each, own in zip(descriptors, names, strict=True) if name in ("", own)]
    if not found:
        there = ", ".join(map(repr, dict.fromkeys(names))) or "none"
        raise AddressError(address, f"no socket of this name was handed over; there are: {there}")
    return found


def _look_at(what: object, descriptor: int) -> Address:
    """Return the address of a listening socket. Raises `AddressError` for any other descriptor."""
    if descriptor in _taken:
        raise AddressError(what, f"file descriptor {descriptor} is in use by another listener, or was")
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise AddressError(what, f"file descriptor {descriptor} is not a socket")
        sock = socket.socket(fileno=descriptor)
    except OSError:
        raise AddressError(what, f"file descriptor {descriptor} is not open") from None
    try:
        address = address_of(sock, what)
        try:
            sock.getpeername()
        except OSError:
            return address
        raise AddressError(what, f"file descriptor {descriptor} is a connection, and no socket to accept on")
    finally:
        sock.detach()


def address_of(sock: socket.socket, what: object = None) -> Address:
    """Return the address of a stream socket. Raises `AddressError` for another kind of socket."""
    what = sock if what is None else what
    if sock.type != socket.SOCK_STREAM:
        raise AddressError(what, "must be a stream socket")
    name = sock.getsockname()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return TcpAddress(name[0], name[1])
    if sock.family != _AF_UNIX:
        raise AddressError(what, "must be a TCP or a Unix socket")
    return UnixAddress(os.fsdecode(name))
