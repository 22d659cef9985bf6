"""The PROXY protocol's parser: what is a header, what is none, and that nothing else happens."""

from __future__ import annotations

import struct
from ipaddress import IPv4Network, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kaio
from kaio.net.proxy_protocol import NO_HEADER, HeaderParser

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def crc32c(data: bytes) -> int:
    """The checksum bit by bit, without a table."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def v2(family: int = 0x11, body: bytes | None = None, tlvs: bytes = b"", command: int = 0x21) -> bytes:
    """A header of version 2."""
    if body is None:
        body = b"\xc0\x00\x02\x01\xc0\x00\x02\x02" + struct.pack("!HH", 50000, 443)
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(body) + len(tlvs)) + body + tlvs


def tlv(kind: int, value: bytes) -> bytes:
    """A field."""
    return bytes([kind]) + struct.pack("!H", len(value)) + value


def with_checksum(header_of: Any) -> bytes:
    """A header with its checksum, as `header_of(checksum field)` makes it."""
    blank = header_of(tlv(3, bytes(4)))
    return bytes(header_of(tlv(3, struct.pack("!I", crc32c(blank)))))


V6 = ip_address("2001:db8::1").packed + ip_address("2001:db8::2").packed + struct.pack("!HH", 1, 65535)
UNIX = b"/run/a".ljust(108, b"\0") + b"/run/b".ljust(108, b"\0")
FOUR = (("192.0.2.1", 50000), ("192.0.2.2", 443))
SIX = (("2001:db8::1", 1, 0, 0), ("2001:db8::2", 65535, 0, 0))

GOOD: dict[str, tuple[bytes, Any, Any]] = {
    "v1 TCP4": (b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 443\r\n", *FOUR),
    "v1 TCP6": (b"PROXY TCP6 2001:db8::1 2001:db8:0:0::2 1 65535\r\n", *SIX),
    "v1 mapped": (
        b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:c000:202 50000 443\r\n",
        ("::ffff:192.0.2.1", 50000, 0, 0),
        ("::ffff:192.0.2.2", 443, 0, 0),
    ),
    "v1 port 0": (b"PROXY TCP4 0.0.0.0 255.255.255.255 0 0\r\n", ("0.0.0.0", 0), ("255.255.255.255", 0)),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", None, None),
    "v1 UNKNOWN and more": (b"PROXY UNKNOWN ffff:f...f 65535 what ever\r\n", None, None),
    "v1 longest": (b"PROXY UNKNOWN " + b"f" * (107 - 16) + b"\r\n", None, None),
    "v2 TCP4": (v2(), *FOUR),
    "v2 UDP4": (v2(0x12), *FOUR),
    "v2 TCP6": (v2(0x21, V6), *SIX),
    "v2 unix": (v2(0x31, UNIX), "/run/a", "/run/b"),
    "v2 unspecified": (v2(0x00, b""), None, None),
    "v2 unspecified with a body": (v2(0x00, tlv(4, bytes(50))), None, None),
    "v2 unspecified transport": (v2(0x10), None, None),
    "v2 local": (v2(0x00, b"", command=0x20), None, None),
    "v2 local with addresses": (v2(command=0x20), None, None),
    "v2 fields": (v2(tlvs=tlv(1, b"h2") + tlv(4, bytes(9)) + tlv(0xE0, b"")), *FOUR),
    "v2 checksum": (with_checksum(lambda check: v2(tlvs=tlv(4, b"ab") + check + tlv(5, b"id"))), *FOUR),
    "v2 longest": (v2(tlvs=tlv(4, bytes(4096 - 16 - 12 - 3))), *FOUR),
}

BAD: dict[str, bytes] = {
    "nothing of the kind": b"GET / HTTP/1.1\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00",
    "lower case": b"proxy TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
    "v1 without CRLF": b"PROXY TCP4 " + b"1" * 100,
    "v1 too long": b"PROXY UNKNOWN " + b"f" * (108 - 16) + b"\r\n",
    "v1 LF": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n" + b" " * 107,
    "v1 two spaces": b"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n",
    "v1 trailing space": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n",
    "v1 missing": b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n",
    "v1 family": b"PROXY TCP5 192.0.2.1 192.0.2.2 1 2\r\n",
    "v1 nothing": b"PROXY \r\n",
    "v1 mixed families": b"PROXY TCP4 2001:db8::1 192.0.2.2 1 2\r\n",
    "v1 leading zero": b"PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n",
    "v1 zone": b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n",
    "v1 port sign": b"PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n",
    "v1 port zero": b"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n",
    "v1 port large": b"PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n",
    "v1 port empty": b"PROXY TCP4 192.0.2.1 192.0.2.2  2\r\n",
    "v1 not ASCII": "PROXY TCP4 192.0.2.1 192.0.2.2 ١ 2\r\n".encode(),
    "v1 newline": b"PROXY TCP4 192.0.2.1\n192.0.2.2 1 2 3\r\n",
    "v2 version": v2(command=0x11),
    "v2 command": v2(command=0x22),
    "v2 family": v2(0x41),
    "v2 transport": v2(0x13),
    "v2 short addresses": v2(body=b"\xc0\x00\x02\x01"),
    "v2 short v6": v2(0x21),
    "v2 short unix": v2(0x31),
    "v2 cut field": v2(tlvs=b"\x01\x00\x09ab"),
    "v2 cut head of a field": v2(tlvs=b"\x01\x00"),
    "v2 checksum": v2(tlvs=tlv(3, b"\0\0\0\1")),
    "v2 short checksum": v2(tlvs=tlv(3, b"\0")),
    "v2 too long": v2(tlvs=tlv(4, bytes(4096 - 16 - 12 - 2))),
}


def feed_all(parser: HeaderParser, data: bytes, step: int) -> None:
    """Feed in pieces."""
    for at in range(0, len(data), step):
        parser.feed(data[at : at + step])


@pytest.mark.parametrize("mode", ["require", "accept"])
@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("rest", [b"", b"\x16\x03 and more"])
@pytest.mark.parametrize("name", GOOD)
def test_headers_are_found_however_they_come(name: str, rest: bytes, step: int, mode: Any) -> None:
    """And nothing of what follows is lost."""
    header, source, destination = GOOD[name]
    parser = HeaderParser(mode=mode)
    data, at, found = header + rest, 0, None
    while found is None:
        assert at < len(data)
        found = parser.feed(data[at : at + step])
        at += step
        assert found is None or at >= len(header)
    assert isinstance(found, kaio.ProxyHeader)
    assert (found.source, found.destination) == (source, destination)
    assert found.version == int(name[1])
    assert parser.rest + data[at:] == rest


@pytest.mark.parametrize("step", [1, 10_000])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_header_is_refused(name: str, step: int) -> None:
    """In one line, which quotes no more than its beginning."""
    parser = HeaderParser()
    with pytest.raises(kaio.ProxyError) as caught:
        feed_all(parser, BAD[name], step)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 400


@pytest.mark.parametrize("data", [b"GET /", b"PRO\n", b"\r\n\r\nhello", b"x"])
def test_mode_accept_gives_everything_back(data: bytes) -> None:
    """Also what looked like a header for a while."""
    parser = HeaderParser(mode="accept")
    found = [parser.feed(data[at : at + 1]) for at in range(len(data))]
    first = next(at for at, each in enumerate(found) if each is not None)
    assert found[first] is NO_HEADER
    assert repr(NO_HEADER) == "NO_HEADER"
    whole = HeaderParser(mode="accept")
    assert whole.feed(data) is NO_HEADER
    assert whole.rest == data


def test_fields_are_readable() -> None:
    """Those of the specification by name, all others by their number."""
    sub = tlv(0x21, b"TLSv1.3") + tlv(0x22, "Bärbel\n".encode()) + tlv(0x23, b"AES")
    tls = tlv(0x20, b"\x07" + struct.pack("!I", 0) + sub)
    data = v2(tlvs=tlv(1, b"h2") + tlv(2, b"example.org") + tlv(5, b"\x01\x02") + tls + tlv(0xEA, b"vpce-1"))
    header: Any = HeaderParser().feed(data)
    assert (header.alpn, header.authority, header.unique_id) == (b"h2", "example.org", b"\x01\x02")
    assert header.tls == kaio.ProxyTls(True, True, True, "TLSv1.3", "Bärbel\n", "AES")
    assert header.tlv(0xEA) == b"vpce-1"
    assert header.tlv(0xEB) is None
    plain: Any = HeaderParser().feed(v2())
    assert (plain.alpn, plain.authority, plain.unique_id, plain.tls, plain.tlvs) == (None, None, None, None, ())
    odd: Any = HeaderParser().feed(v2(tlvs=tlv(0x20, b"\x01\0\0\0\1\xff")))
    assert odd.tls == kaio.ProxyTls(True, False, False)
    short: Any = HeaderParser().feed(v2(tlvs=tlv(0x20, b"\x01")))
    assert short.tls is None


@given(st.binary(max_size=300), st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11"]))
def test_anything_is_a_header_or_an_error_or_unfinished(data: bytes, start: bytes) -> None:
    """No other exception, whatever comes; and the same in one piece and in many."""
    ends: list[Any] = []
    for step in (1, 13, 1000):
        parser = HeaderParser()
        found: Any = None
        try:
            for at in range(0, len(start + data), step):
                found = parser.feed((start + data)[at : at + step])
                if found is not None:
                    break
        except kaio.ProxyError:
            found = "error"
        ends.append(found)
    assert ends[0] == ends[1] == ends[2]


@given(st.sampled_from(sorted(GOOD)), st.data())
def test_a_damaged_header_does_no_harm(name: str, data: st.DataObject) -> None:
    """One byte is another."""
    header = bytearray(GOOD[name][0])
    header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        HeaderParser().feed(bytes(header))
    except kaio.ProxyError as exc:
        assert str(exc).isprintable()  # noqa: PT017 - it need not be raised


@pytest.mark.parametrize(
    ("peername", "trusted"),
    [
        (("10.1.2.3", 5), True),
        (("11.1.2.3", 5), False),
        (("::ffff:10.1.2.3", 5, 0, 0), True),
        (("2001:db8::7", 5, 0, 0), True),
        (("2001:db9::7", 5, 0, 0), False),
        (("fe80::1%eth0", 5, 0, 2), True),
        (("192.0.2.7", 5), True),
        (("192.0.2.8", 5), False),
        (("host", 5), False),
        ("", False),
        (b"\0x", False),
    ],
)
def test_who_is_trusted(peername: Any, trusted: bool) -> None:
    """Networks and addresses; an IPv4 address in IPv6's clothes is an IPv4 address."""
    given: list[Any] = ["10.0.0.0/8", "2001:db8::/32", "fe80::/10", IPv4Network("192.0.2.7/32")]
    assert kaio.ProxyProtocol(given).is_trusted(peername) is trusted
    if "10." in str(peername):
        assert kaio.ProxyProtocol(["::ffff:10.0.0.0/104"]).is_trusted(peername) is trusted
    assert kaio.ProxyProtocol(["unix", "192.0.2.1"]).is_trusted("") is True
    assert kaio.ProxyProtocol(["unix"]).is_trusted(("10.1.2.3", 5)) is False


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"trusted": "10.0.0.0/8"}, TypeError, r"\['10.0.0.0/8'\]"),
        ({"trusted": 5}, TypeError, "5"),
        ({"trusted": []}, ValueError, "at least one"),
        ({"trusted": ["10.0.0.1/8"]}, ValueError, "10.0.0.1/8.*host bits"),
        ({"trusted": ["example.org"]}, ValueError, "example.org"),
        ({"trusted": [167772160]}, ValueError, "167772160"),
        ({"trusted": ["10.0.0.0/8"], "mode": "maybe"}, ValueError, "maybe"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, error: type[Exception], text: str) -> None:
    """With a message that says what would do."""
    with pytest.raises(error, match=text):
        kaio.ProxyProtocol(**arguments)


def test_it_has_a_value_and_a_repr() -> None:
    """Two that say the same are equal."""
    one = kaio.ProxyProtocol(["10.0.0.0/8", "unix"], mode="accept")
    assert one == kaio.ProxyProtocol(["10.0.0.0/8", "unix"], mode="accept") != kaio.ProxyProtocol(["unix"])
    assert len({one, eval(repr(one), {"ProxyProtocol": kaio.ProxyProtocol})}) == 1
