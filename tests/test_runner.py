"""The suite's own runner: what conftest.py watches over is shown to fail once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FAULTY = Path(__file__).parent / "programs" / "faulty_tests.py"


def test_what_the_runner_watches_over_fails() -> None:
    """On both loops; and uvloop is closed although a failed test leaves a transport open."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run([*command, str(FAULTY)], capture_output=True, text=True, cwd=FAULTY.parents[2], timeout=60)
    outcomes: dict[str, set[str]] = {}
    for outcome, test in re.findall(r"^(PASSED|FAILED|ERROR) \S+::test_(\S+)", done.stdout, re.MULTILINE):
        outcomes.setdefault(test, set()).add(outcome)
    faults = {
        "a_callback_fails": {"FAILED"},
        "a_callback_fails_on_purpose": {"PASSED"},
        "a_task_fails_while_the_loop_is_closed": {"PASSED", "ERROR"},
        "the_time_is_up": {"FAILED"},
    }
    expected = {f"{test}[{loop}]": each for test, each in faults.items() for loop in ("asyncio", "uvloop")}
    assert outcomes == {**expected, "a_failure_leaves_a_transport_open": {"FAILED"}}, done.stdout
