"""`kaio enforce`: let the kernel give a policy to all TCP sockets of a unit, a cgroup or the machine."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import click

from ..errors import KaioError, PolicyError
from ..policy import Keepalive
from ..tools import cgroups
from ..tools.enforcing import (
    Counters,
    EnforceError,
    Enforcement,
    Kind,
    Ports,
    Target,
    boot_files,
    enforced_on,
    enforcements,
    kept_at_boot,
    lift,
    missing_unit,
    parse_ports,
    plan,
    reload_systemd,
    remove_files,
    runtime_files,
    write_files,
)
from ..tools.enforcing import enforce as enforce_on
from ..tools.plans import duration
from ..tools.processes import Attachment, Change, Outcome, ProcessError, ProcessSocket
from ._exit import CANNOT, MISTAKE, NO, YES, complain, fail, printable
from ._output import json_option, print_json, print_table
from ._processes import describe_peer, parse_interval

__all__ = ["enforce"]

_EXAMPLE: Final = "kaio enforce --unit nginx.service 20s:10s:4"
COLUMNS: Final = ("target", "policy", "except", "state", *Counters._fields)


@click.command()
@click.option("--unit", metavar="NAME", help="A systemd unit: a service, scope, slice or socket.")
@click.option("--cgroup", metavar="PATH", help="A cgroup of version 2, such as /sys/fs/cgroup/system.slice.")
@click.option("--machine", is_flag=True, help="Everything that runs on this machine.")
@click.option("--except", "excepted", metavar="PORTS", help="Services to leave alone, by port: 22,8000-8010.")
@click.option("--boot", is_flag=True, help="Do it again at each boot: files for systemd are written.")
@click.option("--new-only", is_flag=True, help="Leave sockets alone that exist already.")
@click.option(
    "--watch",
    metavar="TIME",
    callback=parse_interval,
    help="Keep running, and spare live peers that accept no data: look at this interval.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done and the kernel program, and do nothing.")
@json_option
@click.argument("what", metavar="[POLICY | status | off]", default="")
def enforce(
    unit: str | None,
    cgroup: str | None,
    machine: bool,
    excepted: str | None,
    boot: bool,
    new_only: bool,
    watch: float | None,
    dry_run: bool,
    as_json: bool,
    what: str,
) -> None:
    """Let the kernel give a POLICY to all TCP sockets of a unit, a cgroup or the machine, as they come into being.

    Connections made get it before their first segment is sent, connections accepted before the program sees them; in
    whatever language, without a running process, a restart or a gap. Times that a program sets itself stand. Sockets
    that exist already are set once, as by `kaio attach`. It lasts until `off` or the next boot; with --boot, longer.

    Without POLICY, the one of the environment is used; without a unit, cgroup or machine, the status is shown.

    Exits with 0 when it is done; 3 without the rights (root), and on kernels without what it needs.
    """
    what = what.strip() if what.strip().lower() not in ("off", "status") else what.strip().lower()
    target = _target(unit, cgroup, machine, what)
    if what == "status" or (target is None and not what):
        _status(target, as_json)
    if target is None:
        fail(f"{what}: on what? Give --unit, --cgroup or --machine; such as `{_EXAMPLE}`", MISTAKE)
    if what == "off":
        _off(target, dry_run, as_json)
    if boot and watch is not None:
        fail("--watch cannot be combined with --boot: let a service of its own run it", MISTAKE)
    wanted = _Wanted(target, *_policy(what, excepted), boot=boot)
    if dry_run:
        _explain(wanted, as_json)
    _enforce(wanted, new_only, watch, as_json)


# -- what is given


def _target(unit: str | None, cgroup: str | None, machine: bool, what: str) -> Target | None:
    if (unit is not None) + (cgroup is not None) + machine > 1:
        fail(f"give one of --unit, --cgroup and --machine; such as `{_EXAMPLE}`", MISTAKE)
    try:
        if unit is not None:
            return Target.unit(unit)
        if cgroup is not None:
            earlier = enforced_on(cgroup) if what in ("off", "status") else None  # it may be gone
            return earlier or Target.cgroup(cgroup)
    except EnforceError as exc:
        _fail(exc)
    except KaioError as exc:
        fail(str(exc), MISTAKE)
    return Target.machine() if machine else None


def _policy(text: str, excepted: str | None) -> tuple[Keepalive, list[Ports]]:
    try:
        policy = Keepalive.from_env() if not text else Keepalive.parse(text)
        ports = [] if excepted is None else parse_ports(excepted)
        plan(policy, ports)
        return policy, ports
    except PolicyError as exc:
        fail(f"{exc}; such as `{_EXAMPLE}`", MISTAKE)
    except EnforceError as exc:
        fail(str(exc))


class _Wanted:
    """What is to be enforced, and the files that keep it."""

    def __init__(self, target: Target, policy: Keepalive, ports: Sequence[Ports], *, boot: bool) -> None:
        if boot and target.kind is Kind.CGROUP:
            fail("--boot needs --unit or --machine: a cgroup that no unit makes does not exist at boot", MISTAKE)
        self.target = target
        self.policy = policy
        self.ports = ports
        self.boot = boot

    def excepts(self, found: ProcessSocket) -> bool:
        """Whether a socket that exists is left alone.

        A listening socket is: the kernel gives the policy to what it accepts, which otherwise would inherit it, and
        keep it when another one is enforced; only what `attach` has set on one is replaced. So is a socket one of
        whose ports is excepted; which end is the service cannot be seen.
        """
        ports = {found.local[1], *(() if found.peer is None else (found.peer[1],))}
        left = found.listening and not found.chosen
        return left or any(each.first <= port <= each.last for each in self.ports for port in ports)

    def files(self) -> dict[str, str]:
        """The files for systemd, by path relative to the root directory."""
        if not self.boot:
            return runtime_files(self.target)
        on = ["--machine"] if self.target.kind is Kind.MACHINE else ["--unit", self.target.name]
        ports = ["--except", ",".join(map(str, self.ports))] if self.ports else []
        return boot_files(self.target, [*on, *ports, "--new-only", str(self.policy)])


# -- doing it


def _enforce(wanted: _Wanted, new_only: bool, watch: float | None, as_json: bool) -> NoReturn:
    target = wanted.target
    try:
        problem = None if wanted.boot or target.directory() else missing_unit(target)
        if problem is not None:
            fail(f"{target}: {problem}")
        earlier = next((each.policy for each in enforcements() if each.target == target), None)
        done = enforce_on(target, wanted.policy, ports=wanted.ports)
    except PolicyError as exc:
        fail(str(exc), MISTAKE)
    except EnforceError as exc:
        _fail(exc)
    except cgroups.CgroupError as exc:
        fail(str(exc))
    files, unkept = wanted.files(), ""
    try:
        write_files(files)
    except EnforceError as exc:
        files, unkept = {}, f"{exc}: {wanted.policy} is enforced on {target} now, but will not be again"
    complaint = reload_systemd() if files else None
    outcomes, refused = ({}, []) if new_only else _set_existing(wanted, earlier)
    if as_json:
        document = {**_document(done), "files": [f"/{path}" for path in files]}
        print_json({**document, "existing": dict(outcomes), "refused": refused})
    else:
        _tell(wanted, done, files, outcomes)
    sys.stdout.flush()
    if refused:
        complain(f"processes whose sockets stay as they are: {len(refused)}; the first: {refused[0]}")
    if complaint:
        complain(f"systemd: {complaint}")
    if unkept:
        fail(unkept)
    if watch is not None:
        _keep_looking(wanted, done.pins, watch)
    sys.exit(YES)


def _set_existing(wanted: _Wanted, earlier: str | None) -> tuple[Mapping[str, int], list[str]]:
    """Set the policy on the sockets that exist already, also in place of the `earlier` one that the kernel gave them.

    Returns how many had which outcome, and what was refused.
    """
    given = True if earlier is None else Keepalive.parse(earlier)
    with Attachment((), wanted.policy, by_kernel=given, excepted=wanted.excepts) as attachment:
        try:
            changes = _look(attachment, wanted.target)
        except PolicyError as exc:  # the times that it leaves to the system are those of a socket's network namespace
            return {}, [f"sockets that existed: {exc}"]
        return (
            collections.Counter(change.outcome.value for change in changes),
            [str(error) for error in attachment.refused.values()],
        )


def _look(attachment: Attachment, target: Target) -> list[Change]:
    """Set the policy on the sockets that exist already, or look at them again."""
    with contextlib.suppress(cgroups.CgroupError):  # it is gone, or several run the unit by now
        directory = target.directory()
        for pid in cgroups.processes(directory) if directory is not None else ():
            if pid != os.getpid():
                with contextlib.suppress(ProcessError):  # it has exited
                    attachment.add(pid)
    return attachment.look()


def _keep_looking(wanted: _Wanted, pins: str, every: float) -> None:
    """Spare live peers that accept no data, until the policy is lifted or this command is ended."""
    with Attachment((), wanted.policy, by_kernel=True, excepted=wanted.excepts) as attachment:
        while os.path.isdir(pins):
            for change in _look(attachment, wanted.target):
                if change.outcome in (Outcome.LIFTED, Outcome.RESTORED):
                    peer = describe_peer(change.socket)
                    click.echo(f"{change.socket.pid}  {peer}  user timeout {change.outcome.value}: {change.why}")
                    sys.stdout.flush()
            time.sleep(attachment.pace(every))


def _tell(wanted: _Wanted, done: Enforcement, files: dict[str, str], outcomes: Mapping[str, int]) -> None:
    where = f" ({done.directory})" if done.directory is not None else ""
    click.echo(f"{wanted.policy} is enforced on {printable(str(done.target))}{printable(where)}.")
    if done.directory is None:
        click.echo("It does not run now; systemd attaches the programs when it starts.")
    if outcomes:
        click.echo(f"Sockets that existed: {', '.join(f'{count} {name}' for name, count in outcomes.items())}.")
    for path in files:
        click.echo(f"Written: /{path}")
    earlier = None if wanted.boot else kept_at_boot(done.target)
    if earlier is not None:
        click.echo(f"The next boot brings back the policy in {earlier}; --boot replaces it.")
    elif not wanted.boot or not files:
        click.echo("It lasts until the next boot; --boot makes it last.")
    bound = wanted.policy.effective_user_timeout
    if wanted.policy.stalled == "keep" and bound is not None:
        click.echo(
            "stalled=keep cannot be had in the kernel alone: a live peer that accepts no data for"
            f" {duration(bound)} is dropped, unless `kaio enforce ... --watch 1s` runs and spares it."
        )


def _off(target: Target, dry_run: bool, as_json: bool) -> NoReturn:
    if dry_run:
        fail("--dry-run goes with a policy, not with off", MISTAKE)
    try:
        lifted = lift(target)
    except EnforceError as exc:
        _fail(exc)
    try:
        removed = remove_files(target)
    except EnforceError as exc:
        fail(f"{exc}: nothing is enforced on {target} now, but will be again at the next boot")
    complaint = reload_systemd() if removed else None
    if as_json:
        print_json({"target": _target_document(target), "lifted": lifted, "removed": removed})
    elif lifted or removed:
        click.echo(f"Nothing is enforced on {printable(str(target))} any more; its sockets keep the options they have.")
        for path in removed:
            click.echo(f"Removed: {path}")
    else:
        click.echo(f"Nothing was enforced on {printable(str(target))}.")
    if complaint:
        complain(f"systemd: {complaint}")
    sys.exit(YES)


def _fail(exc: EnforceError) -> NoReturn:
    """Exit with the reason, after the verifier's log if it has refused the program."""
    if exc.log:
        click.echo(exc.log, err=True)
    fail(str(exc), CANNOT)


