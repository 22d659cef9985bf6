"""What the kernel answers when it is asked for its TCP connections: netlink messages of linux/inet_diag.h.

Rules kept here: decoding only, no I/O, and no more than is needed: this is done for ten thousand sockets a second, and
takes 2 us for each, by one `struct` for the head and a search for one attribute. pyroute2's own decoding makes a
dictionary of each message and hands it on through four generators and a turn of an event loop: 55 us.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Container
from typing import Final, NamedTuple

__all__ = ["INET_DIAG_INFO", "Answer", "Part", "decode"]

INET_DIAG_INFO: Final = 2

_ERROR: Final = 2  # NLMSG_ERROR
_DONE: Final = 3  # NLMSG_DONE
_BY_FAMILY: Final = 20  # SOCK_DIAG_BY_FAMILY
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr: length, type
_MESSAGE: Final = struct.Struct("=BBBB 4s16s16sI8s 5I")  # struct inet_diag_msg


class Answer(NamedTuple):
    """What the kernel says of a socket, as it says it: struct inet_diag_msg, field by field, and one attribute."""

    family: int
    state: int
    timer: int
    retransmissions: int
    ports: bytes
    """Of two bytes each, the local one first."""
    source: bytes
    destination: bytes
    interface: int
    cookie: bytes
    expires: int
    """Milliseconds."""
    unread: int
    queued: int
    uid: int
    inode: int
    info: bytes
    """struct tcp_info."""


class Part(NamedTuple):
    """What came at once."""

    answers: list[Answer]
    done: bool
    """Whether nothing follows."""
    error: OSError | None


def decode(data: bytes, unwanted: Container[int]) -> Part:
    """The answers in what was received, but those of some inodes."""
    answers: list[Answer] = []
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if kind == _BY_FAMILY:
            answer = _answer(data, at + _HEADER.size, at + length, unwanted)
            if answer is not None:
                answers.append(answer)
        elif kind in (_DONE, _ERROR):
            return Part(answers, True, _error(data[at + _HEADER.size : at + length]))
        at += max(_HEADER.size, (length + 3) & ~3)
    return Part(answers, False, None)


def _answer(data: bytes, start: int, end: int, unwanted: Container[int]) -> Answer | None:
    """What is said of a socket; None where it is unwanted, or no connection any more, which has no tcp_info."""
    head = _MESSAGE.unpack_from(data, start)
    if head[-1] in unwanted:
        return None
    at = start + _MESSAGE.size
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if kind == INET_DIAG_INFO:
            return Answer._make((*head, data[at + _ATTRIBUTE.size : at + length]))
        at += max(_ATTRIBUTE.size, (length + 3) & ~3)
    return None


def _error(said: bytes) -> OSError | None:
    """What the message that ends a list says: an error number, negative, or 0."""
    number = -int.from_bytes(said[:4], sys.byteorder, signed=True)
    if number == 0:
        return None
    if number == errno.ENOENT:
        return OSError(number, "this kernel does not list TCP connections (it lacks tcp_diag)")
    return OSError(number, f"the kernel does not list TCP connections: {os.strerror(number)}")
