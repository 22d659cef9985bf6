"""Reading and setting the TCP sockets of running processes, in whatever language they are written.

    _access      another process's descriptors: pidfd_open(2), pidfd_getfd(2), and why they are not permitted
    _system      the kernel's TCP defaults in a socket's network namespace
    _sockets     `sockets`, `processes`, `survey`: a socket's options, and the detection times that follow from them
    _watched     `watched`: the sockets that a process's own monitor watches
    _naming      finding processes by number, name or unit, and those below them
    _environment the policy that a program's own environment asks for
    _programs    what well-known programs set on accepted connections, and which setting to change
    _records     what kaio has set, remembered from one command to the next
    _setting     setting a policy on a socket from outside, and sparing stalled peers
    _attaching   `attach`, `Attachment`: a policy for the sockets of one or more processes, once or repeatedly

Rules kept here: the duplicate of a process's socket is closed at once after reading or setting, because it keeps the
connection open; only keepalive options are changed; times that the program has set itself are kept.

Linux 5.6 and newer, with permission to ptrace the process: a dumpable process of the same user, or root. A
`ProcessError` says what is missing.
"""

from __future__ import annotations

from ._access import ProcessError, lacking
from ._attaching import Attachment, attach
from ._naming import descendants, find, program_name
from ._programs import note, sets_own_times
from ._setting import Change, Outcome
from ._sockets import ProcessSocket, Survey, processes, sockets, survey, uncovered
from ._watched import watched

__all__ = [
    "Attachment",
    "Change",
    "Outcome",
    "ProcessError",
    "ProcessSocket",
    "Survey",
    "attach",
    "descendants",
    "find",
    "lacking",
    "note",
    "processes",
    "program_name",
    "sets_own_times",
    "sockets",
    "survey",
    "uncovered",
    "watched",
]
