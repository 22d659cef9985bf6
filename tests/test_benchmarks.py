"""The benchmarks work: each question is asked with tiny numbers. What they measure is not judged here."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.__main__ import QUESTIONS
from benchmarks.contenders import CONTENDERS
from benchmarks.results import Metric, Results, quantile

ROOT = pathlib.Path(__file__).parent.parent

# What each is asked with: every contender serves somewhere, and none more often than it takes.
ASKED: dict[str, tuple[str, ...]] = {
    "echo": ("--only", "C,bare,drop-in,protocol,connection,timed,streams,timeout,anyio", "--case", "1 KiB, 64"),
    "bulk": ("--only", "C,protocol,connection,streams,anyio"),
    "accept": ("--only", "C,unwatched,streams,anyio"),
    "memory": ("--only", "connection,ping,read-timeout"),
    "supervise": ("--only", "kernel,heartbeat"),
    "detect": ("--only", "connection", "--case", "one at a time"),
    "workers": (),
    "pool": (),
    "import_time": (),
}


def ask(*command: str, results: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run it, as a user does. In a process of its own: it moves to one core."""
    command = (sys.executable, "-m", *command, "--results", str(results))
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=90)


@pytest.mark.heavy
@pytest.mark.parametrize("question", QUESTIONS)
def test_question_is_answered(question: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> None:
    if question != "import_time" and not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler here: run scripts/install-system-packages")
    if question == "detect":
        request.getfixturevalue("dead_peers")
    loops = () if question == "import_time" else ("--loops", "uvloop")
    done = ask("benchmarks", question, "--quick", *loops, *ASKED[question], results=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / f"{question}.json").read_text())
    asked = ASKED[question][1].split(",") if ASKED[question] else []
    assert not asked or {row["contender"] for row in document["rows"]} == set(asked)
    for row in document["rows"]:
        assert row["figures"].keys() == document["metrics"].keys()
        assert all(math.isfinite(summary["median"]) for summary in row["figures"].values()), row
        assert row["contender"] in done.stdout
    assert all(target["verdict"] in ("pass", "MISS") for target in document["targets"])


def test_every_contender_is_asked_somewhere() -> None:
    asked = {name for arguments in ASKED.values() if arguments for name in arguments[1].split(",")}
    assert asked == CONTENDERS.keys()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--only", "bear"), "argument --only: 'bear' is none of"),
        (("--loops", "trio"), "argument --loops: 'trio' is none of"),
        (("--rounds", "0"), "argument --rounds: 0: must be at least 1"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], complaint: str, tmp_path: pathlib.Path) -> None:
    done = ask("benchmarks.echo", *arguments, results=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr


def results(**figures: list[float]) -> Results:
    """Measured: contenders with their figure in each round."""
    made = Results("what", "What", [Metric("cpu", "CPU us")])
    for contender, values in figures.items():
        for value in values:
            made.add("case", "uvloop", contender, {"cpu": value})
    return made


def test_ratio_is_taken_within_the_round() -> None:
    made = results(bare=[10.0, 20.0, 40.0], ours=[11.0, 24.0, 44.0])
    assert made.ratios("ours", "bare", case="case") == [1.1, 1.2, 1.1]
    assert made.ratios("ours", "absent", case="case") == []


@pytest.mark.parametrize(
    ("bound", "at_most", "verdict"),
    [(1.1, True, "pass"), (1.0, True, "MISS"), (1.2, False, "MISS"), (1.1, False, "pass")],
)
def test_target_is_judged_by_the_median(bound: float, at_most: bool, verdict: str) -> None:
    made = results()
    made.target("text", [1.0, 1.1, 9.0], bound, at_most=at_most)
    assert [target.verdict for target in made.targets] == [verdict]


def test_target_is_left_out_where_nothing_was_measured() -> None:
    made = results()
    made.target("text", [], 1.0)
    assert made.targets == []


def test_quantile() -> None:
    values: list[Any] = list(range(100, 0, -1))
    assert quantile(values, 0.50) == 50
    assert quantile(values, 0.99) == 99
    assert quantile([7.0], 0.99) == 7.0
