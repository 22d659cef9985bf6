"""/proc: names, descriptors, status; the cgroups.

The kernel writes these files, and users choose the names in them: of processes (prctl(2), PR_SET_NAME), of mount
points, of cgroups. So the lines are as the kernel writes them, escapes included, and the names are hostile.
"""

from __future__ import annotations

import os
import posixpath
import re
import types
from collections.abc import Sequence
from typing import Final, NamedTuple

from hypothesis import strategies as st

from kaio.tools import cgroups, procfs
from kaio.tools.cgroups import CgroupError
from kaio.tools.processes import _access, _watched

from .files import replaced, said
from .inputs import HOSTILE, edited, linear, names, pieces
from .search import Property, tells_why

__all__ = ["PROPERTIES", "Link", "Membership", "Mount", "Status"]

_PID: Final = 4_194_303
_COMM: Final = 15  # bytes of a process's name


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


# -- names and descriptors


def _name_is_read(name: bytes) -> None:
    with said(procfs, {f"/proc/{_PID}/comm": name + b"\n"}):
        assert procfs.process_name(_PID) == _text(name)


class Link(NamedTuple):
    target: str
    inode: int | None
    """None: it is no socket."""


_LINKS: Final = st.one_of(
    st.integers(1, 2**63).map(lambda inode: Link(f"socket:[{inode}]", inode)),
    st.sampled_from(
        ["pipe:[7]", "anon_inode:[eventpoll]", "/socket:[7]", "socket:[7] (deleted)", "socket:[7]\n", "socket:[]", "/"]
    ).map(lambda target: Link(target, None)),
    st.text(st.characters(categories=["Nd"]), min_size=1)
    .filter(lambda digits: not digits.isascii())
    .map(lambda digits: Link(f"socket:[{digits}]", None)),
    names(40).map(lambda name: Link(f"/{os.fsdecode(name)}", None)),
)


def _sockets_are_found(links: Sequence[Link]) -> None:
    directory = f"/proc/{_PID}/fd"
    targets = {f"{directory}/{fd}": link.target for fd, link in enumerate(links)}
    kernel = types.SimpleNamespace(
        listdir=lambda path: [path.rpartition("/")[2] for path in targets], readlink=targets.__getitem__
    )
    with replaced(procfs, os=kernel):
        found = list(procfs.socket_inodes(_PID))
    assert found == [(fd, link.inode) for fd, link in enumerate(links) if link.inode is not None]


# -- /proc/PID/status


class Status(NamedTuple):
    """What the kernel knows of a process."""

    name: bytes
    pids: Sequence[int]
    """In its pid namespaces, the innermost last."""
    uids: Sequence[int]
    capabilities: int

    def written(self) -> bytes:
        """Write it as fs/proc/array.c does, which escapes newlines and backslashes in the name."""
        name = self.name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
        lines = (
            b"Name:\t" + name,
            b"Umask:\t0022",
            b"State:\tS (sleeping)",
            b"Tgid:\t%d" % self.pids[0],
            b"Pid:\t%d" % self.pids[0],
            b"Uid:\t" + b"\t".join(b"%d" % uid for uid in self.uids),
            b"Gid:\t0\t0\t0\t0",
            b"NSpid:\t" + b"\t".join(b"%d" % pid for pid in self.pids),
            b"CapPrm:\t%016x" % self.capabilities,
            b"CapEff:\t%016x" % self.capabilities,
        )
        return b"\n".join(lines) + b"\n"


_FORGED: Final = (b"\rNSpid:7", b"\rTgid:1", b"\nNSpid:7", b"\x85NSpid:7", b"\rUid:0 0 0 0")
_COMMS: Final = st.one_of(names(_COMM), st.sampled_from(_FORGED).map(lambda forged: (b"a" + forged)[:_COMM]))
_STATUSES: Final = st.builds(
    Status,
    _COMMS,
    st.lists(st.integers(1, 2**22), min_size=1, max_size=4),
    st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4),
    st.integers(0, 2**41 - 1),
)
_STATUS_TOKENS: Final = (
    *(
        b"Name:",
        b"State:",
        b"Tgid:",
        b"Uid:",
        b"Gid:",
        b"NSpid:",
        b"CapPrm:",
        b"CapEff:",
        b"\t",
        b"0",
        b"7",
        b"Z (zombie)",
    ),
    *("٣".encode(), b"-1", b"0x", b"9" * 5000, b"_", b"1_0", b":"),
)


