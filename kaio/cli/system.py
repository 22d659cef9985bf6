"""`kaio system`: show the kernel's TCP defaults, set them, and persist them."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Final, NoReturn, TypeVar

import click

from .. import PolicyError
from ..tools.plans import duration
from ..tools.sysctls import (
    FILE,
    PROC,
    SETTINGS,
    Assignment,
    Defaults,
    SysctlError,
    at_boot,
    change,
    overriding,
    parse,
    persisted,
    read,
)
from ._output import CANNOT, MISTAKE, fail, json_option, print_json, print_table

__all__ = ["system"]

_EXAMPLE: Final = "kaio system set idle=600 interval=60 count=20"
_SUDO_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # secure_path, sudoers(5)

F = TypeVar("F", bound=Callable[..., object])


def dry_run_option(command: F) -> F:
    """Add the option --dry-run to a command."""
    return click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")(command)


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def system(context: click.Context, as_json: bool) -> None:
    """Show the kernel's TCP defaults and what they mean; set them, and keep them across reboots.

    They apply to the network namespace in which the command runs.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            fail(f"--json goes after {context.invoked_subcommand}; such as `{_EXAMPLE} --json`", MISTAKE)
        return
    try:
        defaults = read()
    except SysctlError as exc:
        fail(_problem(exc))
    try:
        deciding, unknown = at_boot(), ""
    except SysctlError as exc:
        deciding, unknown = {}, _problem(exc)
    if as_json:
        print_json({**_document(defaults, deciding), "problem": unknown or None})
        return
    _show(defaults)
    for assignment in deciding.values():
        click.echo(_describe(assignment))
    if unknown:
        click.echo(f"The values at the next boot are unknown: {unknown}")


@system.command("set")
@click.argument("assignments", metavar="NAME=VALUE...", nargs=-1)
@click.option("--persist", "keep", is_flag=True, help="Keep the values across reboots: /etc/sysctl.d/60-kaio.conf.")
@dry_run_option
@json_option
def set_(assignments: tuple[str, ...], keep: bool, dry_run: bool, as_json: bool) -> None:
    """Set values, all or none: idle, interval (seconds), count, retries2, syn_retries, or their sysctl names.

    Existing connections use a new interval and count from their next probe on, unless they have times of their own.
    """
    if not assignments:
        fail(f"nothing to set; such as `{_EXAMPLE}`", MISTAKE)
    try:
        wanted = parse(assignments)
    except PolicyError as exc:
        fail(f"{exc}; such as `{_EXAMPLE}`", MISTAKE)
    flags = ["--persist"] if keep else []
    _apply(wanted, ["set", *assignments, *flags], keep=keep, dry_run=dry_run, as_json=as_json)


@system.command()
@dry_run_option
@json_option
def load(dry_run: bool, as_json: bool) -> None:
    """Set the persisted values, all or none. Lines for other settings are ignored."""
    try:
        kept = persisted()
    except PolicyError as exc:
        fail(str(exc), MISTAKE)
    except SysctlError as exc:
        remedy = f"; `{_EXAMPLE} --persist` persists values" if exc.errno == errno.ENOENT else ""
        fail(f"{_problem(exc)}{remedy}")
    if not kept.values:
        fail(f"/{FILE}: has none of kaio's settings; `{_EXAMPLE} --persist` persists values")
    _apply(kept.values, ["load"], keep=False, dry_run=dry_run, as_json=as_json)
    if kept.others and not as_json:
        click.echo(f"Not set, because they are not kaio's settings: {', '.join(kept.others)}")


def _apply(wanted: Mapping[str, int], words: list[str], *, keep: bool, dry_run: bool, as_json: bool) -> None:
    """Set values, or show what would change, and print the result."""
    try:
        before = read()
        after = before if dry_run else change(wanted, root="/" if keep else None)
    except SysctlError as exc:
        _fail_refused(exc, words, wanted)
    try:
        deciding, unknown = overriding(wanted) if keep else {}, ""
    except SysctlError as exc:
        deciding, unknown = {}, _problem(exc)
    changes = {field: {"before": getattr(before, field), "after": value} for field, value in wanted.items()}
    if as_json:
        lines = {field: assignment._asdict() for field, assignment in deciding.items()}
        file = f"/{FILE}" if keep else None
        said = {"dry_run": dry_run, "changes": changes, "file": file, "overridden_by": lines}
        print_json({**said, "problem": unknown or None})
        return
    rows = [(SETTINGS[field].sysctl, str(each["before"]), str(each["after"])) for field, each in changes.items()]
    columns = ("sysctl", "now", "would be") if dry_run else ("sysctl", "before", "now")
    print_table(columns, rows, right=columns[1:])
    if not dry_run:
        click.echo(f"\n{_meaning(after)}")
    if keep:
        click.echo(f"{'Would be kept' if dry_run else 'Kept'} across reboots in /{FILE}.")
    for assignment in deciding.values():
        click.echo(f"But that file is overridden. {_describe(assignment)}")
    if unknown:
        click.echo(f"Whether another file overrides it is unknown: {unknown}")


