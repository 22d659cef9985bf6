"""The Python files below some paths, and what is in them.

Rules kept here: only regular files are opened, without blocking, and none is read beyond a limit. A file or directory
that cannot be read is reported, and the others are read all the same.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Final

__all__ = ["LARGEST", "LARGEST_NOTEBOOK", "NOTEBOOK", "UnreadableError", "check_size", "find", "read"]

NOTEBOOK: Final = ".ipynb"
LARGEST: Final = 4 * 1024 * 1024
"""Bytes of the largest source that is read: its tree takes up to 500 times as much memory, 2 GiB."""
LARGEST_NOTEBOOK: Final = 4 * LARGEST
"""Bytes of the largest notebook, most of which is output."""

_SUFFIXES: Final = (".py", ".pyw", NOTEBOOK)
_STUB: Final = ".pyi"  # declares names, and makes no connections
_SKIPPED: Final = frozenset({"__pycache__", "node_modules", "site-packages"})
_KINDS: Final = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a directory"),
)
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
_CHUNK: Final = 1024 * 1024


class UnreadableError(Exception):
    """Why a file, a directory or a cell of a notebook cannot be read."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def find(given: str) -> Iterator[tuple[str, UnreadableError | None]]:
    """The path itself, or the Python files below it; with the reason, for a directory that cannot be listed."""
    if os.path.isdir(given):
        yield from _walk(given)
    elif not given.endswith(_STUB):
        yield given, None


def _walk(top: str) -> Iterator[tuple[str, UnreadableError | None]]:
    """In the order of os.walk(), which does not report errors, and calls itself for each level in Python 3.11."""
    todo = [top]
    while todo:
        directory = todo.pop()
        try:
            with os.scandir(directory) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as exc:
            yield directory, UnreadableError(_words(exc))
            continue
        below: list[str] = []
        for entry in listed:
            if _is_directory(entry):
                below += [entry.path] if _is_walked(entry) else []
            elif entry.name.endswith(_SUFFIXES):
                yield entry.path, None
        todo += reversed(below)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_walked(entry: os.DirEntry[str]) -> bool:
    return not (
        entry.name.startswith(".")
        or entry.name in _SKIPPED
        or entry.is_symlink()
        or os.path.exists(os.path.join(entry.path, "pyvenv.cfg"))
    )


def read(path: str) -> bytes:
    """Read a regular file. Raises `UnreadableError`."""
    largest = LARGEST_NOTEBOOK if path.endswith(NOTEBOOK) else LARGEST
    try:
        _check(os.stat(path), largest)  # opening a device may do something
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as exc:
        raise UnreadableError(_words(exc)) from exc
    try:
        _check(os.fstat(descriptor), largest)
        return _read(descriptor, largest)
    except OSError as exc:
        raise UnreadableError(_words(exc)) from exc
    finally:
        os.close(descriptor)


def check_size(size: int, largest: int = LARGEST) -> None:
    """Raise `UnreadableError` for a size over the limit."""
    if size > largest:
        raise UnreadableError(f"it has more than {largest // (1024 * 1024)} MiB")


def _check(status: os.stat_result, largest: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "something else")
        raise UnreadableError(f"it is {kind}, not a regular file")
    check_size(status.st_size, largest)


def _read(descriptor: int, largest: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := os.read(descriptor, _CHUNK):
        parts.append(part)
        size += len(part)
        check_size(size, largest)  # grown since, or of a file system that gives no sizes
    return b"".join(parts)


def _words(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
