"""`kaio attach`: set a policy on the sockets of a running process."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

import click

from ..errors import KaioError, PolicyError, format_address
from ..policy import Keepalive
from ..tools.processes import Attachment, Change, Outcome
from ._output import CANNOT, MISTAKE, YES, fail, json_option, print_json, print_table
from ._processes import describe_peer, keepalive_option, parse_interval, report_refused

__all__ = ["attach"]

COLUMNS = ("pid", "fd", "local", "peer", "before", "after", "outcome")


@click.command()
@click.argument("pid", type=int)
@keepalive_option
@click.option(
    "--watch", metavar="TIME", callback=parse_interval, help="Keep running, and look for new sockets at this interval."
)
@click.option("--children/--no-children", default=None, help="Include its child processes; the default with --watch.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--force", is_flag=True, help="Include sockets on which the program has set times itself.")
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
    """Set a keepalive policy on the TCP sockets of a running process; connections accepted later inherit it.

    Times that the program has set itself are kept. The kernel enforces the user timeout: a peer that accepts no data
    for that long is dropped. With --watch, the connection is kept as long as the peer answers (unless the policy says
    stalled=drop). When --watch ends, the sockets keep their options.

    With --watch, --json prints one line for each socket. Exits with 0 if every socket was set or kept, 3 if not.
    """
    below = watch is not None if children is None else children
    try:
        with Attachment(pid, policy, force=force, dry_run=dry_run, children=below) as attachment:
            changes = attachment.look()
            if pid in attachment.refused:
                fail(str(attachment.refused[pid]))
            failed = _print_changes(pid, changes, dry_run, as_json, as_lines=watch is not None)
            failed |= report_refused(attachment, set())
            if watch is not None and not dry_run:
                _keep_looking(attachment, watch, as_json)
    except KaioError as exc:
        fail(str(exc), MISTAKE if isinstance(exc, PolicyError) else CANNOT)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(CANNOT if failed else YES)


def _keep_looking(attachment: Attachment, every: float, as_json: bool) -> None:
    """Look repeatedly, until all the processes have exited."""
    told = set(attachment.refused)
    while attachment.alive:
        attachment.wait(attachment.pace(every))
        for change in attachment.look():
            click.echo(json.dumps(_document(change, dry_run=False)) if as_json else "  ".join(_row(change, False)))
        sys.stdout.flush()
        report_refused(attachment, told)


def _print_changes(pid: int, changes: Sequence[Change], dry_run: bool, as_json: bool, *, as_lines: bool) -> bool:
    """Print the changes. Returns whether any of them failed."""
    if as_json and as_lines:
        for change in changes:
            click.echo(json.dumps(_document(change, dry_run)))
    elif as_json:
        print_json({"pid": pid, "dry_run": dry_run, "sockets": [_document(change, dry_run) for change in changes]})
    elif changes:
        print_table(
            COLUMNS,
            [_row(change, dry_run) for change in changes],
            right=("pid", "fd"),
            droppable=("before", "fd", "after"),
        )
    else:
        click.echo(f"process {pid} has no TCP sockets")
    sys.stdout.flush()
    return any(change.outcome is Outcome.FAILED for change in changes)


def _row(change: Change, dry_run: bool) -> tuple[str, ...]:
    found = change.socket
    outcome = _outcome(change, dry_run) + (f": {change.why}" if change.why else "")
    local = format_address(found.local)
    return str(found.pid), str(found.fd), local, describe_peer(found), str(found.state), str(change.after), outcome


def _outcome(change: Change, dry_run: bool) -> str:
    doing = change.outcome in (Outcome.SET, Outcome.LIFTED, Outcome.RESTORED)
    return f"would be {change.outcome.value}" if dry_run and doing else change.outcome.value


def _document(change: Change, dry_run: bool) -> dict[str, object]:
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
