"""The kernel's type information (BTF): a table that is made at random, and the running kernel's own."""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from hypothesis import strategies as st

from kaio.tools.bpf import BpfError, _types, field_offsets

from .files import said
from .inputs import edited, linear, pieces
from .search import Property, tells_why

__all__ = ["PROPERTIES", "Structure", "find", "running", "written"]

_PATH: Final = "vmlinux"
_ORDER: Final = "<" if sys.byteorder == "little" else ">"
_STRUCT, _UNION = 4, 5
_EXTRA: Final = {1: 4, 3: 12, 14: 4, 17: 4}
"""Bytes that follow a type, by kind: integers, arrays, variables, tags."""
_PER_MEMBER: Final = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
"""Bytes for each member of a type, by kind: structures, unions, enumerations, prototypes, sections."""


class Structure(NamedTuple):
    """A type: a structure unless `kind` says another, with the offsets of its members in bits."""

    name: bytes
    members: Sequence[tuple[bytes, int]]
    has_bit_fields: bool = False
    kind: int = _STRUCT

    def offset(self, field: bytes) -> int | None:
        """Of the last member of that name, in bytes; None if there is none."""
        mask = 0xFFFFFF if self.has_bit_fields else 0xFFFFFFFF
        return next(((at & mask) // 8 for name, at in reversed(self.members) if name == field), None)


def find(types: Sequence[Structure], name: bytes, fields: Sequence[bytes]) -> list[int] | None:
    """What `field_offsets` should find: in the first structure of that name with all the fields."""
    for each in types:
        if each.kind == _STRUCT and each.name == name:
            offsets = [each.offset(field) for field in fields]
            if None not in offsets:
                return [at for at in offsets if at is not None]
    return None


def written(types: Sequence[Structure]) -> bytes:
    """Write a table (Documentation/bpf/btf.rst)."""
    names = b"\0"
    places = {b"": 0}
    for name in (each for one in types for each in (one.name, *(member for member, _ in one.members))):
        if name not in places:
            places[name] = len(names)
            names += name + b"\0"
    table = b"".join(
        struct.pack(
            f"{_ORDER}III", places[each.name], each.has_bit_fields << 31 | each.kind << 24 | len(each.members), 64
        )
        + b"".join(struct.pack(f"{_ORDER}III", places[member], 1, at) for member, at in each.members)
        for each in types
    )
    return struct.pack(f"{_ORDER}HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(table), len(table), len(names)) + table + names


def read(data: bytes) -> Iterator[Structure]:
    """Read a whole table, type by type."""
    _, _, _, length, types_at, size, names_at, _ = struct.unpack_from(f"{_ORDER}HBBIIIII", data)
    names = data[length + names_at :]

    @functools.cache
    def name(at: int) -> bytes:
        return names[at : names.index(b"\0", at)]

    at, end = length + types_at, length + types_at + size
    while at < end:
        place, info, _ = struct.unpack_from(f"{_ORDER}III", data, at)
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        after = at + 12 + _EXTRA.get(kind, 0) + count * _PER_MEMBER.get(kind, 0)
        if kind == _STRUCT:
            members = struct.iter_unpack(f"{_ORDER}III", data[at + 12 : after])
            yield Structure(name(place), [(name(each), offset) for each, _, offset in members], bool(info >> 31))
        at = after


@functools.cache
def running() -> tuple[Structure, ...]:
    """The structures of the running kernel; empty where it has no type information."""
    try:
        with open(_types.BTF, "rb") as file:
            return tuple(read(file.read()))
    except OSError:
        return ()


# -- properties

_NAMES: Final = st.sampled_from([b"", b"sock", b"so", b"sk_mark", b"mark", b"sk", b"sock_common"])
_MEMBERS: Final = st.lists(st.tuples(_NAMES, st.integers(0, 2**14).map(lambda at: at * 8)), max_size=5)
_STRUCTURES: Final = st.builds(
    Structure, _NAMES, _MEMBERS, st.booleans(), st.sampled_from([_STRUCT, _STRUCT, _STRUCT, _UNION])
)
_WANTED: Final = st.sampled_from(["sock", "sock_common", "mark", "so", "nothing"])


def _found(data: bytes, name: str, fields: Sequence[str]) -> list[int] | None:
    with said(_types, {_PATH: data}):
        try:
            return list(field_offsets(name, fields, _PATH).values())
        except BpfError as exc:
            tells_why(exc)
            return None


def _fields_are_found(example: tuple[Sequence[Structure], str, Sequence[str]]) -> None:
    types, name, fields = example
    right = find(types, name.encode(), [field.encode() for field in fields])
    assert _found(written(types), name, fields) == right


def _any_bytes(data: bytes) -> None:
    found = _found(data, "sock", ["sk_mark", "mark"])
    assert found is None or all(0 <= at < 2**29 for at in found)


def _running_kernel(example: tuple[int, int, bool]) -> None:
    types = running()
    if not types:
        return
    chosen = types[example[0] % len(types)]
    fields = sorted({name for name, _ in chosen.members if name})
    if not chosen.name or not fields:
        return
    wanted = [fields[example[1] % len(fields)], fields[-1], *([b"no_such_field"] if example[2] else [])]
    wanted = list(dict.fromkeys(wanted))
    right = find(types, chosen.name, wanted)
    try:
        found: list[int] | None = list(
            field_offsets(chosen.name.decode(), [field.decode() for field in wanted]).values()
        )
    except BpfError:
        found = None
    assert found == right


_TOKENS: Final = (
    bytes(4),
    struct.pack("=I", 1),
    struct.pack("=I", 4 << 24 | 1),
    struct.pack("=I", 2**32 - 1),
    b"\0sock\0mark\0",
)
_TABLES: Final = st.lists(_STRUCTURES, max_size=4).map(written)


def _large(types: bytes) -> None:
    """A table of that many types, behind a header that says so."""
    names = b"\0sock\0sk_mark\0mark\0"
    head = struct.pack(f"{_ORDER}HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    _any_bytes(head + types + names)


_ENTRIES: Final = st.lists(
    st.tuples(*[st.sampled_from([0, 1, 4 << 24, 4 << 24 | 1, 4 << 24 | 0xFFFF, 6])] * 3).map(
        lambda words: struct.pack(f"{_ORDER}III", *words)
    ),
    max_size=3,
).map(b"".join)

PROPERTIES: Final = (
    Property(
        "BTF: fields are where the table says",
        st.tuples(
            st.lists(_STRUCTURES, max_size=5),
            _WANTED,
            st.lists(st.sampled_from(["sk_mark", "mark", "sk", "nothing"]), min_size=1, max_size=3, unique=True),
        ),
        _fields_are_found,
    ),
    Property("BTF: any bytes", pieces(_TOKENS), _any_bytes),
    Property("BTF: what was valid", edited(_TABLES, _TOKENS), _any_bytes),
    Property(
        "BTF: the running kernel's",
        st.tuples(st.integers(0, 2**20), st.integers(0, 50), st.booleans()),
        _running_kernel,
    ),
    linear("BTF: time", _ENTRIES, _ENTRIES, _large),
)
