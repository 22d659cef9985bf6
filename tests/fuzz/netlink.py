"""The kernel's list of connections, and struct tcp_info."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Final

from hypothesis import strategies as st

from kaio.kernel.tcpinfo import TcpInfo, idle_time_from_bytes, last_data_recv_from_bytes
from kaio.liveness.health import judge
from kaio.tools.sockdiag import TcpConnection
from kaio.tools.sockdiag._answer import INET_DIAG_INFO, Answer, decode

from .inputs import edited, linear, pieces
from .search import Property

__all__ = ["PROPERTIES", "attribute", "message"]

_HEADER: Final = struct.Struct("=IHHII")
_BODY: Final = struct.Struct("=BBBB 4s16s16sI8s 5I")
_SOCKET, _DONE, _ERROR, _OTHER = 20, 3, 2, 1


def message(kind: int, body: bytes) -> bytes:
    """A netlink message (linux/netlink.h)."""
    return _HEADER.pack(_HEADER.size + len(body), kind, 2, 1, 0) + body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute of one."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


_number: Final = st.integers(0, 2**32 - 1)
_ANSWERS: Final = st.builds(
    Answer,
    family=st.sampled_from([socket.AF_INET, socket.AF_INET6]),
    state=st.integers(0, 255),
    timer=st.integers(0, 255),
    retransmissions=st.integers(0, 255),
    ports=st.binary(min_size=4, max_size=4),
    source=st.binary(min_size=16, max_size=16),
    destination=st.one_of(st.binary(min_size=16, max_size=16), st.just(bytes(10) + b"\xff\xff\x7f\0\0\1")),
    interface=_number,
    cookie=st.binary(min_size=8, max_size=8),
    expires=_number,
    unread=_number,
    queued=_number,
    uid=_number,
    inode=st.integers(0, 5),
    info=st.binary(min_size=1, max_size=300),
)
_ATTRIBUTES: Final = st.lists(
    st.builds(attribute, st.integers(0, 30).filter(lambda kind: kind != INET_DIAG_INFO), st.binary(max_size=20)),
    max_size=3,
).map(b"".join)


def _written(answer: Answer, before: bytes = b"", after: bytes = b"") -> bytes:
    return message(_SOCKET, _BODY.pack(*answer[:-1]) + before + attribute(INET_DIAG_INFO, answer.info) + after)


_SOCKETS: Final = st.tuples(_ANSWERS, _ATTRIBUTES, _ATTRIBUTES).map(lambda each: _written(*each))
_LISTS: Final = st.tuples(
    st.lists(st.one_of(_SOCKETS, st.builds(message, st.just(_OTHER), st.binary(max_size=40)))).map(b"".join),
    st.one_of(
        st.just(b""),
        st.builds(message, st.sampled_from([_DONE, _ERROR]), st.one_of(st.binary(max_size=8), st.just(bytes(4)))),
    ),
).map(b"".join)


def _sockets_are_decoded(answers: Sequence[tuple[Answer, bytes, bytes]]) -> None:
    part = decode(b"".join(_written(*each) for each in answers), {3})
    assert part.answers == [answer for answer, _, _ in answers if answer.inode != 3]
    assert not part.done
    assert part.error is None


def _end_is_decoded(number: int) -> None:
    part = decode(message(_ERROR, struct.pack("=i", -number) + bytes(16)), ())
    assert part.done
    right = number if number <= 4095 else errno.EBADMSG  # no kernel has larger ones
    assert (part.error.errno if part.error else 0) == right
    assert part.error is None or part.error.strerror


def _decoded(data: bytes) -> None:
    part = decode(data, {3})
    assert part.error is None or str(part.error)
    for answer in part.answers:
        assert len(answer.info) < len(data)
        connection = TcpConnection(answer, (), judge(TcpInfo.from_bytes(answer.info)))
        assert connection.unacknowledged >= 0
        assert (connection.timer, connection.expires, connection.unanswered, connection.silence) is not None
        if answer.family in (socket.AF_INET, socket.AF_INET6):
            assert connection.local
            assert connection.peer


def _info_is_decoded(data: bytes) -> None:
    info = TcpInfo.from_bytes(data)
    for time in (info.rto, info.silence, info.rtt, info.min_rtt, idle_time_from_bytes(data)):
        assert time is None or 0 <= time < 2**32
    assert last_data_recv_from_bytes(data) == info.last_data_recv
    shorter = TcpInfo.from_bytes(data[: max(1, len(data) // 2)])  # of an older kernel
    assert all(value is None or value == same for value, same in zip(shorter, info, strict=True))


_TOKENS: Final = (
    message(_SOCKET, bytes(_BODY.size)),
    message(_SOCKET, bytes(_BODY.size) + attribute(INET_DIAG_INFO, b"")),
    message(_SOCKET, b""),
    message(_DONE, b""),
    _HEADER.pack(0, _SOCKET, 0, 0, 0),
    _HEADER.pack(2**32 - 1, _SOCKET, 0, 0, 0),
    _HEADER.pack(16, _OTHER, 0, 0, 0),
    message(_ERROR, struct.pack("=i", -(2**31))),
    bytes(4),
    struct.pack("=HH", 4, INET_DIAG_INFO),
    struct.pack("=HH", 65535, INET_DIAG_INFO),
)

PROPERTIES: Final = (
    Property(
        "netlink: what the kernel writes",
        st.lists(st.tuples(_ANSWERS, _ATTRIBUTES, _ATTRIBUTES), max_size=5),
        _sockets_are_decoded,
    ),
    Property(
        "netlink: the end of a list",
        st.one_of(st.integers(0, 2**31), st.sampled_from(list(errno.errorcode))),
        _end_is_decoded,
    ),
    Property("netlink: any bytes", pieces(_TOKENS), _decoded),
    Property("netlink: what was valid", edited(_LISTS, _TOKENS), _decoded),
    linear("netlink: time", pieces(_TOKENS, 4), st.one_of(pieces(_TOKENS, 4), _SOCKETS), _decoded),
    Property("tcp_info: any bytes", st.binary(min_size=1, max_size=300), _info_is_decoded),
)
