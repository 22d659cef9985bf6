"""`kaio run`: run a Python program on kaio's event loop.

Rules kept here: this process is replaced by a Python that runs the program, with the interpreter options that were
given to this one, so that arguments, `__main__`, exit codes, signals and tracebacks are as without kaio.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from typing import Final

import click

from .. import tools
from ..errors import PolicyError
from ..policy import as_policy, parse_time
from ..tools.bootstrap import VARIABLE, Settings
from ._interpreter import interpreter_flags, require_uvloop

__all__ = ["run"]

_FOLDER: Final = os.path.join(os.path.dirname(tools.__file__), "_bootstrap")
_TAKING_A_VALUE: Final = frozenset({"--keepalive", "--loop", "--sweep"})


class _Running(click.Command):
    """A command whose options end where the program begins, as those of the Python interpreter do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        position = 0
        while position < len(args) and args[position].startswith("-") and args[position] not in ("-m", "-", "--"):
            position += 2 if args[position] in _TAKING_A_VALUE else 1
        ctx.obj = args[position + (args[position : position + 1] == ["--"]) :]
        return super().parse_args(ctx, args[:position])


@click.command(cls=_Running, options_metavar="[OPTIONS] (PROGRAM.py | -m MODULE) [ARGS]...")
@click.option("--keepalive", metavar="SPEC", help="The policy, such as 20s:10s:4. Default: from the environment.")
@click.option(
    "--loop",
    type=click.Choice(["uvloop", "asyncio"]),
    help="The base loop. Default: the program's own.",
)
@click.option("--sweep", default="5s", show_default=True, metavar="TIME", help="How often to sweep; off: never.")
@click.option("--report", is_flag=True, help="Print which sockets are covered, at exit and on SIGUSR1.")
@click.pass_context
def run(ctx: click.Context, keepalive: str | None, loop: str | None, sweep: str, report: bool) -> None:
    """Run a Python program on kaio's event loop.

    asyncio.run, uvloop.run, the workers of servers and the children of multiprocessing use it. A sweep finds sockets
    that are not used by a loop. KEEPALIVE=off in the environment turns everything off.
    """
    program: list[str] = ctx.obj
    if not program or program == ["-m"]:
        raise click.UsageError("no program given: kaio run app.py, or kaio run -m module")
    _check_program(program)
    try:
        policy = as_policy(keepalive)
        every = None if sweep == "off" else parse_time("sweep", sweep)
        if every is not None and not 0.1 <= every <= 3600:
            raise PolicyError("sweep", sweep, "must be from 100ms to 1h, or off")
    except PolicyError as exc:
        raise click.UsageError(str(exc)) from None
    if loop == "uvloop":
        require_uvloop()
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise click.UsageError("Python runs with -E, -I or -S, and ignores the environment that kaio run needs")
    environment = dict(os.environ)
    environment[VARIABLE] = f"{sys.prefix}\n{Settings(str(policy), loop, every, report)}"
    if keepalive is not None:
        environment["KAIO_KEEPALIVE"] = str(policy)  # the default policy of kaio's own functions
    paths = [_FOLDER, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *interpreter_flags(), *program], environment)  # noqa: S606 - needs no shell


def _check_program(program: list[str]) -> None:
    """Raise a usage error for a program that is no file but a module, or a script on PATH: Python would not find it."""
    name = program[0]
    if name in ("-m", "-") or os.path.exists(name) or os.sep in name:
        return
    rest = " ".join(program[1:])
    if name.replace(".", "").isidentifier() and importlib.util.find_spec(name.partition(".")[0]) is not None:
        raise click.UsageError(f"there is no file {name}, but a module: kaio run -m {name} {rest}".rstrip())
    script = shutil.which(name)
    if script is not None and _is_python(script):
        raise click.UsageError(f"there is no file {name}, but a program: kaio run {script} {rest}".rstrip())


def _is_python(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            first = file.readline(200)
    except OSError:
        return False
    return first.startswith(b"#!") and b"python" in first
