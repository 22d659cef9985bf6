"""`kaio.testing.blackhole` and its pytest fixture, for other people's tests."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kaio
from kaio.testing import blackhole as make_blackhole
from kaio.testing import lacking

from .conftest import echo, until

pytestmark = pytest.mark.usefixtures("dead_peers")


def silent(sock: socket.socket) -> bool:
    """Whether nothing arrives for a while."""
    sock.settimeout(0.1)
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True


async def test_takes_every_kind_of_endpoint_and_puts_all_back() -> None:
    """Socket, transport, StreamWriter, Connection, listening socket; keepalive is back on afterwards."""
    async with kaio.serve(echo, "127.0.0.1", 0, keepalive="5s:2s:3") as server:
        reader, writer = await kaio.open_connection(*server.sockets[0].getsockname(), keepalive="5s:2s:3")
        await until(lambda: server.connections)
        for end in (writer, writer.transport, next(iter(server.connections))):
            with make_blackhole(end):
                assert not kaio.inspect(end).enabled
            assert kaio.inspect(end).enabled
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        writer.close()
        with make_blackhole(server.sockets[0]), pytest.raises(kaio.DeadPeerError):
            await kaio.connect(*server.sockets[0].getsockname(), keepalive="1s:1s:1")
        async with kaio.connect(*server.sockets[0].getsockname()) as back:
            await back.send(b"y")
            assert await back.receive() == b"y"


async def test_what_has_no_socket_is_refused() -> None:
    """A clear error for what is no connection."""
    with pytest.raises(TypeError, match="expected a socket"), make_blackhole(42):
        pass


def test_the_fixture_cuts_and_heals(blackhole: Any) -> None:
    """Within the block nothing arrives; afterwards everything does."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as ours,
        listener.accept()[0] as theirs,
    ):
        with blackhole(theirs):
            ours.sendall(b"x")
            assert silent(theirs)
        theirs.settimeout(5)
        assert theirs.recv(1) == b"x"


def test_without_the_right_it_says_what_to_do(tmp_path: Path) -> None:
    """PermissionError with the remedy, and the fixture skips with it."""
    (tmp_path / "test_it.py").write_text(
        "import socket, pytest\n"
        "from kaio.testing import blackhole as make, lacking\n"
        "def test_skipped(blackhole): raise AssertionError\n"
        "def test_error():\n"
        "    assert 'unshare -Urn' in lacking()\n"
        "    with socket.socket() as s, pytest.raises(PermissionError, match='CAP_NET_ADMIN'), make(s): pass\n"
    )
    unprivileged = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable]
    done = subprocess.run(
        [*unprivileged, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert "1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "CAP_NET_ADMIN" in done.stdout
    assert lacking() is None


async def test_an_end_that_closes_while_dead_is_no_error() -> None:
    """Closing within the block is as good as healing."""
    async with kaio.serve(echo, "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        with make_blackhole(writer):
            writer.transport.abort()
            await asyncio.sleep(0.01)
        assert reader is not None
