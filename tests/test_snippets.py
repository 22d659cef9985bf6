"""The Python in README.md and docs/ passes mypy, each block in the context that its text gives it."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import textwrap

from .import_graph import ROOT

PROJECT = ROOT.parent
PAGES = [
    "README.md",
    "docs/testing.md",
    "docs/tools.md",
    "docs/loops.md",
    "docs/architecture.md",
    "docs/asgi.md",
    "docs/clients.md",
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What the text around the blocks speaks of.
CONTEXT = """
from __future__ import annotations
import asyncio, contextlib, os, socket, ssl
from collections.abc import Callable
from typing import Any
import aiohttp, kaio, redis.asyncio

async def handler(connection: kaio.Connection) -> None: ...
async def main() -> None: ...
async def slow_model(prompt: str) -> bytes: return b""
def my_metrics(event: kaio.Event) -> None: ...
context: ssl.SSLContext
sock: socket.socket
writer: asyncio.StreamWriter
transport: asyncio.Transport
connection: kaio.Connection
server: kaio.Server[Any]
prompt: str
policy: kaio.Keepalive
async def log_in(connection: kaio.Connection) -> None: ...
async def work(data: bytes) -> None: ...
async def work_with(connection: kaio.Connection) -> None: ...
async def command(connection: kaio.Connection, *arguments: bytes) -> bytes: return b""
class Client(kaio.KeepaliveProtocol): ...
their_end_of_the_connection: socket.socket
"""


def test_snippets_pass_mypy(tmp_path: pathlib.Path) -> None:
    """Blocks with `await` at the top stand in a function, as in the asyncio REPL; transcripts (>>>) are left out."""
    places: dict[str, str] = {}
    for page in PAGES:
        text = (PROJECT / page).read_text("utf-8")
        for match in BLOCK.finditer(text):
            source = match[1]
            if source.startswith(">>>"):
                continue
            name = f"snippet_{len(places)}"
            places[name] = f"{page}:{text.count(chr(10), 0, match.start()) + 1}"
            body = (
                textwrap.indent(source, "    ")
                if re.search(r"^(async with|async for|await|\w+ = await|    reply = await)", source, re.M)
                else ""
            )
            whole = f"async def block() -> None:\n{body}" if body else source
            (tmp_path / f"{name}.py").write_text(CONTEXT + whole, "utf-8")
    assert len(places) > 10
    command = [sys.executable, "-m", "mypy", "--config-file=", "--check-untyped-defs", "--ignore-missing-imports"]
    options = ["--python-version=3.11", "--no-error-summary", "--cache-dir", str(PROJECT / ".mypy_cache" / "snippets")]
    disabled = ["--disable-error-code=no-redef", "--disable-error-code=unused-coroutine"]
    done = subprocess.run(
        [*command, *options, *disabled, str(tmp_path)], capture_output=True, text=True, timeout=110, cwd=PROJECT
    )
    said = re.sub(r"\S*(snippet_\d+)\.py", lambda match: places[match[1]], done.stdout)
    assert not said, said
    assert (done.returncode, done.stderr) == (0, "")
