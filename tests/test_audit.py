"""`kaio audit` of running processes and of Python source."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kaio
from kaio.cli import cli
from kaio.tools.processes import lacking, sockets

from .programs import Puppet, puppet, run_alone

PROGRAMS = Path(__file__).parent / "programs"

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))


@pytest.fixture
def other() -> Iterator[Puppet]:
    """Another process, which executes what it is told."""
    with puppet() as process:
        yield process


def audit(*arguments: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli, ["audit", *arguments], prog_name="kaio")


# -- running processes


@pytest.mark.parametrize("command", ["audit", "top"])
def test_a_name_that_a_process_gave_itself_is_shown_and_not_obeyed(other: Puppet, command: str) -> None:
    """Control characters and line feeds are escaped, in JSON by its own rules."""
    name = "a\x1b[31m\u009bb\nc"
    other(f"open('/proc/self/comm', 'wb').write({name.encode()!r})")
    other("listener = socket.create_server(('127.0.0.1', 0))")
    other("client = socket.create_connection(listener.getsockname()); accepted = listener.accept()[0]")
    shown = CliRunner().invoke(cli, [command, str(other.pid), *(["--once"] if command == "top" else [])], color=True)
    assert r"a\x1b[31m\x9bb\nc" in shown.output
    assert "\x1b" not in shown.output
    document = CliRunner().invoke(cli, [command, str(other.pid), "--json"], color=True).output
    assert "\x1b" not in document
    assert r"a\u001b[31m" in document


# Keepalive, idle, interval, count, user timeout in ms (None: not set); whether it is uncovered; the worst case.
MIXTURES = [
    ((0, None, None, None, None), True, "never detected while idle"),
    ((0, 5, 5, 5, None), True, "never detected while idle"),
    ((0, None, None, None, 9000), True, "never detected while idle"),
    ((1, None, None, None, None), True, "detected only after 2 h 11 min while idle"),
    ((1, 300, 100, 3, None), False, "about 15 min for data in flight"),
    ((1, 30, 5, 3, 45000), False, "at most 45 s"),
    ((1, 20, 10, 4, 60000), False, "at most 1 min"),
    ((1, 300, 100, 3, 3000), True, "one lost probe ends the connection: the user timeout is too short"),
    ((1, 10, 10, 1, 20000), False, "at most 20 s"),
    ((1, 32767, 75, 9, None), True, "detected only after 9 h 17 min while idle"),
]

MAKE = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
v4 = socket.create_server(("127.0.0.1", 0), backlog=1000)
v6 = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=1000)
held, it = [v4, v6], []
def give(s, number):
    keepalive, idle, interval, count, user_timeout = MIXTURES[number % len(MIXTURES)]
    s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, keepalive)
    for option, value in ((4, idle), (5, interval), (6, count), (18, user_timeout)):
        if value is not None: s.setsockopt(TCP, option, value)
    held.append(s)
    it.append([s.fileno(), number % len(MIXTURES), s.getsockname()[1], s.getpeername()[1]])
for number in range(500):
    listener = (v4, v6)[number % 2]
    client = socket.create_connection(listener.getsockname()[:2])
    give(client, number)
    give(listener.accept()[0], number * 7)
"""


def test_each_of_a_thousand_sockets_is_judged_by_its_options(other: Puppet) -> None:
    """The library and the command agree with what was set, for every mixture of options."""
    made = other(f"MIXTURES = {[mixture for mixture, _, _ in MIXTURES]!r}\n{MAKE}")
    found = {one.fd: one for one in sockets(other.pid)}
    result = audit(str(other.pid), "--json")
    document = json.loads(result.stdout)
    rows = {row["fd"]: row for row in document["sockets"]}
    assert len(made) == 1000
    assert len(found) == len(rows) == 1002  # two listeners
    for fd, number, local, peer in made:
        (keepalive, idle, interval, count, user_timeout), uncovered, words = MIXTURES[number]
        one, row = found[fd], rows[fd]
        expected = {
            "enabled": bool(keepalive),
            "idle": idle or 7200,
            "interval": interval or 75,
            "count": count or 9,
            "user_timeout": user_timeout / 1000 if user_timeout else None,
        }
        assert row["options"] == expected
        assert one.state.enabled == bool(keepalive)
        assert one.peer is not None
        assert (one.local[1], one.peer[1]) == (local, peer)
        assert row["local"].endswith(f":{local}")
        assert row["peer"].endswith(f":{peer}")
        assert (one.covered, row["uncovered"], row["worst_case"]) == (not uncovered, uncovered, words)
        assert one.chosen == row["chosen"] == (bool(keepalive) and idle is not None)
        assert row["state"] == "established"
        assert row["found_after"]["in_flight"] == (user_timeout / 1000 if user_timeout else 924.6)
    listeners = [row for row in rows.values() if row["listening"]]
    assert [row["uncovered"] for row in listeners] == [
        True,
        True,
    ]  # some of the connections they accepted are not covered
    expected_uncovered = sum(MIXTURES[number][1] for _, number, _, _ in made) + 2
    assert document["uncovered"] == expected_uncovered
    assert result.exit_code == 1
    lines = audit(str(other.pid)).output.splitlines()
    assert len(lines) == 1004
    assert sum(line.startswith("!") for line in lines) == expected_uncovered
    assert lines[-1] == f"processes: 1, TCP sockets: 1002, uncovered: {expected_uncovered}"


