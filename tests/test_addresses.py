"""Addresses: parsing, formatting, and the errors of invalid ones."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest

from kaio import AddressError, TcpAddress, UnixAddress
from kaio.addresses import Address, parse_address, tcp_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9000", TcpAddress("127.0.0.1", 9000)),
        ("0.0.0.0:0", TcpAddress("0.0.0.0", 0)),
        ("localhost:65535", TcpAddress("localhost", 65535)),
        ("db-1.example.org:5432", TcpAddress("db-1.example.org", 5432)),
        ("db_1:5432", TcpAddress("db_1", 5432)),
        ("bücher.example:80", TcpAddress("bücher.example", 80)),
        ("[::1]:9000", TcpAddress("::1", 9000)),
        ("[::]:443", TcpAddress("::", 443)),
        ("[2001:db8::1]:443", TcpAddress("2001:db8::1", 443)),
        ("[::ffff:192.0.2.1]:80", TcpAddress("::ffff:192.0.2.1", 80)),
        ("[fe80::1%eth0]:80", TcpAddress("fe80::1%eth0", 80)),
        (":9000", TcpAddress(None, 9000)),
        ("*:9000", TcpAddress(None, 9000)),
        ("unix:/run/app.sock", UnixAddress("/run/app.sock")),
        ("unix:app.sock", UnixAddress("app.sock")),
        ("unix:/tmp/with:colon and space", UnixAddress("/tmp/with:colon and space")),
        ("unix:" + "x" * 107, UnixAddress("x" * 107)),
        (pathlib.PurePosixPath("/run/app.sock"), UnixAddress("/run/app.sock")),
        (pathlib.PurePosixPath("127.0.0.1:9000"), UnixAddress("127.0.0.1:9000")),
    ],
)
def test_parse_address_accepts_every_form(text: str | os.PathLike[str], address: Address) -> None:
    """host:port, [host]:port, :port, unix:path, and a path object."""
    parsed = parse_address(text)
    assert parsed == address
    assert type(parsed) is type(address)


@pytest.mark.parametrize(
    "text", ["127.0.0.1:9000", "localhost:1", "[::1]:9000", "[fe80::1%eth0]:80", ":9000", "unix:/run/app.sock"]
)
def test_text_of_an_address_parses_to_the_same_address(text: str) -> None:
    """str and parse_address are inverse."""
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "has no port; write host:port"),
        ("localhost", "has no port; write host:port"),
        ("9000", "has no port"),
        ("/run/app.sock", "has no port"),
        ("[::1]", "has no port"),
        ("localhost:", "the port is ''"),
        (":", "the port is ''"),
        ("localhost:http", "the port is 'http', but must be a whole number from 0 to 65535"),
        ("localhost:65536", "the port is '65536', but must be a whole number from 0 to 65535"),
        ("localhost:100000", "the port is '100000'"),
        ("localhost:-1", "the port is '-1'"),
        ("localhost:+1", "the port is '+1'"),
        ("localhost:80.0", "the port is '80.0'"),
        ("localhost: 80", "the port is ' 80'"),
        ("localhost:80 ", "the port is '80 '"),
        ("localhost:80\n", "the port is '80\\n'"),
        ("localhost:８０", "the port is '８０'"),
        ("localhost:٨٠", "the port is '٨٠'"),
        ("::1:9000", "has more than one colon; write an IPv6 address in brackets"),
        ("2001:db8::1:443", "has more than one colon"),
        ("tcp:localhost:80", "has more than one colon"),
        ("http://localhost:80", "is a URL"),
        ("[::1:9000", "has an unmatched bracket"),
        ("::1]:9000", "has an unmatched bracket"),
        ("[]:9000", "'' in brackets is not an IPv6 address"),
        ("[localhost]:9000", "'localhost' in brackets is not an IPv6 address"),
        ("[127.0.0.1]:9000", "'127.0.0.1' in brackets is not an IPv6 address"),
        ("[::1%]:9000", "'::1%' in brackets is not an IPv6 address"),
        ("[:::]:9000", "':::' in brackets is not an IPv6 address"),
        ("[1:2]:9000", "'1:2' in brackets is not an IPv6 address"),
        ("local host:80", "'local host' is not a valid host name"),
        (" localhost:80", "' localhost' is not a valid host name"),
        ("//localhost:80", "'//localhost' is not a valid host name"),
        ("user@localhost:80", "'user@localhost' is not a valid host name"),
        ("local\0host:80", "'local\\x00host' is not a valid host name"),
        ("unix:", "the path is empty; write 'unix:/run/app.sock'"),
        ("unix:/run/\0.sock", "the path contains a NUL character"),
        ("unix:" + "x" * 108, "the path is longer than 107 bytes"),
        ("unix:" + "ü" * 54, "the path is longer than 107 bytes"),
        (pathlib.PurePosixPath("x" * 108), "the path is longer than 107 bytes"),
        (None, "must be a string such as '127.0.0.1:9000'"),
        (9000, "must be a string such as '127.0.0.1:9000'"),
        (b"localhost:80", "must be a string such as '127.0.0.1:9000'"),
        (("localhost", 80), "must be a string such as '127.0.0.1:9000'"),
    ],
)
def test_invalid_addresses_are_refused(text: Any, part: str) -> None:
    """The error has the value and says what is wrong with it."""
    with pytest.raises(AddressError) as caught:
        parse_address(text)
    assert type(caught.value) is AddressError
    assert caught.value.address is text
    assert str(caught.value) == f"address {text!r}: {caught.value.problem}"
    assert part in caught.value.problem


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("localhost", 80, TcpAddress("localhost", 80)),
        ("localhost", "80", TcpAddress("localhost", 80)),
        ("::1", 0, TcpAddress("::1", 0)),
        (None, 65535, TcpAddress(None, 65535)),
        ("", 80, TcpAddress(None, 80)),
    ],
)
def test_host_and_port_may_be_given_separately(host: str | None, port: object, address: TcpAddress) -> None:
    """A port is a number or its digits; None and an empty host mean all interfaces."""
    assert tcp_address(host, port) == address


@pytest.mark.parametrize(
    ("host", "port", "part"),
    [
        ("localhost", 65536, "the port is '65536'"),
        ("localhost", -1, "the port is '-1'"),
        ("localhost", "http", "the port is 'http'"),
        ("localhost", "", "the port is ''"),
        ("localhost", "８０", "the port is '８０'"),
        ("localhost", True, "the port must be a whole number from 0 to 65535"),
        ("localhost", None, "the port must be a whole number from 0 to 65535"),
        ("localhost", 80.0, "the port must be a whole number from 0 to 65535"),
        ("localhost", b"80", "the port must be a whole number from 0 to 65535"),
        (b"localhost", 80, "the host must be a string or None"),
        (127, 80, "the host must be a string or None"),
        (("localhost", 80), 80, "the host must be a string or None"),
    ],
)
def test_invalid_hosts_and_ports_are_refused(host: Any, port: object, part: str) -> None:
    """The same exception as for the text of an address."""
    with pytest.raises(AddressError) as caught:
        tcp_address(host, port)
    assert part in caught.value.problem
