"""Addresses and their text: `127.0.0.1:9000`, `[::1]:9000`, `:9000`, `unix:/run/app.sock`.

Rules kept here: no I/O, so no host name is resolved. An invalid address raises `AddressError`, which says why.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Final, NamedTuple, TypeAlias

from .errors import AddressError

__all__ = ["Address", "TcpAddress", "UnixAddress", "make_address", "parse_address", "tcp_address"]

_PORT = re.compile(r"[0-9]{1,5}")
_HOST = re.compile(r"[^\s\x00-\x1f\x7f\[\]/@#?:]+")
_ZONE = re.compile(r"[^\s\x00-\x1f\x7f\[\]/%:]+")
_MAX_HOST: Final = 255  # bytes of a name (RFC 1035 2.3.4)
_MAX_LABEL: Final = 63  # bytes between two dots (RFC 1035 2.3.4)
_MAX_ZONE: Final = 15  # bytes of an interface's name (IFNAMSIZ)
_MAX_UNIX: Final = 107  # sun_path has 108 bytes, the last of them NUL (unix(7))


class TcpAddress(NamedTuple):
    """A host and a port. The host is None for all interfaces."""

    host: str | None
    port: int

    def __str__(self) -> str:
        host = self.host or ""
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class UnixAddress(NamedTuple):
    """The path of a Unix socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address: TypeAlias = TcpAddress | UnixAddress


def parse_address(text: str | os.PathLike[str]) -> Address:
    """Parse the text of an address.

    `host:port`; `[host]:port` for IPv6; `:port` and `*:port` for all interfaces; `unix:path`. A path object is the
    path of a Unix socket. Raises `AddressError`.
    """
    if isinstance(text, os.PathLike):
        return _unix(os.fsdecode(text), text)
    if not isinstance(text, str):
        raise AddressError(text, "must be a string such as '127.0.0.1:9000', '[::1]:9000' or 'unix:/run/app.sock'")
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"), text)
    if "://" in text:
        raise AddressError(text, "is a URL; write host:port, such as '127.0.0.1:9000'")
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        raise AddressError(text, "has no port; write host:port, such as '127.0.0.1:9000', or unix:PATH")
    return TcpAddress(_host(host, text), _port(port, text))


def make_address(host: str | os.PathLike[str] | Address | None, port: object = None) -> Address:
    """Make an address of a host and a port, or of an address or text that has both. Raises `AddressError`."""
    if isinstance(host, (TcpAddress, UnixAddress)):
        if port is not None:
            raise AddressError(str(host), f"is a complete address, so port={port!r} cannot be given too")
        return host
    if port is None and host is not None:
        return parse_address(host)
    return tcp_address(os.fspath(host) if isinstance(host, os.PathLike) else host, port)


def tcp_address(host: str | None, port: object) -> TcpAddress:
    """Make an address of a host and a port. Raises `AddressError`."""
    if host is not None and not isinstance(host, str):
        raise AddressError(host, "the host must be a string or None")
    if isinstance(port, bool) or not isinstance(port, (int, str)):
        raise AddressError(port, "the port must be a whole number from 0 to 65535")
    if host and host != "*" and not _is_host(host):
        raise AddressError(host, "is not a valid host name; write an IPv6 address without brackets and without a port")
    return TcpAddress(None if host in (None, "", "*") else host, _port(str(port), port))


def _host(host: str, whole: str) -> str | None:
    if host in ("", "*"):
        return None
    if host.startswith("[") and host.endswith("]"):
        if not _is_ipv6(host[1:-1]):
            raise AddressError(whole, f"{host[1:-1]!r} in brackets is not an IPv6 address")
        return host[1:-1]
    if host.startswith("[") or host.endswith("]"):
        raise AddressError(whole, "has an unmatched bracket; write '[::1]:9000'")
    if ":" in host:
        raise AddressError(whole, "has more than one colon; write an IPv6 address in brackets, such as '[::1]:9000'")
    if not _is_host(host):
        raise AddressError(whole, f"{host!r} is not a valid host name")
    return host


def _is_host(host: str) -> bool:
    """Whether it can be looked up: an IPv6 address, or a name."""
    if ":" in host:
        return _is_ipv6(host)
    return len(host) <= _MAX_HOST and _HOST.fullmatch(host) is not None and _can_be_encoded(host)


def _is_ipv6(text: str) -> bool:
    address, percent, zone = text.partition("%")
    if percent and not (len(zone) <= _MAX_ZONE and _ZONE.fullmatch(zone) and _can_be_encoded(text)):
        return False
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return True


def _can_be_encoded(host: str) -> bool:
    """Whether getaddrinfo() can encode it; otherwise it would raise a UnicodeError, which is no OSError."""
    if host.isascii():  # the codec and its tables take 14 ms to load, and are not needed
        return all(0 < len(label) <= _MAX_LABEL for label in host.removesuffix(".").split("."))
    try:
        host.encode("idna")
    except UnicodeError:  # a label that is empty or longer than 63 bytes, or characters that no name may have
        return False
    return True


def _port(text: str, whole: object) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise AddressError(whole, f"the port is {text!r}, but must be a whole number from 0 to 65535")
    return int(text)


def _unix(path: str, whole: object) -> UnixAddress:
    if not path:
        raise AddressError(whole, "the path is empty; write 'unix:/run/app.sock'")
    if "\0" in path:
        raise AddressError(whole, "the path contains a NUL character")
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError as exc:
        raise AddressError(whole, f"the path cannot be encoded: {exc.reason}") from None
    if size > _MAX_UNIX:
        raise AddressError(whole, f"the path is longer than {_MAX_UNIX} bytes")
    return UnixAddress(path)
