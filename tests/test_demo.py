"""`kaio demo` as a process, and its verdicts on made-up reports."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest

import kaio
from kaio.cli.demo import PATIENT, QUICK, Peer, Scenario, problem

PYTHON = (sys.executable, "-W", "error")
DEMO = (*PYTHON, "-m", "kaio", "demo")
LIVING = ("alive, sending", "alive, idle")
DYING = {"dies while idle": (3.0, "keepalive"), "dies while receiving": (5.0, "unacknowledged")}


def environment(**more: str) -> dict[str, str]:
    """The present environment without the variables that the demo reads."""
    without = ("NO_COLOR", "FORCE_COLOR", "KAIO_DEMO_INSIDE", "TERM", "COLUMNS", "LINES")
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return {**kept, "TERM": "xterm", **more}


def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command until it exits."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=40, env=environment(**more), stdin=subprocess.DEVNULL
    )


@pytest.fixture
def unprivileged() -> tuple[str, ...]:
    """A command prefix that takes away the privilege to cut peers off."""
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        prefix = (shutil.which("setpriv") or "setpriv", "--bounding-set=-all", "--inh-caps=-all")
    if not is_lacking(prefix):
        pytest.skip("this kernel lets any user attach the filter")
    return prefix


@functools.cache
def is_lacking(prefix: tuple[str, ...]) -> bool:
    """Whether a command with this prefix lacks the privilege."""
    asked = run(*prefix, *PYTHON, "-c", "import kaio.testing; print(kaio.testing.lacking())")
    assert not asked.returncode, asked.stderr
    return asked.stdout.strip() != "None"


def check_all_as_expected(output: str) -> None:
    """Check the plain output: the states of each peer over time, and the table of results."""
    assert "\x1b" not in output
    assert "\r" not in output
    states: dict[str, list[str]] = {}
    for who, state in re.findall(r"^ *[\d.]+ s  (.{20})  (\w+)", output, re.MULTILINE):
        states.setdefault(who.strip(), []).append(state)
    results = {row[0]: row[1:] for row in (re.split(r" {2,}", line) for line in output.splitlines())}
    for who in LIVING:
        assert set(states[who]) <= {"alive", "suspect"}  # suspect: a busy machine answers late
        assert results[who] == ["alive", "alive", "as expected"]
    for who, (bound, because) in DYING.items():
        assert states[who] == ["alive", "suspect", "dead"]
        expected, measured, cause, verdict = results[who]
        assert expected == f"{bound:.1f} s"
        assert bound - 0.1 <= float(measured.removesuffix(" s")) <= bound + 1.0
        assert (cause, verdict) == (because, "as expected")
    assert output.splitlines()[-1].startswith("As expected: ")


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_deaths_are_detected_in_time_and_live_peers_are_not_reported(loop: str, dead_peers: None) -> None:
    began = time.monotonic()
    done = run(*DEMO, "--loop", loop)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert loop in done.stdout.splitlines()[0]
    check_all_as_expected(done.stdout)
    assert time.monotonic() - began < 30


@pytest.mark.slow
@pytest.mark.may_skip
def test_an_unprivileged_demo_runs_in_its_own_network_namespace(unprivileged: Sequence[str]) -> None:
    trial = run(*unprivileged, "unshare", "-Un", "--keep-caps", "true")
    if trial.returncode:
        pytest.skip(f"no namespaces for users here: {trial.stderr.strip()}")
    done = run(*unprivileged, *DEMO)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    check_all_as_expected(done.stdout)


@pytest.mark.may_skip
@pytest.mark.parametrize(
    ("more", "words"),
    [({"PATH": ""}, "`unshare` is not installed"), ({"KAIO_DEMO_INSIDE": "1"}, "loopback")],
    ids=["no unshare", "unshare did not help"],
)
def test_a_missing_privilege_is_one_line(more: dict[str, str], words: str, unprivileged: Sequence[str]) -> None:
    done = run(*unprivileged, *DEMO, **more)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("kaio demo: ")
    assert words in line


@pytest.mark.slow
def test_exits_with_1_if_a_result_is_not_as_expected(dead_peers: None) -> None:
    script = """
