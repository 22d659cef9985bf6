"""How the commands speak: tables on a terminal, plain lines elsewhere, JSON when asked; exit codes for scripts.

0: done, and the answer is yes. 1: done, and the answer is no (something is uncovered, a connection could not be made).
2: a mistake in what was asked for. 3: it could not be done (no permission, no such process, the kernel refused).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, NoReturn

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "CANNOT",
    "MISTAKE",
    "NO",
    "YES",
    "fail",
    "json_option",
    "on_terminal",
    "print_json",
    "print_table",
    "printable",
]

YES: Final = 0
NO: Final = 1
MISTAKE: Final = 2
CANNOT: Final = 3

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else.")


def fail(message: str, code: int = CANNOT) -> NoReturn:
    """One line on standard error, and out."""
    click.echo(f"kaio: {message}", err=True)
    sys.exit(code)


def on_terminal() -> bool:
    """Whether there is somebody who looks."""
    return sys.stdout.isatty()


def printable(name: str) -> str:
    """A name that another program chose for itself: what a terminal might obey, or break a line at, is escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name)


def print_json(document: Any) -> None:
    """The document, for a program."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = (), styles: Sequence[str] = ()
) -> None:
    """A table on a terminal; elsewhere lines of the same cells, aligned by blanks, with a first line of headings.

    `right` names the columns that are aligned to the right; `styles` are the rows' rich styles, where there are any.
    """
    rows, rights = list(rows), set(right)
    if on_terminal():
        table = Table(box=box.ROUNDED, border_style="dim", header_style="bold")
        for column in columns:
            table.add_column(column, justify="right" if column in rights else "left")
        for number, row in enumerate(rows):
            style = styles[number] if number < len(styles) else ""
            table.add_row(*(Text(cell) for cell in row), style=style)
        Console().print(table)
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = (
            cell.rjust(width) if column in rights else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        )
        click.echo("  ".join(cells).rstrip())
