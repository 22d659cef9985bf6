"""`kaio audit PATH`: find the places in Python source that make sockets without keepalive."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import click

from ..tools.audit import audit as audit_source
from ._output import MISTAKE, NO, YES, fail, print_json

__all__ = ["audit_paths"]


def audit_paths(paths: Sequence[str], as_json: bool) -> int:
    """Print the findings. Returns the exit code."""
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        fail(f"{missing[0]}: neither a process nor an existing path", MISTAKE)
    findings = audit_source(paths)
    bare = sum(not finding.covered for finding in findings)
    if as_json:
        print_json({"findings": [dataclasses.asdict(finding) for finding in findings], "uncovered": bare})
        return NO if bare else YES
    for finding in findings:
        mark = " " if finding.covered else "!"
        call = f"{finding.call}: " if finding.call else ""
        click.echo(f"{mark} {finding.path}:{finding.line}: {call}{finding.why}")
    click.echo(f"places: {len(findings)}, uncovered: {bare}")
    return NO if bare else YES
