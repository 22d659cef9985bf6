"""Files that a module finds when it opens them: what /proc would say."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import IO, Any

__all__ = ["replaced", "said"]


@contextlib.contextmanager
def said(module: ModuleType, files: Mapping[str, bytes]) -> Iterator[None]:
    """Let a module's `open` find these files, by path, and no others. They are decoded as the module asks."""

    def opened(
        path: str,
        mode: str = "r",
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        if path not in files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        raw = io.BytesIO(files[path])
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding or "utf-8", errors, newline)

    with replaced(module, open=opened):
        yield


@contextlib.contextmanager
def replaced(module: ModuleType, **names: object) -> Iterator[None]:
    """Give a module other values for some of its names, also for built-in ones."""
    space = vars(module)
    before = {name: space[name] for name in names if name in space}
    space.update(names)
    try:
        yield
    finally:
        for name in names:
            del space[name]
        space.update(before)