# -- showing it


def _explain(wanted: _Wanted, as_json: bool) -> NoReturn:
    """Show what would be done."""
    try:
        programs = {name: each.listing() for name, each in plan(wanted.policy, wanted.ports).items()}
        directory = wanted.target.directory()
    except KaioError as exc:
        fail(str(exc))
    files = wanted.files()
    if as_json:
        print_json(
            {
                "target": _target_document(wanted.target),
                "policy": str(wanted.policy),
                "except": [str(each) for each in wanted.ports],
                "directory": directory,
                "files": {f"/{path}": content for path, content in files.items()},
                "programs": programs,
            }
        )
        sys.exit(YES)
    where = "no cgroup: it does not run" if directory is None else printable(directory)
    click.echo(f"{wanted.policy} would be enforced on {printable(str(wanted.target))} ({where}).")
    for path, content in files.items():
        what = f"a link to {content[2:]}" if content.startswith("->") else "\n" + content
        click.echo(f"\nWould be written: /{path}: {what}".rstrip())
    for name, text in (("giver", "each new connection"), ("guard", "each setsockopt(2) on its sockets")):
        click.echo(f"\nThe kernel would run this program, kaio_{name}, for {text}:\n")
        for line in programs[name]:
            click.echo(line)
    sys.exit(YES)


def _status(target: Target | None, as_json: bool) -> NoReturn:
    try:
        found = [each for each in enforcements() if target is None or each.target == target]
    except EnforceError as exc:
        _fail(exc)
    if as_json:
        print_json({"enforced": [_document(each) for each in found]})
    elif found:
        print_table(COLUMNS, [_row(each) for each in found], right=COLUMNS[4:])
    else:
        click.echo("No policy is enforced" + (f" on {printable(str(target))}." if target else "."))
    sys.exit(YES if found else NO)


def _row(found: Enforcement) -> tuple[str, ...]:
    ports = ",".join(map(str, found.ports))
    state = "enforced" if found.attached else "not running" if found.directory is None else "not attached"
    return str(found.target), found.policy, ports, state, *map(str, found.counters)


def _target_document(target: Target) -> dict[str, str]:
    return {"kind": target.kind.value, "name": target.name}


def _document(found: Enforcement) -> dict[str, object]:
    return {
        "target": _target_document(found.target),
        "policy": found.policy,
        "except": [str(each) for each in found.ports],
        "since": found.since,
        "directory": found.directory,
        "attached": found.attached,
        "pins": found.pins,
        "counters": found.counters._asdict(),
    }
