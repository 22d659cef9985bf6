"""Make the man pages from the command line's own help: kaio(1), and one for each command.

    python -m scripts.man [DIRECTORY]    # default: build/man

Rules kept here: what a page says of a command is what its --help says; exit codes, variables and files are the same for
all of them.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Final

import click

from kaio import __version__
from kaio.cli import COMMANDS, cli

__all__ = ["main", "pages"]

EXIT_CODES: Final = {
    "0": "Success, and the answer is yes.",
    "1": "Success, and the answer is no: something is uncovered, a connection failed, nothing is enforced.",
    "2": "A mistake in the command line.",
    "3": "Failure: no permission, no such process, refused by the kernel, nothing could be read or written.",
}
ENVIRONMENT: Final = {
    "KAIO_KEEPALIVE": "The default policy, as for keepalive=; it comes before the next four.",
    "KEEPALIVE": "off turns keepalive off, as with libkeepalive. In a program's own environment it opts out of attach"
    " and exec.",
    "KEEPIDLE, KEEPINTVL, KEEPCNT": "The times and the count of the default policy, as with libkeepalive.",
    "KAIO_DEBUG": "With 1, what was not foreseen is shown with its traceback.",
    "KAIO_RUNTIME_DIR": "Where attach remembers what it has set; default /run/kaio, or kaio in XDG_RUNTIME_DIR.",
}
FILES: Final = {
    "/etc/sysctl.d/60-kaio.conf": "The values that system set --persist keeps.",
    "/sys/fs/bpf/kaio": "The programs that enforce has pinned.",
    "/etc/systemd/system/kaio-enforce-*.service, *.d/60-kaio.conf": "What enforce --boot writes.",
    "/run/kaio": "What attach has set on other processes' sockets, until the next boot.",
}


def pages() -> dict[str, str]:
    """The pages by the names of their files."""
    context = click.Context(cli, info_name="kaio")
    found = {"kaio.1": _page(cli, context)}
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        below = click.Context(command, info_name=name, parent=context)
        found[f"kaio-{name}.1"] = _page(command, below)
    return found


def _page(command: click.Command, context: click.Context) -> str:
    path = context.command_path
    name = path.replace(" ", "-")
    lines = [
        f'.TH "{_escaped(name.upper())}" "1" "" "kaio {__version__}" "kaio"',
        ".SH NAME",
        f"{_escaped(name)} \\- {_escaped(_summary(command, context))}",
        ".SH SYNOPSIS",
        f".B {_escaped(path)}",
        _escaped(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_paragraphs(command.help or ""),
        *_section("OPTIONS", _options(command, context)),
    ]
    if isinstance(command, click.Group):
        lines += _section("COMMANDS", _commands(command, context))
    lines += _section("EXIT STATUS", EXIT_CODES)
    lines += _section("ENVIRONMENT", ENVIRONMENT)
    lines += _section("FILES", FILES)
    others = ["kaio", *(f"kaio-{each}" for each in COMMANDS)]
    see = ", ".join(f"{each}(1)" for each in others if each != name)
    lines += [".SH SEE ALSO", _escaped(f"{see}, tcp(7), socket(7)")]
    return "\n".join(lines) + "\n"


def _summary(command: click.Command, context: click.Context) -> str:
    if context.parent is None:
        return (command.help or "").split("\n")[0].rstrip(".")
    return COMMANDS[str(context.info_name)].rstrip(".")


def _options(command: click.Command, context: click.Context) -> dict[str, str]:
    found: dict[str, str] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            found[record[0]] = record[1]
    return found


def _commands(group: click.Group, context: click.Context) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found[name] = COMMANDS.get(name) if group is cli else command.get_short_help_str(200)  # type: ignore[assignment]
        if group is not cli:  # a command of a command has no page of its own
            below = click.Context(command, info_name=name, parent=context)
            options = "; ".join(f"{flags}: {text}" for flags, text in _options(command, below).items())
            found[name] = f"{found[name]} {options}"
    return found


def _section(title: str, entries: dict[str, str]) -> Iterator[str]:
    yield f".SH {title}"
    for term, text in entries.items():
        yield ".TP"
        yield f"\\fB{_escaped(term)}\\fR"
        yield _escaped(" ".join(text.split())) or "\\&"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield ".PP"
        yield _escaped(" ".join(paragraph.split()))


def _escaped(text: str) -> str:
    """Text as roff prints it: a backslash, a hyphen and a dot at the beginning have meanings of their own."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def main() -> None:
    """Write the pages."""
    directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build/man")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")
    print(f"man pages: {len(pages())}, in {directory}")


if __name__ == "__main__":
    main()
