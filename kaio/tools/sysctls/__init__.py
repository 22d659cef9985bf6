"""The kernel's TCP defaults: reading them, setting all or none, and persisting them across reboots.

_settings   the settings, their limits, and values given as text
_boot       the files of sysctl.d(5), which are read at boot
_kernel     the values in /proc/sys
"""

from __future__ import annotations

from ._boot import FILE, Assignment, Persisted, at_boot, overriding, persist, persisted
from ._kernel import Defaults, change, read
from ._settings import PROC, SETTINGS, Setting, SysctlError, check, parse

__all__ = [
    "FILE",
    "PROC",
    "SETTINGS",
    "Assignment",
    "Defaults",
    "Persisted",
    "Setting",
    "SysctlError",
    "at_boot",
    "change",
    "check",
    "overriding",
    "parse",
    "persist",
    "persisted",
    "read",
]
