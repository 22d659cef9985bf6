"""The settings: what kaio and the kernel call them, their limits, and values given as text.

Rules kept here: every value is checked before it is used. No I/O.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from ...errors import KaioError, PolicyError
from ...policy.fields import MAX_COUNT, MAX_SECONDS
from ...policy.units import read_seconds

__all__ = ["PROC", "SETTINGS", "Setting", "SysctlError", "check", "field_of", "parse", "path_of", "require_linux"]

PROC: Final = "/proc/sys"


class SysctlError(KaioError, OSError):
    """A setting that cannot be read, changed or persisted.

    `errno` is the reason, `strerror` names the setting and any value, `filename` is the file.
    """


class Setting(NamedTuple):
    """One of the kernel's TCP defaults."""

    field: str
    """The name that kaio uses."""
    name: str
    """The name that the kernel uses."""
    least: int
    most: int
    unit: str

    @property
    def sysctl(self) -> str:
        """The name that sysctl(8) uses."""
        return f"net.ipv4.{self.name}"

    @property
    def path(self) -> str:
        """The path relative to /proc/sys."""
        return f"net/ipv4/{self.name}"


# The kernel accepts more: on Linux 6.18 -1, 0 and up to INT_MAX / HZ seconds, and 0 to 255 probes. But setsockopt()
# rejects such values (EINVAL), and with 0 the kernel probes without a pause, or ends the connection without a probe.
# The limits of the retries are the kernel's own (net/ipv4/sysctl_net_ipv4.c).
SETTINGS: Final[Mapping[str, Setting]] = {
    setting.field: setting
    for setting in (
        Setting("idle", "tcp_keepalive_time", 1, MAX_SECONDS, "s"),
        Setting("interval", "tcp_keepalive_intvl", 1, MAX_SECONDS, "s"),
        Setting("count", "tcp_keepalive_probes", 1, MAX_COUNT, "probes"),
        Setting("retries2", "tcp_retries2", 0, 255, "retransmissions"),
        Setting("syn_retries", "tcp_syn_retries", 1, 127, "retransmissions"),
    )
}
"""The settings, by kaio's name."""


def parse(assignments: Iterable[str]) -> dict[str, int]:
    """Parse values by field: `idle=600`, `idle=10m`, `tcp_keepalive_time=600`, `net.ipv4.tcp_keepalive_time=600`.

    Seconds may be written as the times of a policy.

    Raises `PolicyError` for a setting that is unknown or given twice, and for a value out of range.
    """
    given: dict[str, object] = {}
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise PolicyError("setting", text, "must be of the form name=value, such as idle=600")
        field = _field(name, value)
        if field in given:
            raise PolicyError(field, value, "is given twice")
        given[field] = int(value) if re.fullmatch(r"[+-]?[0-9]{1,18}", value) else _time(field, value)
    return check(given)


def _time(field: str, text: str) -> int | str:
    """A time in whole seconds, if it is one for a setting in seconds; else the text, which `check` refuses."""
    seconds = read_seconds(text.lower()) if SETTINGS[field].unit == "s" else None
    return int(seconds) if seconds is not None and seconds == int(seconds) else text


def check(values: Mapping[str, object]) -> dict[str, int]:
    """Check values given under any of their names, and return them by field. Raises `PolicyError`."""
    checked: dict[str, int] = {}
    for name, value in values.items():
        setting = SETTINGS[_field(name, value)]
        if isinstance(value, bool) or not isinstance(value, int) or not setting.least <= value <= setting.most:
            limits = f"from {setting.least} to {setting.most} ({setting.sysctl}"
            limit = f"must be whole seconds {limits}; such as 600 or 10m)"
            if setting.unit != "s":
                limit = f"must be a whole number {limits}, {setting.unit})"
            raise PolicyError(setting.field, value, limit)
        checked[setting.field] = int(value)
    return checked


def _field(name: str, value: object) -> str:
    path = path_of(name.removeprefix(f"{PROC}/"))
    for setting in SETTINGS.values():
        if name in (setting.field, setting.name) or path == setting.path:
            return setting.field
    raise PolicyError(name, value, f"is not a setting; the settings are {', '.join(SETTINGS)}, or their sysctl names")


def path_of(name: str) -> str:
    """Convert a key to a path relative to /proc/sys.

    If its first separator is a dot, dots and slashes are swapped (sysctl.d(5)).
    """
    first = re.search(r"[./]", name)
    return name.translate(_SWAP) if first is not None and first[0] == "." else name


_SWAP: Final = str.maketrans("./", "/.")


def field_of(path: str) -> str | None:
    """Return the field whose setting has this path; None for other paths."""
    return next((field for field, setting in SETTINGS.items() if setting.path == path), None)


def require_linux() -> None:
    """Raise `SysctlError` on other systems."""
    if not sys.platform.startswith("linux"):
        raise SysctlError(
            errno.EOPNOTSUPP, f"the kernel's TCP defaults can be read and set on Linux only; this is {sys.platform}"
        )
