"""The PROXY protocol: headers as the specification has them, in pieces of any size, and whatever else clients send."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

from hypothesis import strategies as st

from kaio.net.proxy_protocol import HeaderParser, NoHeader, ProxyError, ProxyHeader

from .inputs import edited, linear, pieces
from .search import Property

__all__ = ["PROPERTIES"]

_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_LONGEST: Final = 4096  # bytes of a header

_Fields: TypeAlias = Sequence[tuple[int, bytes]]
_Result: TypeAlias = tuple[ProxyHeader | NoHeader | str | None, bytes]
_Mode: TypeAlias = Literal["require", "accept"]


def _version_2(command: int, family: int, body: bytes, fields: _Fields) -> bytes:
    whole = body + b"".join(struct.pack("!BH", kind, len(value)) + value for kind, value in fields)
    return _SIGNATURE + bytes([0x20 | command, family]) + struct.pack("!H", len(whole)) + whole


_PORT: Final = st.integers(0, 65535)
_FIELDS: Final = st.lists(
    st.tuples(st.sampled_from([0x01, 0x02, 0x05, 0x20, 0x21, 0x30, 0xE0]), st.binary(max_size=40)), max_size=5
)


def _host(family: socket.AddressFamily) -> st.SearchStrategy[bytes]:
    size = 4 if family == socket.AF_INET else 16
    return st.binary(min_size=size, max_size=size)


def _ends(family: socket.AddressFamily) -> st.SearchStrategy[tuple[bytes, bytes, int, int]]:
    return st.tuples(_host(family), _host(family), _PORT, _PORT)


_FAMILIES: Final = st.sampled_from([socket.AF_INET, socket.AF_INET6])
_BOTH_ENDS: Final = _FAMILIES.flatmap(lambda family: st.tuples(st.just(family), _ends(family)))


def _address(family: socket.AddressFamily, host: bytes, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    text = socket.inet_ntop(family, host)
    return (text, port) if family == socket.AF_INET else (text, port, 0, 0)


def _fed(data: bytes, sizes: Sequence[int], mode: _Mode) -> _Result:
    """Feed a parser with pieces of these sizes, again and again: its result, or its error, and what is left."""
    parser = HeaderParser(mode=mode)
    at, turn = 0, 0
    while at < len(data):
        piece = data[at : at + sizes[turn % len(sizes)]]
        at, turn = at + len(piece), turn + 1
        try:
            found = parser.feed(piece)
        except ProxyError as exc:
            return str(exc)[:20], b""
        if found is not None:
            return found, parser.rest + data[at:]
        assert len(parser._data) <= _LONGEST
    return None, data


def _header_is_found(
    example: tuple[int, tuple[socket.AddressFamily, tuple[bytes, bytes, int, int]], _Fields, bytes, Sequence[int]],
) -> None:
    version, (family, (source, destination, *ports)), fields, rest, sizes = example
    if version == 1:
        name, fields = "TCP4" if family == socket.AF_INET else "TCP6", []
        hosts = " ".join(socket.inet_ntop(family, host) for host in (source, destination))
        header = f"PROXY {name} {hosts} {ports[0]} {ports[1]}\r\n".encode()
    else:
        body = source + destination + struct.pack("!HH", *ports)
        header = _version_2(1, 0x11 if family == socket.AF_INET else 0x21, body, fields)
    found, left = _fed(header + rest, sizes, "require")
    assert isinstance(found, ProxyHeader)
    assert found.version == version
    assert found.source == _address(family, source, ports[0])
    assert found.destination == _address(family, destination, ports[1])
    assert list(found.tlvs) == list(fields)
    assert left == rest


def _any_bytes(example: tuple[bytes, Sequence[int], _Mode]) -> None:
    data, sizes, mode = example
    found, left = _fed(data, sizes, mode)
    whole, rest = _fed(data, [max(1, len(data))], mode)
    assert type(found) is type(whole)
    assert isinstance(found, str) or (found, left) == (whole, rest)
    if isinstance(found, ProxyHeader):
        assert (found.alpn, found.unique_id, found.tls, found.authority) is not None
        assert data.endswith(left)
        assert len(data) - len(left) <= _LONGEST


_TOKENS: Final = (
    *(
        b"PROXY ",
        b"UNKNOWN",
        b"TCP4 ",
        b"TCP6 ",
        b"127.0.0.1 ",
        b"::1 ",
        b"1 2",
        b"\r\n",
        _SIGNATURE,
        b"\x21\x11",
        b"\x20\0",
    ),
    *(
        b"\0\x0c",
        b"\xff\xff",
        b"\x03\0\x04abcd",
        b"\x20\0\x05\x01\0\0\0\0",
        b"\x04\0\0",
        b"1" * 107,
        b"GET / HTTP/1.1\r\n",
    ),
    _version_2(1, 0x11, bytes(12), [(0x20, b"\x07\0\0\0\0\x21\0\x03TLS")]),
    _version_2(1, 0x11, bytes(12), [(4, bytes(4000))]),
    _version_2(1, 0x31, bytes(216), []),
    _version_2(0, 0, b"", []),
)
_SIZES: Final = st.lists(st.sampled_from([1, 2, 3, 7, 12, 16, 100, 5000]), min_size=1, max_size=4)
_MODES: Final = st.sampled_from(["require", "accept"])
_BYTES: Final = st.one_of(pieces(_TOKENS, 8), edited(st.sampled_from(_TOKENS), _TOKENS))

PROPERTIES: Final = (
    Property(
        "PROXY: headers of both versions, in pieces",
        st.tuples(st.sampled_from([1, 2]), _BOTH_ENDS, _FIELDS, st.binary(max_size=20), _SIZES),
        _header_is_found,
    ),
    Property("PROXY: any bytes, in pieces", st.tuples(_BYTES, _SIZES, _MODES), _any_bytes),
    linear("PROXY: time", _BYTES, _BYTES, lambda data: _fed(data, [1], "accept")),
    linear("PROXY: time with large pieces", _BYTES, _BYTES, lambda data: _fed(data, [4000], "accept")),
)
