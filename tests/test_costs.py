"""What keepalive costs while all is well: no system call of ours per accepted connection."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("accept_thousand.py")
COUNT = 1_000


def option_calls(kind: str, loop: str, trace: Path) -> int:
    """How many setsockopt and getsockopt a server made in accepting, echoing and ending 1,000 connections."""
    command = ["strace", "-f", "-c", "-o", str(trace), "-e", "trace=setsockopt,getsockopt"]
    server = subprocess.Popen(
        [*command, sys.executable, str(SCRIPT), kind, loop], stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parent.parent
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        for _ in range(COUNT):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
    calls = re.findall(
        r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+).*(?:setsockopt|getsockopt)$", trace.read_text(), re.MULTILINE
    )
    return sum(map(int, calls))


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_accepted_connection_costs_no_option_call_more_than_on_the_bare_loop(loop: str, tmp_path: Path) -> None:
    """By strace over 1,000 connections: the listening socket's few calls, and none per connection."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    bare = option_calls("bare", loop, tmp_path / "bare")
    for kind in ("protocol", "handler"):
        ours = option_calls(kind, loop, tmp_path / kind)
        print(f"{loop}: bare {bare}, {kind} {ours}")
        assert ours <= bare + 30, f"{kind}: {ours - bare} calls more for {COUNT} connections"
