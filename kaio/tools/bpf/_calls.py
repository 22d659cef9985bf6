"""bpf(2), and the file system that keeps what it made.

Rules kept here: a descriptor that a function returns is close-on-exec, as all of bpf(2) are, and belongs to the caller;
an errno becomes a `BpfError`, which says what was refused and, where the kernel lacks a permission, which.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Final, NamedTuple

from ...kernel.descriptors import libc
from ._error import BpfError

__all__ = ["SETSOCKOPT", "SOCK_OPS", "Bpf", "Hook", "attached", "detach", "is_bpffs", "mount"]

# arch/*/entry/syscalls: x86 and a few older ones have numbers of their own
_NUMBERS: Final = {"x86_64": 321, "i386": 357, "i686": 357, "ppc64": 361, "ppc64le": 361, "s390x": 351}
_ASM_GENERIC: Final = 280
_ARM: Final = 386

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD, _OBJ_PIN, _OBJ_GET = 0, 1, 2, 5, 6, 7
_PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _OBJ_GET_INFO, _PROG_QUERY = 8, 9, 13, 15, 16
_LINK_CREATE, _LINK_UPDATE, _LINK_DETACH = 28, 29, 34
_ARRAY: Final = 2
_ALLOW_MULTI: Final = 2
_BPF_FS_MAGIC: Final = 0xCAFE4A11
_LOG_SIZE: Final = 1 << 20
# The kernel lets only programs under a licence compatible with its own read its structures; MIT's is, under this name
# (include/linux/license.h).
_LICENSE: Final = b"Dual MIT/GPL"
_NAME: Final = 15  # bytes of a program's or map's name


class Hook(NamedTuple):
    """A place where the kernel calls a program for the sockets of a cgroup."""

    program: int
    """The type of program: enum bpf_prog_type."""
    attachment: int
    """The type of attachment: enum bpf_attach_type."""


SOCK_OPS: Final = Hook(13, 3)
"""Events of TCP sockets: they connect, are accepted, ..."""
SETSOCKOPT: Final = Hook(25, 22)
"""Calls of setsockopt(2), before the kernel handles them."""


class Bpf:
    """An object of bpf(2), referred to by a descriptor: a map, a program or a link. Close it, or use it in `with`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    # -- made here

    @classmethod
    def array(cls, name: str, size: int) -> Bpf:
        """Make a map with a single value of that many bytes."""
        return cls(_make_array(name, size))

    @classmethod
    def program(cls, hook: Hook, name: str, instructions: bytes) -> Bpf:
        """Load a program. The error has the verifier's log."""
        return cls(_load(hook, name, instructions))

    def link(self, hook: Hook, cgroup: int) -> Bpf:
        """Attach this program to a cgroup, given by a descriptor of its directory, for as long as the link exists."""
        attributes = struct.pack("=IIII", self.fileno(), cgroup, hook.attachment, 0)
        return Bpf(_call(_LINK_CREATE, attributes, "attaching the program to the cgroup"))

    def attach(self, hook: Hook, cgroup: int) -> None:
        """Attach this program to a cgroup for as long as the cgroup exists."""
        attributes = struct.pack("=IIII", cgroup, self.fileno(), hook.attachment, _ALLOW_MULTI)
        _call(_PROG_ATTACH, attributes, "attaching the program to the cgroup")

    @classmethod
    def pinned(cls, path: str) -> Bpf:
        """Open what is pinned there."""
        name = ctypes.create_string_buffer(os.fsencode(path))
        attributes = struct.pack("=QII", ctypes.addressof(name), 0, 0)
        return cls(_call(_OBJ_GET, attributes, f"opening {path}"))

    # -- what it does

    def pin(self, path: str) -> None:
        """Give it a name in a BPF file system, so that it outlives this process."""
        name = ctypes.create_string_buffer(os.fsencode(path))
        _call(_OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), self.fileno(), 0), f"pinning {path}")

    def replace(self, program: Bpf) -> None:
        """Give this link another program, with nothing in between."""
        attributes = struct.pack("=IIII", self.fileno(), program.fileno(), 0, 0)
        _call(_LINK_UPDATE, attributes, "replacing the program of the link")

    def detach(self) -> None:
        """Detach this link's program, whoever else refers to the link."""
        try:
            _call(_LINK_DETACH, struct.pack("=I", self.fileno()), "detaching the program")
        except BpfError as exc:
            if exc.errno != errno.ENOENT:  # the cgroup is gone
                raise

    def read(self, size: int) -> bytes:
        """Read that many bytes, the whole value of a map of one value. Raises `BpfError` if it is another map."""
        # struct bpf_map_info: type, id, key_size, value_size. The kernel writes the whole value, however long it is.
        kind, _, key, length = struct.unpack_from("=IIII", self.info())
        if (kind, key, length) != (_ARRAY, 4, size):
            raise BpfError(errno.EINVAL, f"reading a map: not one whose value has {size} bytes")
        value = ctypes.create_string_buffer(size)
        _on_value(_MAP_LOOKUP, self, value, "reading a map")
        return value.raw

    def write(self, value: bytes) -> None:
        """Write the whole value of a map of one value."""
        _on_value(_MAP_UPDATE, self, ctypes.create_string_buffer(value, len(value)), "writing a map")

    def info(self, size: int = 256) -> bytes:
        """The kernel's description: struct bpf_prog_info, bpf_map_info or bpf_link_info."""
        value = ctypes.create_string_buffer(size)
        attributes = struct.pack("=IIQ", self.fileno(), size, ctypes.addressof(value))
        _call(_OBJ_GET_INFO, attributes, "asking for a description")
        return value.raw

    @property
    def program_id(self) -> int:
        """The kernel's number of this program."""
        return int(struct.unpack_from("=II", self.info())[1])

    @property
    def cgroup_id(self) -> int:
        """The number of the cgroup that this link is attached to; 0 if that is gone."""
        # struct bpf_link_info: type, id, prog_id, and after padding the union's cgroup_id
        return int(struct.unpack_from("=Q", self.info(), 16)[0])

    @property
    def linked_program(self) -> int:
        """The kernel's number of the program of this link."""
        return int(struct.unpack_from("=III", self.info())[2])

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Close the descriptor. Does nothing if it is closed."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Bpf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attached(hook: Hook, cgroup: int, name: str = "") -> list[int]:
    """The numbers of the programs that are attached to a cgroup itself, by links or without.

    With a name, those of that name, which needs CAP_SYS_ADMIN; without that right there are none.
    """
    numbers = (ctypes.c_uint32 * 64)()
    attributes = struct.pack("=IIIIQI", cgroup, hook.attachment, 0, 0, ctypes.addressof(numbers), len(numbers))
    buffer = ctypes.create_string_buffer(attributes, len(attributes) + 4)
    _call_in(_PROG_QUERY, buffer, "listing the programs of the cgroup")
    count = struct.unpack_from("=I", buffer.raw, 24)[0]
    return [number for number in numbers[:count] if not name or _name_of(number) == name]


