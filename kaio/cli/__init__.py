"""The command line, one module a command.

Rules kept here: a command is imported only when it is called, so that `kaio run` does not load the other commands'
libraries into a program. The work is done by modules of `kaio.tools`, which know nothing of terminals; tables, JSON and
exit codes are in `_output`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Final, NoReturn

import click

__all__ = ["COMMANDS", "cli", "main"]

# command: its line in `kaio --help`, which is printed without importing it
COMMANDS: Final = {
    "attach": "Set a policy on the sockets of a running process, from outside.",
    "audit": "Find TCP sockets without keepalive, in running processes or in Python source.",
    "check": "Set keepalive on a test socket or a connection, and read it back from the kernel.",
    "demo": "Watch four peers over loopback, two of which die.",
    "enforce": "Let the kernel give a policy to all TCP sockets of a unit, a cgroup or the machine.",
    "exec": "Start a program, and set a policy on all its sockets from outside.",
    "plan": "Explain a policy: when a death is detected, what probing costs, which middleboxes it outlasts.",
    "run": "Run a Python program on kaio's event loop.",
    "serve": "Serve a handler or protocol class: several workers, reloads, draining.",
    "system": "Show and set the kernel's keepalive defaults.",
    "top": "Watch TCP connections live: probes, silence, health.",
}


class _Commands(click.Group):
    """A group whose commands are the modules of this package; each defines a command of its own name."""

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
    """Keepalive for asyncio, and for programs that are already running."""


def main() -> NoReturn:
    """Run a command. A usage error is one line on standard error, with exit code 2."""
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
