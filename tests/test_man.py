"""Man pages, and the completion of shells: both are made from the commands themselves."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import click
import pytest

from kaio.cli import COMMANDS, cli
from scripts.man import pages


def test_each_command_and_option_has_its_place() -> None:
    """In a page of its own, or in its group's."""
    made = pages()
    assert set(made) == {"kaio.1", *(f"kaio-{name}.1" for name in COMMANDS)}
    context = click.Context(cli, info_name="kaio")
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        text = made[f"kaio-{name}.1"].replace("\\-", "-")
        commands = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
        for each in commands:
            for parameter in each.params:
                if isinstance(parameter, click.Option):
                    assert parameter.opts[0] in text, (name, parameter.opts)
        for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "FILES"):
            assert f".SH {section}" in text


def test_the_pages_are_valid(tmp_path: pathlib.Path) -> None:
    """groff has nothing to warn of."""
    if shutil.which("groff") is None:
        pytest.skip("no groff here: run scripts/install-system-packages")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.man", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "man pages: " in done.stdout
    for page in sorted(tmp_path.iterdir()):
        done = subprocess.run(
            ["groff", "-man", "-ww", "-z", "-Tutf8", "-K", "utf8", page], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), page


def complete(shell: str, words: str, number: int) -> list[str]:
    """What a shell offers."""
    environment = {
        **os.environ,
        "_KAIO_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(number) if shell != "fish" else words.rsplit(" ", maxsplit=1)[-1],
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kaio"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stderr == ""
    return re.findall(r"^(?:plain[,\n])?([\w-]+)", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_are_completed(shell: str) -> None:
    """Of commands that are imported only when they are called."""
    assert "audit" in complete(shell, "kaio au", 1)
    options = complete(shell, "kaio audit --", 2)
    assert {"--all", "--children", "--json"} <= set(options)
    assert "set" in complete(shell, "kaio system s", 2)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_each_shell(shell: str) -> None:
    environment = {**os.environ, "_KAIO_COMPLETE": f"{shell}_source"}
    command = [sys.executable, "-c", "from kaio.__main__ import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if shell == "bash" and "Shell completion is not supported for Bash versions older" in done.stderr:
        pytest.skip("an old bash")
    assert "_KAIO_COMPLETE" in done.stdout
