"""`kaio run`: any Python program, on loops whose sockets have keepalive.

Rules kept here: Python itself runs the program, in this very process and with the flags that this Python has, so that
its arguments, `__main__`, exit codes, signals and tracebacks are its own.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import click

import kaio
from kaio.errors import PolicyError
from kaio.policy import as_policy, parse_time
from kaio.tools.bootstrap import VARIABLE, Settings

__all__ = ["run"]

_FOLDER: Final = os.path.join(os.path.dirname(kaio.__file__), "tools", "_bootstrap")
_TAKING_A_VALUE: Final = frozenset({"--keepalive", "--loop", "--sweep"})


class _Running(click.Command):
    """A command whose arguments end where the program's begin, as Python's own do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        position = 0
        while position < len(args) and args[position].startswith("-") and args[position] not in ("-m", "-", "--"):
            position += 2 if args[position] in _TAKING_A_VALUE else 1
        ctx.obj = args[position + (args[position : position + 1] == ["--"]) :]
        return super().parse_args(ctx, args[:position])


@click.command(cls=_Running, options_metavar="[OPTIONS] (PROGRAM.py | -m MODULE) [ARGS]...")
@click.option("--keepalive", metavar="SPEC", help="The policy, such as 20s:10s:4. Default: from the environment.")
@click.option("--loop", type=click.Choice(["uvloop", "asyncio"]), help="What asyncio.run makes. Default: as ever.")
@click.option("--sweep", default="5s", show_default=True, metavar="TIME", help="How often to look for others' sockets.")
@click.option("--report", is_flag=True, help="Say which sockets are covered, at exit and on SIGUSR1.")
@click.pass_context
def run(ctx: click.Context, keepalive: str | None, loop: str | None, sweep: str, report: bool) -> None:
    """Run a Python program on kaio's event loop.

    asyncio.run, uvloop.run, servers' workers and multiprocessing's children all get it, and sockets that never touch a
    loop are found by a sweep (--sweep off: never). KEEPALIVE=off in the environment turns it off.
    """
    program: list[str] = ctx.obj
    if not program or program == ["-m"]:
        raise click.UsageError("which program? kaio run app.py, or kaio run -m module")
    try:
        policy = as_policy(keepalive)
        every = None if sweep == "off" else parse_time("sweep", sweep)
        if every is not None and not 0.1 <= every <= 3600:
            raise PolicyError("sweep", sweep, "must be from 100ms to 1h, or off")
    except PolicyError as exc:
        raise click.UsageError(str(exc)) from None
    if loop == "uvloop":
        _require_uvloop()
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise click.UsageError("this Python ignores its environment (-E, -I or -S), by which the program is reached")
    environment: dict[str, Any] = dict(os.environ)
    environment[VARIABLE] = f"{sys.prefix}\n{Settings(str(policy), loop, every, report)}"
    if keepalive is not None:
        environment["KAIO_KEEPALIVE"] = str(policy)  # what kaio's own functions take as their default
    paths = [_FOLDER, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *_flags(), *program], environment)  # noqa: S606 - no shell is wanted


def _flags() -> list[str]:
    """The options that this Python was given: what stands before `-m kaio`, or before the script."""
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    return before[:-2] if before[-2:-1] == ["-m"] else before[:-1]


def _require_uvloop() -> None:
    try:
        import uvloop  # noqa: F401, PLC0415 - not everywhere
    except ImportError:
        raise click.UsageError("uvloop is not installed; use --loop asyncio") from None
