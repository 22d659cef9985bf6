"""Jupyter notebooks: the Python code of their cells, read as one module.

Rules kept here: a cell that cannot be parsed is reported, and the others are read all the same. Lines for IPython,
which begin with `%` or `!` or ask for help with `?`, are left out; so are cells in other languages.
"""

from __future__ import annotations

import ast
import bisect
import json
import re
from collections.abc import Callable, Iterator
from typing import Final

from ._files import UnreadableError, check_size

__all__ = ["Notebook"]

# Cell magics whose cell is Python all the same.
_PYTHON_MAGICS: Final = frozenset({"%%time", "%%timeit", "%%capture", "%%prun", "%%python", "%%python3"})
_ASSIGNED: Final = re.compile(r"(\s*)([\w.]+)\s*=\s*[%!].*")


class Notebook:
    """The code cells of a notebook; the lines of its tree are counted from the first cell on."""

    def __init__(self, source: bytes, parse: Callable[[str], ast.Module]) -> None:
        """Read a notebook. `parse` raises `UnreadableError`, and so does this if it is not a notebook at all."""
        self.unreadable: list[tuple[int, UnreadableError]] = []
        """The cells that cannot be read."""
        self._starts: list[int] = []  # the line before each readable cell
        self._numbers: list[int] = []
        body: list[ast.stmt] = []
        line = size = 0
        for number, text in _code_cells(source):
            size += len(text)
            check_size(size)
            try:
                tree = _parse(text, parse)
            except UnreadableError as exc:
                self.unreadable.append((number, exc))
                continue
            self._starts.append(line)
            self._numbers.append(number)
            body += ast.increment_lineno(tree, line).body
            line += text.count("\n") + 1
        self.tree = ast.Module(body, [])

    @property
    def is_empty(self) -> bool:
        """Whether there is no Python in it that could be read."""
        return not self._starts

    def place(self, line: int) -> tuple[int, int]:
        """The cell of a line of the tree, and the line within the cell; both count from one."""
        index = bisect.bisect_left(self._starts, line) - 1
        return self._numbers[index], line - self._starts[index]

    def line_name(self, line: int) -> str:
        cell, within = self.place(line)
        return f"line {within} of cell {cell}"


def _code_cells(source: bytes) -> Iterator[tuple[int, str]]:
    """The number of each code cell, among all cells, with its text."""
    try:
        document = json.loads(source.decode("utf-8-sig"))
    except (ValueError, RecursionError) as exc:
        raise UnreadableError(f"it is not a notebook: {exc}", getattr(exc, "lineno", 1)) from exc
    cells = _cells(document)
    if not _is_python(document):
        return
    for number, cell in enumerate(cells, 1):
        if isinstance(cell, dict) and cell.get("cell_type") == "code":
            text = cell.get("source", cell.get("input", ""))  # `input` up to version 3 of the format
            lines = text if isinstance(text, list) else [text]
            yield number, "".join(each for each in lines if isinstance(each, str))


def _cells(document: object) -> list[object]:
    if isinstance(document, dict):
        if isinstance(cells := document.get("cells"), list):
            return cells
        if isinstance(sheets := document.get("worksheets"), list):  # up to version 3 of the format
            found = [sheet.get("cells") for sheet in sheets if isinstance(sheet, dict)]
            return [cell for cells in found if isinstance(cells, list) for cell in cells]
    raise UnreadableError("it is not a notebook: it has no cells")


def _is_python(document: dict[str, object]) -> bool:
    """Whether the notebook is for Python, which it is if it does not say."""
    metadata = document.get("metadata")
    for key, name in (("kernelspec", "language"), ("language_info", "name")):
        part = metadata.get(key) if isinstance(metadata, dict) else None
        language = part.get(name) if isinstance(part, dict) else None
        if isinstance(language, str) and language:
            return "python" in language.lower()
    return True


def _parse(text: str, parse: Callable[[str], ast.Module]) -> ast.Module:
    try:
        return parse(text)
    except UnreadableError:
        plain = _without_magics(text)
        if plain == text:
            raise
        return parse(plain)


def _without_magics(text: str) -> str:
    """The cell with IPython's lines replaced, each by one line."""
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    if lines[first].startswith("%%"):
        if lines[first].split()[0] not in _PYTHON_MAGICS:
            return ""
        lines[first] = ""
    continued = False
    for number, line in enumerate(lines):
        stripped = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if continued:
            lines[number] = ""
        elif stripped.startswith(("%", "!", "?")) or (stripped.endswith("?") and not stripped.startswith("#")):
            lines[number] = f"{indent}pass"
        elif found := _ASSIGNED.fullmatch(line):
            lines[number] = f"{found[1]}{found[2]} = None"
        else:
            continue
        continued = line.endswith("\\")
    return "\n".join(lines)
