"""`kaio attach`: set a policy on the sockets of running processes."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence

import click

from ..errors import KaioError, PolicyError
from ..policy import Keepalive
from ..tools.processes import Attachment, Change, Outcome, ProcessError, descendants
from ..tools.procfs import process_name
from ._exit import CANNOT, MISTAKE, YES, complain, fail
from ._output import as_json as encode
from ._output import json_option, print_json, print_table, printable
from ._processes import (
    describe,
    describe_peer,
    find_all,
    keepalive_option,
    parse_interval,
    report_refused,
    socket_document,
    tell_of_children,
)

__all__ = ["attach"]

COLUMNS = ("pid", "fd", "local", "peer", "before", "after", "outcome")
DROPPABLE = ("before", "fd", "after")


@click.command()
@click.argument("subjects", nargs=-1, required=True, metavar="PID | NAME | UNIT...")
@keepalive_option
@click.option(
    "--watch", metavar="TIME", callback=parse_interval, help="Keep running, and look for new sockets at this interval."
)
@click.option("--children/--no-children", default=None, help="Include child processes; the default with --watch.")
@click.option("--undo", is_flag=True, help="Give the sockets back the options they had before kaio set any.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--force", is_flag=True, help="Include sockets on which the program has set times itself.")
@json_option
def attach(
    subjects: tuple[str, ...],
    policy: Keepalive,
    watch: float | None,
    children: bool | None,
    undo: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Set a keepalive policy on the TCP sockets of running processes; connections accepted later inherit it.

    Processes are given by number, by name as for `pgrep -x`, or by systemd unit. Times that a program has set itself
    are kept, and KEEPALIVE=off in its environment opts out. The kernel enforces the user timeout: a peer that accepts
    no data for that long is dropped. Listening sockets get none until a connection shows that the program sets no times
    on what it accepts. With --watch, new sockets get the policy too, and the connection of a live peer is kept as long
    as it answers (unless the policy says stalled=drop). When --watch ends, the sockets keep their options. Another
    policy replaces one that kaio has set before, and --undo takes it back.

    With --watch, --json prints one line for each socket. Exits with 0 if every socket was set or kept, 3 if not.
    """
    if undo and (watch is not None or force):
        fail("--undo cannot be combined with --watch or --force", MISTAKE)
    below = watch is not None if children is None else children
    output = _Output(dry_run=dry_run, as_json=as_json, as_lines=watch is not None)
    try:
        pids = find_all(subjects)
        _allow_many_descriptors()
        with Attachment((), policy, force=force, dry_run=dry_run, children=below) as attachment:
            failed = _follow(attachment, pids)
            changes = attachment.undo() if undo else attachment.look()
            refused = all(pid in attachment.refused for pid in pids)
            failed |= not refused and output.show(pids, changes)
            failed |= report_refused(attachment, set())
            for line in attachment.unreadable:
                complain(line)
            if not below and not refused:
                tell_of_children(pids, descendants(pids))
            if watch is not None and not dry_run:
                _keep_looking(attachment, watch, output)
    except KaioError as exc:
        fail(str(exc), MISTAKE if isinstance(exc, PolicyError) else CANNOT)
    sys.exit(CANNOT if failed or attachment.unreadable else YES)


def _allow_many_descriptors() -> None:
    """Allow a descriptor for each process, as far as the hard limit goes: a database may have thousands."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - not on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):  # macOS reports a limit that it does not accept
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _follow(attachment: Attachment, pids: list[int]) -> bool:
    """Follow the processes, and remove from the list those that do not exist. Returns whether there are any.

    Raises `ProcessError` if none exists.
    """
    missing: list[ProcessError] = []
    for pid in list(pids):
        try:
            attachment.add(pid)
        except ProcessError as exc:
            missing.append(exc)
            pids.remove(pid)
    if missing and not pids:
        raise missing[0]
    for error in missing:
        complain(str(error))
    return bool(missing)


def _keep_looking(attachment: Attachment, every: float, output: _Output) -> None:
    """Look repeatedly, until all the processes have exited."""
    told = set(attachment.refused)
    while attachment.alive:
        attachment.wait(attachment.pace(every))
        output.show_lines(attachment.look())
        report_refused(attachment, told)


@dataclasses.dataclass(frozen=True)
class _Output:
    """How changes are printed."""

    dry_run: bool
    as_json: bool
    as_lines: bool

    def show(self, pids: Sequence[int], changes: Sequence[Change]) -> bool:
        """Print the first changes. Returns whether any of them failed."""
        if self.as_json and self.as_lines:
            self.show_lines(changes)
        elif self.as_json:
            documents = [self._document(change) for change in changes]
            print_json({"pids": list(pids), "dry_run": self.dry_run, "sockets": documents})
        elif changes:
            rows = [self._row(change) for change in changes]
            print_table(COLUMNS, rows, right=("pid", "fd"), droppable=DROPPABLE)
        else:
            which = f"process {pids[0]} has" if len(pids) == 1 else f"{len(pids)} processes have"
            click.echo(f"{which} no TCP sockets")
        sys.stdout.flush()
        return any(change.outcome is Outcome.FAILED for change in changes)

    def show_lines(self, changes: Sequence[Change]) -> None:
        """Print a line for each change."""
        for change in changes:
            line = encode(self._document(change)) if self.as_json else printable("  ".join(self._row(change)))
            click.echo(line)
        sys.stdout.flush()

    def _row(self, change: Change) -> tuple[str, ...]:
        found = change.socket
        outcome = self._outcome(change) + (f": {change.why}" if change.why else "")
        local = describe(found.local)
        return str(found.pid), str(found.fd), local, describe_peer(found), str(found.state), str(change.after), outcome

    def _outcome(self, change: Change) -> str:
        doing = change.outcome in (Outcome.SET, Outcome.LIFTED, Outcome.RESTORED, Outcome.UNDONE)
        return f"would be {change.outcome.value}" if self.dry_run and doing else change.outcome.value

    def _document(self, change: Change) -> dict[str, object]:
        return {
            **socket_document(change.socket, process_name(change.socket.pid)),
            "before": dataclasses.asdict(change.socket.state),
            "after": dataclasses.asdict(change.after),
            "outcome": self._outcome(change),
            "why": change.why,
        }
