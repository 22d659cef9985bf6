"""`kaio audit`: what is uncovered, in running processes and in source."""

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
    """Another process."""
    with puppet() as process:
        yield process


def audit(*arguments: str) -> Result:
    """Run the command, in this process."""
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


# Keepalive, idle, interval, count, user timeout in ms; None: not touched. Then: whether it is uncovered, and the words.
MIXTURES = [
    ((0, None, None, None, None), True, "never found out while idle"),
    ((0, 5, 5, 5, None), True, "never found out while idle"),
    ((0, None, None, None, 9000), True, "never found out while idle"),
    ((1, None, None, None, None), True, "only after 2 h 11 min while idle"),
    ((1, 300, 100, 3, None), False, "about 15 min for data in flight"),
    ((1, 30, 5, 3, 45000), False, "at most 45 s"),
    ((1, 20, 10, 4, 60000), False, "at most 1 min"),
    ((1, 300, 100, 3, 3000), True, "a single lost probe ends it: the user timeout is too short"),
    ((1, 10, 10, 1, 20000), False, "at most 20 s"),
    ((1, 32767, 75, 9, None), True, "only after 9 h 17 min while idle"),
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


def test_a_thousand_sockets_are_judged_each_as_it_is(other: Puppet) -> None:
    """Whatever mixture of options they have: the library and the command are right about every one."""
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
        assert (one.local[1], one.peer[1]) == (local, peer)
        assert row["local"].endswith(f":{local}")
        assert row["peer"].endswith(f":{peer}")
        assert (one.covered, row["uncovered"], row["worst_case"]) == (not uncovered, uncovered, words)
        assert one.chosen == row["chosen"] == (bool(keepalive) and idle is not None)
        assert row["state"] == "ESTABLISHED"
        assert row["found_after"]["in_flight"] == (user_timeout / 1000 if user_timeout else 924.6)
    listeners = [row for row in rows.values() if row["listening"]]
    assert [row["uncovered"] for row in listeners] == [True, True]  # not all that they accepted is covered
    expected_uncovered = sum(MIXTURES[number][1] for _, number, _, _ in made) + 2
    assert document["uncovered"] == expected_uncovered
    assert result.exit_code == 1
    lines = audit(str(other.pid)).output.splitlines()
    assert len(lines) == 1004
    assert sum(line.startswith("!") for line in lines) == expected_uncovered
    assert lines[-1] == f"TCP sockets: 1002, of them uncovered: {expected_uncovered}"


def test_the_table_and_the_exit_code(other: Puppet) -> None:
    """1 when something is uncovered, 0 when nothing is; each socket in a line, in words."""
    result = audit(str(other.pid))
    assert (result.exit_code, result.output) == (0, "TCP sockets: 0, of them uncovered: 0\n")
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
    assert first.endswith("never     15 min  15 min  never found out while idle")
    assert second.startswith("   ")
    assert "(not connected)" in second
    assert second.endswith("no peer yet")
    assert summary == "TCP sockets: 2, of them uncovered: 1"
    other("""
client = socket.create_connection(listener.getsockname()); accepted = listener.accept()[0]
for each in (client, accepted):
    each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1); each.setsockopt(TCP, socket.TCP_KEEPIDLE, 60)
""")
    result = audit(str(other.pid))
    assert result.exit_code == 0
    assert "the program covers what it accepts" in result.output
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
    """One table; the processes that may not be looked at are counted on standard error."""
    done = run_alone(ALL.format(uid=0, arguments=["--json"]))
    document = json.loads(done.stdout)
    rows = [(row["listening"], row["uncovered"]) for row in document["sockets"]]
    assert (rows, document["refused"]) == ([(True, True), (False, False)], [])
    assert done.returncode == 1
    done = run_alone(ALL.format(uid=65533, arguments=[]))
    assert done.stdout == "TCP sockets: 0, of them uncovered: 0\n"
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("kaio: processes that may not be looked at: 2; the first: process ")
    assert "it belongs to another user (root): run as" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["999999999"], 3, "process 999999999: there is no such process"),
        (["no/such/path"], 2, "no/such/path: neither a process number nor a path that exists"),
        ([], 2, "audit takes process numbers, or paths, or --all"),
        (["--all", "1"], 2, "audit takes process numbers, or paths, or --all"),
        (["1", "."], 2, "audit takes process numbers, or paths, or --all"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], code: int, complaint: str) -> None:
    """On standard error."""
    result = audit(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"kaio: {complaint}\n")


# -- what a process bounds by itself

POLICIES = (
    "20s:10s:4",
    "20s:10s:4,user_timeout=2m",
    "20s:10s:4,user_timeout=1h",
    "20s:10s:4,user_timeout=none",
    "20s:10s:4,stalled=drop",
    "20s:10s:4,user_timeout=2m,stalled=drop",
    "20s:10s:4,user_timeout=1h,stalled=drop",
)
STATES = {"idle": "idle", "in_flight": "sent data unacknowledged", "window_shut": "window shut"}  # audit's, plan's


