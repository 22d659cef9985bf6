"""The places in Python source that make TCP sockets, clients and servers, and what sets keepalive there.

Rules kept here: source is parsed, never imported or run, one file at a time. A name refers to what it was imported or
assigned as where it is used, so that a parameter called `socket` is not the module. A place that cannot be judged from
the file counts as uncovered; a setting that comes from a variable counts as on.

    _files        the files, and their source
    _libraries    the calls that make connections, and what sets keepalive in each
    _kaio         kaio's own names
    _scopes       scopes and bindings, and the bindings that reach a place
    _reader       one pass through a file's tree, which collects them
    _calls        the arguments of calls
    _names        what the expressions of a file refer to
    _values       the values of arguments
    _evidence     what is done with each connection
    _judge        the verdict on each place
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from ._files import SourceError, files, read
from ._judge import Judge

__all__ = ["Finding", "Report", "audit", "report"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A place that makes a TCP socket, a client or a server; or a file that could not be read."""

    path: str
    """For a notebook, followed by the number of the code cell: `notebook.ipynb[3]`."""
    line: int
    """For a notebook, the line in the cell."""
    call: str
    """The full name of what is called, whatever it was imported as; empty when the file could not be read."""
    covered: bool
    why: str
    """What sets keepalive here, or what to do about it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What an audit has read and found."""

    findings: list[Finding]
    files: int
    """How many files were read."""
    unreadable: int
    """How many were not; each is a finding."""
    refused: list[str]
    """Directories that could not be listed, each with the reason."""
    missing: list[str]
    """Paths that do not exist."""


def audit(paths: Sequence[str | os.PathLike[str]]) -> list[Finding]:
    """Audit files, and the Python files and notebooks of directories.

    Hidden directories, virtual environments, `__pycache__` and `node_modules` are skipped unless named explicitly. A
    file that cannot be read or parsed is one finding, with an empty `call`.

    Raises FileNotFoundError for a path that does not exist.
    """
    for path in paths:
        os.stat(path)
    return report(paths).findings


def report(paths: Sequence[str | os.PathLike[str]]) -> Report:
    """Audit as `audit` does, and tell what was read, refused and missing."""
    given = [os.fspath(path) for path in paths]
    result = Report([], 0, 0, [], [path for path in given if not os.path.exists(path)])
    read_files = unreadable = 0
    for path in files([path for path in given if path not in result.missing], result.refused.append):
        found = _audit_file(path)
        failed = any(not finding.call for finding in found)
        unreadable += failed
        read_files += not failed
        result.findings.extend(found)
    return dataclasses.replace(result, files=read_files, unreadable=unreadable)


def _audit_file(path: str) -> list[Finding]:
    try:
        source = read(path)
        places = Judge(source.tree).places()
        return [Finding(*source.place(path, line), call, covered, why) for line, call, covered, why in places]
    except SourceError as exc:
        return [Finding(path, exc.line, "", False, f"cannot be read: {exc.reason}")]
    except RecursionError as exc:  # ast.unparse of a deeply nested expression
        return [Finding(path, 1, "", False, f"cannot be read: {exc}")]
