"""Parse the text of a policy: `20s:10s:4`, `on`, `idle=20s,count=4`, `detect=30s`; and libkeepalive's variables.

    policy  = "on" / "off" / times *("," pair) / pair *("," pair) / task
    times   = [time] ":" [time] ":" [count]           ; as in nginx's so_keepalive; an empty one is the system's value
    pair    = name "=" value                          ; names and values: _FIELDS
    task    = ("detect" / "hold") "=" time ["," "stalled" "=" value]

Rules kept here: letter case and surrounding white space do not matter. Ambiguous text is an error. This module does not
know `Keepalive`: the caller passes the functions that create a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from ..errors import PolicyError
from .fields import AUTO, Auto
from .units import read_count, read_seconds

__all__ = ["parse_libkeepalive", "parse_policy", "parse_time"]

Policy = TypeVar("Policy")


def parse_time(field: str, text: str) -> float:
    """Convert text such as "20s", "1m30s", "500ms", "7" to seconds. Raises `PolicyError`, which names the field."""
    seconds = read_seconds(text)
    if seconds is None:
        raise PolicyError(field, text, "must be a time such as 20s, 1m30s, 500ms, or a bare number of seconds")
    return seconds


def _parse_count(field: str, text: str) -> int:
    count = read_count(text)
    if count is None:
        raise PolicyError(field, text, "must be a whole number")
    return count


def _time_or_system(field: str, text: str) -> float | None:
    return None if text == "system" else parse_time(field, text)


def _count_or_system(field: str, text: str) -> int | None:
    return None if text == "system" else _parse_count(field, text)


def _user_timeout(field: str, text: str) -> float | Auto | None:
    words: dict[str, Auto | None] = {"auto": AUTO, "none": None}
    return words[text] if text in words else parse_time(field, text)


def _unchanged(_field: str, text: str) -> str:
    return text


_FIELDS: Final[dict[str, Callable[[str, str], object]]] = {
    "idle": _time_or_system,
    "interval": _time_or_system,
    "count": _count_or_system,
    "user_timeout": _user_timeout,
    "stalled": _unchanged,  # Keepalive checks it
}
"""The parser of each field's value, called with the name and the text."""


def parse_policy(
    text: str,
    make: Callable[..., Policy],
    words: Mapping[str, Policy],
    tasks: Mapping[str, Callable[[float], Policy]],
    change: Callable[[Policy, str], Policy],
) -> Policy:
    """Create a policy from text.

    `make` is called with the fields in the text, by name. `words` are the policies that are written as one word, and
    `tasks` the functions that create a policy from one time; `change` gives such a policy another value of `stalled`,
    the only field that says nothing about times. Raises `PolicyError`, as the functions may.
    """
    word = text.strip().lower()
    if word in words:
        return words[word]
    if "=" not in word and "," not in word:
        return make(**_parse_times(word, text))
    first, *rest = word.split(",")
    fields: dict[str, object] = {}
    if "=" in first:
        rest = [first, *rest]
    elif first.strip() in words:
        raise PolicyError("keepalive", text, f"{first!r} cannot be combined with other fields")
    else:
        fields.update(_parse_times(first, first))
    pairs = _split_pairs(rest, fields, text)
    task = next((task for task in tasks if task in pairs), None)
    if task is None:
        return make(**fields, **_parse_values(pairs, [*_FIELDS, *tasks]))
    if pairs.keys() - {task, "stalled"} or fields:
        raise PolicyError("keepalive", text, f"{task}= cannot be combined with other fields but stalled=")
    policy = tasks[task](parse_time(task, pairs[task]))
    return change(policy, pairs["stalled"]) if "stalled" in pairs else policy


def _parse_times(word: str, text: str) -> dict[str, float | None]:
    """Parse `idle:interval:count`."""
    parts = [part.strip() for part in word.split(":")]
    if len(parts) != 3:
        raise PolicyError(
            "keepalive",
            text,
            "must be 'on', 'off', 'idle:interval:count' such as '20s:10s:4' or '30m::10', or name=value such as"
            " 'idle=20s,count=4', 'detect=30s', 'hold=350s'",
        )
    idle, interval, count = parts
    return {
        "idle": parse_time("idle", idle) if idle else None,
        "interval": parse_time("interval", interval) if interval else None,
        "count": _parse_count("count", count) if count else None,
    }


def _split_pairs(items: list[str], fields: Mapping[str, object], text: str) -> dict[str, str]:
    """Split each `name=value`, and check that no name is given twice, nor in `fields` already."""
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name or not value:
            raise PolicyError("keepalive", text, f"{item.strip()!r} must be of the form name=value")
        if name in pairs or name in fields:
            raise PolicyError(name, value, f"is given twice in {text!r}")
        pairs[name] = value
    return pairs


def _parse_values(pairs: Mapping[str, str], known: list[str]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs.items():
        if name not in _FIELDS:
            raise PolicyError(name, value, f"is not a field; the fields are {', '.join(known)}")
        fields[name] = _FIELDS[name](name, value)
    return fields


# -- the environment

_LIBKEEPALIVE: Final[dict[str, tuple[str, Callable[[str, str], object]]]] = {
    "idle": ("KEEPIDLE", parse_time),
    "interval": ("KEEPINTVL", parse_time),
    "count": ("KEEPCNT", _parse_count),
}


def parse_libkeepalive(env: Mapping[str, str], make: Callable[..., Policy], off: Policy) -> Policy:
    """Create a policy from libkeepalive's variables: KEEPALIVE, KEEPIDLE, KEEPINTVL, KEEPCNT.

    `make` is called with the fields whose variables are set, `off` is the policy for KEEPALIVE=off. An empty variable
    counts as not set. Raises `PolicyError`, which names the variable.
    """
    switch = env.get("KEEPALIVE", "").strip().lower()
    if switch not in ("", "on", "off"):
        raise PolicyError("KEEPALIVE", env["KEEPALIVE"], "must be 'on' or 'off'")
    if switch == "off":
        return off
    fields: dict[str, object] = {}
    for field, (variable, parse) in _LIBKEEPALIVE.items():
        text = env.get(variable, "").strip()
        if text:
            fields[field] = parse(variable, text)
    try:
        return make(**fields)
    except PolicyError as exc:
        raise PolicyError(_LIBKEEPALIVE[exc.field][0], exc.value, exc.limit) from None
