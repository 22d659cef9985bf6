"""What kaio has set on sockets from outside, remembered from one command to the next.

Otherwise the next command would take kaio's own times for the program's, and neither replace nor undo them. A socket is
known by its cookie, which the kernel never uses again before the next boot (SO_COOKIE, socket(7); before Linux 5.10 two
network namespaces may use the same).

Rules kept here: the file is in a directory that only its owner can write to, and is not trusted otherwise: a file that
others could have written, of another boot or without sense is as if it were not there. Without a place for it nothing
is remembered. A socket counts as kaio's only as long as it has exactly the options that are remembered. Sockets
that are closed are forgotten, so that a program with many connections does not fill memory or the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import stat
import time
from collections.abc import Collection, Iterator
from typing import Final

from ...policy import SocketState
from ..locks import lock
from ..procfs import stat_field

__all__ = ["Record", "Records", "start_of"]

_FILE: Final = "attached.json"
_BOOT: Final = "/proc/sys/kernel/random/boot_id"
_PATIENCE: Final = 5.0  # seconds to wait for another command
_LARGEST: Final = 1 << 26  # bytes
_START_TIME: Final = 22  # proc(5), stat: starttime


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What kaio has set on a socket."""

    pid: int
    started: int
    """When the process was started, in the kernel's ticks; the pid may be used again."""
    port: int
    """The local port, if it is a listening socket; else 0."""
    before: SocketState
    """The options that it had before kaio first set any."""
    given: SocketState
    """The options that kaio has set."""
    network: int = 0
    """The network namespace, by its cookie: containers use the same ports."""


class Records:
    """The records of this user: those of earlier commands, which are read once, and new ones, written by `save`."""

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory if directory is not None else _directory()
        self._earlier = self._load()
        self._records = dict(self._earlier)
        self._listeners = {cookie: record for cookie, record in self._records.items() if record.port}
        self._saved = set(self._earlier)
        self._changed: dict[int, Record | None] = {}

    def find(self, cookie: int) -> Record | None:
        """Return what was set on a socket."""
        return self._records.get(cookie) if cookie else None

    def of_listener(self, network: int, port: int, times: object) -> Record | None:
        """Return what was set on a listening socket, if accepted connections inherit these times.

        Also what an earlier command has set, even if it is replaced by now: connections that were accepted before that
        have it.
        """
        for cookie, record in self._listeners.items():
            if (record.network, record.port) == (network, port):
                for each in (record, self._earlier.get(cookie)):
                    if each is not None and each.given.enabled and each.given.times == times:
                        return each
        return None

    def put(self, cookie: int, record: Record) -> None:
        """Remember what was set on a socket."""
        if cookie:
            self._records[cookie] = self._changed[cookie] = record
            if record.port:
                self._listeners[cookie] = record

    def drop(self, cookie: int) -> None:
        """Leave a socket out of the file. It is found until then: accepted connections may have its options."""
        if cookie in self._saved:
            self._changed[cookie] = None
        else:
            self._changed.pop(cookie, None)

    def keep(self, cookies: Collection[int], pids: Collection[int]) -> None:
        """Forget all sockets of these processes but those with these cookies: they are closed.

        But the last listening socket of each port, because the connections that it accepted have its options.
        """
        last = {(each.network, each.port): cookie for cookie, each in self._listeners.items()}
        for cookie, record in list(self._records.items()):
            if record.pid in pids and cookie not in cookies and last.get((record.network, record.port)) != cookie:
                del self._records[cookie]
                self._earlier.pop(cookie, None)
                self._listeners.pop(cookie, None)
                self.drop(cookie)

    def save(self) -> None:
        """Write what has changed since, beside what other commands have written. Raises OSError."""
        if not self._changed or self._directory is None:
            return
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        with self._locked(self._directory):
            records = self._load()
            for cookie, record in self._changed.items():
                if record is None:
                    records.pop(cookie, None)
                else:
                    records[cookie] = record
            starts = {pid: start_of(pid) for pid in {record.pid for record in records.values()}}
            living = {key: each for key, each in records.items() if 0 < starts[each.pid] == each.started}
            _write(os.path.join(self._directory, _FILE), living)
        self._saved.update(living)
        self._saved.difference_update(cookie for cookie, record in self._changed.items() if record is None)
        self._changed.clear()

    def _load(self) -> dict[int, Record]:
        if self._directory is None:
            return {}
        try:
            if not _is_own(os.stat(self._directory)):
                return {}
            with open(os.path.join(self._directory, _FILE), encoding="ascii") as file:
                if not _is_own(os.fstat(file.fileno())) or os.fstat(file.fileno()).st_size > _LARGEST:
                    return {}
                document = json.load(file)
            if document["boot"] != _boot():
                return {}
            return _records(document["sockets"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}

    @staticmethod
    @contextlib.contextmanager
    def _locked(directory: str) -> Iterator[None]:
        """Lock the directory. A lock that is held for too long is not waited for: it protects a convenience."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            lock(descriptor, time.monotonic() + _PATIENCE)
            yield
        finally:
            os.close(descriptor)


def start_of(pid: int) -> int:
    """When a process was started, in the kernel's ticks since boot (proc(5): stat); 0 if there is none."""
    return stat_field(pid, _START_TIME) or 0


def _directory() -> str | None:
    """The directory for the file: as the environment says, root's, or the user's; None if there is none."""
    given = os.environ.get("KAIO_RUNTIME_DIR")
    if given:
        return given
    if os.geteuid() == 0:
        return "/run/kaio"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "kaio") if runtime and os.path.isdir(runtime) else None


def _is_own(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _boot() -> str:
    with open(_BOOT, encoding="ascii") as file:
        return file.read().strip()


def _records(sockets: dict[str, dict[str, object]]) -> dict[int, Record]:
    """Those that make sense: one that does not costs the others nothing."""
    found = {}
    for cookie, values in sockets.items():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            found[int(cookie)] = _record(values)
    return found


def _record(values: dict[str, object]) -> Record:
    pid, started, port = (int(str(values[name])) for name in ("pid", "started", "port"))
    network = int(str(values.get("network", 0)))
    before, given = (values[name] for name in ("before", "given"))
    if min(pid, started, port, network) < 0:
        raise ValueError("pids, times, ports and cookies must not be negative")
    return Record(pid, started, port, _state(before), _state(given), network)


def _state(values: object) -> SocketState:
    if not isinstance(values, dict):
        raise TypeError("options must be objects")
    if not isinstance(values.get("enabled"), bool):
        raise TypeError("keepalive must be on or off")
    state = SocketState(**values)
    if not all(map(_is_option, (*state.times, state.user_timeout))):
        raise ValueError("options must be numbers")
    return state


def _is_option(value: object) -> bool:
    if value is None:
        return True
    # The defaults of a network namespace may be 0 and negative, too.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _write(path: str, records: dict[int, Record]) -> None:
    document = {"boot": _boot(), "sockets": {str(key): dataclasses.asdict(each) for key, each in records.items()}}
    temporary = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        json.dump(document, file)
    os.replace(temporary, path)
