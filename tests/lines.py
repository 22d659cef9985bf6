"""The lines that a running program prints, read in a thread as they come."""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import time
from typing import IO

__all__ = ["Lines"]


class Lines:
    """Those of one stream. They are found in their order, and each once."""

    def __init__(self, stream: IO[str]) -> None:
        self.seen: list[str] = []
        """All that were read by `find`."""
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError):  # closed at the end of the test
            for line in stream:
                self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def find(self, pattern: str, within: float) -> re.Match[str]:
        """Wait for a line that has a pattern; lines before it are read, too."""
        end = time.monotonic() + within
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line {pattern!r} within {within} s after {self.seen}") from None
            if line is None:
                self._queue.put(None)
                raise AssertionError(f"ended without a line {pattern!r}: {self.seen}")
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found

    def join(self, timeout: float) -> None:
        """Wait until the program has closed the stream."""
        self._thread.join(timeout)
