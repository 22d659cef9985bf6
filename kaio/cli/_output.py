"""Output shared by the commands: tables on a terminal, plain lines elsewhere, JSON on request.

Rules kept here: what is printed in a table is escaped, whoever chose it. Where a terminal is too narrow for the columns
of a table, some are left out; addresses are never cut, and nothing is where the output is not a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

import click
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._exit import CANNOT, MISTAKE, NO, YES, fail, printable

__all__ = [
    "CANNOT",
    "MISTAKE",
    "NO",
    "YES",
    "aligned",
    "as_json",
    "bordered_table",
    "fail",
    "json_option",
    "on_terminal",
    "print_json",
    "print_table",
    "printable",
]

_BORDER: Final = 3  # columns between two cells
_ADDRESSES: Final = frozenset({"local", "peer"})  # are never cut

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


def on_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def print_json(document: object) -> None:
    """Print a document as JSON, in characters that the output has; half characters of file names are escaped."""
    click.echo(as_json(document, indent=2))


def as_json(document: object, indent: int | None = None) -> str:
    """Encode a document as JSON; in a single line without `indent`."""
    text = json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return json.dumps(document, indent=indent, allow_nan=False)
    return text


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    styles: Sequence[str] = (),
    droppable: Sequence[str] = (),
) -> None:
    """Print a table with borders on a terminal, and aligned lines elsewhere.

    `right` names the right-aligned columns; `styles` are the rows' rich styles, which may be fewer than the rows.
    `droppable` names the columns that are left out where a terminal is too narrow, the first one first.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if not on_terminal():
        for line in aligned(columns, cells, right=right):
            click.echo(line)
        return
    console = Console()
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    kept = _fitting(columns, widths, droppable, console.width)
    table = bordered_table()
    for number in kept:
        name = columns[number]
        whole = name in _ADDRESSES
        table.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=whole)
    for number, row in enumerate(cells):
        style = styles[number] if number < len(styles) else ""
        table.add_row(*(Text(row[kept_number]) for kept_number in kept), style=style)
    console.print(table)


def _fitting(columns: Sequence[str], widths: Sequence[int], droppable: Sequence[str], width: int) -> list[int]:
    """The numbers of the columns that are shown."""
    kept = list(range(len(columns)))
    for name in droppable:
        if sum(widths[number] + _BORDER for number in kept) + 1 <= width:
            break
        kept.remove(columns.index(name))
    return kept


def bordered_table() -> Table:
    """An empty rich table in the style of all commands."""
    return Table(box=box.ROUNDED, border_style="dim", header_style="bold")


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> Iterator[str]:
    """The lines of a table, headings first, with columns two spaces apart."""
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = (
            f"{' ' * (width - cell_len(cell))}{cell}" if column in right else f"{cell}{' ' * (width - cell_len(cell))}"
            for column, cell, width in zip(columns, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
