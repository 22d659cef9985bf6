"""Starting a program as the caller of this process would have started it.

Rules kept here: the program has the signal mask and the dispositions that this process was started with, its
environment, descriptors and process group. LISTEN_PID, by which a program knows that the sockets of sd_listen_fds(3)
are for it, is the program's number if it was this process's.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, NoReturn

from ..cgroups import CgroupError

__all__ = ["Inherited", "start"]

_FAILED: Final = 127
_PLACING: Final = b"cgroup"
_EXECUTING: Final = b"execve"


class Inherited(NamedTuple):
    """What this process was started with."""

    mask: set[int | signal.Signals]
    ignores_sigchld: bool


def start(command: Sequence[str], inherited: Inherited, cgroup: str | None = None) -> int:
    """Start a program, in a cgroup if one is given by its directory, and return its number.

    Raises OSError if it cannot be executed, with the errno of execve(2); the errno is ENOENT if it is nowhere on PATH.
    Raises `CgroupError` if the cgroup cannot be entered; the program has not been started then.
    """
    if not command[0]:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    if "\0" in "".join(command):
        raise OSError(errno.EINVAL, "the command contains a null character")
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _execute(command, inherited, cgroup, writer)
    os.close(writer)
    with open(reader, "rb") as failures:
        failure = failures.read()  # empty once the program is executed: the pipe is close-on-exec
    if failure:
        os.waitpid(pid, 0)
        what, number = failure.split()
        if what == _PLACING:
            raise CgroupError(int(number), f"{cgroup}: {os.strerror(int(number))}")
        raise OSError(int(number), os.strerror(int(number)))
    return pid


def _execute(command: Sequence[str], inherited: Inherited, cgroup: str | None, writer: int) -> NoReturn:
    """In the child: become the program, or report the errno."""
    number, doing = errno.EINVAL, _PLACING
    try:
        if cgroup is not None:
            with open(os.path.join(cgroup, "cgroup.procs"), "w", encoding="ascii") as procs:
                procs.write("0")
        doing = _EXECUTING
        environment = _environment(os.environ)
        for each in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(each, signal.SIG_DFL)
        if inherited.ignores_sigchld:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, inherited.mask)
        os.execvpe(command[0], list(command), environment)  # noqa: S606 - the program is what the user wants to run
    except OSError as exc:
        number = exc.errno or errno.EINVAL
    except BaseException:  # noqa: S110 - the child must not run its parent's code
        pass
    finally:
        os.write(writer, b"%s %d" % (doing, number))
        os._exit(_FAILED)


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    environment = dict(given)
    if environment.get("LISTEN_PID") == str(os.getppid()):
        environment["LISTEN_PID"] = str(os.getpid())
        environment.pop("LISTEN_PIDFDID", None)  # a pidfd's inode, which is not ours to know beforehand
    return environment
