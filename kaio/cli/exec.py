"""`kaio exec`: start a program, and give a policy to all its sockets from outside.

Rules kept here: this process has the program's output and exit code, and dies by the same signal. Whatever goes wrong
with its sockets costs the program nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import sys
from collections.abc import Callable
from typing import Final, NoReturn

import click

from ..policy import Keepalive
from ..tools.cgroups import CgroupError
from ..tools.enforcing import EnforcedCgroup, EnforceError
from ..tools.processes import Attachment, ProcessError, ProcessSocket, descendants, lacking
from ..tools.running import Program, Signals
from ._exit import CANNOT, complain, fail
from ._processes import keepalive_option, parse_interval, report_refused

__all__ = ["exec"]

NOT_EXECUTABLE: Final = 126  # as with env(1), nice(1), timeout(1) and the shells
NOT_FOUND: Final = 127
FIRST_LOOKS: Final = 0.05  # seconds; doubled after each look, up to --watch


@click.command("exec", context_settings={"allow_interspersed_args": False})
@keepalive_option
@click.option(
    "--watch",
    metavar="TIME",
    default="1s",
    callback=parse_interval,
    help="Interval of looking for new sockets; default 1s.",
)
@click.option("--force", is_flag=True, help="Include sockets on which the program has set times itself.")
@click.option(
    "--by",
    type=click.Choice(["kernel", "looking"]),
    help="Who sets the policy: the kernel, as the sockets come into being, or this process, by looking. Default: the"
    " kernel where it is permitted.",
)
@click.option("-q", "--quiet", is_flag=True, help="Do not say who sets the policy.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def exec(  # noqa: A001 - the command's name
    policy: Keepalive, watch: float, force: bool, by: str | None, quiet: bool, program: str, arguments: tuple[str, ...]
) -> None:
    """Start PROGRAM, written in any language, and give a keepalive policy to all its TCP sockets from outside.

    Where it is permitted (root, as a rule) the program gets a cgroup of its own, in which the kernel sets the policy as
    connections come into being; child processes and daemons have it too, even after this command has ended. Elsewhere
    this command looks for new sockets, at the interval of --watch, as long as the program or a process that it left
    behind runs. Times that the program has set itself are kept, and KEEPALIVE=off in its environment opts out.

    Signals are passed on, each once. Exits with the program's exit code, or dies by the same signal; 127 if the program
    does not exist, 126 if it cannot be executed, 3 if sockets of other processes cannot be accessed at all.
    """
    inherited = _open_sockets()
    cgroup = None if by == "looking" else _cgroup(policy, required=by == "kernel", quiet=quiet)
    reason = lacking()
    if cgroup is None and reason is not None:
        fail(reason)
    signals = Signals()
    started = _start([program, *arguments], signals, cgroup)
    try:
        if reason is None:
            excepted = None if cgroup is None else _given_by_kernel(inherited)
            _watch(started, policy, watch, force, excepted)
        while started.code is None:
            started.wait(3600)
    finally:
        signals.close()
        if cgroup is not None:
            cgroup.remove()
    _exit_like(started.code)


def _cgroup(policy: Keepalive, *, required: bool, quiet: bool) -> EnforcedCgroup | None:
    """Make a cgroup in which the kernel enforces the policy; None if that is not permitted."""
    if not policy.enabled:
        return None
    try:
        cgroup = EnforcedCgroup(policy)
    except EnforceError as exc:
        if required:
            fail(str(exc), CANNOT)
        if not quiet:
            complain(f"looks for new sockets; the kernel cannot set the policy by itself: {exc}")
        return None
    if not quiet:
        complain(f"the kernel gives {policy} to each connection in {cgroup.path}")
    return cgroup


def _start(command: list[str], signals: Signals, cgroup: EnforcedCgroup | None) -> Program:
    try:
        return Program(command, signals, None if cgroup is None else cgroup.path)
    except CgroupError as exc:
        if cgroup is not None:
            cgroup.remove()
        fail(str(exc))
    except OSError as exc:
        if cgroup is not None:
            cgroup.remove()
        code = NOT_FOUND if exc.errno in (errno.ENOENT, errno.ENOTDIR) else NOT_EXECUTABLE
        fail(f"{command[0] or repr('')}: {exc.strerror}", code)


def _open_sockets() -> frozenset[int]:
    """The inodes of this process's sockets, which the program inherits."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the directory's own descriptor
            described = os.fstat(int(name))
            if stat.S_ISSOCK(described.st_mode):
                found.add(described.st_ino)
    return frozenset(found)


def _given_by_kernel(inherited: frozenset[int]) -> Callable[[ProcessSocket], bool]:
    """What is left to the kernel: listening sockets made in the cgroup, whose connections it gives the policy.

    They would inherit times set on the listening socket, which the kernel then takes for the program's choice; and no
    user timeout. An inherited socket belongs to the cgroup in which it was made.
    """
    return lambda found: found.listening and not found.chosen and not found.mptcp and found.inode not in inherited


def _watch(
    program: Program, policy: Keepalive, every: float, force: bool, excepted: Callable[[ProcessSocket], bool] | None
) -> None:
    """Set the policy on sockets until the program exits; if nobody else does, until what it left behind has ended.

    `excepted` tells the sockets to which the kernel gives it; None: nobody else does.
    """
    looking_only = excepted is None
    told: set[int] = set()
    pause = FIRST_LOOKS
    said = False
    try:
        with Attachment(
            (), policy, force=force, children=True, by_kernel=not looking_only, excepted=excepted
        ) as attachment:
            while program.code is None or (looking_only and program.left_behind):
                for pid in (program.pid, *_own(program)):
                    with contextlib.suppress(ProcessError):  # it has ended
                        attachment.add(pid)
                program.wait(pause)
                attachment.look()
                report_refused(attachment, told)
                pause = min(2 * pause, attachment.pace(every))
                if program.code is not None and not said and looking_only and program.left_behind:
                    said = True
                    complain("the program has ended; the processes that it left behind are watched until they end")
    except Exception as exc:
        complain(f"new sockets do not get the policy any more: {str(exc) or type(exc).__name__}")


def _own(program: Program) -> list[int]:
    """The processes that the program left behind, and those below them."""
    left = program.left_behind
    return [*left, *descendants(left)] if left else []


def _exit_like(code: int) -> NoReturn:
    """Exit as the program did."""
    if code >= 0:
        sys.exit(code)
    import resource  # noqa: PLC0415 - not on Windows

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump of this process would replace the program's
    number = -code
    if number != signal.SIGKILL:
        with contextlib.suppress(OSError, ValueError):  # two signals are the C library's, and never blocked
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    sys.exit(128 + number)
