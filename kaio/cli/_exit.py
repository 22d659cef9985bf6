"""Exit codes, and the one line that says why.

0: success, and the answer is yes. 1: success, and the answer is no (something is uncovered, a connection failed).
2: a usage error. 3: failure (no permission, no such process, refused by the kernel).

Rules kept here: names that others have chosen are escaped, so that a line stays a line. A standard error that cannot be
written to is no reason for another exit code.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Final, NoReturn

import click

__all__ = ["CANNOT", "MISTAKE", "NO", "YES", "complain", "fail", "printable"]

YES: Final = 0
NO: Final = 1
MISTAKE: Final = 2
CANNOT: Final = 3

_LONGEST: Final = 1000  # characters of a line, which may quote an argument of any length


def fail(message: str, code: int = CANNOT) -> NoReturn:
    """Print one line on standard error and exit."""
    complain(message)
    sys.exit(code)


def complain(message: str, name: str = "kaio") -> None:
    """Print one line on standard error."""
    line = printable(message)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    with contextlib.suppress(OSError):
        click.echo(f"{name}: {line}", err=True)


def printable(name: str) -> str:
    """Escape what a terminal might obey or break a line at: controls, those of direction too; half characters."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name)
