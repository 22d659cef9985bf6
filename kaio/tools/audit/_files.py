"""The files of an audit: which ones, and their source.

Rules kept here: only regular files are read, and none that is too large, so that a pipe, a device or a file of another
user's making cannot hold the audit up. A notebook's code cells are read as one module; lines for IPython are left out.
"""

from __future__ import annotations

import ast
import json
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

__all__ = ["Source", "SourceError", "files", "read"]

_SKIPPED: Final = frozenset({"__pycache__", "node_modules", "site-packages"})
_SUFFIXES: Final = (".py", ".pyw", ".ipynb")
_LARGEST: Final = 16 << 20  # bytes
_MAGIC: Final = re.compile(r"[ \t]*([%!?]|.*\?[ \t]*$)")
_OTHER_LANGUAGE: Final = re.compile(r"[ \t]*%%(?!time\b|timeit\b|capture\b|prun\b|python3?\b)")


class SourceError(Exception):
    """A file that cannot be read as Python; `line` is where, `reason` is why."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line = line
        self.reason = reason


class Source(NamedTuple):
    """A file's tree, and how to name its lines."""

    tree: ast.Module
    cells: Sequence[int] = ()
    """For a notebook, the line of the module at which each code cell begins."""

    def place(self, path: str, line: int) -> tuple[str, int]:
        """The path and line to report; for a notebook, the path with the number of the cell, and the line in it."""
        number = sum(start <= line for start in self.cells)
        return (f"{path}[{number}]", line - self.cells[number - 1] + 1) if number else (path, line)


def files(paths: Sequence[str], refused: Callable[[str], None]) -> Iterator[str]:
    """Iterate over Python files, each once, under the first name it is found by; those of directories in their order.

    `refused` is called with the reason for each directory that cannot be listed.
    """
    seen: set[str] = set()
    for given in paths:
        for path in _walk(given, refused) if os.path.isdir(given) else (given,):
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                yield path


def _walk(top: str, refused: Callable[[str], None]) -> Iterator[str]:
    def report(exc: OSError) -> None:
        refused(f"{exc.filename}: {exc.strerror}")

    for directory, below, names in os.walk(top, onerror=report):
        below[:] = sorted(
            name
            for name in below
            if not name.startswith(".")
            and name not in _SKIPPED
            and not os.path.exists(os.path.join(directory, name, "pyvenv.cfg"))
        )
        yield from (os.path.join(directory, name) for name in sorted(names) if name.endswith(_SUFFIXES))


def read(path: str) -> Source:
    """Read and parse a file. Raises `SourceError`."""
    try:
        source = _content(path)
    except OSError as exc:
        raise SourceError(1, str(exc.strerror)) from None
    cells: list[int] = []
    text: bytes | str = source
    if path.endswith(".ipynb"):
        text, cells = _notebook(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarnings about the audited source are of no interest here
            tree = ast.parse(text, path.encode(errors="backslashreplace"))
    except SyntaxError as exc:
        line = exc.lineno or 1
        raise SourceError(line, f"syntax error: {exc.msg}") from None
    except (ValueError, RecursionError, MemoryError) as exc:  # null bytes before Python 3.12; nested too deeply
        raise SourceError(1, str(exc) or type(exc).__name__) from None
    return Source(tree, cells)


def _content(path: str) -> bytes:
    # Without blocking: a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise SourceError(1, "not a regular file")
        content = file.read(_LARGEST + 1)  # not to the size that it had, which may grow
        if len(content) > _LARGEST:
            raise SourceError(1, f"larger than {_LARGEST >> 20} MiB")
        return content


def _notebook(content: bytes) -> tuple[str, list[int]]:
    """Join a notebook's code cells. Returns the source and the line at which each begins."""
    try:
        document = json.loads(content)
        cells = [cell["source"] for cell in document["cells"] if cell["cell_type"] == "code"]
        sources = [cell if isinstance(cell, str) else "".join(cell) for cell in cells]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SourceError(1, "not a notebook of version 4") from None
    lines: list[str] = []
    starts: list[int] = []
    for source in sources:
        starts.append(len(lines) + 1)
        lines += _without_magic(source)
    return "\n".join(lines), starts


def _without_magic(source: str) -> list[str]:
    """A cell's lines, with those for IPython replaced; all of them if the cell is in another language."""
    lines = source.split("\n")
    if _OTHER_LANGUAGE.match(source.lstrip("\n")):
        return [""] * len(lines)
    return [
        f"{line[: len(line) - len(line.lstrip())]}pass" if _MAGIC.match(line) and not _is_python(line) else line
        for line in lines
    ]


def _is_python(line: str) -> bool:
    """Whether a line that looks like IPython's is Python all the same: `"what?"`, or the rest of an expression."""
    return not line.lstrip().startswith(("%", "!", "?")) and ('"' in line or "'" in line or "#" in line)