def test_the_table_and_the_exit_code(other: Puppet) -> None:
    """The exit code is 1 if a socket is uncovered, else 0; each socket is a line."""
    result = audit(str(other.pid))
    assert (result.exit_code, result.output) == (0, "processes: 1, TCP sockets: 0, uncovered: 0\n")
    address = other("""
listener = socket.create_server(("127.0.0.1", 0)); fresh = socket.socket()
it = "%s:%s" % listener.getsockname()
""")
    result = audit(str(other.pid))
    assert result.exit_code == 1
    heading, first, second, summary = result.output.splitlines()
    assert heading.split() == (
        ["process", "fd", "local", "peer", "options", "idle", "in", "flight", "shut", "worst", "case"]
    )
    assert first.startswith(f"!  {other.pid} ")
    assert f"{address}  (listening)" in first
    assert first.endswith("never     15 min  15 min  never detected while idle")
    assert second.startswith("   ")
    assert "(not connected)" in second
    assert second.endswith("no peer yet")
    assert summary == "processes: 1, TCP sockets: 2, uncovered: 1"
    other("""
client = socket.create_connection(listener.getsockname()); accepted = listener.accept()[0]
for each in (client, accepted):
    each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1); each.setsockopt(TCP, socket.TCP_KEEPIDLE, 60)
""")
    result = audit(str(other.pid))
    assert result.exit_code == 0
    assert "accepted connections are covered" in result.output
    both = audit(str(other.pid), str(os.getpid()), str(other.pid), "--json")
    assert len([row for row in json.loads(both.stdout)["sockets"] if row["pid"] == other.pid]) == 4


ALL = """
import os, pwd, sys
import kaio.cli.audit
from kaio.cli import cli
from tests.programs import puppet

with puppet() as one, puppet() as two:
    one("s = socket.create_server(('127.0.0.1', 0))")
    two("s = socket.socket()")
    if {uid}:
        os.setgroups([]); os.setgid({uid}); os.setuid({uid})
    try:
        cli(["audit", "--all", *{arguments}], prog_name="kaio")
    finally:
        sys.stdout.flush()
        if {uid}:
            os._exit(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="making a namespace of processes needs root")
def test_all_processes_at_once() -> None:
    """One table; processes that could not be inspected are counted on standard error."""
    done = run_alone(ALL.format(uid=0, arguments=["--json"]))
    document = json.loads(done.stdout)
    rows = [(row["listening"], row["uncovered"]) for row in document["sockets"]]
    assert (rows, document["refused"]) == ([(True, True), (False, False)], [])
    assert done.returncode == 1
    done = run_alone(ALL.format(uid=65533, arguments=[]))
    assert done.stdout == "processes: 1, TCP sockets: 0, uncovered: 0\n"
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("kaio: processes that could not be inspected: 2; the first: process ")
    assert "it belongs to another user (root): run as" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["999999999"], 3, "process 999999999: there is no such process"),
        (["no/such/path"], 2, "no/such/path: neither a process nor an existing path"),
        ([], 2, "give processes, or paths, or --all"),
        (["--all", "1"], 2, "give processes, or paths, or --all"),
        (["1", "."], 2, "give processes, or paths, or --all"),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, complaint: str) -> None:
    """The line goes to standard error, and standard output is empty."""
    result = audit(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"kaio: {complaint}\n")


# -- bounds that a process enforces itself

POLICIES = (
    "20s:10s:4",
    "20s:10s:4,user_timeout=2m",
    "20s:10s:4,user_timeout=1h",
    "20s:10s:4,user_timeout=none",
    "20s:10s:4,stalled=drop",
    "20s:10s:4,user_timeout=2m,stalled=drop",
    "20s:10s:4,user_timeout=1h,stalled=drop",
)
STATES = {
    "idle": "idle",
    "in_flight": "sent data unacknowledged",
    "window_shut": "window shut",
}  # names in audit and in plan


def planned(policy: str) -> dict[str, float]:
    """The detection times that `kaio plan` gives for the states of an audit."""
    states = json.loads(CliRunner().invoke(cli, ["plan", policy, "--json"]).stdout)["states"]
    return {name: states[state]["kaio"] for name, state in STATES.items()}


@contextlib.contextmanager
def audited(*arguments: str) -> Iterator[tuple[int, list[int]]]:
    """Run tests/programs/audited.py; yield its pid and the ports it listens on."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, [int(port) for port in process.stdout.readline().split()]
        finally:
            process.kill()


def accepted(pid: int) -> dict[int, dict[str, Any]]:
    """The audit's rows for the connections that a process has accepted, by listening port."""
    rows = json.loads(audit(str(pid), "--json").stdout)["sockets"]
    return {int(row["local"].rpartition(":")[2]): row for row in rows if row["peer"] is not None}


