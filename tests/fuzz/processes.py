"""Who a process is: its parents, its name, its unit, what its environment asks for; what kaio has set on sockets."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from hypothesis import strategies as st

from kaio.policy import Keepalive, SocketState
from kaio.tools import procfs
from kaio.tools.processes import _environment, _naming, _records

from .files import replaced, said
from .inputs import HOSTILE, edited, linear, names, pieces, text_of
from .search import Property

__all__ = ["PROPERTIES", "Program"]

_PID: Final = 4_194_303
_COMM: Final = 15  # bytes of a process's name


# -- /proc/PID/stat

_COMMS: Final = st.one_of(names(_COMM), st.sampled_from([b"a) S 1 (b", b")", b"(", b") ", b"a\nb) R 1", b"\r) Z 1 1"]))


def _stat(comm: bytes, parent: int, started: int) -> bytes:
    """Write it as fs/proc/array.c does: nothing in the name is escaped."""
    return b"7 (%s) S %d %s %d 0 0\n" % (comm, parent, b" ".join([b"0"] * 17), started)


def _stat_is_read(example: tuple[bytes, int, int]) -> None:
    files = {f"/proc/{_PID}/stat": _stat(*example)}
    with said(procfs, files), replaced(_naming, all_pids=lambda: [_PID]):
        assert _naming.parents() == {_PID: example[1]}
        assert _records.start_of(_PID) == example[2]


def _any_stat(data: bytes) -> None:
    files = {f"/proc/{_PID}/stat": data}
    with said(procfs, files), replaced(_naming, all_pids=lambda: [_PID]):
        assert all(isinstance(parent, int) for parent in _naming.parents().values())
        assert isinstance(_records.start_of(_PID), int)


_STAT_TOKENS: Final = (b"7 (", b") ", b"S ", b"1 ", b"-1 ", b"9" * 5000, b"\xd9\xa3", b"0 " * 19, *HOSTILE)


def _descendants_are_found(example: tuple[Sequence[int], int]) -> None:
    """Parents are given as the earlier process that each descends from."""
    parents = {pid: parent % pid for pid, parent in enumerate(example[0], 1)}
    top = example[1] % (len(parents) + 1)
    right = {top}
    for pid, parent in parents.items():
        if parent in right:
            right.add(pid)
    with replaced(_naming, parents=lambda: parents):
        assert _naming.descendants([top]) == sorted(right - {top})


def _follow_a_chain(links: str) -> None:
    """Every process but the first is the child of the one before."""
    with replaced(_naming, parents=lambda: {pid: pid + 1 for pid in range(len(links))}):
        assert len(_naming.descendants([len(links)])) == len(links)


# -- names and units


class Program(NamedTuple):
    """A running program."""

    name: bytes
    """Of its file."""

    def find(self, word: bytes) -> bool:
        """Whether kaio finds it by a word of the command line."""
        files = {f"/proc/{_PID}/comm": self.name[:_COMM] + b"\n", f"/proc/{_PID}/cmdline": b"/bin/" + self.name + b"\0"}
        with said(procfs, files), said(_naming, files):
            return _naming._is_called(_PID, os.fsdecode(word))


_FILE_NAMES: Final = st.one_of(
    names(40, b"\0/"), st.text("aé\u2028", min_size=10, max_size=20).map(str.encode), st.just(b"x" * 40)
)


def _programs_are_found_by_name(example: tuple[bytes, bytes]) -> None:
    name, other = example
    assert Program(name).find(name)
    assert Program(name).find(other) == (other in (name, name[:_COMM]))


_UNITS: Final = st.sampled_from(
    [b"a.service", b"b.service", b"a.slice", b"x\ra.service", b"a.service\r", b"1:x:", b"\r"]
)
_GROUPS: Final = st.lists(
    st.tuples(st.sampled_from([b"0::", b"1:name=systemd:", b"5:cpu,cpuacct:"]), st.lists(_UNITS, max_size=3)),
    max_size=3,
)


def _units_are_found(groups: Sequence[tuple[bytes, Sequence[bytes]]]) -> None:
    content = b"".join(hierarchy + b"/" + b"/".join(parts) + b"\n" for hierarchy, parts in groups)
    with said(_naming, {f"/proc/{_PID}/cgroup": content}):
        for unit in ("a.service", "b.service", "c.service"):
            right = any(unit.encode() in parts for _, parts in groups)
            assert _naming._in_unit(_PID, unit) == right


# -- the environment

_ENVIRON_TOKENS: Final = (
    *(name.encode() + b"=" for name in _environment.VARIABLES),
    *(b"\0", b"=", b"off", b"on", b"20s:10s:4", b"20", b"9" * 300, b"PATH=/bin", b"nginx: worker process", *HOSTILE),
)


def _environment_is_heeded(data: bytes) -> None:
    with said(_environment, {f"/proc/{_PID}/environ": data}):
        found = _environment.choice(_PID, {})
        found_as_ours = _environment.choice(_PID, _environment._environment(_PID))
    assert found_as_ours is None
    assert found is None or "its environment has " in found.why
    assert found is None or found.policy is None or isinstance(found.policy, Keepalive)


_VARIABLES: Final = st.dictionaries(
    st.sampled_from(_environment.VARIABLES), text_of(["off", "on", "20", ":", "s", "4"], 3), max_size=5
).map(lambda given: {name: value.replace("\0", "") for name, value in given.items()})


def _variables_are_read(given: Mapping[str, str]) -> None:
    given = {name: os.fsdecode(value.encode("utf-8", "replace")) for name, value in given.items()}
    data = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in given.items())
    with said(_environment, {f"/proc/{_PID}/environ": b"A=b\0" + data + b"Z=\0"}):
        assert _environment._environment(_PID) == given


# -- what kaio has set

_BOOT: Final = b"7a8f\n"
_PLAIN: Final = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4))
_STATES: Final = st.fixed_dictionaries(
    {"enabled": st.one_of(st.booleans(), _PLAIN)},
    optional={name: st.one_of(st.integers(1, 60), _PLAIN) for name in ("idle", "count", "user_timeout", "x")},
)
_FIELDS: Final = st.fixed_dictionaries(
    {name: st.one_of(st.just(7), st.just(7), _PLAIN) for name in ("pid", "started", "port")}
    | {name: st.one_of(_STATES, _STATES, _PLAIN) for name in ("before", "given")}
)
_COOKIES: Final = st.one_of(st.just("1"), st.sampled_from(["2", "-1", "9" * 5000, "x"]), st.text(max_size=3))
_DOCUMENTS: Final = st.one_of(
    st.fixed_dictionaries({"boot": st.just("7a8f"), "sockets": st.dictionaries(_COOKIES, _FIELDS, max_size=3)}),
    st.fixed_dictionaries({"boot": st.just("7a8f"), "sockets": st.one_of(_PLAIN, st.lists(_PLAIN))}),
    st.lists(_PLAIN),
)


def _records_make_sense(document: Any) -> None:
    _any_records(json.dumps(document).encode())


def _any_records(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, _records._FILE), "wb") as file:
            file.write(content)
        with replaced(_records, _boot=_BOOT.decode().strip):
            records = _records.Records(directory)._earlier
    for record in records.values():
        for number in (record.pid, record.started, record.port):
            assert number >= 0
        for state in (record.before, record.given):
            assert isinstance(state.enabled, bool)
            for value in (*state.times, state.user_timeout):
                assert value is None or type(value) in (int, float)
                assert value is None or (math.isfinite(value) and value > 0)
            assert str(state)


_SECONDS: Final = st.one_of(st.none(), st.integers(1, 32767))
_SOCKET_STATES: Final = st.builds(
    SocketState, enabled=st.booleans(), idle=_SECONDS, interval=_SECONDS, count=_SECONDS, user_timeout=_SECONDS
)
_RECORDS: Final = st.dictionaries(
    st.integers(1, 2**64 - 1),
    st.builds(
        _records.Record,
        st.integers(1, 2**22),
        st.integers(1, 2**40),
        st.integers(0, 65535),
        _SOCKET_STATES,
        _SOCKET_STATES,
    ),
    max_size=4,
)


def _records_are_read(records: dict[int, _records.Record]) -> None:
    with tempfile.TemporaryDirectory() as directory, replaced(_records, _boot=_BOOT.decode().strip):
        _records._write(os.path.join(directory, _records._FILE), records)
        assert _records.Records(directory)._earlier == records


_JSON_TOKENS: Final = (
    b'{"boot": "7a8f", "sockets": {',
    b"}",
    b"[" * 3000,
    b'"1": ',
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"null",
)

PROPERTIES: Final = (
    Property(
        "stat: what the kernel writes", st.tuples(_COMMS, st.integers(0, 2**22), st.integers(1, 2**40)), _stat_is_read
    ),
    Property("stat: any bytes", pieces(_STAT_TOKENS), _any_stat),
    Property("stat: what was valid", edited(st.builds(_stat, _COMMS, st.just(1), st.just(5)), _STAT_TOKENS), _any_stat),
    linear("stat: time", pieces(_STAT_TOKENS), pieces(_STAT_TOKENS), _any_stat),
    Property(
        "descendants: of any tree",
        st.tuples(st.lists(st.integers(0, 50), max_size=50), st.integers(0, 50)),
        _descendants_are_found,
    ),
    linear("descendants: time", st.just(""), st.just("x"), _follow_a_chain),
    Property("names: a program is found by its own", st.tuples(_FILE_NAMES, _FILE_NAMES), _programs_are_found_by_name),
    Property("units: a component of a cgroup's path", _GROUPS, _units_are_found),
    Property("environ: any bytes", pieces(_ENVIRON_TOKENS), _environment_is_heeded),
    Property("environ: what a program has", _VARIABLES, _variables_are_read),
    linear("environ: time", pieces(_ENVIRON_TOKENS), pieces(_ENVIRON_TOKENS), _environment_is_heeded),
    Property("records: only what makes sense", _DOCUMENTS, _records_make_sense),
    Property("records: any bytes", pieces(_JSON_TOKENS), _any_records),
    Property("records: what was written", _RECORDS, _records_are_read),
)
