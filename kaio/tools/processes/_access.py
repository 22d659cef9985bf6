"""Another process's descriptors: pidfd_open(2), pidfd_getfd(2), and what to say when that is refused.

Rules kept here: what is borrowed shares its file description with the process, so its file status flags are never
touched; an errno becomes a `ProcessError` here, which names the permission that is missing and a way to get it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import sys
from collections.abc import Iterable
from typing import Any, Final

from ...errors import KaioError
from ...kernel.descriptors import libc

__all__ = ["Process", "ProcessError", "lacking", "wait_for_end"]

_PIDFD_GETFD: Final = 438  # the same on every architecture that came after it (asm-generic/unistd.h)
_CAP_SYS_PTRACE: Final = 1 << 19  # linux/capability.h
_YAMA: Final = "/proc/sys/kernel/yama/ptrace_scope"
_AS_ROOT: Final = "run as root (CAP_SYS_PTRACE)"


class ProcessError(KaioError, OSError):
    """A process whose sockets cannot be read: gone, or not ours to look at. The message says how to get the permission.

    `pid` is the process, `errno` the kernel's number: ESRCH where there is none, EPERM or EACCES where it is forbidden,
    ENOSYS where the kernel cannot.
    """

    pid: int

    def __init__(self, pid: int, number: int, reason: str) -> None:
        super().__init__(number, f"process {pid}: {reason}")
        self.pid = pid
        self._reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return ProcessError, (self.pid, self.errno, self._reason)

    def __str__(self) -> str:
        return str(self.strerror)


class Process:
    """A running process, held by a descriptor, so that a number that is used again is never taken for it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = -1
        if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
            raise _refused(pid, errno.ENOSYS)
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError) as exc:
            raise _refused(pid, getattr(exc, "errno", errno.ESRCH)) from None
        if self.ended:
            self.close()
            raise _refused(pid, errno.ESRCH)

    @property
    def ended(self) -> bool:
        """Whether it has ended; its parent may not have asked yet."""
        return bool(wait_for_end([self], 0))

    def sockets(self) -> dict[int, int]:
        """Its sockets of any kind: inode to the lowest of the descriptors that stand for it. Raises ProcessError."""
        found: dict[int, int] = {}
        directory = f"/proc/{self.pid}/fd"
        try:
            names = os.listdir(directory)
        except OSError as exc:
            raise self._failed(exc.errno) from None
        for fd in sorted(map(int, names)):
            try:
                target = os.readlink(f"{directory}/{fd}")
            except OSError:  # closed meanwhile
                continue
            if target.startswith("socket:["):
                found.setdefault(int(target[8:-1]), fd)
        if not found and self.ended:
            raise _refused(self.pid, errno.ESRCH)
        return found

    def borrow(self, fd: int, inode: int) -> socket.socket | None:
        """The socket of that descriptor and inode, to be closed at once; None when the process has closed it.

        Raises `ProcessError`.
        """
        copy, number = _getfd(self._pidfd, fd)
        if copy < 0:
            if number == errno.EBADF:
                return None
            raise self._failed(number)
        if os.fstat(copy).st_ino != inode:  # closed, and its number is another file's by now
            os.close(copy)
            return None
        # Told that it is non-blocking, Python does not make it so where socket.setdefaulttimeout() is in use: that
        # flag is the process's own, too.
        return socket.socket(-1, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, -1, copy)

    def close(self) -> None:
        """Let go of it. Harmless when it is closed."""
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self._pidfd

    def _failed(self, number: int | None) -> ProcessError:
        return _refused(self.pid, errno.ESRCH if self.ended else number or errno.EIO)


def wait_for_end(processes: Iterable[Process], seconds: float) -> list[int]:
    """Wait until one of the processes has ended, or that many seconds; the pids of those that have."""
    pids = {process.fileno(): process.pid for process in processes}
    poll = select.poll()
    for pidfd in pids:
        poll.register(pidfd, select.POLLIN)
    return [pids[pidfd] for pidfd, _ in poll.poll(seconds * 1000)]


def lacking() -> str | None:
    """Why no process's sockets can be read here, in one line; None when those can that permit it."""
    pid = os.getpid()
    try:
        with Process(pid) as self, socket.socket() as probe:
            copy, number = _getfd(self.fileno(), probe.fileno())
    except ProcessError as exc:
        return _cannot(exc.errno or errno.ENOSYS)
    if copy < 0:
        return _cannot(number)
    os.close(copy)
    return None


def _cannot(number: int) -> str:
    """Why a process may not even look at its own descriptors, which needs no permission."""
    if not sys.platform.startswith("linux"):
        return f"sockets of other processes can be had on Linux only; this is {sys.platform}"
    if number == errno.ENOSYS:
        return "this kernel has no pidfd_getfd(2), which Linux 5.6 has; or a container's seccomp filter hides it"
    return "a seccomp filter forbids pidfd_getfd(2): with Docker, run with --cap-add SYS_PTRACE"


