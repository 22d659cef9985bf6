"""Another process's descriptors: pidfd_open(2), pidfd_getfd(2), and why they are not permitted.

Rules kept here: a duplicated socket shares its open file description with the process, so its file status flags are
never changed; an errno becomes a `ProcessError`, which names the missing permission and how to get it. A process cannot
make this one wait: it may close its socket, or use the number for another file, while there is a duplicate, whose
close(2) is then the one that waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import select
import socket
import struct
import sys
import threading
from collections.abc import Iterable
from typing import Final

from ...errors import KaioError
from ...kernel.descriptors import Descriptor, libc
from ..procfs import socket_inodes, threads, user_name

__all__ = ["NO_PID", "Process", "ProcessError", "has_exited", "lacking", "wait_for_end"]

_PIDFD_GETFD: Final = 438  # the same on every architecture that came after it (asm-generic/unistd.h)
_PIDFD_THREAD: Final = os.O_EXCL if hasattr(os, "O_EXCL") else 0  # Linux 6.9: the id may be any thread's
_CAP_SYS_PTRACE: Final = 1 << 19  # linux/capability.h
_ID: Final = re.compile(r"[0-9]{1,10}")
_CAPABILITIES: Final = re.compile(r"[0-9a-f]{1,16}")
_YAMA: Final = "/proc/sys/kernel/yama/ptrace_scope"
_AS_ROOT: Final = "run as root (CAP_SYS_PTRACE)"


NO_PID: Final = -(1 << 31)
"""What a `ProcessError` has in place of a number that nobody has given."""


class ProcessError(KaioError, OSError):
    """A process whose sockets cannot be read: it does not exist, or access is denied. The message says how to get it.

    `pid` is the process, or `NO_PID` if a name stands for none; `errno` is the kernel's error number: ESRCH if it does
    not exist, EPERM or EACCES if access is not permitted, ENOSYS if the kernel lacks the system call.
    """

    pid: int

    def __init__(self, pid: int, number: int, reason: str) -> None:
        super().__init__(number, reason if pid == NO_PID else f"process {pid}: {reason}")
        self.pid = pid
        self._reason = reason

    def __reduce__(self) -> tuple[type[ProcessError], tuple[int, int | None, str]]:
        return ProcessError, (self.pid, self.errno, self._reason)

    def __str__(self) -> str:
        return str(self.strerror)


class Process:
    """A running process, referred to by a pidfd, so that a reused pid is never mistaken for it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.unreadable: list[str] = []
        """Sockets that could not be read at the last look, each with the reason."""
        self._pidfd = -1
        self._thread: int | None = None  # one that lives, if the first has ended
        self._thread_pidfd = -1
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
        """Whether it has exited, even if its parent has not waited for it yet."""
        return bool(wait_for_end([self], 0))

    def sockets(self) -> dict[int, int]:
        """Map the inodes of its sockets, of any kind, to the lowest descriptor of each. Raises `ProcessError`."""
        found: dict[int, int] = {}
        try:
            for fd, inode in socket_inodes(self.pid, self._thread):
                found.setdefault(inode, fd)
        except OSError as exc:
            if self._thread is None:
                raise self._failed(exc.errno) from None
        if not found:
            if self.ended:
                raise _refused(self.pid, errno.ESRCH)
            if self._use_living_thread():
                return self.sockets()
        return found

    def duplicate(self, fd: int, inode: int) -> socket.socket | None:
        """Duplicate the TCP socket with this descriptor and inode; None if it is not TCP, or closed. Close it soon.

        Raises `ProcessError`.
        """
        copy, number = _getfd(self._pidfd if self._thread is None else self._thread_pidfd, fd)
        if copy < 0:
            if number == errno.EBADF:
                return None
            raise self._failed(number)
        if not _is_socket(copy):  # the number is used again, for a file whose close(2) may wait, as with FUSE
            _close_aside(copy)
            return None
        try:
            found = Descriptor.of(copy)
            if found.inode == inode and found.is_tcp:  # otherwise closed, and the number is used again
                # A family that Python does not know makes it raise errors without a number. With SOCK_NONBLOCK, it does
                # not make the socket non-blocking after socket.setdefaulttimeout(), for the process too.
                sock = _Duplicate(found.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0, copy)
                copy = -1
                return sock
        except OSError as exc:
            self.unreadable.append(f"process {self.pid}, descriptor {fd}: {exc.strerror or exc}")
        finally:
            if copy >= 0:
                os.close(copy)
        return None

    def _use_living_thread(self) -> bool:
        """Read by way of another thread from now on, if the one so far has ended. Raises `ProcessError`."""
        if not _has_ended(f"{self.pid}/task/{self._thread or self.pid}"):
            return False
        for thread in self._living_threads():
            try:
                pidfd = os.pidfd_open(thread, _PIDFD_THREAD)
            except ProcessLookupError:
                continue
            except OSError as exc:
                reason = "its main thread has ended, and reading by way of another one needs Linux 6.9"
                raise ProcessError(self.pid, exc.errno or errno.EINVAL, reason) from None
            self._close_thread()
            self._thread, self._thread_pidfd = thread, pidfd
            if self.ended:  # so that the thread may be one of another process with the same pid
                raise _refused(self.pid, errno.ESRCH)
            return True
        return False

    def _living_threads(self) -> list[int]:
        try:
            found = threads(self.pid)
        except OSError:
            return []
        return [each for each in found if not _has_ended(f"{self.pid}/task/{each}")]

    def _close_thread(self) -> None:
        pidfd, self._thread_pidfd = self._thread_pidfd, -1
        self._thread = None
        if pidfd >= 0:
            os.close(pidfd)

    def close(self) -> None:
        """Close the pidfd. Does nothing if it is closed."""
        self._close_thread()
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