def _status_is_read(status: Status) -> None:
    with said(_access, {f"/proc/{_PID}/status": status.written()}):
        found = _access._status(_PID)
    assert _access._ids(found, "Uid") == set(status.uids[:3])
    assert _access._capabilities(found, "CapEff") == status.capabilities
    assert found["Tgid"] == str(status.pids[0])
    with said(_watched, {f"/proc/{_PID}/status": status.written()}):
        assert _watched._own_pid(_PID) == status.pids[-1]


def _reasons_are_given(data: bytes) -> None:
    files = {f"/proc/{pid}/status": data for pid in (_PID, "self")} | {_access._YAMA: data}
    with said(_access, files), replaced(_access, lacking=lambda: None):
        assert _access._forbidden(_PID)
        assert _access._missing(_PID)
    with said(_watched, {f"/proc/{_PID}/status": data}):
        assert isinstance(_watched._own_pid(_PID), int)


# -- mountinfo and the cgroups


class Mount(NamedTuple):
    """A line of /proc/PID/mountinfo."""

    root: bytes
    point: bytes
    options: Sequence[bytes]
    kind: bytes
    source: bytes

    def written(self) -> bytes:
        """Write it as fs/proc_namespace.c does."""
        root, point, source = map(_mangled, (self.root, self.point, self.source))
        return b" ".join([b"31 23 0:28", root, point, b"rw", *self.options, b"-", self.kind, source, b"rw"]) + b"\n"


def _mangled(name: bytes) -> bytes:
    """The escapes of seq_escape(): of white space that separates, and of the backslash."""
    return re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % ord(found[0]), name)


_PATHS: Final = st.lists(names(12, b"\0/"), max_size=3).map(lambda parts: b"/" + b"/".join(parts))
_MOUNTS: Final = st.builds(
    Mount,
    _PATHS,
    _PATHS,
    st.lists(st.sampled_from([b"shared:1", b"master:2", b"propagate_from:3", b"unbindable"]), max_size=3),
    st.sampled_from([b"cgroup2", b"cgroup", b"tmpfs", b"fuse.x-cgroup2", b"cgroup22"]),
    st.one_of(names(12), st.just(b"none"), st.just(b"")),
)
_MOUNTINFO: Final = "/proc/self/mountinfo"


def _hierarchy_is_found(mounts: Sequence[Mount]) -> None:
    right = next((mount for mount in mounts if mount.kind == b"cgroup2"), None)
    with said(cgroups, {_MOUNTINFO: b"".join(mount.written() for mount in mounts)}):
        try:
            found = cgroups._mounted()
        except CgroupError:
            assert right is None
        else:
            assert right is not None
            assert tuple(map(os.fsencode, found)) == (right.point, right.root)


class Membership(NamedTuple):
    """A process's cgroups."""

    others: Sequence[bytes]
    """Of version 1."""
    path: bytes
    root: bytes
    """The cgroup that is seen at the mount point."""

    def written(self) -> bytes:
        """Write it as proc_cgroup_show() does: nothing is escaped, and no name has a newline."""
        lines = [b"%d:memory:%s" % (number, path) for number, path in enumerate(self.others, 1)]
        return b"".join(line + b"\n" for line in [*lines[::-1], b"0::" + self.path])


_GROUP_NAMES: Final = st.one_of(names(20, b"\0/\n"), st.sampled_from([b"x\r0::", b"..", b"a (deleted)", b"0::"]))
_GROUPS: Final = st.lists(_GROUP_NAMES, max_size=3).map(lambda parts: b"/" + b"/".join(parts))
_MEMBERSHIPS: Final = st.builds(Membership, st.lists(_GROUPS, max_size=3), _GROUPS, st.one_of(st.just(b"/"), _GROUPS))
_TOP: Final = "/sys/fs/cgroup"


