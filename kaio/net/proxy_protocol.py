"""The PROXY protocol, versions 1 and 2: what a proxy says of its client before the client's own first byte.

The specification is HAProxy's (doc/proxy-protocol.txt); numbers in brackets are its sections.

Rules kept here: no I/O. A parser takes bytes as they come, keeps no more of them than a header may have, and raises
`ProxyError` for everything that the specification does not allow. The parser is kaio's own because its core depends on
nothing that every program would have to install; it is fuzzed, and tried with HAProxy and nginx.
"""

from __future__ import annotations

import dataclasses
import re
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final, Literal, TypeAlias

from ..errors import KaioError

__all__ = ["NO_HEADER", "HeaderParser", "NoHeader", "ProxyError", "ProxyHeader", "ProxyProtocol", "ProxyTls"]

Network: TypeAlias = IPv4Network | IPv6Network
SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int] | str
"""As `peername`: host and port, for IPv6 with flow and scope; a path for a Unix socket."""


class ProxyError(KaioError, ValueError):
    """A PROXY header that is malformed, or missing where it is required."""


class ProxyProtocol:
    """Who may send PROXY headers to a listener, and whether they must.

    `trusted` are networks ("10.0.0.0/8"), addresses ("192.0.2.7"), and "unix" for the clients of a Unix socket. With
    mode "require" the connections of all others are refused, and every connection begins with a header. With mode
    "accept" others are ordinary clients, and those that are trusted may send a header.

    Raises TypeError, ValueError.
    """

    __slots__ = ("_networks", "_trusts_unix", "mode", "trusted")

    def __init__(
        self,
        trusted: Iterable[str | Network | IPv4Address | IPv6Address],
        *,
        mode: Literal["require", "accept"] = "require",
    ) -> None:
        if isinstance(trusted, (str, bytes)) or not isinstance(trusted, Iterable):
            raise TypeError(f"trusted must be a list of networks, such as ['10.0.0.0/8'], got {trusted!r}")
        if mode not in ("require", "accept"):
            raise ValueError(f"mode={mode!r}: must be 'require' or 'accept'")
        given = list(trusted)
        if not given:
            raise ValueError("trusted=[]: must name at least one network, or no header could ever be believed")
        self.mode: Literal["require", "accept"] = mode
        self._trusts_unix = "unix" in given
        self._networks = tuple(_network(each) for each in given if each != "unix")
        self.trusted: tuple[str, ...] = tuple(map(str, self._networks)) + ("unix",) * self._trusts_unix
        """The networks, as text."""

    def is_trusted(self, peername: Any) -> bool:
        """Whether the peer of a connection, as `get_extra_info("peername")` returns it, may send a header."""
        if not isinstance(peername, tuple):
            return self._trusts_unix
        try:
            address = ip_address(str(peername[0]).partition("%")[0])
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProxyProtocol) and (self.trusted, self.mode) == (other.trusted, other.mode)

    def __hash__(self) -> int:
        return hash((self.trusted, self.mode))

    def __repr__(self) -> str:
        return f"ProxyProtocol(trusted={list(self.trusted)!r}, mode={self.mode!r})"


def _network(given: object) -> Network:
    try:
        if not isinstance(given, (str, IPv4Address, IPv6Address, IPv4Network, IPv6Network)):
            raise ValueError("not a network")
        network = ip_network(given)
        mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
        # As `is_trusted` takes an IPv4 address in IPv6's dress for what it is.
        return network if mapped is None or network.prefixlen < 96 else IPv4Network((mapped, network.prefixlen - 96))
    except ValueError as exc:
        raise ValueError(f"trusted={given!r}: must be a network such as '10.0.0.0/8', or 'unix': {exc}") from None


# -- what a header says


