"""Running a program on whose sockets a policy is set from outside: the part of `kaio exec` that knows no terminal.

    _start     starting it, with what the caller of this process has given it, in a cgroup if there is one
    _signals   passing signals on, each exactly once
    _program   `Program`: the program and what it leaves behind, until the last process has ended

Rules kept here: this process stays the program's parent, and becomes that of the processes whose parents end, because
Yama permits only ancestors to inspect a process (kernel.yama.ptrace_scope is 1 on many systems). It has one thread.
Linux only.
"""

from __future__ import annotations

from ._program import Program
from ._signals import Signals

__all__ = ["Program", "Signals"]
