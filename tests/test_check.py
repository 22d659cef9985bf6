"""`kaio check`: what the TCP Keepalive HOWTO's example program shows, with the kernel's own values."""

from __future__ import annotations

import json
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from kaio.cli import cli
from kaio.testing import blackhole

from . import namespaces


def check(*arguments: str) -> Result:
    """Run `kaio check` in this process."""
    return CliRunner().invoke(cli, ["check", *arguments])


def cells(output: str) -> dict[str, list[str]]:
    """The rows of the table, by their first cells."""
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening socket. Its kernel completes handshakes although nothing is accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def address(sock: socket.socket) -> str:
    """A socket's address as it is written on a command line."""
    return f"127.0.0.1:{sock.getsockname()[1]}"


def test_a_new_socket_is_off_and_then_on() -> None:
    """In a process of its own; the output is plain lines without control codes."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kaio", "check", "--keepalive", "180s:60s:20"],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    rows = cells(done.stdout)
    assert rows["SO_KEEPALIVE"] == ["OFF", "ON"]
    assert rows["TCP_KEEPIDLE"][2:] == ["180", "s"]
    assert rows["TCP_KEEPINTVL"][2:] == ["60", "s"]
    assert rows["TCP_KEEPCNT"][1:] == ["20"]
    assert "unacknowledged for 23 min; kaio enforces it" in done.stdout


def test_a_new_socket_has_the_systems_values() -> None:
    """The first column is read before any option is set (tcp(7))."""
    rows = cells(check().stdout)
    for option, name in (("TCP_KEEPIDLE", "tcp_keepalive_time"), ("TCP_KEEPINTVL", "tcp_keepalive_intvl")):
        assert rows[option][0] == pathlib.Path(f"/proc/sys/net/ipv4/{name}").read_text().strip()


def test_the_policy_off_leaves_keepalive_off() -> None:
    """And no bound for sent data is printed."""
    done = check("--keepalive", "off")
    assert done.exit_code == 0
    assert cells(done.stdout)["SO_KEEPALIVE"] == ["OFF", "OFF"]
    assert "unacknowledged" not in done.stdout


@pytest.mark.parametrize(
    ("spec", "bound"), [("on", None), ("1:2:3,stalled=drop", 7.0), ("1:1:2,user_timeout=4500ms,stalled=drop", 4.5)]
)
def test_stalled_drop_sets_the_kernels_user_timeout(spec: str, bound: float | None) -> None:
    """The value is in seconds, as read back from the kernel."""
    done = check("--keepalive", spec, "--json")
    state = json.loads(done.stdout)["with_policy"]
    assert (state["enabled"], state["user_timeout"]) == (True, bound)
    shown = check("--keepalive", spec).stdout
    assert cells(shown)["TCP_USER_TIMEOUT"] == ["none", *(["none"] if bound is None else [f"{bound:g}", "s"])]


def test_a_connection_and_the_health_of_its_peer(listener: socket.socket) -> None:
    """The connection has the same options, and its peer is alive."""
    done = check(address(listener), "--keepalive", "detect=30s")
    assert (done.exit_code, done.stderr) == (0, "")
    rows = cells(done.stdout)
    assert rows["SO_KEEPALIVE"] == ["OFF", "ON", "ON"]
    assert rows["TCP_KEEPIDLE"][-2:] == ["10", "s"]
    assert rows["TCP_KEEPCNT"][-1] == "4"
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{address(listener)} is alive, round trip ")
    assert "last heard" in last

    shown = json.loads(check(address(listener), "--keepalive", "1:2:3", "--json").stdout)
    assert shown["policy"] == "1s:2s:3"
    assert shown["fresh"]["enabled"] is False
    assert shown["connection"]["socket"] == shown["with_policy"]
    assert shown["connection"]["peer"] == address(listener)
    assert shown["connection"]["health"]["state"] == "alive"


def test_the_default_policy_is_used_without_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same default as for keepalive=None."""
    assert check().stdout.startswith("policy 20s:10s:4\n")
    monkeypatch.setenv("KEEPIDLE", "7")
    assert check().stdout.startswith("policy 7s:10s:4\n")


def only_line(done: Result, code: int) -> str:
    """The one line of a failed command."""
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("kaio: ")
    return line


def test_a_refused_connection_is_one_line(listener: socket.socket) -> None:
    """The exit code is 1, and standard output is empty, with --json too."""
    where = address(listener)
    listener.close()
    for arguments in ([where], [where, "--json"]):
        assert only_line(check(*arguments), 1) == f"kaio: no connection to {where}: Connection refused"


def test_an_unanswered_connection_attempt_is_one_line(listener: socket.socket, dead_peers: None) -> None:
    """It ends after the policy's user timeout, not after the system's two minutes."""
    with blackhole(listener):
        line = only_line(check(address(listener), "--keepalive", "1:1:1,user_timeout=500ms"), 1)
    assert line.startswith(f"kaio: no connection to {address(listener)}: peer {address(listener)} is dead (connecting)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keepalive", "soon"], ["keepalive='soon'"]),
        (["--keepalive", "1:2:128"], ["count=128", "from 1 to 127"]),
        (["127.0.0.1"], ["has no port"]),
        (["127.0.0.1:http"], ["the port is 'http'"]),
        (["http://127.0.0.1:80"], ["is a URL"]),
        (["unix:/run/app.sock"], ["keepalive needs TCP"]),
    ],
)
def test_a_usage_error_is_one_line(arguments: list[str], words: list[str]) -> None:
    """It names the argument and the reason, and gives a correct command."""
    line = only_line(check(*arguments), 2)
    for word in ("such as `kaio check 127.0.0.1:9000", *words):
        assert word in line


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("true", "Network is unreachable"),  # loopback is down
        ("ip link set lo up; ip route add unreachable 192.0.2.0/24", "No route to host"),
        ("ip link set lo up; ip route add prohibit 192.0.2.0/24", "Permission denied"),
    ],
)
def test_where_the_network_is_at_fault_the_peer_is_not_called_dead(before: str, reason: str) -> None:
    """One line, and nothing from the logger."""
    reason_not = namespaces.lacking()
    if reason_not is not None:
        pytest.skip(reason_not)
    command = f"{before}; exec {sys.executable} -m kaio check 192.0.2.1:9"
    done = subprocess.run(["unshare", "-n", "sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"kaio: no connection to 192.0.2.1:9: {reason}\n"


@pytest.mark.parametrize(
    "where", ["a" * 70 + ":80", "a\x1b]0;\nb:80", "a..b:80", "host:", "x:70000", "", "[::1", "x:y", "a\0b:1"]
)
def test_an_address_that_cannot_be_is_a_usage_error(where: str) -> None:
    """In one line, whatever is in it."""
    done = CliRunner().invoke(cli, ["check", where])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "\x1b" not in done.stderr
