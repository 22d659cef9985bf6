"""The files of sysctl.d(5), settings given as text, and the values in /proc/sys."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Final

from hypothesis import strategies as st

from kaio.errors import PolicyError
from kaio.tools.sysctls import FILE, PROC, SETTINGS, Defaults, SysctlError, _boot, _kernel, parse

from .files import said
from .inputs import edited, linear, pieces, text_of
from .search import Property, tells_why

__all__ = ["PROPERTIES"]

_KEYS: Final = tuple(
    name
    for setting in SETTINGS.values()
    for name in (setting.sysctl, setting.path, setting.name, setting.field, f"/proc/sys/{setting.path}")
)
_TOKENS: Final = (
    *(key.encode() for key in _KEYS),
    *(
        b" = ",
        b"=",
        b"-",
        b"#",
        b";",
        b"600",
        b"75\n",
        b"9 \r\n",
        b"net.ipv4.*",
        b"net/ipv4/tcp_*",
        b"[",
        b"]",
        b"[!a-",
        b"*",
        b"?",
    ),
    *(
        b"9" * 5000,
        "٣".encode(),
        b"+1",
        b"0x10",
        b"net.ipv6/conf.all",
        b"\x1c",
        b"\x0b",
        b"net.ipv4.tcp_keepalive_time = 600\n",
    ),
)
_VALUES: Final = st.dictionaries(st.sampled_from(list(SETTINGS)), st.integers(1, 127), min_size=1)
_FILES: Final = pieces(_TOKENS)


def _boot_of(files: Mapping[str, bytes]) -> None:
    """Read all that is read at boot, from these files."""
    with tempfile.TemporaryDirectory() as root:
        for path, content in files.items():
            os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
            with open(os.path.join(root, path), "wb") as file:
                file.write(content)
        try:
            found = _boot.persisted(root)
            assert all(SETTINGS[field].least <= value <= SETTINGS[field].most for field, value in found.values.items())
        except (PolicyError, SysctlError) as exc:
            tells_why(exc)
        deciding = _boot.at_boot(root) | _boot.overriding(SETTINGS, root)
        for field, line in deciding.items():
            assert field in SETTINGS
            with open(line.path, "rb") as file:
                assert 0 < line.line <= file.read().count(b"\n") + 1


def _any_file(content: bytes) -> None:
    _boot_of({FILE: content})


_PLACES: Final = st.sampled_from([FILE, "etc/sysctl.d/99-z.conf", "usr/lib/sysctl.d/50-a.conf", "etc/sysctl.conf"])


def _values_are_kept(example: tuple[bytes, Mapping[str, int]]) -> None:
    """Values written beside whatever else is in the file are read back, and the rest of it stays."""
    content, values = os.fsdecode(example[0]), example[1]
    merged = _boot._merged(content, values)
    assert _boot._merged(merged, values) == merged
    with tempfile.TemporaryDirectory() as root:
        path = os.path.join(root, FILE)
        os.makedirs(os.path.dirname(path))
        with open(path, "wb") as file:
            file.write(os.fsencode(merged))
        deciding = _boot.at_boot(root)
        assert {field: deciding[field].value for field in values} == {f: str(value) for f, value in values.items()}
    lines = iter(merged.split("\n"))
    for line in content.removesuffix("\n").split("\n") if content else ():
        if not any(name in line for name in _KEYS):
            assert line in lines  # which goes on from there


def _parse_settings(assignments: Sequence[str]) -> None:
    try:
        values = parse(assignments)
    except PolicyError as exc:
        tells_why(exc)
    else:
        assert parse([f"{field}={value}" for field, value in values.items()]) == values


_ASSIGNMENTS: Final = text_of([*_KEYS, "=", "600", "9" * 5000, " ", "\u0663", "+1", "-1", "1_0", "net.ipv4."], 6)


def _values_are_read(content: bytes) -> None:
    paths = [f"{PROC}/{setting.path}" for setting in SETTINGS.values()]
    with said(_kernel, dict.fromkeys(paths, content)):
        try:
            found = _kernel.read()
        except SysctlError as exc:
            tells_why(exc)
        else:
            assert isinstance(found, Defaults)
            digits = re.fullmatch(rb"\s*([0-9]{1,18})\s*", content)
            assert digits is None or found.idle == int(digits[1])


PROPERTIES: Final = (
    Property("sysctl.d: any file", _FILES, _any_file),
    Property("sysctl.d: any files", st.dictionaries(_PLACES, _FILES, max_size=4), _boot_of),
    Property("sysctl.d: values are kept, and so is the rest", st.tuples(_FILES, _VALUES), _values_are_kept),
    linear("sysctl.d: time", _FILES, _FILES, _any_file),
    Property("settings: any text", st.lists(_ASSIGNMENTS, max_size=4), _parse_settings),
    linear("settings: time", _ASSIGNMENTS, _ASSIGNMENTS, lambda text: _parse_settings([text])),
    Property(
        "/proc/sys: any bytes",
        edited(st.integers(-1, 2**31).map(lambda n: b"%d\n" % n), (b"9" * 5000, b"\t", b"_", b"-", b"\xff")),
        _values_are_read,
    ),
)
