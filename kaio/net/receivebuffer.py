"""The bytes that a connection has received and nobody has taken yet."""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["EMPTY", "ReceiveBuffer"]


class ReceiveBuffer:
    """A queue of bytes, kept in the chunks in which they arrived."""

    __slots__ = ("_chunks", "_consumed", "size")

    def __init__(self) -> None:
        self._chunks: deque[bytes | bytearray] = deque()
        self._consumed = 0  # bytes of the first chunk that have been taken
        self.size: int = 0  # bytes in all chunks that have not

    def append(self, data: bytes) -> None:
        """Add a chunk at the end."""
        self._chunks.append(data)
        self.size += len(data)

    def take(self, most: int) -> bytes:
        """Remove and return at most that many bytes, up to the end of the first chunk. The buffer must not be empty."""
        chunk = self._chunks[0]
        start = self._consumed
        if len(chunk) - start <= most:
            self._chunks.popleft()
            self._consumed = 0
            data = chunk[start:] if start else chunk
        else:
            self._consumed = start + most
            data = chunk[start : start + most]
        self.size -= len(data)
        return data if type(data) is bytes else bytes(data)

    def take_exactly(self, count: int) -> bytes:
        """Remove and return that many bytes. The buffer must have them."""
        parts = []
        while count:
            part = self.take(count)
            count -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def find(self, delimiter: bytes, start: int) -> int:
        """Return where a delimiter first stands, from an offset on; -1: nowhere.

        Joins the chunks, each of them once: a line that comes byte by byte costs no more than its length.
        """
        chunks = self._chunks
        if not chunks:
            return -1
        if len(chunks) > 1:
            joined = chunks.popleft()
            if type(joined) is not bytearray:
                joined = bytearray(memoryview(joined)[self._consumed :])
            else:
                del joined[: self._consumed]
            self._consumed = 0
            for chunk in chunks:
                joined += chunk
            chunks.clear()
            chunks.append(joined)
        at = chunks[0].find(delimiter, self._consumed + start)
        return at if at < 0 else at - self._consumed


EMPTY: Final = ReceiveBuffer()
"""The buffer of every connection that has not had to keep anything yet; nothing is appended to it.

A deque takes 624 bytes, and most connections never need one: their data is handed to the task that waits for it.
"""