def planned(policy: str) -> dict[str, float]:
    """When `kaio plan` says that a death is found, in the states that an audit has."""
    states = json.loads(CliRunner().invoke(cli, ["plan", policy, "--json"]).stdout)["states"]
    return {name: states[state]["kaio"] for name, state in STATES.items()}


@contextlib.contextmanager
def audited(*arguments: str) -> Iterator[tuple[int, list[int]]]:
    """A program of tests/programs/audited.py: its pid and the ports that it listens on."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, [int(port) for port in process.stdout.readline().split()]
        finally:
            process.kill()


def accepted(pid: int) -> dict[int, dict[str, Any]]:
    """What an audit says of the connections that a process has accepted, by the port that it listens on."""
    rows = json.loads(audit(str(pid), "--json").stdout)["sockets"]
    return {int(row["local"].rpartition(":")[2]): row for row in rows if row["peer"] is not None}


def until_it_says(pid: int, wanted: dict[int, dict[str, float]], monitored: bool) -> dict[int, dict[str, Any]]:
    """Ask until times and monitors are as wanted, or for as long as a monitor may take to begin and then some."""
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
def test_an_audit_says_the_same_as_the_plan(base: str) -> None:
    """Of connections of kaio's server and of another library's on kaio's loop, once a monitor watches them."""
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
            rows = until_it_says(pid, wanted, monitored=True)
            assert [rows[port]["worst_case"] for port in ports] == [
                "at most 1 min, data in flight by kaio's monitor",
                "at most 2 min, data in flight by kaio's monitor",
                "about 15 min for data in flight",
                "about 15 min for data in flight",
                "at most 1 min",
                "at most 2 min",
                "at most 1 h",
            ]
            bounds = [rows[port]["monitor"]["bound"] for port in ports]
            assert bounds == [60, 120, 3600, None, None, None, None]
            assert "at most 1 min, data in flight by kaio's monitor" in audit(str(pid)).output


@pytest.mark.slow
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if "1h" not in policy])
def test_an_audit_says_the_same_as_the_plan_of_what_a_sweep_bounds(policy: str) -> None:
    """The kernel does it, for sockets that no loop has seen: no monitor has a part in it.

    With a user timeout the kernel does not count probes: a plan says when an idle peer is found then.
    """
    run = ("-m", "kaio", "run", "--sweep", "100ms", "--keepalive", policy, str(PROGRAMS / "audited.py"), "block", "")
    with audited(*run) as (pid, (port,)), socket.create_connection(("127.0.0.1", port)):
        wanted = planned(policy)
        if policy == "20s:10s:4,user_timeout=2m":
            plan = CliRunner().invoke(cli, ["plan", policy]).output
            assert "takes the place of the count: idle peers are found dead after 2 min." in plan
            wanted["idle"] = 120
        until_it_says(pid, {port: wanted}, monitored=False)


def test_the_readme_says_the_same_as_the_plan() -> None:
    """Of the policies in its table."""
    text = (Path(kaio.__file__).parent.parent / "README.md").read_text("utf-8")
    (idle,) = re.findall(r"^\| `20s:10s:4` \|.*found within (\d+) s \|$", text, re.MULTILINE)
    (dropped,) = re.findall(r"^\| `(\S+stalled=drop)` \|.*unacknowledged for (\d+) minutes \|$", text, re.MULTILINE)
    assert planned("20s:10s:4") == dict.fromkeys(STATES, int(idle))
    assert planned(dropped[0])["in_flight"] == 60 * int(dropped[1])


# -- source


def test_source_is_audited_where_a_path_is_given(tmp_path: Path) -> None:
    """Each place that makes a socket; 1 where one is uncovered."""
    bare, covered = tmp_path / "bare.py", tmp_path / "covered.py"
    bare.write_text("import socket\ns = socket.create_connection(('db', 1))\n")
    covered.write_text("import kaio\nasync def main():\n    await kaio.connect('db', 1)\n")
    result = audit(str(tmp_path))
    assert result.exit_code == 1
    assert f"! {bare}:2: socket.create_connection: " in result.output
    assert f"  {covered}:3: kaio.connect: " in result.output
    assert result.output.endswith("places: 2, of them uncovered: 1\n")
    document = json.loads(audit(str(bare), str(covered), "--json").stdout)
    assert [(row["path"], row["line"], row["covered"]) for row in document["findings"]] == [
        (str(bare), 2, False),
        (str(covered), 3, True),
    ]
    assert document["uncovered"] == 1
    result = audit(str(covered))
    assert result.exit_code == 0
    assert result.output.endswith("places: 1, of them uncovered: 0\n")
