"""What a policy is enforced on: the machine, a systemd unit, or a cgroup; and the name that each has among the pins.

Rules kept here: a unit has a new cgroup each time it is started, so a target is resolved when it is used.
"""

from __future__ import annotations

import enum
import errno
import hashlib
import os
import re
from typing import Final, NamedTuple

from .. import cgroups
from ..cgroups import CgroupError

__all__ = ["Kind", "Target"]

_UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,200}\.(service|scope|slice|socket)")
_ROOT_SLICE: Final = "-.slice"
_LONGEST: Final = 200  # characters; names in a file system have 255 bytes at most
_PLAIN: Final = re.compile(r"[^A-Za-z0-9-]")


class Kind(enum.StrEnum):
    """The kinds of targets."""

    MACHINE = "machine"
    UNIT = "unit"
    CGROUP = "cgroup"


class Target(NamedTuple):
    """What a policy is enforced on."""

    kind: Kind
    name: str = ""
    """A unit's name, or the path of a cgroup's directory; empty for the machine."""

    @classmethod
    def machine(cls) -> Target:
        """All cgroups that can be seen."""
        return cls(Kind.MACHINE)

    @classmethod
    def unit(cls, name: str) -> Target:
        """A systemd unit; without a suffix, a service. The slice above all others is the machine.

        Raises `CgroupError` for what cannot be a unit with sockets.
        """
        if name == _ROOT_SLICE:
            return cls.machine()
        name = name if "." in name else f"{name}.service"
        # A template's files apply to all its instances, whose cgroups bear other names: they would not be found again.
        if not _UNIT.fullmatch(name) or name.rpartition(".")[0].endswith("@"):
            limit = "must be the name of a service, scope, slice or socket, such as nginx.service, and no template's"
            raise CgroupError(errno.EINVAL, f"unit {name!r}: {limit}")
        return cls(Kind.UNIT, name)

    @classmethod
    def cgroup(cls, path: str) -> Target:
        """A cgroup by the path of its directory, or as in /proc/PID/cgroup. Raises `CgroupError` if there is none."""
        top = cgroups.hierarchy()
        if "\0" in path:
            raise CgroupError(errno.EINVAL, f"cgroup {path!r}: must not contain a null character")
        real = os.path.realpath(path)
        if real != top and not real.startswith(f"{top}/"):
            below = os.path.realpath(f"{top}/{path}")
            if not (path.startswith("/") and os.path.isdir(below)):
                raise CgroupError(errno.ENOENT, f"{path} is not a cgroup of version 2, which are below {top}")
            real = below
        if not os.path.exists(f"{real}/cgroup.procs"):
            raise CgroupError(errno.ENOENT, f"{path} is not a cgroup of version 2, which are below {top}")
        if real == top:
            return cls(Kind.MACHINE)
        name = os.path.basename(real)
        return cls(Kind.UNIT, name) if _UNIT.fullmatch(name) and _is_unit(name, real) else cls(Kind.CGROUP, real)

    def __str__(self) -> str:
        return {Kind.MACHINE: "the machine", Kind.UNIT: f"unit {self.name}", Kind.CGROUP: f"cgroup {self.name}"}[
            self.kind
        ]

    @property
    def key(self) -> str:
        """A name that no other target has, of characters that a BPF file system accepts: no dots."""
        if self.kind is Kind.MACHINE:
            return self.kind.value
        name = _PLAIN.sub(_hexadecimal, self.name)
        if len(name) > _LONGEST:
            name = hashlib.sha256(os.fsencode(self.name)).hexdigest()
        return f"{self.kind}-{name}"

    def directory(self) -> str | None:
        """The cgroup's directory; None if the unit does not run, or the cgroup is gone. Raises `CgroupError`."""
        if self.kind is Kind.MACHINE:
            return cgroups.hierarchy()
        if self.kind is Kind.UNIT:
            return cgroups.of_unit(self.name)
        return self.name if os.path.isdir(self.name) else None

    def directories(self) -> list[str]:
        """The directories of all cgroups that may be meant: several, if users run units of that name."""
        if self.kind is Kind.UNIT:
            return cgroups.all_of_unit(self.name)
        directory = self.directory()
        return [] if directory is None else [directory]


def _hexadecimal(found: re.Match[str]) -> str:
    return "".join(f"_{byte:02x}" for byte in os.fsencode(found[0]))


def _is_unit(name: str, directory: str) -> bool:
    """Whether a cgroup is that of the unit whose name it bears, and no other's."""
    try:
        return cgroups.of_unit(name) == directory
    except CgroupError:  # several bear the name
        return False
