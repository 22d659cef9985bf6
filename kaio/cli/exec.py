"""`kaio exec`: start a program, and give all its sockets a policy from outside.

Rules kept here: to its caller this process is the program, with its output, its exit code, and the signal that it dies
of. It stays the program's parent, since Yama lets nobody else look into a process (kernel.yama.ptrace_scope is 1 on
many systems). All happens in one thread, which waits for signals and looks at the sockets in between.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Final, NoReturn

import click

from kaio.errors import KaioError
from kaio.policy import Keepalive
from kaio.tools.processes import Attachment, ProcessError, lacking

from ._output import fail
from .attach import complain, keepalive_option, watch_time

__all__ = ["exec"]

NOT_EXECUTABLE: Final = 126  # as with env(1), nice(1), timeout(1) and the shells
NOT_FOUND: Final = 127
FIRST_LOOKS: Final = 0.05  # seconds; each further look comes after twice the time, until they come as asked for

FORWARDED: Final = frozenset(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows lacks most
)


@click.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@keepalive_option
@click.option(
    "--watch", metavar="TIME", default="1s", callback=watch_time, help="How often to look for new sockets; default 1s."
)
@click.option("--force", is_flag=True, help="Also sockets on which the program has set times itself.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def exec(policy: Keepalive, watch: float, force: bool, program: str, arguments: tuple[str, ...]) -> None:  # noqa: A001
    """Start PROGRAM, in whatever language, and give all its TCP sockets a keepalive policy from outside.

    Its children's as well. New sockets get it within --watch, what listeners accept at once. What the program has set
    itself stands. Ends with the program's exit code, or of its signal; 127 when there is no such program, 126 when it
    cannot be run, 3 when sockets of other processes cannot be had here at all.
    """
    reason = lacking()
    if reason is not None:
        fail(reason)
    # A program's children that ended are its own affair; but that our own has, we must hear.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    pid = _start([program, *arguments], mask)
    _end_like(_accompany(pid, policy, watch, force))


def _start(command: list[str], mask: set[int | signal.Signals]) -> int:
    """The program, with the signals as our caller gave them to us; Python ignores these two."""
    try:
        return os.posix_spawnp(
            command[0], command, os.environ, setsigmask=mask, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ)
        )
    except FileNotFoundError as exc:
        fail(f"{command[0]}: {exc.strerror}", NOT_FOUND)
    except OSError as exc:
        fail(f"{command[0]}: {exc.strerror}", NOT_EXECUTABLE)


def _accompany(pid: int, policy: Keepalive, every: float, force: bool) -> int:
    """Look at the program's sockets until it has ended; its exit code, or minus the signal that it died of."""
    try:
        attachment = Attachment(pid, policy, force=force, children=True)
    except ProcessError:  # it has ended already
        return _wait(pid)
    told: set[int] = set()
    pause = FIRST_LOOKS
    with attachment:
        while True:
            code = _until_next(pid, pause)
            if code is not None:
                return code
            try:
                attachment.look()
            except KaioError as exc:  # the program runs, and that is the first thing
                click.echo(f"kaio: {exc}", err=True)
                return _wait(pid)
            complain(attachment, told)
            pause = min(2 * pause, attachment.pace(every))


def _wait(pid: int) -> int:
    """Wait for the program's end, without a look at its sockets."""
    while True:
        code = _until_next(pid, 3600)
        if code is not None:
            return code


def _until_next(pid: int, seconds: float) -> int | None:
    """Pass signals on for a while, or until the program has ended: then how."""
    received = signal.sigtimedwait(FORWARDED | {signal.SIGCHLD}, seconds)
    if received is not None and received.si_signo != signal.SIGCHLD:
        # What the kernel sends for a key or a hangup goes to the whole foreground group: the program has it already.
        by_kernel = received.si_code > 0
        if not by_kernel and received.si_pid != pid:
            os.kill(pid, received.si_signo)
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _end_like(code: int) -> NoReturn:
    """End as the program has ended."""
    if code >= 0:
        sys.exit(code)
    import resource  # noqa: PLC0415 - not on Windows

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one memory dump, the program's own, is enough
    number = -code
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    sys.exit(128 + number)
