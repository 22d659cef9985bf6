"""What all commands share: exit codes, one line for each failure, output that cannot be written, help and version."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from typing import Final

import pytest

from kaio.cli import COMMANDS
from kaio.cli._exit import printable
from kaio.cli._output import aligned, as_json

KAIO: Final = (sys.executable, "-W", "error", "-m", "kaio")

ANSWERS: Final = {
    "--help": 0,
    "--version": 0,
    "audit {pid}": 0,
    "attach {pid} --dry-run": 0,
    "check": 0,
    "enforce status": 1,
    "enforce --machine --dry-run 20s:10s:4": 0,
    "plan": 0,
    "plan --json": 0,
    "system": 0,
    "top --once": 0,
    "top --json": 0,
}
"""Commands that print an answer, and their exit codes."""
WAYS: Final = {
    "to a file": "{command} >{file}",
    "without standard input": "{command} <&- >{file}",
    "without standard error": "{command} 2>&- >{file}",
    "to standard error that is full": "{command} 2>/dev/full >{file}",
    "in the C locale": "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {command} >{file}",
    "in ASCII": "PYTHONIOENCODING=ascii {command} >{file}",
    "in one column": "COLUMNS=1 {command} >{file}",
    "to a dumb terminal": "TERM=dumb {command} >{file}",
}
REFUSED: Final = {
    "to a full disk": ("{command} >/dev/full", 3),
    "to closed standard output": ("{command} >&-", 3),
    "to nowhere": ("{command} >&- 2>&- <&-", 3),
    "to nobody": ("set -o pipefail; {command} | true", 141),
}


def run(way: str, words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run kaio in a shell."""
    command = " ".join([*KAIO, words.format(pid=os.getpid())])
    return subprocess.run(
        ["bash", "-c", way.format(command=command, **more)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.heavy
@pytest.mark.parametrize("words", ANSWERS)
def test_each_command_answers_whatever_its_streams(words: str, tmp_path: os.PathLike[str]) -> None:
    """The exit code is the answer's, and standard error is empty."""
    for name, way in WAYS.items():
        file = os.path.join(tmp_path, "output")
        done = run(way, words, file=file)
        assert (done.returncode, done.stderr) == (ANSWERS[words], ""), name
        with open(file, encoding="utf-8") as output:
            text = output.read()
        assert text, name
        if "--json" in words:
            json.loads(text)


@pytest.mark.heavy
@pytest.mark.parametrize("words", ANSWERS)
def test_output_that_cannot_be_written_is_a_failure(words: str) -> None:
    """One line, and 3: 1 would mean that something is uncovered. Without a reader it ends as other programs do."""
    for name, (way, code) in REFUSED.items():
        done = run(way, words)
        silent = "2>&-" in way or code == 141
        if code == 141 and done.returncode == ANSWERS[words]:
            continue  # it was done before the reader was
        assert (done.returncode, done.stderr.count("\n")) == (code, 0 if silent else 1), (name, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_each_command(command: str, flag: str) -> None:
    done = run("{command}", f"{command} {flag}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: kaio {command}")
    assert "-h, --help" in done.stdout


def test_version() -> None:
    assert run("{command}", "-V").stdout == run("{command}", "--version").stdout
    assert run("{command}", "-V").stdout.startswith("kaio ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("adit", 2, "no such command: adit; did you mean audit?"),
        ("zzz", 2, "no such command: zzz (see kaio --help)"),
        ("'a\x1b]0;x\x07\nb'", 2, "no such command: a\\x1b]0;x\\x07\\nb"),
        ("audit --al", 2, "--al"),
        ("plan --connectons 5", 2, "--connections"),
        ("attach " + "9" * 5000, 3, " ... "),
        ("attach 99999999999", 3, "there is no such process"),
        ("top 99999999999", 3, "there is no such process"),
    ],
)
def test_mistakes_are_one_line(words: str, code: int, message: str) -> None:
    done = run("{command}", words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
    assert message in done.stderr
    assert len(done.stderr) < 1200


FAILING: Final = """
import sys
from kaio.cli import main, plan
def fail(*_): raise {error}
plan._show = fail
sys.argv = ["kaio", "plan"]
main()
"""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("KeyError('x')", 3, "kaio: KeyError: 'x' (a mistake in kaio; KAIO_DEBUG=1 shows where)\n"),
        ("RecursionError('too deep')", 3, "kaio: RecursionError: too deep (a mistake"),
        ("MemoryError()", 3, "kaio: MemoryError: "),
        ("OSError(24, 'Too many open files', '/x\\ny')", 3, "kaio: /x\\ny: Too many open files\n"),
        ("ModuleNotFoundError(name='pyroute2')", 3, "kaio: pyroute2 is not installed: pip install 'kaio-net[cli]'\n"),
        ("KeyboardInterrupt", 130, ""),
        ("SystemExit(7)", 7, ""),
        ("SystemExit", 0, ""),
    ],
)
def test_what_was_not_foreseen_is_one_line(error: str, code: int, message: str) -> None:
    """With KAIO_DEBUG=1, a traceback precedes it."""
    program = FAILING.format(error=error)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith(message)) == (code, True), done.stderr
    assert done.stderr.count("\n") == bool(message)
    if message:
        environment = {**os.environ, "KAIO_DEBUG": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert "Traceback" in done.stderr


def test_help_and_version_load_little() -> None:
    """Neither tables nor netlink nor an event loop."""
    program = (
        "import sys\nfrom kaio.cli import main\nsys.argv = ['kaio', '{}']\ntry: main()\nfinally: print(*sys.modules)"
    )
    for flag in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", program.format(flag)], capture_output=True, text=True, check=True)
        loaded = set(done.stdout.split())
        assert loaded & {"rich", "pyroute2", "asyncio", "uvloop"} == set()


# -- tables


@pytest.mark.parametrize(
    "name", ["a\x1b[31m", "a\nb", "a\tb", "\x9b31m", "\u202edcba", "a\u200bb", "\udcff", "\x7f", "\u2028"]
)
def test_what_a_terminal_might_obey_is_escaped(name: str) -> None:
    """Controls of every kind, and half characters; what can be seen stays."""
    assert printable(name).isprintable()
    assert printable(name).isascii()
    assert printable("é 日本 [red]") == "é 日本 [red]"


def test_columns_are_aligned_as_a_terminal_shows_them() -> None:
    """Wide characters take two cells, combining ones none."""
    lines = list(aligned(("name", "n"), [("日本", "1"), ("e\u0301", "22")], right=("n",)))
    assert lines == ["name   n", "日本   1", "e\u0301     22"]


def test_json_is_valid_whatever_a_file_is_called() -> None:
    """Half characters are escaped, since no encoding has them."""
    assert json.loads(as_json({"é": "\udcff"})) == {"é": "\udcff"}
    as_json({"é": "\udcff\x1b"}).encode()
    with pytest.raises(ValueError, match="Out of range float"):
        as_json({"x": float("inf")})


TABLE: Final = """
from kaio.cli._output import print_table
rows = [("[2001:db8:1111:2222:3333:4444:5555:6666]:65535", "192.0.2.1:80", "x" * 30, "y" * 30, "\\x1b]0;t\\x07[red]")]
print_table(("local", "peer", "first", "second", "name"), rows, droppable=("first", "second"))
"""


@pytest.mark.parametrize(("width", "shown"), [(200, {"first", "second"}), (120, {"second"}), (80, set())])
def test_columns_that_do_not_fit_a_terminal_are_left_out(width: int, shown: set[str]) -> None:
    """Addresses are whole."""
    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", TABLE], stdout=terminal, env=environment) as process:
        os.close(terminal)
        text = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:  # the terminal's other end is closed
                break
            if not part:
                break
            text += part
        assert process.wait() == 0
    os.close(main)
    output = re.sub("\x1b\\[[0-9;]*m", "", text.decode())
    assert {name for name in ("first", "second") if name in output} == shown
    assert "[2001:db8:1111:2222:3333:4444:5555:6666]:65535" in output
    assert "\x1b]" not in output
    assert max(len(line) for line in output.splitlines()) <= width or width == 80
