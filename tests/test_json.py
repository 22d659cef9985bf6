"""What the commands print with --json keeps to one schema, docs/schema.json, whatever they print it of."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
from collections.abc import Iterator
from typing import Any, Final

import jsonschema
import pytest
from click.testing import CliRunner

from kaio.cli import cli
from kaio.tools.processes import lacking

from .programs import Puppet, puppet

SCHEMA: Final = json.loads((pathlib.Path(__file__).parent.parent / "docs/schema.json").read_text("utf-8"))

pytestmark = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))

SOCKETS: Final = """
import select
v4 = socket.create_server(("127.0.0.1", 0))
v6 = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
kept = [socket.socket(), socket.socket(socket.AF_INET6)]
for where in (v4.getsockname(), ("127.0.0.1", v6.getsockname()[1]), ("::1", v6.getsockname()[1])):
    kept.append(socket.create_connection(where[:2]))
    kept.append((v4 if where[:2] == v4.getsockname()[:2] else v6).accept()[0])
kept[3].shutdown(socket.SHUT_WR)
open("/proc/self/comm", "wb").write(b"a\\x1b\\n\\xff")
it = len(kept)
"""


@pytest.fixture
def other() -> Iterator[Puppet]:
    """A process with sockets of all kinds, and a name that lies."""
    with puppet() as process:
        process(SOCKETS)
        yield process


def printed(*words: str) -> Any:
    """The document that a command prints."""
    result = CliRunner().invoke(cli, words, prog_name="kaio")
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def conforms(document: Any, part: str) -> None:
    """Check a document against a part of the schema."""
    jsonschema.validate(document, {"$ref": f"#/$defs/{part}", "$defs": SCHEMA["$defs"]})


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_documents_of_processes(other: Puppet) -> None:
    """The same socket is described in the same words by audit, attach and top."""
    audited = printed("audit", str(other.pid), "--json")
    conforms(audited, "audit")
    attached = printed("attach", str(other.pid), "--json")
    conforms(attached, "attach")
    listed = printed("top", str(other.pid), "--json")
    conforms(listed, "top")
    assert len(audited["sockets"]) == len(attached["sockets"]) == 10
    common = ("pid", "process", "fd", "inode", "family", "mptcp", "local", "peer", "listening", "state")
    by_fd = {row["fd"]: {name: row[name] for name in common} for row in audited["sockets"]}
    assert by_fd == {row["fd"]: {name: row[name] for name in common} for row in attached["sockets"]}
    by_inode = {row["inode"]: (row["local"], row["peer"], row["state"]) for row in audited["sockets"]}
    assert listed["connections"]
    for row in listed["connections"]:
        assert by_inode[row["inode"]] == (row["local"], row["peer"], row["state"])
        assert [each["name"] for each in row["processes"]] == [audited["sockets"][0]["process"]]


def test_other_documents(tmp_path: pathlib.Path) -> None:
    """Source, a test socket with and without a connection, what is enforced."""
    (tmp_path / "a.py").write_text("import socket\nsocket.socket()\n")
    conforms(printed("audit", str(tmp_path), "--json"), "source_audit")
    conforms(printed("check", "--json"), "check")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        conforms(printed("check", f"127.0.0.1:{listener.getsockname()[1]}", "--json"), "check")
    with contextlib.suppress(AssertionError):  # without the right to look
        conforms(printed("enforce", "status", "--json"), "enforce_status")


def test_a_document_of_another_kind_does_not_conform() -> None:
    with pytest.raises(jsonschema.ValidationError):
        conforms({"sockets": [{}]}, "audit")