def _getfd(pidfd: int, fd: int) -> tuple[int, int]:
    """A copy of another process's descriptor, close-on-exec; -1 and the errno when there is none."""
    copy = libc().syscall(_PIDFD_GETFD, pidfd, fd, 0)
    return copy, ctypes.get_errno() if copy < 0 else 0


# -- why not


def _refused(pid: int, number: int) -> ProcessError:
    if number in (errno.EPERM, errno.EACCES):
        return ProcessError(pid, number, _forbidden(pid))
    if number == errno.ENOSYS:
        return ProcessError(pid, number, _cannot(number))
    if number in (errno.ESRCH, errno.ENOENT, errno.EINVAL):  # the last two: the number of a thread (pidfd_open(2))
        return ProcessError(pid, errno.ESRCH, _missing(pid))
    return ProcessError(pid, number, os.strerror(number))


def _missing(pid: int) -> str:
    status = _status(pid)
    if status.get("State", "").startswith("Z"):
        return "it has ended"
    leader = status.get("Tgid", str(pid))
    return "there is no such process" if leader == str(pid) else f"that is a thread of process {leader}"


def _forbidden(pid: int) -> str:
    """What the kernel's check (ptrace(2), "Ptrace access mode checking") did not find in order."""
    reason = lacking()
    if reason is not None:
        return reason
    theirs, ours = _status(pid), _status("self")
    if _capabilities(ours, "CapEff") & _CAP_SYS_PTRACE:
        return "not even with CAP_SYS_PTRACE: it is outside of this container, or a security module protects it"
    if _ids(theirs, "Uid") != _ids(ours, "Uid"):
        return _of_another_user(theirs, ours)
    if _ids(theirs, "Gid") != _ids(ours, "Gid"):
        return f"it runs under another group than we do: {_AS_ROOT}"
    if not _dumpable(pid, theirs):
        return (
            "it does not let itself be looked at (not dumpable: it has changed its user, runs a set-user-ID program or"
            f" one that we may not read, or asked for that with prctl(2)): {_AS_ROOT}"
        )
    if _capabilities(theirs, "CapPrm") & ~_capabilities(ours, "CapPrm"):
        return f"it has capabilities that we have not: {_AS_ROOT}"
    return _restricted(_yama_scope())


def _of_another_user(theirs: dict[str, str], ours: dict[str, str]) -> str:
    uids = _ids(theirs, "Uid")
    uid = min(uids, default=0)
    reason = f"it belongs to another user ({_user(uid)})" if len(uids) == 1 else "it runs under more than one user"
    if _ids(ours, "Uid") == {0}:
        return f"{reason}, and root here lacks CAP_SYS_PTRACE: with Docker, run with --cap-add SYS_PTRACE"
    return (
        f"{reason}: run as that user, or {_AS_ROOT.removeprefix('run ')}" if len(uids) == 1 else f"{reason}: {_AS_ROOT}"
    )


def _restricted(scope: int) -> str:
    """For the scopes of Documentation/admin-guide/LSM/Yama.rst."""
    if scope == 1:
        return (
            "only its parents may look into it (kernel.yama.ptrace_scope is 1):"
            f" {_AS_ROOT}, or start the program with `kaio exec`, or `sysctl kernel.yama.ptrace_scope=0`"
        )
    if scope == 2:
        return f"only root may look into processes (kernel.yama.ptrace_scope is 2): {_AS_ROOT}"
    if scope >= 3:
        return f"nobody may look into processes until the next boot (kernel.yama.ptrace_scope is {scope})"
    return f"a security module forbids it: {_AS_ROOT}"


def _status(pid: int | str) -> dict[str, str]:
    """/proc/PID/status, which everybody may read; empty when there is no such process."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}


def _ids(status: dict[str, str], kind: str) -> set[int]:
    """The real, effective and saved ones: what is compared."""
    return set(map(int, status.get(kind, "").split()[:3]))


def _capabilities(status: dict[str, str], kind: str) -> int:
    return int(status.get(kind, "0"), 16)


def _dumpable(pid: int, status: dict[str, str]) -> bool:
    """Files in /proc/PID belong to root where a process is not dumpable (proc(5))."""
    try:
        return os.stat(f"/proc/{pid}/status").st_uid in _ids(status, "Uid")
    except OSError:
        return True


def _user(uid: int) -> str:
    import pwd  # noqa: PLC0415 - not on Windows

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _yama_scope() -> int:
    try:
        with open(_YAMA, encoding="utf-8") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
