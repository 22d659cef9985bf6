"""The places in Python source that make TCP sockets, clients and servers, and what sets keepalive there.

Rules kept here: source is parsed, never imported or run, one file at a time. A name refers to what it was imported or
assigned as where it is used, so that a parameter called `socket` is not the module. A place that cannot be judged from
the file counts as uncovered; a setting that comes from a variable counts as on.

    _files        the files below some paths
    _notebook     the cells of Jupyter notebooks
    _libraries    the calls that make connections, and what sets keepalive in each
    _kaio         kaio's own names
    _scopes       scopes and bindings, and the bindings that reach a place
    _reader       one pass through a file's tree, which collects them
    _calls        the arguments of calls
    _names        what the expressions of a file refer to
    _values       the values of arguments
    _evidence     what is done with each connection
    _platform     conditions that exclude Linux
    _judge        the verdict on each place
"""

from __future__ import annotations

import ast
import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence

from ._files import NOTEBOOK, UnreadableError, find, read
from ._judge import Judge
from ._notebook import Notebook

__all__ = ["Finding", "Report", "audit", "report"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A place that makes a TCP socket, a client or a server; or a file that could not be read."""

    path: str
    line: int
    call: str
    """The full name of what is called, whatever it was imported as; empty when the file could not be read."""
    covered: bool
    why: str
    """What sets keepalive here, or what to do about it."""
    cell: int | None = None
    """The cell of a notebook, counted from one among all of its cells; `line` is the line in that cell."""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What was found below some paths, and how much was read."""

    findings: list[Finding]
    files: int
    """The files that were read."""
    empty: list[str]
    """The given paths in which there is nothing to audit."""

    @property
    def unreadable(self) -> int:
        """The files, directories and cells of notebooks that could not be read."""
        return sum(not finding.call for finding in self.findings)

    @property
    def places(self) -> int:
        """The places that make connections."""
        return len(self.findings) - self.unreadable

    @property
    def uncovered(self) -> int:
        """The places where nothing sets keepalive."""
        return sum(bool(finding.call) and not finding.covered for finding in self.findings)


def audit(paths: Sequence[str | os.PathLike[str]]) -> list[Finding]:
    """Audit files, and the Python files and notebooks of directories.

    Hidden directories, virtual environments, `__pycache__` and `node_modules` are skipped unless named explicitly.
    Stubs (`.pyi`) are not audited. A file that cannot be read or parsed is one finding, with an empty `call`.

    Raises FileNotFoundError for a path that does not exist.
    """
    for path in paths:
        os.stat(path)
    return report(paths).findings


def report(paths: Sequence[str | os.PathLike[str]]) -> Report:
    """Audit like `audit()`, and count the files; a path that does not exist is one that cannot be read."""
    findings: list[Finding] = []
    files = 0
    empty: list[str] = []
    seen: set[str] = set()
    for given in [os.fspath(path) for path in paths]:
        audited = False
        for path, problem in find(given):
            real = _identity(path)
            if real in seen:  # each file once, under the first name it was found by
                audited = True
                continue
            seen.add(real)
            found, was_read = _audit_file(path) if problem is None else ([_unreadable(path, problem)], False)
            findings += found
            files += was_read
            audited = audited or was_read or bool(found)
        if not audited:
            empty.append(given)
    return Report(findings, files, empty)


def _identity(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # a null byte
        return path


def _audit_file(path: str) -> tuple[list[Finding], bool]:
    """The findings of a file, and whether there was Python in it that could be read."""
    try:
        source = read(path)
        if path.endswith(NOTEBOOK):
            return _audit_notebook(path, Notebook(source, _parse))
        tree = _parse(source)
        return [Finding(path, *place) for place in Judge(tree).places()], True
    except UnreadableError as exc:
        return [_unreadable(path, exc)], False
    except RecursionError as exc:
        return [_unreadable(path, UnreadableError(str(exc)))], False


def _audit_notebook(path: str, notebook: Notebook) -> tuple[list[Finding], bool]:
    unreadable = [_unreadable(path, problem, cell) for cell, problem in notebook.unreadable]
    return [*_places(path, notebook), *unreadable], not notebook.is_empty


def _places(path: str, notebook: Notebook) -> Iterator[Finding]:
    for line, call, covered, why in Judge(notebook.tree, notebook.line_name).places():
        cell, within = notebook.place(line)
        yield Finding(path, within, call, covered, why, cell)


def _unreadable(path: str, problem: UnreadableError, cell: int | None = None) -> Finding:
    return Finding(path, problem.line, "", False, f"cannot be read: {problem}", cell)


def _parse(source: bytes | str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarnings about the audited source are of no interest here
            return ast.parse(source)
    except SyntaxError as exc:
        raise UnreadableError(f"syntax error: {exc.msg}", exc.lineno or 1) from exc
    except Exception as exc:  # null bytes, nested too deeply, whatever the codec of a coding cookie raises
        raise UnreadableError(str(exc) or type(exc).__name__) from exc
