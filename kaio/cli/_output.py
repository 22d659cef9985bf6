"""Output shared by the commands: tables on a terminal, plain lines elsewhere, JSON on request; exit codes.

0: success, and the answer is yes. 1: success, and the answer is no (something is uncovered, a connection failed).
2: a usage error. 3: failure (no permission, no such process, refused by the kernel).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, NoReturn

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
    "aligned",
    "bordered_table",
    "fail",
    "json_option",
    "on_terminal",
    "print_json",
    "print_table",
]

YES: Final = 0
NO: Final = 1
MISTAKE: Final = 2
CANNOT: Final = 3

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


def fail(message: str, code: int = CANNOT) -> NoReturn:
    """Print one line on standard error and exit."""
    click.echo(f"kaio: {message}", err=True)
    sys.exit(code)


def on_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def print_json(document: object) -> None:
    """Print a document as JSON."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = (), styles: Sequence[str] = ()
) -> None:
    """Print a table with borders on a terminal, and aligned lines elsewhere.

    `right` names the right-aligned columns; `styles` are the rows' rich styles, which may be fewer than the rows.
    """
    rows, rights = list(rows), set(right)
    if on_terminal():
        table = bordered_table()
        for column in columns:
            table.add_column(column, justify="right" if column in rights else "left")
        for number, row in enumerate(rows):
            style = styles[number] if number < len(styles) else ""
            table.add_row(*(Text(cell) for cell in row), style=style)
        Console().print(table)
    else:
        for line in aligned(columns, rows, right=rights):
            click.echo(line)


def bordered_table() -> Table:
    """An empty rich table in the style of all commands."""
    return Table(box=box.ROUNDED, border_style="dim", header_style="bold")


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> Iterator[str]:
    """The lines of a table, headings first, with columns two spaces apart."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