@dataclasses.dataclass(frozen=True, slots=True)
class ProxyTls:
    """What the proxy says of its client's TLS connection [2.2.5]."""

    used: bool
    """Whether the client connected with TLS."""
    certificate: bool
    """Whether the client gave a certificate, over this connection or an earlier one of its session."""
    verified: bool
    """Whether that certificate was verified."""
    version: str | None = None
    common_name: str | None = None
    cipher: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What a proxy says of a connection."""

    version: Literal[1, 2]
    command: Literal["PROXY", "LOCAL"]
    """LOCAL: the proxy speaks for itself, to check our health, for example."""
    source: SocketAddress | None = None
    """The client's address; None where the proxy does not know it, or speaks for itself."""
    destination: SocketAddress | None = None
    """The address that the client connected to."""
    tlvs: tuple[tuple[int, bytes], ...] = ()
    """Further fields, type and value, in their order [2.2]."""

    def tlv(self, kind: int) -> bytes | None:
        """The value of the first field of a type; None where there is none."""
        return next((value for each, value in self.tlvs if each == kind), None)

    @property
    def alpn(self) -> bytes | None:
        """The protocol that the client's TLS has agreed on (PP2_TYPE_ALPN)."""
        return self.tlv(0x01)

    @property
    def authority(self) -> str | None:
        """The host name that the client asked for (PP2_TYPE_AUTHORITY)."""
        return _text(self.tlv(0x02))

    @property
    def unique_id(self) -> bytes | None:
        """The number that the proxy has given to the connection (PP2_TYPE_UNIQUE_ID)."""
        return self.tlv(0x05)

    @property
    def tls(self) -> ProxyTls | None:
        """The client's TLS connection (PP2_TYPE_SSL); None where the proxy does not speak of it."""
        value = self.tlv(0x20)
        if value is None or len(value) < 5:
            return None
        client, verify = value[0], int.from_bytes(value[1:5], "big")
        try:
            fields = dict(_split(value[5:]))
        except ValueError:
            fields = {}
        return ProxyTls(
            used=bool(client & 0x01),
            certificate=bool(client & 0x06),
            verified=bool(client & 0x06) and verify == 0,
            version=_text(fields.get(0x21)),
            common_name=_text(fields.get(0x22)),
            cipher=_text(fields.get(0x23)),
        )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace")


# -- parsing

_V1: Final = b"PROXY "
_V2: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V1_LONGEST: Final = 107  # bytes, with CRLF [2.1]
_V2_HEAD: Final = 16
_V2_LONGEST: Final = 4096  # bytes that are accepted; HAProxy's own headers have a few hundred
_PORT: Final = re.compile(r"0|[1-9][0-9]{0,4}", re.ASCII)
_CRC32C: Final = 0x03
_NOOP: Final = 0x04


class NoHeader:
    """The type of NO_HEADER."""

    def __repr__(self) -> str:
        return "NO_HEADER"


NO_HEADER: Final = NoHeader()
"""What a parser with mode "accept" returns when a connection does not begin with a header."""


class HeaderParser:
    """Finds a header at the beginning of a stream of bytes."""

    __slots__ = ("_data", "_is_required", "rest")

    def __init__(self, *, mode: Literal["require", "accept"] = "require") -> None:
        self._is_required = mode == "require"
        self._data = bytearray()
        self.rest: bytes = b""
        """Once there is a result: the bytes after the header, or all of them when there is none."""

    def feed(self, data: bytes) -> ProxyHeader | NoHeader | None:
        """Take the next bytes; return the header, NO_HEADER, or None when more bytes are needed.

        Raises `ProxyError`.
        """
        taken = self._data
        taken += data
        for signature, parse in ((_V2, self._parse_v2), (_V1, self._parse_v1)):
            if taken.startswith(signature):
                return parse()
            if signature.startswith(taken):
                return None
        if self._is_required:
            raise ProxyError(f"no PROXY header: it begins with {_quoted(taken)}")
        self.rest = bytes(taken)
        return NO_HEADER

    def _end(self, length: int) -> bytes:
        """Return the header, of that many bytes."""
        header, self.rest = bytes(self._data[:length]), bytes(self._data[length:])
        return header

    def _parse_v1(self) -> ProxyHeader | None:
        end = self._data.find(b"\r\n", 0, _V1_LONGEST)
        if end < 0:
            if len(self._data) >= _V1_LONGEST:
                raise ProxyError(f"a PROXY header of version 1 without an end: {_quoted(self._data)}")
            return None
        line = self._end(end + 2)[:-2]
        try:
            words = line.decode("ascii").split(" ")
        except UnicodeDecodeError:
            raise ProxyError(f"a PROXY header that is not ASCII: {_quoted(line)}") from None
        if words[1] == "UNKNOWN":
            return ProxyHeader(1, "PROXY")
        family = {"TCP4": socket.AF_INET, "TCP6": socket.AF_INET6}.get(words[1])
        if family is None or len(words) != 6:
            raise ProxyError(f"not a PROXY header: {_quoted(line)}")
        try:
            source, destination = (_v1_address(family, words[at], words[at + 2]) for at in (2, 3))
        except ValueError:
            raise ProxyError(f"a PROXY header with a wrong address or port: {_quoted(line)}") from None
        return ProxyHeader(1, "PROXY", source, destination)

    def _parse_v2(self) -> ProxyHeader | None:
        data = self._data
        if len(data) < _V2_HEAD:
            return None
        version, command, family, length = data[12] >> 4, data[12] & 0x0F, data[13], int.from_bytes(data[14:16], "big")
        if version != 2 or command not in (0, 1) or family >> 4 > 3 or family & 0x0F > 2:
            raise ProxyError(f"not a PROXY header of version 2: {_quoted(data)}")
        if _V2_HEAD + length > _V2_LONGEST:
            raise ProxyError(f"a PROXY header of {_V2_HEAD + length} bytes; at most {_V2_LONGEST} are accepted")
        if len(data) < _V2_HEAD + length:
            return None
        header = self._end(_V2_HEAD + length)
        size, unpack = _V2_ADDRESSES[family >> 4]
        body = header[_V2_HEAD:]
        is_local = command == 0
        if len(body) < size:
            if not is_local:
                raise ProxyError(f"a PROXY header that is too short for its addresses: {_quoted(header)}")
            size = len(body)
        try:
            tlvs = tuple(_split(body[size:]))
        except ValueError:
            raise ProxyError(f"a PROXY header with a field that is cut off: {_quoted(header)}") from None
        _check_sum(header, _V2_HEAD + size)
        tlvs = tuple(each for each in tlvs if each[0] != _NOOP)
        # Also without addresses where the transport is unspecified [2.2].
        if is_local or unpack is None or family & 0x0F == 0:
            return ProxyHeader(2, "LOCAL" if is_local else "PROXY", tlvs=tlvs)
        source, destination = unpack(body[:size])
        return ProxyHeader(2, "PROXY", source, destination, tlvs)


