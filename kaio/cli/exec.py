"""`kaio exec`: start a program, and set a policy on all its sockets from outside.

Rules kept here: this process has the program's output and exit code, and dies by the same signal. It remains the
program's parent, because Yama permits only parents to inspect a process (kernel.yama.ptrace_scope is 1 on many
systems). A single thread waits for signals, and looks at the sockets in between.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Final, NoReturn

import click

from ..errors import KaioError
from ..policy import Keepalive
from ..tools.processes import Attachment, ProcessError, lacking
from ._exit import fail
from ._processes import keepalive_option, parse_interval, report_refused

__all__ = ["exec"]

NOT_EXECUTABLE: Final = 126  # as with env(1), nice(1), timeout(1) and the shells
NOT_FOUND: Final = 127
FIRST_LOOKS: Final = 0.05  # seconds; doubled after each look, up to --watch

FORWARDED: Final = frozenset(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows lacks most
)


@click.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@keepalive_option
@click.option(
    "--watch",
    metavar="TIME",
    default="1s",
    callback=parse_interval,
    help="Interval of looking for new sockets; default 1s.",
)
@click.option("--force", is_flag=True, help="Include sockets on which the program has set times itself.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def exec(policy: Keepalive, watch: float, force: bool, program: str, arguments: tuple[str, ...]) -> None:  # noqa: A001
    """Start PROGRAM, written in any language, and set a keepalive policy on all its TCP sockets from outside.

    Sockets of its child processes are included. New sockets get the policy within --watch, accepted connections at
    once. Times that the program has set itself are kept. Exits with the program's exit code, or dies by the same
    signal; 127 if the program does not exist, 126 if it cannot be executed, 3 if sockets of other processes cannot be
    accessed on this system at all.
    """
    reason = lacking()
    if reason is not None:
        fail(reason)
    # The caller may have set SIGCHLD to be ignored, and then the kernel would not report the program's exit.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    pid = _start([program, *arguments], mask)
    _exit_like(_watch(pid, policy, watch, force))


def _start(command: list[str], mask: set[int | signal.Signals]) -> int:
    """Start the program with the caller's signal mask and dispositions; SIGPIPE and SIGXFSZ are ignored by Python."""
    try:
        return os.posix_spawnp(
            command[0], command, os.environ, setsigmask=mask, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ)
        )
    except FileNotFoundError as exc:
        fail(f"{command[0]}: {exc.strerror}", NOT_FOUND)
    except OSError as exc:
        fail(f"{command[0]}: {exc.strerror}", NOT_EXECUTABLE)


def _watch(pid: int, policy: Keepalive, every: float, force: bool) -> int:
    """Set the policy on sockets until the program exits. Returns its exit code, or minus the signal that ended it."""
    try:
        attachment = Attachment(pid, policy, force=force, children=True)
    except ProcessError:  # it has exited already
        return _wait_for_exit(pid)
    told: set[int] = set()
    pause = FIRST_LOOKS
    with attachment:
        while True:
            code = _forward_signals(pid, pause)
            if code is not None:
                return code
            try:
                attachment.look()
            except KaioError as exc:  # the program continues without the policy
                click.echo(f"kaio: {exc}", err=True)
                return _wait_for_exit(pid)
            report_refused(attachment, told)
            pause = min(2 * pause, attachment.pace(every))


def _wait_for_exit(pid: int) -> int:
    """Wait for the program's exit, without looking at its sockets."""
    while True:
        code = _forward_signals(pid, 3600)
        if code is not None:
            return code


def _forward_signals(pid: int, seconds: float) -> int | None:
    """Forward signals for that long. Returns the exit code as soon as the program has exited, else None."""
    received = signal.sigtimedwait(FORWARDED | {signal.SIGCHLD}, seconds)
    if received is not None and received.si_signo != signal.SIGCHLD:
        # The kernel sends signals of the terminal to the whole foreground group, which includes the program.
        by_kernel = received.si_code > 0
        if not by_kernel and received.si_pid != pid:
            os.kill(pid, received.si_signo)
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _exit_like(code: int) -> NoReturn:
    """Exit as the program did."""
    if code >= 0:
        sys.exit(code)
    import resource  # noqa: PLC0415 - not on Windows

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump of this process would replace the program's
    number = -code
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    sys.exit(128 + number)
