"""The policy that a program's own environment asks for: KEEPALIVE=off and libkeepalive's other variables.

Rules kept here: the environment is the program's, so it decides nothing but the policy of the program's own sockets;
what cannot be read, or is invalid, is as if it were not there. Programs that overwrite their arguments to show a title
overwrite their environment too: only complete NAME=VALUE strings count, and they are read again only when the process
executes another program.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, NamedTuple

from ...errors import PolicyError
from ...policy import Keepalive
from ..procfs import stat_field

__all__ = ["Choice", "choice", "image"]

VARIABLES: Final = ("KAIO_KEEPALIVE", "KEEPALIVE", "KEEPIDLE", "KEEPINTVL", "KEEPCNT")
_LARGEST: Final = 1 << 20  # bytes
_START_OF_STACK: Final = 28  # proc(5), stat: startstack, a random address, from execve(2) on


class Choice(NamedTuple):
    """What a program's environment asks for."""

    policy: Keepalive | None
    """None: it asks for an invalid one."""
    why: str
    """The variables, or what is wrong with them."""


def choice(pid: int, ours: Mapping[str, str] | None = None) -> Choice | None:
    """Return what a process's environment asks for; None if it asks for nothing.

    Variables that `ours`, by default the environment of this process, has with the same values do not count: they are
    inherited, and this command has heeded them already.
    """
    known = os.environ if ours is None else ours
    found = {name: value for name, value in _environment(pid).items() if value}
    if all(known.get(name, "") == found.get(name, "") for name in VARIABLES):
        return None
    words = " ".join(f"{name}={value}" for name, value in found.items())
    if not words:
        return None
    try:
        return Choice(Keepalive.from_env(found), f"its environment has {words}")
    except PolicyError as exc:
        return Choice(None, f"its environment has {words}: {exc.limit}")


def image(pid: int) -> tuple[str, int | None]:
    """What changes when a process executes another program, with another environment: its file, and its stack."""
    try:
        file = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        file = ""
    return file, stat_field(pid, _START_OF_STACK)


def _environment(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            content = file.read(_LARGEST)
    except OSError:
        return {}
    found: dict[str, str] = {}
    for entry in content.split(b"\0")[:-1]:  # the last one is complete if it ends with a null byte
        name, equals, value = os.fsdecode(entry).partition("=")
        if equals and name in VARIABLES:
            found.setdefault(name, value)
    return found