def _v1_address(family: int, host: str, port: str) -> SocketAddress:
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError(port)
    if family == socket.AF_INET:
        return str(IPv4Address(host)), int(port)
    if "%" in host:
        raise ValueError(host)
    return _ipv6(IPv6Address(host).packed), int(port), 0, 0


def _v4(body: bytes) -> tuple[SocketAddress, SocketAddress]:
    source, destination, source_port, destination_port = struct.unpack("!4s4sHH", body)
    return (str(IPv4Address(source)), source_port), (str(IPv4Address(destination)), destination_port)


def _ipv6(packed: bytes) -> str:
    """Write an address as getpeername() does: IPv4 addresses in IPv6's dress with dots."""
    return socket.inet_ntop(socket.AF_INET6, packed)


def _v6(body: bytes) -> tuple[SocketAddress, SocketAddress]:
    source, destination, source_port, destination_port = struct.unpack("!16s16sHH", body)
    return (_ipv6(source), source_port, 0, 0), (_ipv6(destination), destination_port, 0, 0)


def _unix(body: bytes) -> tuple[SocketAddress, SocketAddress]:
    source, destination = body[:108], body[108:]
    return _path(source), _path(destination)


def _path(name: bytes) -> str:
    return name.rstrip(b"\0").decode("utf-8", "surrogateescape")


_V2_ADDRESSES: Final[tuple[tuple[int, Any], ...]] = ((0, None), (12, _v4), (36, _v6), (216, _unix))


def _split(data: bytes) -> Iterable[tuple[int, bytes]]:
    """Split fields of type, length and value. Raises ValueError when one is cut off."""
    at = 0
    while at < len(data):
        end = at + 3
        if end <= len(data):
            end += int.from_bytes(data[at + 1 : at + 3], "big")
        if end > len(data) or at + 3 > len(data):
            raise ValueError("cut off")
        yield data[at], data[at + 3 : end]
        at = end


def _check_sum(header: bytes, at: int) -> None:
    """Compare a header, whose fields begin there, with its checksum: that of the header with zeros for it [2.2.3]."""
    for kind, value in _split(header[at:]):
        at += 3
        if kind == _CRC32C:
            blank = header[:at] + bytes(len(value)) + header[at + len(value) :]
            if len(value) != 4 or _crc32c(blank) != int.from_bytes(value, "big"):
                raise ProxyError(f"a PROXY header whose checksum does not match: {_quoted(header)}")
        at += len(value)


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reflected (RFC 9260, appendix A)
    return byte


_CRC_TABLE: Final = tuple(map(_crc_of, range(256)))


def _quoted(data: bytes | bytearray) -> str:
    return repr(bytes(data[:64])) + ("..." if len(data) > 64 else "")