def audit_until(pid: int, wanted: dict[int, dict[str, float]], monitored: bool) -> dict[int, dict[str, Any]]:
    """Audit until times and monitors are as wanted; fail after 15 s, longer than a monitor takes to start."""
    until = time.monotonic() + 15
    while True:
        found = accepted(pid)
        times = {port: row["found_after"] for port, row in found.items()}
        if times == wanted and all(bool(row["monitor"]) == monitored for row in found.values()):
            return found
        assert time.monotonic() < until, (wanted, found)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["asyncio", "uvloop"])
def test_audit_and_plan_agree_on_watched_connections(base: str) -> None:
    """For connections of kaio's server, and of another server on kaio's loop, once a monitor watches them."""
    with contextlib.ExitStack() as stack:
        programs = [
            stack.enter_context(audited(str(PROGRAMS / "audited.py"), kind, base, *POLICIES))
            for kind in ("serve", "loop")
        ]
        for _, ports in programs:
            for port in ports:
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        for pid, ports in programs:
            wanted = {port: planned(policy) for port, policy in zip(ports, POLICIES, strict=True)}
            rows = audit_until(pid, wanted, monitored=True)
            assert [rows[port]["worst_case"] for port in ports] == [
                "at most 1 min, data in flight bounded by kaio's monitor",
                "at most 2 min, data in flight bounded by kaio's monitor",
                "about 15 min for data in flight",
                "about 15 min for data in flight",
                "at most 1 min",
                "at most 2 min",
                "at most 1 h",
            ]
            bounds = [rows[port]["monitor"]["bound"] for port in ports]
            assert bounds == [60, 120, 3600, None, None, None, None]
            assert "at most 1 min, data in flight bounded by kaio's monitor" in audit(str(pid)).output


@pytest.mark.slow
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if "1h" not in policy])
def test_audit_and_plan_agree_on_sockets_found_by_a_sweep(policy: str) -> None:
    """Sockets that no loop uses are bounded by the kernel alone, without a monitor.

    With a user timeout the kernel does not count probes; the plan gives the resulting time for an idle peer.
    """
    run = ("-m", "kaio", "run", "--sweep", "100ms", "--keepalive", policy, str(PROGRAMS / "audited.py"), "block", "")
    with audited(*run) as (pid, (port,)), socket.create_connection(("127.0.0.1", port)):
        wanted = planned(policy)
        if policy == "20s:10s:4,user_timeout=2m":
            plan = CliRunner().invoke(cli, ["plan", policy]).output
            assert "replaces the count: dead idle peers are detected after 2 min." in plan
            wanted["idle"] = 120
        audit_until(pid, {port: wanted}, monitored=False)


def test_the_readme_and_the_plan_agree() -> None:
    """For the policies in the README's table."""
    text = (Path(kaio.__file__).parent.parent / "README.md").read_text("utf-8")
    (idle,) = re.findall(r"^\| `20s:10s:4` \|.*unanswered probes: within (\d+) s \|$", text, re.MULTILINE)
    (dropped,) = re.findall(r"^\| `(\S+stalled=drop)` \|.*unacknowledged for (\d+) minutes \|$", text, re.MULTILINE)
    assert planned("20s:10s:4") == dict.fromkeys(STATES, int(idle))
    assert planned(dropped[0])["in_flight"] == 60 * int(dropped[1])


# -- source


def test_a_path_is_audited_as_source(tmp_path: Path) -> None:
    """Each place that makes a socket is a line; the exit code is 1 if one is uncovered."""
    bare, covered = tmp_path / "bare.py", tmp_path / "covered.py"
    bare.write_text("import socket\ns = socket.create_connection(('db', 1))\n")
    covered.write_text("import kaio\nasync def main():\n    await kaio.connect('db', 1)\n")
    result = audit(str(tmp_path))
    assert result.exit_code == 1
    assert f"! {bare}:2: socket.create_connection: " in result.output
    assert f"  {covered}:3: kaio.connect: " in result.output
    assert result.output.endswith("places: 2, uncovered: 1\n")
    document = json.loads(audit(str(bare), str(covered), "--json").stdout)
    assert [(row["path"], row["line"], row["covered"]) for row in document["findings"]] == [
        (str(bare), 2, False),
        (str(covered), 3, True),
    ]
    assert document["uncovered"] == 1
    result = audit(str(covered))
    assert result.exit_code == 0
    assert result.output.endswith("places: 1, uncovered: 0\n")


def test_the_findings_of_one_path_are_shown_when_another_is_gone(tmp_path: Path) -> None:
    """Also when that is a bare word, which alone would be the name of a process."""
    good = tmp_path / "good.py"
    good.write_text("import socket\nsocket.socket()\n")
    for gone in ("gone", f"{tmp_path}/gone", "gone.py"):
        result = audit(str(good), gone)
        assert result.exit_code == 2
        assert "good.py:2: socket.socket" in result.stdout
        assert result.stderr == f"kaio: {gone}: neither a process nor an existing path\n"
