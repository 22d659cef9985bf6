"""Options and messages shared by the commands on other processes: attach, exec, audit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from ..errors import PolicyError, format_address
from ..kernel.tcpinfo import TcpState
from ..policy import MAX_USER_TIMEOUT_MS, Keepalive, parse_time
from ..tools.kernel_policy import in_kernel
from ..tools.processes import Attachment, ProcessSocket
from ._exit import MISTAKE, fail

__all__ = ["describe_peer", "keepalive_option", "parse_interval", "report_refused"]

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
            click.echo(f"kaio: {refusal}", err=True)
    return bool(attachment.refused)


def describe_peer(found: ProcessSocket) -> str:
    """The peer's address, or the state of a socket without a peer."""
    if found.peer is not None:
        return format_address(found.peer)
    if found.listening:
        return "(listening)"
    return "(connecting)" if found.tcp_state == TcpState.SYN_SENT else "(not connected)"