class _Duplicate(socket.socket):
    """A duplicate of a process's socket. Closing it never waits, whatever SO_LINGER says (socket(7))."""

    __slots__ = ()

    def close(self) -> None:
        """Close the duplicate, in another thread if the process may have left the waiting to it."""
        try:
            on, seconds = struct.unpack("ii", self.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        except OSError:
            on = seconds = 0
        if on and seconds:
            _close_aside(self.detach())
        else:
            super().close()


def _close_aside(fd: int) -> None:
    """Close a descriptor in a thread that nobody waits for."""
    try:
        threading.Thread(target=_close, args=(fd,), name="kaio-close", daemon=True).start()
    except RuntimeError:  # no more threads
        _close(fd)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def _is_socket(fd: int) -> bool:
    """Whether a descriptor of this process is a socket. Unlike fstat(2), this asks no file system."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:[")
    except OSError:
        return False


def wait_for_end(processes: Iterable[Process], seconds: float) -> list[int]:
    """Wait until one of the processes has exited, at most that many seconds; return the pids of those that have."""
    pids = {process.fileno(): process.pid for process in processes}
    poll = select.poll()
    for pidfd in pids:
        poll.register(pidfd, select.POLLIN)
    return [pids[pidfd] for pidfd, _ in poll.poll(seconds * 1000)]


def lacking() -> str | None:
    """Why sockets of other processes cannot be read on this system, in one line; None if they can be."""
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
    """Why a process cannot duplicate its own descriptors, which needs no permission."""
    if not sys.platform.startswith("linux"):
        return f"sockets of other processes can be read on Linux only; this is {sys.platform}"
    if number == errno.ENOSYS:
        return "pidfd_getfd(2) is missing: the kernel is older than Linux 5.6, or a container's seccomp filter hides it"
    return "a seccomp filter forbids pidfd_getfd(2): with Docker, run with --cap-add SYS_PTRACE"


def _getfd(pidfd: int, fd: int) -> tuple[int, int]:
    """Duplicate another process's descriptor, close-on-exec; -1 and the errno on failure."""
    copy = libc().syscall(_PIDFD_GETFD, pidfd, fd, 0)
    return copy, ctypes.get_errno() if copy < 0 else 0


# -- reasons


def _refused(pid: int, number: int) -> ProcessError:
    if number in (errno.EPERM, errno.EACCES):
        return ProcessError(pid, number, _forbidden(pid))
    if number == errno.ENOSYS:
        return ProcessError(pid, number, _cannot(number))
    if number in (errno.ESRCH, errno.ENOENT, errno.EINVAL):  # the last two: the id of a thread (pidfd_open(2))
        return ProcessError(pid, errno.ESRCH, _missing(pid))
    return ProcessError(pid, number, os.strerror(number))


def _missing(pid: int) -> str:
    status = _status(pid)
    if status.get("State", "").startswith("Z"):
        return "it has exited"
    leader = status.get("Tgid", str(pid))
    return "there is no such process" if leader == str(pid) else f"that is a thread of process {leader}"


def _forbidden(pid: int) -> str:
    """Which condition of the kernel's check failed (ptrace(2), "Ptrace access mode checking")."""
    reason = lacking()
    if reason is not None:
        return reason
    theirs, ours = _status(pid), _status("self")
    if _capabilities(ours, "CapEff") & _CAP_SYS_PTRACE:
        return "not permitted even with CAP_SYS_PTRACE: it is outside this container, or a security module protects it"
    if _ids(theirs, "Uid") != _ids(ours, "Uid"):
        return _of_another_user(theirs, ours)
    if _ids(theirs, "Gid") != _ids(ours, "Gid"):
        return f"it runs under another group: {_AS_ROOT}"
    if not _dumpable(pid, theirs):
        return (
            "it is not dumpable (it changed its user, runs a set-user-ID program or an unreadable one, or cleared"
            f" the flag with prctl(2)): {_AS_ROOT}"
        )
    if _capabilities(theirs, "CapPrm") & ~_capabilities(ours, "CapPrm"):
        return f"it has capabilities that this process lacks: {_AS_ROOT}"
    return _restricted(_yama_scope())


def _of_another_user(theirs: dict[str, str], ours: dict[str, str]) -> str:
    uids = _ids(theirs, "Uid")
    uid = min(uids, default=0)
    reason = f"it belongs to another user ({user_name(uid)})" if len(uids) == 1 else "it runs under more than one user"
    if _ids(ours, "Uid") == {0}:
        return f"{reason}, and root here lacks CAP_SYS_PTRACE: with Docker, run with --cap-add SYS_PTRACE"
    return (
        f"{reason}: run as that user, or {_AS_ROOT.removeprefix('run ')}" if len(uids) == 1 else f"{reason}: {_AS_ROOT}"
    )


def _restricted(scope: int) -> str:
    """Explain a scope of Documentation/admin-guide/LSM/Yama.rst."""
    if scope == 1:
        return (
            "only its parent processes may inspect it (kernel.yama.ptrace_scope is 1):"
            f" {_AS_ROOT}, or start the program with `kaio exec`, or `sysctl kernel.yama.ptrace_scope=0`"
        )
    if scope == 2:
        return f"only root may inspect processes (kernel.yama.ptrace_scope is 2): {_AS_ROOT}"
    if scope >= 3:
        return f"nobody may inspect processes until the next boot (kernel.yama.ptrace_scope is {scope})"
    return f"a security module forbids it: {_AS_ROOT}"


def _status(pid: int | str) -> dict[str, str]:
    """Read /proc/PID/status, which needs no permission; empty if the process does not exist."""
    try:
        # The kernel escapes newlines in a process's name, and not the carriage returns that Python would take for one.
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace", newline="\n") as file:
            return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}


def _has_ended(task: str) -> bool:
    """Whether a thread, by its path in /proc, has ended: a zombie, or gone."""
    return _status(task).get("State", "Z").startswith(("Z", "X"))


def has_exited(pid: int) -> bool:
    """Whether a process is gone or a zombie. One whose first thread alone has ended looks like it, but has more."""
    try:
        return _has_ended(str(pid)) and len(threads(pid)) <= 1
    except OSError:
        return True


def _ids(status: dict[str, str], kind: str) -> set[int]:
    """The real, effective and saved ids, which the check compares."""
    return {int(word) for word in status.get(kind, "").split()[:3] if _ID.fullmatch(word)}


def _capabilities(status: dict[str, str], kind: str) -> int:
    value = status.get(kind, "")
    return int(value, 16) if _CAPABILITIES.fullmatch(value) else 0


def _dumpable(pid: int, status: dict[str, str]) -> bool:
    """Whether the process is dumpable; otherwise its files in /proc belong to root (proc(5))."""
    try:
        return os.stat(f"/proc/{pid}/status").st_uid in _ids(status, "Uid")
    except OSError:
        return True


def _yama_scope() -> int:
    try:
        with open(_YAMA, encoding="utf-8") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