def _cgroup_is_found(member: Membership) -> None:
    mount = Mount(member.root, _TOP.encode(), [], b"cgroup2", b"cgroup2")
    path, root = os.fsdecode(member.path), os.fsdecode(member.root)
    whole = types.SimpleNamespace(path=types.SimpleNamespace(normpath=posixpath.normpath, isdir=lambda _: True))
    files = {_MOUNTINFO: mount.written(), f"/proc/{_PID}/cgroup": member.written()}
    inside = root == "/" or path == root or path.startswith(f"{root}/")
    below = path if root == "/" else path[len(root) :]
    is_seen = inside and ".." not in below.split("/")
    with said(cgroups, files), replaced(cgroups, os=whole):
        try:
            found = cgroups.of_process(_PID)
        except CgroupError:
            assert not is_seen
        else:
            assert is_seen
            assert found == posixpath.normpath(f"{_TOP}/{below}")


def _read_cgroups(data: bytes) -> None:
    files = {_MOUNTINFO: data, f"/proc/{_PID}/cgroup": data}
    with said(cgroups, files):
        for read in (cgroups.hierarchy, lambda: cgroups.of_process(_PID)):
            try:
                assert isinstance(read(), str)
            except CgroupError as exc:
                tells_why(exc)


def _read_processes(data: bytes) -> None:
    whole = types.SimpleNamespace(
        path=types.SimpleNamespace(join=posixpath.join, exists=lambda _: True), walk=lambda _: iter(())
    )
    with said(cgroups, {f"{_TOP}/cgroup.procs": data}), replaced(cgroups, os=whole):
        try:
            found = cgroups.processes(_TOP)
        except CgroupError as exc:
            tells_why(exc)
        else:
            assert found == sorted(set(found) - {0})
            assert all(0 < pid < 10**10 for pid in found)


_MOUNT_TOKENS: Final = (
    *(
        b" - cgroup2 ",
        b" - ",
        b" ",
        b"cgroup2",
        b"\\040",
        b"\\777",
        b"\\9",
        b"\n0::/",
        b"0::/",
        b"0::",
        b"/",
        b"1 2 0:3 / /a",
    ),
    *HOSTILE,
)
_PROCS_TOKENS: Final = (b"1\n", b"0\n", b"4194304\n", b"-1\n", b"\n", b"1 2\n", b"1_0\n", b"9" * 5000, "٣\n".encode())

PROPERTIES: Final = (
    Property("comm: a name is read as it is", _COMMS, _name_is_read),
    linear("comm: time", pieces(_FORGED), pieces(_FORGED), _name_is_read),
    Property("descriptors: sockets, and nothing else", st.lists(_LINKS, max_size=8), _sockets_are_found),
    Property("status: what the kernel writes", _STATUSES, _status_is_read),
    Property("status: any bytes", pieces(_STATUS_TOKENS), _reasons_are_given),
    Property("status: what was valid", edited(_STATUSES.map(Status.written), _STATUS_TOKENS), _reasons_are_given),
    linear("status: time", pieces(_STATUS_TOKENS), pieces(_STATUS_TOKENS), _reasons_are_given),
    Property("mountinfo: what the kernel writes", st.lists(_MOUNTS, max_size=5), _hierarchy_is_found),
    Property("cgroup: what the kernel writes", _MEMBERSHIPS, _cgroup_is_found),
    Property("mountinfo, cgroup: any bytes", pieces(_MOUNT_TOKENS), _read_cgroups),
    Property("mountinfo: what was valid", edited(_MOUNTS.map(Mount.written), _MOUNT_TOKENS), _read_cgroups),
    linear("mountinfo, cgroup: time", pieces(_MOUNT_TOKENS), pieces(_MOUNT_TOKENS), _read_cgroups),
    Property("cgroup.procs: any bytes", pieces(_PROCS_TOKENS), _read_processes),
    linear("cgroup.procs: time", pieces(_PROCS_TOKENS), pieces(_PROCS_TOKENS), _read_processes),
)
