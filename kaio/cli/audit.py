"""`kaio audit`: find TCP sockets without keepalive, in running processes or in Python source."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import math
import sys
from collections.abc import Iterable
from typing import NamedTuple

import click

from ..errors import KaioError
from ..kernel.tcpinfo import TcpState
from ..tools.plans import duration
from ..tools.processes import ProcessSocket, Survey, descendants, note, program_name, sets_own_times, survey, uncovered
from ..tools.procfs import process_name
from ._exit import CANNOT, MISTAKE, NO, YES, complain, fail, printable
from ._output import json_option, print_json, print_table
from ._processes import describe, describe_peer, find_all, is_path, socket_document, tell_of_children
from ._source_audit import audit_paths

__all__ = ["audit"]

DROPPABLE = ("options", "shut", "in flight", "idle", "fd")
COLUMNS = ("", "process", "fd", "local", "peer", "options", "idle", "in flight", "shut", "worst case")
RIGHT = ("fd", "idle", "in flight", "shut")


@click.command()
@click.argument("subjects", nargs=-1, metavar="[PID | NAME | UNIT | PATH]...")
@click.option("--all", "everything", is_flag=True, help="Every process that this user may inspect.")
@click.option("--children", is_flag=True, help="Include child processes, such as the workers of a server.")
@json_option
def audit(subjects: tuple[str, ...], everything: bool, children: bool, as_json: bool) -> None:
    """Find TCP sockets without keepalive, in running processes or in Python source.

    For processes, given by number, by name as for `pgrep -x`, or by systemd unit, list each socket with its options and
    the time until a dead peer is detected: while the connection is idle, while sent data is unacknowledged, while the
    peer's window is shut. A socket is uncovered, and marked with "!", if an idle peer's death takes more than an hour
    to detect. Bounds that kaio's monitor enforces within the process are as the process reports them. For a file or
    directory, list each place that makes a socket, a client or a server, and whether keepalive is set there. What
    exists as a file is one; ./NAME is always a path.

    Exits with 0 if everything is covered, 1 if something is not, 3 if nothing could be read.
    """
    paths = [subject for subject in subjects if is_path(subject)]
    words = [subject for subject in subjects if not is_path(subject)]
    if paths and not any(word.isdecimal() for word in words):
        paths, words = list(subjects), []  # beside paths, a word is a path that is not there
    if everything + bool(words) + bool(paths) != 1:
        fail("give processes, or paths, or --all", MISTAKE)
    if paths:
        if children:
            fail("--children goes with processes", MISTAKE)
        sys.exit(audit_paths(paths, as_json))
    try:
        named = None if everything else find_all(words)
        more = [] if named is None else descendants(named)
        result = survey(named if named is None or not children else [*named, *more])
        # Children come and go, and some have exited without being waited for.
        below = frozenset(more)
        seen = [error for error in result.refused if error.pid not in below or error.errno != errno.ESRCH]
        result = result._replace(refused=seen)
    except (KaioError, OSError) as exc:
        fail(str(exc))
    code = _show(result, as_json)
    if more and not children and result.processes:
        tell_of_children(named or [], more)
    sys.exit(code)


# -- running processes


class _Judged(NamedTuple):
    """A socket, and what is said of it."""

    socket: ProcessSocket
    name: str
    """The process's."""
    uncovered: bool
    worst_case: str


def _show(result: Survey, as_json: bool) -> int:
    judged, notes = _judge(result.sockets)
    number = sum(one.uncovered for one in judged)
    refused = [str(error) for error in result.refused]
    if as_json:
        print_json(
            {
                "sockets": [_document(one) for one in judged],
                "processes": result.processes,
                "uncovered": number,
                "refused": refused,
                "unreadable": result.unreadable,
                "notes": notes,
            }
        )
    elif result.processes:
        if judged:
            styles = ["red" if one.uncovered else "" for one in judged]
            print_table(COLUMNS, map(_row, judged), right=RIGHT, styles=styles, droppable=DROPPABLE)
        for name, text in notes.items():
            click.echo(f"{printable(name)} {text}.")
        click.echo(f"processes: {result.processes}, TCP sockets: {len(judged)}, uncovered: {number}")
    for what, lines in (("processes", refused), ("sockets", result.unreadable)):
        if len(lines) == 1:
            complain(lines[0])
        elif lines:
            complain(f"{what} that could not be inspected: {len(lines)}; the first: {lines[0]}")
    if not result.processes or (result.unreadable and not judged):
        return CANNOT
    return NO if number else YES


def _judge(found: Iterable[ProcessSocket]) -> tuple[list[_Judged], dict[str, str]]:
    """Judge the sockets of each process together, and find what is known of their programs."""
    judged: list[_Judged] = []
    programs = set()
    for pid, group in itertools.groupby(found, lambda one: one.pid):
        ours = list(group)
        name, program = process_name(pid), program_name(pid)
        own = sets_own_times(program)
        bad = {one.inode for one in uncovered(ours, sets_own_times=own)}
        judged += (_Judged(one, name, one.inode in bad, worst_case(one, one.inode in bad, own)) for one in ours)
        programs.add(program)
    return judged, {program: text for program in sorted(programs) if (text := note(program)) is not None}


def _row(judged: _Judged) -> tuple[str, ...]:
    found = judged.socket
    detections = (found.idle_detection, found.in_flight_detection, found.window_shut_detection)
    return (
        "!" if judged.uncovered else "",
        f"{found.pid} {printable(judged.name)}".rstrip(),
        str(found.fd),
        describe(found.local),
        describe_peer(found),
        str(found.state),
        *map(_rounded, detections),
        judged.worst_case,
    )


def worst_case(found: ProcessSocket, mark: bool, own_times: bool) -> str:
    """A socket's longest time until a death is detected, in words."""
    if not found.covered and not mark and found.listening and own_times:
        return "accepted connections get the program's own times"
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


def _document(judged: _Judged) -> dict[str, object]:
    found = judged.socket
    idle = found.idle_detection
    return {
        **socket_document(found, judged.name),
        "options": dataclasses.asdict(found.state),
        "chosen": found.chosen,
        "monitor": {"bound": found.monitor_bound} if found.watched else None,
        "uncovered": judged.uncovered,
        "found_after": {
            "idle": None if math.isinf(idle) else idle,
            "in_flight": found.in_flight_detection,
            "window_shut": found.window_shut_detection,
        },
        "worst_case": judged.worst_case,
    }
