"""Policies, times, addresses: what users write."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Final

from hypothesis import strategies as st

from kaio.addresses import Address, TcpAddress, UnixAddress, make_address, parse_address
from kaio.errors import AddressError, PolicyError
from kaio.policy import AUTO, MAX_COUNT, MAX_SECONDS, Keepalive, parse_time
from kaio.policy.units import format_seconds

from .inputs import linear, names, text_of
from .search import Property, tells_why

__all__ = ["PROPERTIES"]


# -- policies

_WORDS: Final = (
    *("idle", "interval", "count", "user_timeout", "stalled", "detect", "hold", "on", "off", "auto", "none", "system"),
    *(
        "keep",
        "drop",
        "=",
        ":",
        ",",
        "20s",
        "10s",
        "4",
        "1m30s",
        "500ms",
        "0.5",
        "1e3",
        "9" * 190,
        "0." + "0" * 190 + "1",
    ),
    *(
        " ",
        "\t",
        "\u0663",
        "\u00b2",
        "İ",
        "ſ",
        "-1",
        "+1",
        "inf",
        "nan",
        "20s:10s:4",
        "idle=20s",
        "detect=30s",
        "32767",
        "d",
    ),
)
_POLICY_TEXTS: Final = text_of(_WORDS)


def _policy_is_parsed(text: str) -> None:
    try:
        policy = Keepalive.parse(text)
    except PolicyError as exc:
        tells_why(exc)
    else:
        assert Keepalive.parse(str(policy)) == policy
        assert policy.detection_time is None or policy.detection_time > 0


@st.composite
def _policies(draw: st.DrawFn) -> Keepalive:
    seconds = st.one_of(st.none(), st.integers(1, MAX_SECONDS), st.floats(0.001, MAX_SECONDS))
    idle, interval = draw(seconds), draw(seconds)
    count = draw(st.one_of(st.none(), st.integers(1, MAX_COUNT)))
    least = (idle or 0) + 2 * (interval or 0) + 3
    user_timeout = draw(st.one_of(st.just(AUTO), st.none(), st.floats(least, 2_147_483)))
    # The kernel cannot enforce a detection time of more than 24 days, and such a policy is refused.
    ways = ["keep"] if user_timeout is AUTO and (interval or 0) * (count or 0) > 2_000_000 else ["keep", "drop"]
    return Keepalive(idle, interval, count, user_timeout=user_timeout, stalled=draw(st.sampled_from(ways)))


def _policy_is_written(policy: Keepalive) -> None:
    assert Keepalive.parse(str(policy)) == policy
    assert Keepalive.from_env({"KAIO_KEEPALIVE": str(policy)}) == policy


_ENVIRONMENTS: Final = st.dictionaries(
    st.sampled_from(["KAIO_KEEPALIVE", "KEEPALIVE", "KEEPIDLE", "KEEPINTVL", "KEEPCNT"]), text_of(_WORDS, 3), max_size=5
)


def _environment_is_read(environ: Mapping[str, str]) -> None:
    named = None
    try:
        policy = Keepalive.from_env(environ)
    except PolicyError as exc:
        tells_why(exc)
        named = exc.field
    else:
        assert Keepalive.parse(str(policy)) == policy
    assert named is None or named in environ


def _time_is_read(text: str) -> None:
    try:
        seconds = parse_time("idle", text)
    except PolicyError as exc:
        tells_why(exc)
    else:
        assert seconds >= 0


def _time_is_written(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_time("idle", format_seconds(seconds)) == seconds


# -- addresses

_PARTS: Final = (
    *(
        ":",
        "[",
        "]",
        "unix:",
        "://",
        "%",
        "::1",
        "fe80::1%",
        "127.0.0.1",
        "9000",
        "65536",
        "*",
        "@",
        "/",
        "?",
        "#",
        ".",
    ),
    *(
        "a" * 63,
        "b" * 64,
        "..",
        "host",
        "\u0663",
        "\0",
        "\n",
        " ",
        "\udc80",
        "xn--",
        "\u3002",
        "0x7f.1",
        "::ffff:1.2.3.4",
    ),
)
_ADDRESSES: Final = text_of(_PARTS, 6)
_ADDRESSES_WITH_PORT: Final = st.tuples(text_of(_PARTS, 4), st.sampled_from(["", ":9000", "]:1", "]:65535", ":0"])).map(
    "".join
)


def _address_is_usable(address: Address) -> None:
    if isinstance(address, UnixAddress):
        assert 0 < len(os.fsencode(address.path)) < 108
        return
    assert 0 <= address.port <= 65535
    if address.host is not None:
        assert address.host.isprintable() or not address.host.isascii()
        assert not {*"\0 \t\r\n[]/"} & {*address.host}
        address.host.encode("idna")  # as getaddrinfo() does


def _address_is_parsed(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressError as exc:
        tells_why(exc)
        return
    _address_is_usable(address)
    assert parse_address(str(address)) == address
    assert make_address(text) == address
    assert make_address(address) == address


def _path_is_parsed(path: bytes) -> None:
    try:
        address = parse_address(pathlib.Path(os.fsdecode(path)))
    except AddressError as exc:
        tells_why(exc)
        return
    _address_is_usable(address)
    assert parse_address(str(address)) == address


def _host_and_port_are_taken(example: tuple[str, object]) -> None:
    host, port = example
    try:
        address = make_address(host, port)
    except AddressError as exc:
        tells_why(exc)
        return
    assert isinstance(address, (TcpAddress, UnixAddress))
    _address_is_usable(address)
    assert parse_address(str(address)) == address


_PORTS: Final = st.one_of(
    st.integers(-1, 65536), st.none(), text_of(["9000", "0", "\u0663", "-", "+", "_", " "], 2), st.booleans()
)

PROPERTIES: Final = (
    Property("policy: any text", _POLICY_TEXTS, _policy_is_parsed),
    Property("policy: what str() writes", _policies(), _policy_is_written),
    Property("policy: any environment", _ENVIRONMENTS, _environment_is_read),
    linear("policy: time", _POLICY_TEXTS, _POLICY_TEXTS, _policy_is_parsed),
    Property("time: any text", _POLICY_TEXTS, _time_is_read),
    Property("time: what format_seconds() writes", st.integers(0, 2**40), _time_is_written),
    Property("address: any text", _ADDRESSES, _address_is_parsed),
    Property("address: any text before a port", _ADDRESSES_WITH_PORT, _address_is_parsed),
    Property("address: any path", names(110), _path_is_parsed),
    Property("address: any host and port", st.tuples(text_of(_PARTS, 4), _PORTS), _host_and_port_are_taken),
    linear("address: time", _ADDRESSES, _ADDRESSES, _address_is_parsed),
)
