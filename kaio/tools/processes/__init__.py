"""The TCP sockets of processes that are running already, whatever they are written in: read them, and set them.

    _access      another process's descriptors: pidfd_open(2), pidfd_getfd(2), and what to say when that is refused
    _system      the kernel's own values, in the network namespace that a socket is in
    _sockets     `sockets`, `processes`, `survey`: what each socket has, and what follows from it
    _watched     `watched`: what a process's own monitor bounds
    _setting     what is done to each socket that gets a policy from outside
    _attaching   `attach`, `Attachment`: which processes' sockets, once or again and again

Rules kept here: a process's socket is held for as long as it takes to read or set it, since whoever holds it keeps the
connection open; nothing but keepalive options is ever changed; what the program chose itself stands.

Linux 5.6 and newer. It takes the permission to trace the process (ptrace(2)): the same user's, and dumpable, or root;
a `ProcessError` says what is missing.
"""

from __future__ import annotations

from ._access import ProcessError, lacking
from ._attaching import Attachment, attach
from ._setting import Change, Outcome, in_kernel
from ._sockets import ProcessSocket, processes, sockets, survey, uncovered
from ._watched import watched

__all__ = [
    "Attachment",
    "Change",
    "Outcome",
    "ProcessError",
    "ProcessSocket",
    "attach",
    "in_kernel",
    "lacking",
    "processes",
    "sockets",
    "survey",
    "uncovered",
    "watched",
]
