"""`kaio audit PATH`: find the places in Python source that make sockets without keepalive.

Rules kept here: names of files are escaped, so that a finding is one line; in JSON they are text that every parser
takes. What can be read is shown, whatever else was given. The exit code is 2 if a path does not exist, else 3 if
nothing could be read, else 1 if a place is uncovered or a file could not be read.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from ..tools.audit import Finding, Report, report
from ._exit import CANNOT, MISTAKE, NO, YES, complain, printable
from ._output import print_json

__all__ = ["audit_paths"]


def audit_paths(paths: Sequence[str], as_json: bool) -> int:
    """Print the findings. Returns the exit code."""
    missing = [path for path in paths if _is_missing(path)]
    result = report([path for path in paths if path not in missing])
    if as_json:
        print_json(_document(result, missing))
    elif len(missing) < len(paths):
        _print(result)
    for path in missing:
        complain(f"{_text(path)}: neither a process nor an existing path")
    if result.empty:
        complain(f"nothing to audit in {', '.join(map(_text, result.empty))}")
    if missing:
        return MISTAKE
    if not result.files:
        return CANNOT
    return NO if result.uncovered or result.unreadable else YES


def _is_missing(path: str) -> bool:
    try:
        os.lstat(path)
    except ValueError:  # a null byte
        return True
    except OSError as exc:
        return exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    return False


def _print(result: Report) -> None:
    for finding in result.findings:
        mark = " " if finding.covered else "!"
        cell = "" if finding.cell is None else f"cell {finding.cell}:"
        call = f"{finding.call}: " if finding.call else ""
        _echo(f"{mark} {_text(finding.path)}:{cell}{finding.line}: {call}{finding.why}")
    counts = f"files: {result.files}, unreadable: {result.unreadable}"
    _echo(f"{counts}, places: {result.places}, uncovered: {result.uncovered}")


def _echo(line: str) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    click.echo(printable(line).encode(encoding, "backslashreplace").decode(encoding))


def _document(result: Report, missing: Sequence[str]) -> dict[str, object]:
    return {
        "findings": [_finding_document(finding) for finding in result.findings],
        "files": result.files,
        "unreadable": result.unreadable,
        "places": result.places,
        "uncovered": result.uncovered,
        "missing": [_text(path) for path in missing],
        "empty": [_text(path) for path in result.empty],
    }


def _finding_document(finding: Finding) -> dict[str, object]:
    text = _text(finding.path)
    return {
        "path": text,
        "path_bytes": None if text == finding.path else os.fsencode(finding.path).hex(),
        "cell": finding.cell,
        "line": finding.line,
        "call": finding.call,
        "covered": finding.covered,
        "why": finding.why,
    }


def _text(path: str) -> str:
    r"""A path as text: bytes that are not UTF-8 as \xNN, which is how they are written in a shell's $'...'."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half characters of other encodings
        return path.encode("utf-8", "backslashreplace").decode("utf-8")
