"""Decoding the kernel's list of TCP connections: netlink messages of linux/inet_diag.h.

Rules kept here: no I/O; only what is needed is decoded, because there may be ten thousand sockets a second. One
`struct` for the fixed part and a search for one attribute take 2 us a socket. pyroute2's own decoding takes 55 us: it
makes a dictionary of each message, and passes it through four generators and an iteration of an event loop.
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
_MAX_ERRNO: Final = 4095  # include/linux/err.h
_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr: length, type
_MESSAGE: Final = struct.Struct("=BBBB 4s16s16sI8s 5I")  # struct inet_diag_msg


class Answer(NamedTuple):
    """The fields of struct inet_diag_msg, and one attribute."""

    family: int
    state: int
    timer: int
    retransmissions: int
    ports: bytes
    """Two bytes each, the local port first."""
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
    """The messages that were received at once."""

    answers: list[Answer]
    done: bool
    """Whether this ends the list."""
    error: OSError | None


def decode(data: bytes, unwanted: Container[int]) -> Part:
    """Decode what was received, and leave out sockets with unwanted inodes."""
    answers: list[Answer] = []
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            return Part(answers, True, _malformed())
        if kind == _BY_FAMILY:
            answer = _answer(data, at + _HEADER.size, at + length, unwanted)
            if answer is not None:
                answers.append(answer)
        elif kind in (_DONE, _ERROR):
            return Part(answers, True, _error(data[at + _HEADER.size : at + length]))
        at += (length + 3) & ~3
    return Part(answers, False, None)


def _answer(data: bytes, start: int, end: int, unwanted: Container[int]) -> Answer | None:
    """Decode a socket; None if it is unwanted, or has no tcp_info because its connection has ended."""
    if end - start < _MESSAGE.size:
        return None
    head = _MESSAGE.unpack_from(data, start)
    if head[-1] in unwanted:
        return None
    at = start + _MESSAGE.size
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if kind == INET_DIAG_INFO:
            info = data[at + _ATTRIBUTE.size : min(at + length, end)]
            return Answer._make((*head, info)) if info else None
        at += max(_ATTRIBUTE.size, (length + 3) & ~3)
    return None


def _malformed() -> OSError:
    return OSError(errno.EBADMSG, "cannot list TCP connections: the kernel's reply is malformed")


def _error(said: bytes) -> OSError | None:
    """Decode the message that ends a list: a negative error number, or 0."""
    number = -int.from_bytes(said[:4], sys.byteorder, signed=True)
    if number == 0:
        return None
    if not 0 < number <= _MAX_ERRNO:
        return _malformed()
    if number == errno.ENOENT:
        return OSError(number, "this kernel cannot list TCP connections: it lacks tcp_diag")
    return OSError(number, f"cannot list TCP connections: {os.strerror(number)}")
