"""What the applications and the load generator (native/load.c) agree on."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["ANSWER", "CHUNK", "DOWNLOADS", "GREETING", "HEADER", "UPLOADS", "checked_chunks", "pattern"]

GREETING: Final = b"x"

HEADER: Final = struct.Struct("<cQ")
"""What a bulk transfer begins with: one of `UPLOADS` or `DOWNLOADS`, and how many bytes."""
UPLOADS: Final = (b"u", b"U")
"""The server receives, and answers with `ANSWER`; the capital: with a checksum."""
DOWNLOADS: Final = (b"d", b"D")
"""The server sends; the capital: what `pattern` says, otherwise the same chunk over and over."""
ANSWER: Final = struct.Struct("<QI")
"""How many bytes were received, and their CRC-32 or 0."""

CHUNK: Final = 64 * 1024
"""Bytes that a handler asks for, and sends, at a time."""
_PERIOD: Final = 65521  # of the pattern; load.c says why


def pattern() -> bytes:
    """One period of the bytes that are sent when they are checked."""
    x, made = 1, bytearray()
    for _ in range(_PERIOD):
        x = (x * 1103515245 + 12345) & 0xFFFFFFFF
        made.append(x >> 16 & 0xFF)
    return bytes(made)


def checked_chunks(total: int) -> list[bytes]:
    """So many bytes of the pattern, in chunks. For checks, which are small: all of it is in memory."""
    period = pattern()
    whole = (period * (total // _PERIOD + 1))[:total]
    return [whole[start : start + CHUNK] for start in range(0, total, CHUNK)]