# -- in words


def _show(defaults: Defaults) -> None:
    settings = SETTINGS.values()
    rows = [
        (setting.field, str(getattr(defaults, setting.field)), setting.sysctl, f"{PROC}/{setting.path}")
        for setting in settings
    ]
    print_table(("setting", "now", "sysctl", "procfs"), rows, right=("now",), droppable=("procfs",))
    click.echo(f"\n{_meaning(defaults)}")


def _meaning(defaults: Defaults) -> str:
    again = len(defaults.syn_waits) - 1
    doubling = min(defaults.syn_retries, again)
    how = f"{again} time{'s' * (again != 1)}"
    if again > doubling:
        how = (
            f"{again - doubling} times each second (tcp_syn_linear_timeouts), then {doubling} ever later (syn_retries)"
        )
    return (
        f"A dead idle peer is detected after {duration(defaults.detection_time)}: {defaults.idle} s idle, then"
        f" {defaults.count} probes, {defaults.interval} s apart; on sockets that turn keepalive on.\n"
        f"Sent data may stay unacknowledged for about {duration(defaults.unacknowledged_time)}: {defaults.retries2}"
        f" retransmissions, after 0.2 s or more, then twice as long each time, {defaults.rto_max:g} s at most.\n"
        f"A connection attempt fails after {duration(defaults.connecting_time)}: the first segment is resent {how}."
    )


def _describe(assignment: Assignment) -> str:
    sysctl = assignment.key.replace("/", ".")
    what = f"excludes {sysctl}" if assignment.value is None else f"sets {sysctl} = {assignment.value}"
    return f"At boot, {assignment.path} line {assignment.line} {what}."


# -- errors


def _problem(exc: SysctlError) -> str:
    return f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc.strerror)


def _fail_refused(exc: SysctlError, words: list[str], wanted: Mapping[str, int]) -> NoReturn:
    """Exit with the reason why the kernel refused, and what would work."""
    in_kernel = str(exc.filename).startswith(PROC)
    remedy = ""
    if exc.errno in (errno.EACCES, errno.EPERM):
        if os.geteuid() != 0:
            remedy = f"; run: sudo {_program()} system {shlex.join(words)}"
        elif in_kernel:
            remedy = "; this needs CAP_NET_ADMIN in this network namespace"
    elif exc.errno == errno.EROFS and in_kernel:
        options = " ".join(f"--sysctl {SETTINGS[field].sysctl}={value}" for field, value in wanted.items())
        remedy = f"; in a container, pass the values when it is started: docker run {options} ..."
    fail(f"{_problem(exc)}{remedy}", CANNOT)


def _program() -> str:
    """The command by which sudo finds this program."""
    if shutil.which("kaio", path=_SUDO_PATH):
        return "kaio"
    script = os.path.join(os.path.dirname(sys.executable), "kaio")
    return shlex.quote(script) if os.path.exists(script) else f"{shlex.quote(sys.executable)} -m kaio"


# -- JSON


def _document(defaults: Defaults, deciding: Mapping[str, Assignment]) -> dict[str, object]:
    """The JSON document. Times are in seconds."""
    return {
        "settings": {
            field: {
                "value": getattr(defaults, field),
                "sysctl": setting.sysctl,
                "procfs": f"{PROC}/{setting.path}",
                "unit": setting.unit,
                "at_boot": deciding[field]._asdict() if field in deciding else None,
            }
            for field, setting in SETTINGS.items()
        },
        "detection_time": defaults.detection_time,
        "unacknowledged_time": round(defaults.unacknowledged_time, 3),
        "connecting_time": defaults.connecting_time,
    }
