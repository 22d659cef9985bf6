"""Options and messages shared by the commands on other processes: attach, exec, audit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import click

from ..errors import PolicyError, format_address
from ..kernel.tcpinfo import TcpState
from ..policy import MAX_USER_TIMEOUT_MS, Keepalive, parse_time
from ..tools.kernel_policy import in_kernel
from ..tools.processes import Attachment, ProcessSocket, find, survey
from ._exit import MISTAKE, complain, fail

__all__ = [
    "describe",
    "describe_peer",
    "find_all",
    "is_path",
    "keepalive_option",
    "parse_interval",
    "report_refused",
    "socket_document",
    "state_name",
    "tell_of_children",
]

F = TypeVar("F", bound=Callable[..., object])


def keepalive_option(command: F) -> F:
    """Add the option --keepalive to a command."""
    return click.option(
        "--keepalive",
        "policy",
        metavar="SPEC",
        callback=_parse_policy,
        help="Such as 20s:10s:4, detect=30s, off; see `kaio plan`. Default: from the environment, else 20s:10s:4.",
    )(command)


def _parse_policy(ctx: click.Context, param: click.Parameter, value: str | None) -> Keepalive:
    try:
        policy = Keepalive.from_env() if value is None else Keepalive.parse(value)
        in_kernel(policy)
        return policy
    except PolicyError as exc:
        fail(str(exc), MISTAKE)


def parse_interval(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Parse the value of --watch, written as the times of a policy."""
    if value is None:
        return None
    try:
        seconds = parse_time("--watch", value)
    except PolicyError:
        seconds = 0.0
    if not 0 < seconds <= MAX_USER_TIMEOUT_MS / 1000:  # also what poll(2) accepts
        fail(f"--watch {value}: must be a time such as 1s, 500ms, 2m", MISTAKE)
    return seconds


def report_refused(attachment: Attachment, told: set[int]) -> bool:
    """Print the processes that cannot be inspected, each once, on standard error. Returns whether there are any."""
    for pid, refusal in attachment.refused.items():
        if pid not in told:
            told.add(pid)
            complain(str(refusal))
    for pid, problem in attachment.misread.items():
        if -pid not in told:
            told.add(-pid)
            complain(problem)
    return bool(attachment.refused)


def find_all(words: Sequence[str]) -> list[int]:
    """Find the processes that numbers, names and units stand for, each once. Raises `ProcessError`."""
    return list(dict.fromkeys(pid for word in words for pid in find(word)))


def is_path(word: str) -> bool:
    """Whether an argument is a path, and not a process: it has a slash or exists, or looks like a Python file."""
    if word.isascii() and word.isdigit():
        return False
    return os.sep in word or word.endswith((".py", ".pyw", ".ipynb")) or os.path.lexists(word)


def tell_of_children(named: Sequence[int], more: Sequence[int]) -> None:
    """Say on standard error that child processes have sockets, which were left out."""
    seen = set(named)
    result = survey(more)
    holding = {found.pid for found in result.sockets} - seen
    if holding:
        which = f"process {named[0]} has" if len(named) == 1 else "they have"
        number = len({found.inode for found in result.sockets})  # children share listening sockets
        children = "1 child process" if len(holding) == 1 else f"{len(holding)} child processes"
        complain(f"{which} {children} with {number} TCP socket{'s' if number > 1 else ''}; --children includes them")


def socket_document(found: ProcessSocket, program: str) -> dict[str, object]:
    """What the JSON documents of all commands say about a process's socket."""
    return {
        "pid": found.pid,
        "process": program,
        "fd": found.fd,
        "inode": found.inode,
        "family": found.family.name,
        "mptcp": found.mptcp,
        "local": describe(found.local),
        "peer": None if found.peer is None else describe(found.peer),
        "listening": found.listening,
        "state": state_name(found.tcp_state),
    }


def state_name(state: int) -> str:
    """The name of a TCP state, as ss(8) has it; the number of one that newer kernels have added."""
    return TcpState(state).name.lower().replace("_", "-") if state in set(TcpState) else str(state)


def describe(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """A socket's address, with an IPv4 address that is mapped to IPv6 as such."""
    host = address[0].removeprefix("::ffff:")
    return format_address((host if "." in host else address[0], address[1]))


def describe_peer(found: ProcessSocket) -> str:
    """The peer's address, or the state of a socket without a peer."""
    if found.peer is not None:
        return describe(found.peer)
    if found.listening:
        return "(listening)"
    return "(connecting)" if found.tcp_state == TcpState.SYN_SENT else "(not connected)"
