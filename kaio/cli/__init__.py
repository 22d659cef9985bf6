"""The command line, one file a command.

Rules kept here: a command is imported when it is called, so that `kaio run` gives a program its loop and not our
libraries; what a command does is in a module that knows no terminal; how it speaks is in `_output`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Final, NoReturn

import click

__all__ = ["COMMANDS", "cli", "main"]

# command: what `kaio --help` says of it, without importing it
COMMANDS: Final = {
    "attach": "Give a running process's sockets a policy, from outside.",
    "audit": "See what is uncovered: in a running process, or in Python source.",
    "check": "See a socket's keepalive off, set, and on; or a real connection's.",
    "demo": "Watch two of four peers die, over loopback.",
    "exec": "Start a program, and give all its sockets a policy from outside.",
    "plan": "What a policy means: when a death is found, what it costs, what it outlasts.",
    "run": "Run a Python program on kaio's event loop.",
    "system": "See and set the kernel's own defaults.",
    "top": "Watch connections live: probes, silence, who is suspect.",
}


class _Commands(click.Group):
    """A group whose commands are modules of this package, with a command of the same name in each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"{__name__}.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_Commands)
def cli() -> None:
    """Keepalive for asyncio, and for what runs already."""


def main() -> NoReturn:
    """Run a command. A mistake of the user's is one line, and exit code 2."""
    try:
        code = cli(prog_name="kaio", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except click.ClickException as exc:
        context = getattr(exc, "ctx", None)
        name = context.command_path if context is not None else "kaio"
        see = f" (see {name} --help)" if isinstance(exc, click.UsageError) else ""
        click.echo(f"{name}: {exc.format_message()}{see}", err=True)
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
