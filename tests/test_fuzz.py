"""The parsers with random input (tests/fuzz), for a moment each, and with what was found by it."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

import pytest
from hypothesis import strategies as st

from kaio.tools.bpf import BpfError, field_offsets
from kaio.tools.processes import _access, _watched
from kaio.tools.procfs import process_name
from kaio.tools.sockdiag._answer import decode

from .fuzz import netlink, proc, types
from .fuzz.inputs import linear
from .fuzz.run import PROPERTIES, main
from .fuzz.search import search

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and netlink are Linux's")

SEED: Final = 1


@pytest.mark.parametrize("name", PROPERTIES)
def test_every_property_holds(name: str) -> None:
    """`make fuzz` searches for longer."""
    sought = PROPERTIES[name]
    outcome = search(sought, seed=SEED, examples=40 if sought.shrinks else 5)
    assert outcome.failure is None, outcome.failure


END: Final = struct.pack("=IHHIIi", 20, 2, 0, 0, 0, -(2**31))  # an error number that no kernel has
SHORT: Final = struct.pack("=IHHII", 16, 20, 0, 0, 0)
CUT_OFF: Final = struct.pack("=IHHII", 4096, 20, 0, 0, 0)
EMPTY: Final = netlink.message(20, bytes(72) + netlink.attribute(2, b""))
BEYOND: Final = netlink.message(20, bytes(72) + struct.pack("=HH", 65535, 2) + b"info") + netlink.message(1, bytes(99))

RECORDS: Final[dict[str, Any]] = {"boot": "7a8f"}
PLAIN: Final = {"pid": 7, "started": 7, "port": 0, "before": {"enabled": True}, "given": {"enabled": True}}
ODD: Final = PLAIN | {"before": {"enabled": True, "idle": "20s"}}
BELOW_ZERO: Final = PLAIN | {"pid": -1}

FOUND: Final[Mapping[str, tuple[str, Any]]] = {
    "a carriage return in a process's name": ("comm: a name is read as it is", b"a\rb"),
    "a newline at the end of a process's name": ("comm: a name is read as it is", b"a\n"),
    "a process's name that looks like a line": (
        "status: what the kernel writes",
        proc.Status(b"a\rNSpid:\t7", [1], [0, 0, 0, 0], 0),
    ),
    "a status without capabilities": ("status: any bytes", b"CapPrm:\n"),
    "a status with words for ids": ("status: any bytes", b"Uid:\tx\t9\n"),
    "an id of 5,000 digits": ("status: any bytes", b"NSpid:\t" + b"9" * 5000 + b"\n"),
    "other digits in a link": ("descriptors: sockets, and nothing else", [proc.Link("socket:[\u0663]", None)]),
    "a mount point with a carriage return": (
        "mountinfo: what the kernel writes",
        [proc.Mount(b"/", b"/a\rb", [], b"cgroup2", b"none")],
    ),
    "a line of mountinfo that is cut short": ("mountinfo, cgroup: any bytes", b" - cgroup2 "),
    "a cgroup's name that looks like a line": (
        "cgroup: what the kernel writes",
        proc.Membership([b"/x\r0::/y"], b"/z", b"/"),
    ),
    "a cgroup outside of the namespace": ("cgroup: what the kernel writes", proc.Membership([], b"/..", b"/")),
    "a program whose name is cut within a character": (
        "names: a program is found by its own",
        (b"x" * 14 + "é".encode() * 3, b"y"),
    ),
    "a program's name that is not UTF-8": ("names: a program is found by its own", (b"\x80", b"y")),
    "a unit beside a cgroup with a carriage return": (
        "units: a component of a cgroup's path",
        [(b"0::", [b"x\ra.service"])],
    ),
    "a record with a word for a time": ("records: only what makes sense", RECORDS | {"sockets": {"1": ODD}}),
    "a record of a process below zero": ("records: only what makes sense", RECORDS | {"sockets": {"1": BELOW_ZERO}}),
    "a file named cgroup.procs": ("cgroup.procs: any bytes", b"sa\xb9\n"),
    "a process below zero": ("cgroup.procs: any bytes", b"-1\n"),
    "an error number out of range": ("netlink: any bytes", END),
    "a message without a body": ("netlink: any bytes", SHORT),
    "a message that is cut off": ("netlink: any bytes", CUT_OFF),
    "a connection with an empty tcp_info": ("netlink: any bytes", EMPTY),
    "a field whose name the kernel does not know": (
        "BTF: fields are where the table says",
        ([types.Structure(b"sock", [(b"", 64)])], "sock", ["mark"]),
    ),
    "a structure whose name the kernel does not know": (
        "BTF: fields are where the table says",
        ([types.Structure(b"", [(b"mark", 64)])], "sock", ["mark"]),
    ),
    "a host with an empty label": ("address: any text", "a..b:80"),
    "a host with a label of 64 letters": ("address: any text", f"{'a' * 64}:80"),
    "a host with an escape": ("address: any text", "\x1bc:80"),
    "a host with a control character": ("address: any text", "a\x08:80"),
    "a host with half a character": ("address: any text", "\udc80:80"),
    "a zone with a NUL": ("address: any text", "[fe80::1%a\0]:80"),
    "a zone with a space": ("address: any text", "[fe80::1%a b]:80"),
    "a zone with an empty label": ("address: any text", "[fe80::1%a..b]:80"),
    "a host beside its port that is no host": ("address: any host and port", ("a b", 80)),
    "a zone beside its port that is empty": ("address: any host and port", ("fe80::1%", 80)),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str) -> None:
    """Each was found at random, and made as simple as it can be."""
    sought, example = FOUND[name]
    PROPERTIES[sought].check(example)


@pytest.mark.parametrize(
    "name", [b"a\rNSpid:\t7", b"a\nb", b"a\n", b"\\n\\", b"\xff\xfe", b"a\x85b", "\u2028".encode()]
)
def test_names_of_real_processes_are_read_as_they_are(name: bytes) -> None:
    """And no name passes for another line of /proc/PID/status."""
    program = (
        "import ctypes, sys; ctypes.CDLL(None).prctl(15, bytes.fromhex(sys.argv[1]), 0, 0, 0);"
        " print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, name.hex()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert process_name(child.pid) == name.decode("utf-8", "replace")
        assert _watched._own_pid(child.pid) == child.pid
        assert _access._status(child.pid)["Tgid"] == str(child.pid)
        child.communicate()


@pytest.mark.may_skip
@pytest.mark.skipif(not types.running(), reason="the kernel has no type information")
@pytest.mark.parametrize(
    ("structure", "fields"),
    [("sock", ["no_such_field"]), ("sock", ["sk_mark", "no_such_field"]), ("no_such_struct", ["next"])],
)
def test_fields_that_the_running_kernel_lacks_are_refused(structure: str, fields: list[str]) -> None:
    """Not taken for an anonymous field, so that a program would write into another one."""
    with pytest.raises(BpfError, match="does not have"):
        field_offsets(structure, fields)


def test_a_long_chain_of_processes_is_followed_in_no_time() -> None:
    """Each process is looked at once: any user can start thousands, each the child of the one before."""
    began = time.thread_time()
    PROPERTIES["descendants: time"].check(("", "x", ""))
    assert time.thread_time() - began < 60


def test_an_attribute_ends_with_its_message() -> None:
    """Whatever length it says, the next message is no part of it."""
    [answer] = decode(BEYOND, ()).answers
    assert answer.info == b"info"


def test_a_broken_parser_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The program prints the example and exits with 1."""
    monkeypatch.setattr("kaio.addresses._is_host", lambda host: True)
    assert main(["--only", "address: any text before a port", "--minutes", "0.2", "--seed", "1"]) == 1
    said = capsys.readouterr().out
    assert "BROKEN" in said
    assert "example=" in said
    assert "1 of 1 properties broken" in said


