"""The kernel's own type information, BTF (Documentation/bpf/btf.rst): where the fields of its structures are.

Rules kept here: a field is looked up by its name in the running kernel, since structures differ from build to build.
The table of types has no index, and walking it takes a tenth of a second; a structure is instead searched for by its
name's number, and taken only if it has every field that is asked for.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Sequence
from typing import Final

from ._error import BpfError

__all__ = ["field_offsets"]

BTF: Final = "/sys/kernel/btf/vmlinux"
_MAGIC: Final = 0xEB9F
_STRUCT: Final = 4  # BTF_KIND_STRUCT


def field_offsets(structure: str, fields: Sequence[str], path: str = BTF) -> dict[str, int]:
    """Return where fields of one of the kernel's structures are, in bytes. Raises `BpfError`."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as exc:
        what = "the kernel has no type information (CONFIG_DEBUG_INFO_BTF)"
        raise BpfError(exc.errno, f"{path}: {what if exc.errno == errno.ENOENT else exc.strerror}") from None
    try:
        found = _find(data, structure.encode(), [field.encode() for field in fields])
    except (struct.error, IndexError):
        found = None
    if found is None:
        raise BpfError(errno.ENOENT, f"{path}: this kernel's struct {structure} does not have {', '.join(fields)}")
    return dict(zip(fields, found, strict=True))


def _find(data: bytes, structure: bytes, fields: Sequence[bytes]) -> list[int] | None:
    order = "<" if sys.byteorder == "little" else ">"
    magic, _, _, length, types_at, types_length, names_at, names_length = struct.unpack_from(f"{order}HBBIIIII", data)
    if magic != _MAGIC:
        return None
    types = data[length + types_at : length + types_at + types_length]
    names = data[length + names_at : length + names_at + names_length]
    # A name that is not in the table must not become 0, which is that of everything anonymous.
    places = [names.find(b"\0%s\0" % name) + 1 for name in (structure, *fields)]
    if 0 in places:
        return None
    wanted = dict(zip(places[1:], fields, strict=True))
    searched = struct.pack(f"{order}I", places[0])
    place = types.find(searched)
    while place >= 0:
        if place % 4 == 0:
            offsets = _members(types, place, order, wanted)
            if len(offsets) == len(fields):
                return [offsets[field] for field in fields]
        place = types.find(searched, place + 1)
    return None


def _members(types: bytes, place: int, order: str, wanted: dict[int, bytes]) -> dict[bytes, int]:
    """The offsets of the wanted fields, if a structure begins there."""
    _, info = struct.unpack_from(f"{order}II", types, place)
    count, kind, bit_fields = info & 0xFFFF, info >> 24 & 0x1F, info >> 31
    if kind != _STRUCT or place + 12 * (1 + count) > len(types):
        return {}
    members = struct.iter_unpack(f"{order}III", types[place + 12 : place + 12 * (1 + count)])
    mask = 0xFFFFFF if bit_fields else 0xFFFFFFFF
    return {wanted[name]: (offset & mask) // 8 for name, _, offset in members if name in wanted}
