"""`kaio audit PATH`: find the places in Python source that make sockets without keepalive."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import click

from ..tools.audit import Report, report
from ._exit import CANNOT, MISTAKE, NO, YES, complain, printable
from ._output import print_json

__all__ = ["audit_paths"]


def audit_paths(paths: Sequence[str], as_json: bool) -> int:
    """Print the findings. Returns the exit code."""
    found = report(paths)
    bare = sum(not finding.covered for finding in found.findings)
    if as_json:
        print_json({**dataclasses.asdict(found), "uncovered": bare})
    else:
        _print(found, bare)
    for path in found.missing:
        complain(f"{path}: neither a process nor an existing path")
    for reason in found.refused:
        complain(reason)
    if found.missing:
        return MISTAKE
    if not found.files:
        if not found.unreadable:
            complain(f"nothing to audit in {', '.join(paths)}: no Python file, no notebook")
        return CANNOT
    return NO if bare else YES


def _print(found: Report, bare: int) -> None:
    for finding in found.findings:
        mark = " " if finding.covered else "!"
        call = f"{finding.call}: " if finding.call else ""
        click.echo(printable(f"{mark} {finding.path}:{finding.line}: {call}{finding.why}"))
    if found.files or found.unreadable:
        unreadable = f", unreadable: {found.unreadable}" if found.unreadable else ""
        click.echo(f"files: {found.files}{unreadable}, places: {len(found.findings)}, uncovered: {bare}")
