"""Control groups of version 2: where the hierarchy is mounted, whose group is whose, which processes are in one.

Rules kept here: a cgroup is named by the path of its directory. The hierarchy may be mounted beside those of version 1
(cgroups(7)), and a mount may show a part of it only, as in containers. A process or cgroup may vanish at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from typing import Final

from ..errors import KaioError

__all__ = ["CgroupError", "all_of_unit", "hierarchy", "of_process", "of_unit", "processes"]

_ESCAPE: Final = re.compile(r"\\([01][0-7]{2})")  # of spaces and the like in mountinfo (proc(5))
_PID: Final = re.compile(rb"[0-9]{1,10}")
_POINT: Final = 5  # the fields of mountinfo up to the mount point, before which is the root


class CgroupError(KaioError, OSError):
    """A cgroup that does not exist or cannot be used; the message says why."""

    def __str__(self) -> str:
        return str(self.strerror)


def hierarchy() -> str:
    """The directory of the topmost cgroup that can be seen. Raises `CgroupError`."""
    return _mounted()[0]


def of_process(pid: int | str = "self") -> str:
    """The directory of a process's cgroup. Raises `CgroupError`."""
    top, root = _mounted()
    try:
        # Only newlines end a line: a cgroup's name may have a carriage return.
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            found = next((line[3:] for line in file.read().split("\n") if line.startswith("0::")), None)
    except OSError as exc:
        raise CgroupError(exc.errno, f"process {pid}: {exc.strerror}") from None
    if found is None:
        raise CgroupError(errno.ENOENT, f"process {pid} is in no cgroup of version 2")
    if root != "/":
        if found != root and not found.startswith(f"{root}/"):
            raise CgroupError(errno.ENOENT, f"process {pid} is in a cgroup that is not mounted here: {found}")
        found = found[len(root) :]
    if ".." in found.split("/"):  # outside of this process's cgroup namespace (cgroup_namespaces(7))
        raise CgroupError(errno.ENOENT, f"process {pid} is in a cgroup that cannot be seen from here: {found}")
    path = os.path.normpath(f"{top}/{found}")
    if not os.path.isdir(path):
        raise CgroupError(errno.ENOENT, f"process {pid} is in a cgroup that cannot be seen from here: {found}")
    return path


def of_unit(unit: str) -> str | None:
    """The directory of a running systemd unit's cgroup, which bears its name; None if the unit does not run.

    Raises `CgroupError` if several users or containers run it: see `all_of_unit`.
    """
    found = all_of_unit(unit)
    if len(found) > 1:
        raise CgroupError(errno.EINVAL, f"several cgroups bear the name {unit}; give one: {', '.join(found)}")
    return found[0] if found else None


def all_of_unit(unit: str) -> list[str]:
    """The directories of the cgroups that may be a systemd unit's.

    A unit of the system comes before all others, one of a user's manager before those of containers.
    """
    top = hierarchy()
    found = [path for path in _directories(top) if os.path.basename(path) == unit]
    distances = [_distance(os.path.relpath(path, top)) for path in found]
    return [path for path, distance in zip(found, distances, strict=True) if distance == min(distances)]


def _distance(path: str) -> int:
    """Whose a unit's cgroup is, by its path from the top: 0 the system's, whose units are below slices alone; 1 a
    user's; 2 that of a container or another process to which a cgroup is delegated."""
    above = path.split("/")[:-1]
    if all(name.endswith(".slice") for name in above):
        return 0
    manager = next(number for number, name in enumerate(above) if not name.endswith(".slice"))
    of_user = above[manager].startswith("user@") and above[manager].endswith(".service")
    return 1 if of_user and all(name.endswith(".slice") for name in above[manager + 1 :]) else 2


def processes(path: str) -> list[int]:
    """The processes in a cgroup and in those below it, in numerical order. Raises `CgroupError`."""
    if not os.path.exists(os.path.join(path, "cgroup.procs")):
        raise _not_a_cgroup(path)
    pids: set[int] = set()
    for directory in _directories(path):
        lines: list[bytes] = []
        with contextlib.suppress(OSError), open(os.path.join(directory, "cgroup.procs"), "rb") as file:
            lines = file.read().splitlines()
        if not all(map(_PID.fullmatch, lines)):  # a file of that name in another file system
            raise _not_a_cgroup(path)
        pids.update(map(int, lines))
    return sorted(pids - {0})  # 0: a process of another pid namespace


def _not_a_cgroup(path: str) -> CgroupError:
    return CgroupError(errno.ENOENT, f"{path} is not a cgroup of version 2")


def _directories(top: str) -> Iterator[str]:
    yield top
    for directory, below, _ in os.walk(top):
        below.sort()
        yield from (os.path.join(directory, name) for name in below)


def _mounted() -> tuple[str, str]:
    """Where the hierarchy is mounted, and which cgroup is seen there."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            lines = file.read().split("\n")
    except OSError as exc:
        raise CgroupError(exc.errno, f"cannot find the cgroups: {exc.strerror}") from None
    for line in lines:
        mount, _, kind = line.partition(" - ")
        fields = mount.split(" ")
        if kind.startswith("cgroup2 ") and len(fields) >= _POINT:
            root, point = (
                _ESCAPE.sub(lambda found: chr(int(found[1], 8)), part) for part in fields[_POINT - 2 : _POINT]
            )
            return point, root
    raise CgroupError(errno.ENOENT, "no cgroups of version 2 are mounted")