def detach(hook: Hook, cgroup: int, number: int) -> None:
    """Detach a program that was attached without a link, as systemd does it. Does nothing if it is not attached so."""
    try:
        with _by_id(number) as program:
            _call(_PROG_DETACH, struct.pack("=IIII", cgroup, program.fileno(), hook.attachment, 0), "detaching")
    except BpfError as exc:
        if exc.errno not in (errno.ENOENT, errno.EINVAL):
            raise


def is_bpffs(path: str) -> bool:
    """Whether a path is in a BPF file system."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs, whose first field is the type
    if libc().statfs(os.fsencode(path), buffer) != 0:
        return False
    return int(struct.unpack_from("=q" if sys.maxsize > 2**32 else "=i", buffer.raw)[0]) & 0xFFFFFFFF == _BPF_FS_MAGIC


def mount(path: str) -> None:
    """Mount a BPF file system, as systemd does at boot."""
    if libc().mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") != 0:
        number = ctypes.get_errno()
        reason = "not permitted: run as root (CAP_SYS_ADMIN)" if number == errno.EPERM else os.strerror(number)
        raise BpfError(number, f"mounting a BPF file system at {path}: {reason}")


# -- the system call


def _number() -> int:
    machine = platform.machine()
    return _ARM if machine.startswith("arm") else _NUMBERS.get(machine, _ASM_GENERIC)


def _call(command: int, attributes: bytes, doing: str) -> int:
    return _call_in(command, ctypes.create_string_buffer(attributes, len(attributes)), doing)


def _call_in(command: int, attributes: ctypes.Array[ctypes.c_char], doing: str) -> int:
    """Call bpf(2). The kernel may write its answer into the attributes."""
    if not sys.platform.startswith("linux"):
        raise BpfError(errno.ENOSYS, f"kernel programs exist on Linux only; this is {sys.platform}")
    found = libc().syscall(_number(), command, ctypes.byref(attributes), len(attributes))
    if found < 0:
        raise _refused(ctypes.get_errno(), doing)
    return int(found)


def _refused(number: int, doing: str, log: str = "") -> BpfError:
    reason = os.strerror(number)
    if number == errno.EPERM:
        reason = "not permitted: run as root (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, outside a user namespace)"
    elif number == errno.ENOSYS:
        reason = "the kernel has no bpf(2), or a container's seccomp filter hides it"
    return BpfError(number, f"{doing}: {reason}", log)


def _make_array(name: str, size: int) -> int:
    attributes = struct.pack("=IIIIIII", _ARRAY, 4, size, 1, 0, 0, 0) + _name(name)
    return _call(_MAP_CREATE, attributes, f"making the map {name}")


def _load(hook: Hook, name: str, instructions: bytes) -> int:
    """Load a program; once more with a log if it is refused, since writing one takes the verifier time."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    license_ = ctypes.create_string_buffer(_LICENSE)

    def attributes(level: int, log: int) -> bytes:
        count, size = len(instructions) // 8, _LOG_SIZE if level else 0
        head = struct.pack("=IIQQ", hook.program, count, ctypes.addressof(code), ctypes.addressof(license_))
        return (
            head + struct.pack("=IIQII", level, size, log, 0, 0) + _name(name) + struct.pack("=II", 0, hook.attachment)
        )

    try:
        return _call(_PROG_LOAD, attributes(0, 0), "loading the program")
    except BpfError as exc:
        if exc.errno not in (errno.EINVAL, errno.EACCES):
            raise
        log = ctypes.create_string_buffer(_LOG_SIZE)
        try:
            return _call(_PROG_LOAD, attributes(1, ctypes.addressof(log)), "loading the program")
        except BpfError as again:
            number = again.errno or errno.EINVAL
            message = f"loading the program: the verifier refused it ({os.strerror(number)})"
            raise BpfError(number, message, log.value.decode(errors="replace")) from None


def _by_id(number: int) -> Bpf:
    return Bpf(_call(_PROG_GET_FD_BY_ID, struct.pack("=III", number, 0, 0), "opening a program"))


def _name_of(number: int) -> str:
    try:
        with _by_id(number) as program:
            # struct bpf_prog_info: the name is at byte 64, after type, id, tag, lengths, addresses, times and maps
            return program.info()[64:80].split(b"\0")[0].decode(errors="replace")
    except BpfError:
        return ""


def _name(name: str) -> bytes:
    return struct.pack("=16s", name.encode()[:_NAME])


def _on_value(command: int, map_: Bpf, value: ctypes.Array[ctypes.c_char], doing: str) -> None:
    key = ctypes.c_uint32(0)
    _call(command, struct.pack("=IIQQQ", map_.fileno(), 0, ctypes.addressof(key), ctypes.addressof(value), 0), doing)
