"""`kaio audit`: find TCP sockets without keepalive, in running processes or in Python source."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence

import click

from ..errors import KaioError, format_address
from ..kernel.tcpinfo import TcpState
from ..tools.audit import audit as audit_source
from ..tools.plans import duration
from ..tools.processes import ProcessSocket, sockets, survey, uncovered
from ..tools.procfs import process_name
from ._output import MISTAKE, NO, YES, fail, json_option, print_json, print_table, printable
from ._processes import describe_peer

__all__ = ["audit"]

DROPPABLE = ("options", "shut", "in flight", "idle", "fd")
COLUMNS = ("", "process", "fd", "local", "peer", "options", "idle", "in flight", "shut", "worst case")


@click.command()
@click.argument("subjects", nargs=-1, metavar="[PID | PATH]...")
@click.option("--all", "everything", is_flag=True, help="Every process that this user may inspect.")
@json_option
def audit(subjects: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Find TCP sockets without keepalive, in running processes or in Python source.

    For a process (a number), list each socket with its options and the time until a dead peer is detected: while the
    connection is idle, while sent data is unacknowledged, while the peer's window is shut. A socket is uncovered, and
    marked with "!", if an idle peer's death takes more than an hour to detect. Bounds that kaio's monitor enforces
    within the process are as the process reports them. For a file or directory, list each place that makes a socket, a
    client or a server, and whether keepalive is set there.

    Exits with 0 if everything is covered, 1 if something is not.
    """
    pids = [int(subject) for subject in subjects if subject.isascii() and subject.isdigit()]
    paths = [subject for subject in subjects if not (subject.isascii() and subject.isdigit())]
    if everything + bool(pids) + bool(paths) != 1:
        fail("give process numbers, or paths, or --all", MISTAKE)
    if paths:
        sys.exit(_audit_paths(paths, as_json))
    try:
        found, refused = survey() if everything else (_sockets_of(pids), [])
    except KaioError as exc:
        fail(str(exc))
    sys.exit(_show(found, [str(error) for error in refused], as_json))


# -- running processes


def _sockets_of(pids: Sequence[int]) -> list[ProcessSocket]:
    return [found for pid in dict.fromkeys(pids) for found in sockets(pid)]


def _show(found: Sequence[ProcessSocket], refused: Sequence[str], as_json: bool) -> int:
    bad = {(one.pid, one.inode) for pid in {one.pid for one in found} for one in uncovered(_of(found, pid))}
    marks = [(one.pid, one.inode) in bad for one in found]
    if as_json:
        documents = [_document(one, mark) for one, mark in zip(found, marks, strict=True)]
        print_json({"sockets": documents, "uncovered": sum(marks), "refused": list(refused)})
        return NO if any(marks) else YES
    if found:
        programs = {pid: process_name(pid) for pid in {one.pid for one in found}}
        rows = [_row(one, programs[one.pid], mark) for one, mark in zip(found, marks, strict=True)]
        styles = ["red" if mark else "" for mark in marks]
        print_table(COLUMNS, rows, right=("fd", "idle", "in flight", "shut"), styles=styles, droppable=DROPPABLE)
    click.echo(f"TCP sockets: {len(found)}, uncovered: {sum(marks)}")
    if refused:
        click.echo(f"kaio: processes that could not be inspected: {len(refused)}; the first: {refused[0]}", err=True)
    return NO if any(marks) else YES


def _of(found: Sequence[ProcessSocket], pid: int) -> list[ProcessSocket]:
    return [one for one in found if one.pid == pid]


def _row(found: ProcessSocket, program: str, mark: bool) -> tuple[str, ...]:
    detections = (found.idle_detection, found.in_flight_detection, found.window_shut_detection)
    return (
        "!" if mark else "",
        f"{found.pid} {printable(program)}".rstrip(),
        str(found.fd),
        format_address(found.local),
        describe_peer(found),
        str(found.state),
        *map(_rounded, detections),
        worst_case(found, mark),
    )


def worst_case(found: ProcessSocket, mark: bool) -> str:
    """A socket's longest time until a death is detected, in words."""
    if not found.covered and not mark:
        return "no peer yet" if found.tcp_state == TcpState.CLOSE else "accepted connections are covered"
    if math.isinf(found.idle_detection):
        return "never detected while idle"
    if not found.covered and not found.one_lost_probe_kills:
        return f"detected only after {_rounded(found.idle_detection)} while idle"
    if found.one_lost_probe_kills:
        return "one lost probe ends the connection: the user timeout is too short"
    in_flight = found.in_flight_detection
    if found.monitor_bound == in_flight:
        return f"at most {_rounded(max(found.idle_detection, in_flight))}, data in flight bounded by kaio's monitor"
    if found.state.user_timeout is None:
        return f"about {_rounded(in_flight)} for data in flight"
    return f"at most {_rounded(max(found.idle_detection, in_flight))}"


def _rounded(seconds: float) -> str:
    """A duration, rounded to minutes from ten minutes up."""
    return duration(seconds if seconds < 600 or math.isinf(seconds) else round(seconds / 60) * 60)


def _document(found: ProcessSocket, mark: bool) -> dict[str, object]:
    idle = found.idle_detection
    return {
        "pid": found.pid,
        "program": process_name(found.pid),
        "fd": found.fd,
        "family": found.family.name,
        "mptcp": found.mptcp,
        "local": format_address(found.local),
        "peer": None if found.peer is None else format_address(found.peer),
        "listening": found.listening,
        "state": TcpState(found.tcp_state).name if found.tcp_state in set(TcpState) else found.tcp_state,
        "options": dataclasses.asdict(found.state),
        "chosen": found.chosen,
        "monitor": {"bound": found.monitor_bound} if found.watched else None,
        "uncovered": mark,
        "found_after": {
            "idle": None if math.isinf(idle) else idle,
            "in_flight": found.in_flight_detection,
            "window_shut": found.window_shut_detection,
        },
        "worst_case": worst_case(found, mark),
    }


# -- source


def _audit_paths(paths: Sequence[str], as_json: bool) -> int:
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        fail(f"{missing[0]}: neither a process number nor an existing path", MISTAKE)
    findings = audit_source(paths)
    bare = sum(not finding.covered for finding in findings)
    if as_json:
        print_json({"findings": [dataclasses.asdict(finding) for finding in findings], "uncovered": bare})
        return NO if bare else YES
    for finding in findings:
        mark = " " if finding.covered else "!"
        call = f"{finding.call}: " if finding.call else ""
        click.echo(f"{mark} {finding.path}:{finding.line}: {call}{finding.why}")
    click.echo(f"places: {len(findings)}, uncovered: {bare}")
    return NO if bare else YES
