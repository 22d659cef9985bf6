"""Times and counts as text, `20s`, `1m30s`, `500ms`, `7`, and as numbers that a caller gives.

Rules kept here: functions for text do not know the field that it is for, so they return None for what is not a time or
a count, and the caller raises the error. Only ASCII digits count as digits.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Final

__all__ = ["check_timeout", "format_seconds", "format_times", "read_count", "read_seconds"]

_UNITS: Final = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
_BARE = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_TIMES = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|s|m|h|d)\s*)+")
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_COUNT = re.compile(r"[0-9]{1,18}")
_MAX_TEXT: Final = 200


def read_seconds(text: str) -> float | None:
    """Convert text such as "20s", "1m30s", "500ms", "7" to seconds; None for any other text."""
    if len(text) > _MAX_TEXT:
        return None
    if _BARE.fullmatch(text):
        return _number(Decimal(text))
    if _TIMES.fullmatch(text):
        return _number(sum((Decimal(n) * _UNITS[unit] for n, unit in _TIME.findall(text)), Decimal(0)))
    return None


def read_count(text: str) -> int | None:
    """Convert decimal digits to a whole number; None for any other text."""
    return int(text) if _COUNT.fullmatch(text) else None


def format_seconds(seconds: float | None, unknown: str = "") -> str:
    """Write a time as `read_seconds` reads it: "20s", "8410ms"; `unknown` for None."""
    if seconds is None:
        return unknown
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def format_times(idle: float | None, interval: float | None, count: int | None, unknown: str = "") -> str:
    """Write idle, interval and count as in nginx's so_keepalive: "20s:10s:4"; `unknown` for each None."""
    return f"{format_seconds(idle, unknown)}:{format_seconds(interval, unknown)}:{unknown if count is None else count}"


def _number(value: Decimal) -> float:
    return int(value) if value == value.to_integral_value() else float(value)


def check_timeout(name: str, value: Any) -> float | None:
    """Return a timeout that was given by a caller. Raises TypeError, ValueError."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds or None, got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r}: must be a positive number of seconds, or None for no limit")
    return float(value)
