"""A cgroup and a BPF file system of a test's own."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import subprocess
import time
from collections.abc import Iterator
from typing import Final

from kaio.errors import KaioError
from kaio.tools import cgroups
from kaio.tools.bpf import BpfError, mount
from kaio.tools.enforcing import linked

__all__ = ["cgroup", "file_system", "inside", "lacking"]

_numbers: Final = itertools.count()


def inside(path: str) -> tuple[str, ...]:
    """The beginning of a command that runs in a cgroup, in the same process."""
    return "sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', path


@contextlib.contextmanager
def cgroup(name: str = "", below: str | None = None) -> Iterator[str]:
    """Make a cgroup, and remove it when its processes have ended."""
    path = os.path.join(below or cgroups.hierarchy(), name or f"kaio-test-{os.getpid()}-{next(_numbers)}")
    os.mkdir(path)
    try:
        yield path
    finally:
        _remove(path)


def _remove(path: str) -> None:
    """Remove a cgroup, which is busy for a moment after its last process has ended."""
    deadline = time.monotonic() + 10
    while True:
        try:
            os.rmdir(path)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def file_system(directory: pathlib.Path) -> Iterator[str]:
    """Mount a BPF file system."""
    path = directory / "bpf"
    path.mkdir()
    mount(str(path))
    try:
        yield str(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def lacking() -> str | None:
    """Why the kernel runs no programs for cgroups here, in one line; None when it does."""
    if os.geteuid() != 0:
        return "kernel programs need root"
    try:
        with cgroup() as path, linked(path, "20s:10s:4"):
            return None
    except (KaioError, BpfError, OSError) as exc:
        return f"no kernel programs for cgroups: {exc}"
