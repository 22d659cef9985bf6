"""The table of the sockets that a monitor watches: as a process writes it, and as any process may forge it."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from hypothesis import strategies as st

from kaio.monitor import owners

from .inputs import edited, linear, pieces
from .search import Property

__all__ = ["PROPERTIES"]

_HEAD: Final = struct.pack("=QQ", owners._MAGIC, owners._VERSION | 77 << 32)
_ORDER: Final = sys.byteorder


def _records(records: Sequence[tuple[int, int]]) -> bytes:
    return _HEAD + b"".join(struct.pack("=QQ", inode, word) for inode, word in records)


_TABLES: Final = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=8).map(_records)
_TOKENS: Final = (_HEAD, bytes(8), bytes(16), struct.pack("=Q", 2**64 - 1), struct.pack("=QQ", 7, 1 << 32 | 5000))


def _changes_are_read(changes: Sequence[tuple[int, int]]) -> None:
    """What was claimed and released is what a reader finds."""
    table = owners._Table()
    expected: dict[int, float | None] = {}
    try:
        for inode, milliseconds in changes:
            table.change(inode, milliseconds)
            if milliseconds == owners._RELEASED:
                expected.pop(inode, None)
            else:
                expected[inode] = milliseconds / 1000 or None
            content = bytes(table._memory)
            assert owners.parse(content, content) == (
                (os.getpid(), expected) if expected else owners.parse(content, b"")
            )
        assert table.bounds() == expected
    finally:
        table.close()


def _any_bytes(example: tuple[bytes, bytes]) -> None:
    first, second = example
    pid, found = owners.parse(first, second)
    assert pid >= 0
    assert pid or not found or first[12:16] == bytes(4)
    for inode, bound in found.items():
        word = inode.to_bytes(8, _ORDER)
        assert word in first
        assert word in second
        assert bound is None or 0 < bound < 2**32 / 1000


def _torn(example: tuple[bytes, Mapping[int, int]]) -> None:
    """A record whose words differ between two readings is left out."""
    first, torn = example
    second = bytearray(first)
    for at, bit in torn.items():
        if 16 <= at < len(second):
            second[at] ^= 1 << bit
    pid, found = owners.parse(first, bytes(second))
    records = [(first[at : at + 16], bytes(second[at : at + 16])) for at in range(16, len(first), 16)]
    right = {int.from_bytes(one[:8], _ORDER) for one, two in records if one == two} - {0}
    assert pid == 77
    assert set(found) == right


def _read_twice(data: bytes) -> None:
    owners.parse(data, data)


_CHANGES: Final = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from([owners._RELEASED, 0, 1, 5000, 2**32 - 1])), max_size=12
)

PROPERTIES: Final = (
    Property("owners: what a monitor writes", _CHANGES, _changes_are_read),
    Property(
        "owners: two readings", st.tuples(_TABLES, st.dictionaries(st.integers(16, 150), st.integers(0, 7))), _torn
    ),
    Property("owners: any bytes", st.tuples(*[st.one_of(pieces(_TOKENS), edited(_TABLES, _TOKENS))] * 2), _any_bytes),
    linear("owners: time", st.just(_HEAD), pieces(_TOKENS), _read_twice),
)
