"""The page of an administrator's tasks is what its commands print."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts.administration import PAGE, lacking, normalised

_reason = lacking()


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.skipif(_reason is not None, reason=str(_reason))
def test_the_page_is_what_the_commands_print() -> None:
    """But for numbers and the white space between columns: find, change, watch and undo work as it says."""
    command = [sys.executable, "-m", "scripts.administration", "--print"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert normalised(done.stdout) == normalised(PAGE.read_text("utf-8"))
