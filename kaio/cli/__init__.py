"""The command line, one module a command.

Rules kept here: a command is imported only when it is called, so that `kaio run` does not load the other commands'
libraries into a program. The work is done by modules of `kaio.tools`, which know nothing of terminals; tables and JSON
are in `_output`, exit codes in `_exit`. Whatever goes wrong, `main` ends with one line on standard error and an exit
code that means what `_exit` says: 1, with which Python ends after a traceback, is the answer "no".
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import signal
import sys
import traceback
from typing import Final, NoReturn

import click

from .. import __version__
from ._exit import CANNOT, complain

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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            ctx.fail(f"no such command: {name}{f'; did you mean {near[0]}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="kaio %(version)s")
def cli() -> None:
    """Keepalive for asyncio, and for programs that are already running."""


def main() -> NoReturn:
    """Run a command, and exit with its code. A mistake or a failure is one line on standard error.

    KAIO_DEBUG=1 in the environment adds the traceback of what was not foreseen.
    """
    _replace_closed_streams()
    if "_KAIO_COMPLETE" in os.environ:
        cli(prog_name="kaio")
    code = _flushed(_run())
    sys.exit(code)


def _run() -> int:
    """Run the command. Returns the exit code."""
    try:
        with cli.make_context("kaio", sys.argv[1:]) as context:
            cli.invoke(context)
        return 0
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 0 if exc.code is None else CANNOT
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        return exc.exit_code
    except click.ClickException as exc:
        usage = getattr(exc, "ctx", None)
        name = usage.command_path if usage is not None else "kaio"
        see = f" (see {name} --help)" if isinstance(exc, click.UsageError) else ""
        complain(f"{exc.format_message()}{see}", name)
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        _end_by_broken_pipe()
    except Exception as exc:
        return _unforeseen(exc)


def _unforeseen(exc: Exception) -> int:
    if os.environ.get("KAIO_DEBUG"):
        with contextlib.suppress(OSError):
            traceback.print_exception(exc)
    if isinstance(exc, OSError) and _flushed(0) != 0:
        return CANNOT  # it came from printing, and is told
    if isinstance(exc, ModuleNotFoundError):
        complain(f"{exc.name} is not installed: pip install 'kaio-net[cli]'")
    elif isinstance(exc, OSError):
        file = f"{os.fsdecode(exc.filename)}: " if isinstance(exc.filename, (str, bytes)) else ""
        complain(f"{file}{exc.strerror or exc}")
    else:
        complain(f"{type(exc).__name__}: {exc} (a mistake in kaio; KAIO_DEBUG=1 shows where)")
    return CANNOT


# -- standard streams


def _replace_closed_streams() -> None:
    """Keep closed standard streams' numbers from other files, and make output never fail because of its characters.

    What is written to a closed standard output fails, as it must: a command without an answer has not answered.
    Descriptors made here are not inherited by programs that are started.
    """
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free number, which is this one
            if number:
                setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flushed(code: int) -> int:
    """Write what is left of the output now, while failures can be told. Returns the exit code."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        _end_by_broken_pipe()
    except OSError as exc:
        _discard_output()
        complain(f"cannot write to standard output: {exc.strerror}")
        return CANNOT


def _end_by_broken_pipe() -> NoReturn:
    """End as other programs do when nobody reads their output: by SIGPIPE, which Python ignores."""
    _discard_output()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
        os.kill(os.getpid(), signal.SIGPIPE)
    sys.exit(CANNOT)


def _discard_output() -> None:
    """Keep Python from writing what is left when it ends, which would fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