def test_an_undocumented_error_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Even if it is the base class of what is documented."""

    def refuse(host: str) -> bool:
        raise ValueError(host)

    monkeypatch.setattr("kaio.addresses._is_host", refuse)
    assert main(["--only", "address: any text before a port", "--minutes", "0.2", "--seed", "1"]) == 1
    assert "ValueError" in capsys.readouterr().out


def test_quadratic_time_is_found() -> None:
    """And linear time, however slow, is not."""

    def quadratic(data: bytes) -> None:
        while data:
            data = data[8:]

    def slow(data: bytes) -> None:
        for _ in data:
            pass

    unit = st.just(b"x")
    found = search(linear("quadratic", unit, unit, quadratic), seed=SEED, examples=3)
    assert found.failure is not None
    assert "AssertionError" in found.failure
    assert search(linear("slow", unit, unit, slow), seed=SEED, examples=3).failure is None


def test_every_name_is_given_once_and_says_whose_parser_it_is() -> None:
    """The table of the run is read by them."""
    assert len(PROPERTIES) > 40
    assert all(": " in name for name in PROPERTIES)


def test_a_run_without_findings_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints how many examples were tried."""
    assert main(["--only", "time: what", "--minutes", "0.001"]) == 0
    assert "0 of 1 properties broken" in capsys.readouterr().out


def test_an_unknown_property_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Rather than a run of nothing."""
    with pytest.raises(SystemExit) as caught:
        main(["--only", "no such"])
    assert caught.value.code == 2
    assert "no property has 'no such' in its name" in capsys.readouterr().err
