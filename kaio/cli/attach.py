"""`kaio attach`: a policy for the sockets of a process that runs already. Also how `kaio exec` speaks of the same."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from kaio.errors import KaioError, PolicyError, format_address
from kaio.kernel.tcpinfo import TcpState
from kaio.policy import Keepalive
from kaio.tools.processes import Attachment, Change, Outcome, ProcessSocket, in_kernel

from ._output import CANNOT, MISTAKE, YES, fail, json_option, print_json, print_table

__all__ = ["attach", "keepalive_option", "other_end", "watch_time"]

COLUMNS = ("pid", "fd", "local", "peer", "before", "after", "outcome")


def policy_of(ctx: click.Context, param: click.Parameter, value: str | None) -> Keepalive:
    """The policy of a command; without one, the default of the environment."""
    try:
        policy = Keepalive.from_env() if value is None else Keepalive.parse(value)
        in_kernel(policy)
        return policy
    except PolicyError as exc:
        fail(str(exc), MISTAKE)


def watch_time(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Seconds, from the same text as the times of a policy."""
    if value is None:
        return None
    try:
        # Of a policy's times, the user timeout is the one that may be a fraction of a second.
        seconds = Keepalive.parse(f"user_timeout={value},count=1").user_timeout
    except PolicyError:
        seconds = None
    if not isinstance(seconds, (int, float)):
        fail(f"--watch {value}: must be a time such as 1s, 500ms, 2m", MISTAKE)
    return seconds


F = TypeVar("F", bound=Callable[..., Any])


def keepalive_option(command: F) -> F:
    """The option, for every command that takes it."""
    return click.option(
        "--keepalive",
        "policy",
        metavar="SPEC",
        callback=policy_of,
        help="Such as 20s:10s:4, detect=30s, off; see `kaio plan`. Default: from the environment, else 20s:10s:4.",
    )(command)


@click.command()
@click.argument("pid", type=int)
@keepalive_option
@click.option(
    "--watch", metavar="TIME", callback=watch_time, help="Go on with sockets that come later; look this often."
)
@click.option(
    "--children/--no-children", default=None, help="Its child processes, too; with --watch that is the default."
)
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would be done.")
@click.option("--force", is_flag=True, help="Also sockets on which the program has set times itself.")
@json_option
def attach(
    pid: int,
    policy: Keepalive,
    watch: float | None,
    children: bool | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Give a running process's TCP sockets a keepalive policy, from outside; what its listeners accept later has it.

    What the program has set itself stands. The user timeout is enforced by the kernel: a peer that takes no data for
    that long is dropped; with --watch, one that answers is spared (unless the policy says stalled=drop). The process
    goes on with what it has when the watching ends.

    With --watch, --json prints a line for each socket. Exits with 0 when all is set that should be, 3 when not.
    """
    below = watch is not None if children is None else children
    try:
        with Attachment(pid, policy, force=force, dry_run=dry_run, children=below) as attachment:
            changes = attachment.look()
            if pid in attachment.refused:
                fail(str(attachment.refused[pid]))
            failed = _tell(pid, changes, dry_run, as_json, as_lines=watch is not None)
            failed |= complain(attachment, set())
            if watch is not None and not dry_run:
                _go_on(attachment, watch, as_json)
    except KaioError as exc:
        fail(str(exc), MISTAKE if isinstance(exc, PolicyError) else CANNOT)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(CANNOT if failed else YES)


def complain(attachment: Attachment, told: set[int]) -> bool:
    """Say on standard error, once for each, which processes may not be looked at; whether there are any."""
    for pid, refusal in attachment.refused.items():
        if pid not in told:
            told.add(pid)
            click.echo(f"kaio: {refusal}", err=True)
    return bool(attachment.refused)


def _go_on(attachment: Attachment, every: float, as_json: bool) -> None:
    """Look again and again, until the last of the processes has ended."""
    told = set(attachment.refused)
    while attachment.alive:
        attachment.wait(attachment.pace(every))
        for change in attachment.look():
            click.echo(json.dumps(_document(change, dry_run=False)) if as_json else "  ".join(_row(change, False)))
        sys.stdout.flush()
        complain(attachment, told)


def _tell(pid: int, changes: Sequence[Change], dry_run: bool, as_json: bool, *, as_lines: bool) -> bool:
    """What was done; whether any of it failed."""
    if as_json and as_lines:
        for change in changes:
            click.echo(json.dumps(_document(change, dry_run)))
    elif as_json:
        print_json({"pid": pid, "dry_run": dry_run, "sockets": [_document(change, dry_run) for change in changes]})
    elif changes:
        print_table(COLUMNS, [_row(change, dry_run) for change in changes], right=("pid", "fd"))
    else:
        click.echo(f"process {pid} has no TCP sockets")
    sys.stdout.flush()
    return any(change.outcome is Outcome.FAILED for change in changes)


def _row(change: Change, dry_run: bool) -> tuple[str, ...]:
    found = change.socket
    outcome = _outcome(change, dry_run) + (f": {change.why}" if change.why else "")
    local = format_address(found.local)
    return str(found.pid), str(found.fd), local, other_end(found), str(found.state), str(change.after), outcome


def _outcome(change: Change, dry_run: bool) -> str:
    doing = change.outcome in (Outcome.SET, Outcome.LIFTED, Outcome.RESTORED)
    return f"would be {change.outcome.value}" if dry_run and doing else change.outcome.value


def other_end(found: ProcessSocket) -> str:
    """The peer, or why there is none."""
    if found.peer is not None:
        return format_address(found.peer)
    if found.listening:
        return "(listening)"
    return "(connecting)" if found.tcp_state == TcpState.SYN_SENT else "(not connected)"


def _document(change: Change, dry_run: bool) -> dict[str, Any]:
    found = change.socket
    return {
        "pid": found.pid,
        "fd": found.fd,
        "local": format_address(found.local),
        "peer": None if found.peer is None else format_address(found.peer),
        "listening": found.listening,
        "before": dataclasses.asdict(found.state),
        "after": dataclasses.asdict(change.after),
        "outcome": _outcome(change, dry_run),
        "why": change.why,
    }