import kaio, kaio.cli.demo as it
it.SCENARIOS = (it.Scenario("dies while idle", it.QUICK, cause=kaio.Cause.UNACKNOWLEDGED),)
it.demo()
"""
    done = run(*PYTHON, "-c", script)
    assert (done.returncode, done.stderr) == (1, ""), done.stdout + done.stderr
    assert "cause is keepalive" in done.stdout
    assert "1 of 1 not as expected" in done.stdout


def test_ctrl_c_exits_without_a_traceback(dead_peers: None) -> None:
    with subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stdout is not None
            while "alive" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            output, complaints = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 130
    assert complaints == ""
    assert "as expected" not in output


def test_an_unknown_loop_is_a_usage_error() -> None:
    done = run(*DEMO, "--loop", "twisted")
    assert done.returncode == 2
    assert "'uvloop', 'asyncio'" in done.stderr


# -- on a terminal


@contextlib.contextmanager
def on_terminal(**more: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run the demo on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            DEMO, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(COLUMNS="80", LINES="24", **more)
        ) as process:
            os.close(theirs)
            try:
                yield process, ours
            finally:
                process.kill()
    finally:
        os.close(ours)


def read_until(terminal: int, words: str, within: float) -> str:
    """The output on the terminal up to certain words."""
    seen = b""
    deadline = time.monotonic() + within
    while words not in seen.decode(errors="ignore"):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, seen.decode(errors="replace")
        seen += os.read(terminal, 65536)  # EIO if the demo has exited without them
    return seen.decode(errors="ignore")


@pytest.mark.slow
def test_the_table_is_updated_in_place_on_a_terminal(dead_peers: None) -> None:
    with on_terminal() as (process, terminal):
        seen = read_until(terminal, "As expected: ", within=30)
        assert process.wait(10) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "\x1b[" in seen
    for state in ("● alive", "● suspect", "● dead"):
        assert state in text
    assert max(len(line.rstrip()) for line in text.replace("\r", "\n").splitlines()) <= 80


def test_no_color_turns_control_codes_off_on_a_terminal(dead_peers: None) -> None:
    with on_terminal(NO_COLOR="1") as (_, terminal):
        assert "\x1b" not in read_until(terminal, "dies while receiving", within=10)


# -- the verdicts


def peer(
    policy: kaio.Keepalive = QUICK,
    *,
    cause: kaio.Cause | None = kaio.Cause.KEEPALIVE,
    after: Sequence[float] = (),
    reported: kaio.Cause = kaio.Cause.KEEPALIVE,
) -> Peer:
    """A peer that was cut off at 100 s, and reported the given numbers of seconds later."""
    made = Peer(Scenario("x", policy, cause=cause))
    made.silent_at = 100.0 if cause is not None else None
    error = kaio.DeadPeerError(reported, errno.ETIMEDOUT, silence=1.0)
    made.reports = [(100.0 + each, error) for each in after]
    made.endings = [error for _ in after]
    return made


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (peer(after=[3.05]), None),
        (peer(after=[3.99]), None),
        (peer(PATIENT, after=[5.4]), None),
        (peer(cause=None), None),
        (peer(), "not reported"),
        (peer(after=[2.5]), "too early"),
        (peer(after=[4.1]), "too late"),
        (peer(after=[3.05, 3.06]), "reported 2 times"),
        (peer(after=[3.05], reported=kaio.Cause.ZERO_WINDOW), "cause is zero window"),
        (peer(cause=None, after=[3.05]), "alive, but reported dead"),
    ],
)
def test_verdicts(seen: Peer, verdict: str | None) -> None:
    found = problem(seen)
    assert found is None if verdict is None else verdict in str(found)


def test_connection_lost_without_the_reported_error_is_wrong() -> None:
    seen = peer(after=[3.05])
    seen.endings = [None]
    assert "ended with [None]" in str(problem(seen))


def test_a_lost_connection_of_a_live_peer_is_wrong() -> None:
    seen = peer(cause=None)
    seen.endings = [ConnectionResetError()]
    assert "ConnectionResetError" in str(problem(seen))


def test_a_sending_client_without_echoes_is_wrong() -> None:
    assert problem(Peer(Scenario("x", QUICK, sends=True))) == "got no more echoes"
