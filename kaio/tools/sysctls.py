"""The kernel's own TCP defaults: what they are, setting them all or none, and keeping them over a reboot.

Rules kept here: a value is checked before any is written and read back after; when one fails, the others get back what
they had. The file for the next boot is replaced as a whole or not at all. No terminal.

/proc/sys/net is that of the calling thread's network namespace, and the only way to the values: the system call
sysctl(2) left Linux with 5.5, and the program sysctl(8) goes through /proc/sys like everybody else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fnmatch
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from ..errors import KaioError, PolicyError
from ..policy import MAX_COUNT, MAX_SECONDS

__all__ = [
    "FILE",
    "PROC",
    "SETTINGS",
    "Assignment",
    "Defaults",
    "Persisted",
    "Setting",
    "SysctlError",
    "at_boot",
    "change",
    "check",
    "overriding",
    "parse",
    "persist",
    "persisted",
    "read",
]

PROC: Final = "/proc/sys"
FILE: Final = "etc/sysctl.d/60-kaio.conf"
"""Where the values for the next boot are, below the root directory."""

# By precedence: of files with the same name the first counts. sysctl.d(5) has all but the last, sysctl(8) all.
_DIRECTORIES: Final = ("etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d", "lib/sysctl.d")
_LAST: Final = "etc/sysctl.conf"  # sysctl --system reads it after all of them

_RTO_MIN: Final = 0.2  # seconds; TCP_RTO_MIN in include/net/tcp.h
_RTO_INIT: Final = 1.0  # TCP_TIMEOUT_INIT, RFC 6298 section 2.1


class SysctlError(KaioError, OSError):
    """The kernel, or the file system, does not let a setting be read, changed or kept.

    `errno` is the reason, `strerror` names the setting and the value where there is one, `filename` is the file.
    """


class Setting(NamedTuple):
    """One of the kernel's defaults."""

    field: str
    """What kaio calls it."""
    name: str
    """What the kernel calls it."""
    least: int
    most: int
    unit: str

    @property
    def sysctl(self) -> str:
        """Its name for sysctl(8)."""
        return f"net.ipv4.{self.name}"

    @property
    def path(self) -> str:
        """Its path below /proc/sys."""
        return f"net/ipv4/{self.name}"


# The kernel takes more: on Linux 6.18 -1, 0 and up to INT_MAX / HZ seconds, and 0 to 255 probes. But a socket cannot be
# told such values (EINVAL), and with 0 it probes without a pause or is given up unasked. The retries are the kernel's
# own limits, from net/ipv4/sysctl_net_ipv4.c.
SETTINGS: Final[Mapping[str, Setting]] = {
    setting.field: setting
    for setting in (
        Setting("idle", "tcp_keepalive_time", 1, MAX_SECONDS, "s"),
        Setting("interval", "tcp_keepalive_intvl", 1, MAX_SECONDS, "s"),
        Setting("count", "tcp_keepalive_probes", 1, MAX_COUNT, "probes"),
        Setting("retries2", "tcp_retries2", 0, 255, "retransmissions"),
        Setting("syn_retries", "tcp_syn_retries", 1, 127, "retransmissions"),
    )
}
"""What can be set, by field."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """The kernel's values; as they stand here, those of a Linux that nobody has changed."""

    idle: int = 7200
    """Seconds of silence before the first probe: tcp_keepalive_time."""
    interval: int = 75
    """Seconds between probes: tcp_keepalive_intvl."""
    count: int = 9
    """Unanswered probes that mean death: tcp_keepalive_probes."""
    retries2: int = 15
    """Retransmissions that bound how long data stays unacknowledged: tcp_retries2."""
    syn_retries: int = 6
    """Retransmissions, with growing waits, of a connection's first segment: tcp_syn_retries."""
    syn_linear_timeouts: int = 4
    """Waits of one second before those: tcp_syn_linear_timeouts, since Linux 6.5."""
    rto_max: float = 120.0
    """Seconds between retransmissions at most: tcp_rto_max_ms, since Linux 6.15; fixed before."""

    @property
    def detection_time(self) -> int:
        """Seconds until a dead idle peer is found, on sockets that have keepalive on."""
        return self.idle + self.interval * self.count

    @property
    def retry_waits(self) -> list[float]:
        """Seconds before each retransmission, and from the last one to the end; for a round trip below 200 ms."""
        return _doubling(_RTO_MIN, self.retries2, self.rto_max)

    @property
    def unacknowledged_time(self) -> float:
        """Seconds for which sent data may stay unacknowledged, at least: the kernel looks when a retransmission is due.

        The kernel's own model, tcp_model_timeout() in net/ipv4/tcp_timer.c.
        """
        return sum(self.retry_waits)

    @property
    def syn_waits(self) -> list[float]:
        """Seconds before each further SYN, and from the last one to the end.

        The end is the first time that is not before what the growing waits alone add up to (tcp_write_timeout()).
        """
        growing = _doubling(_RTO_INIT, self.syn_retries, self.rto_max)
        waits: list[float] = []
        for wait in itertools.chain(itertools.repeat(_RTO_INIT, self.syn_linear_timeouts), growing):
            waits.append(wait)
            if sum(waits) >= sum(growing):
                break
        return waits

    @property
    def connecting_time(self) -> float:
        """Seconds until a connection attempt that nobody answers is given up."""
        return sum(self.syn_waits)


def _doubling(first: float, retries: int, most: float) -> list[float]:
    return [min(first * 2**n, most) for n in range(retries + 1)]


# -- what is asked for


def parse(assignments: Iterable[str]) -> dict[str, int]:
    """Values by field, from texts such as `idle=600`, `tcp_keepalive_time=600`, `net.ipv4.tcp_keepalive_time=600`.

    Raises `PolicyError` for what is not known, stands twice, or is out of range.
    """
    given: dict[str, object] = {}
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise PolicyError("setting", text, "must be of the form name=value, such as idle=600")
        field = _field(name, value)
        if field in given:
            raise PolicyError(field, value, "stands twice")
        given[field] = int(value) if re.fullmatch(r"[+-]?[0-9]{1,18}", value) else value
    return check(given)


def check(values: Mapping[str, object]) -> dict[str, int]:
    """The values by field, which may be given by any of their names. Raises `PolicyError`."""
    checked: dict[str, int] = {}
    for name, value in values.items():
        setting = SETTINGS[_field(name, value)]
        if isinstance(value, bool) or not isinstance(value, int) or not setting.least <= value <= setting.most:
            limit = f"must be a whole number from {setting.least} to {setting.most} ({setting.sysctl}, {setting.unit})"
            raise PolicyError(setting.field, value, limit)
        checked[setting.field] = int(value)
    return checked


def _field(name: str, value: object) -> str:
    path = _key(name.removeprefix(f"{PROC}/"))
    for setting in SETTINGS.values():
        if name in (setting.field, setting.name) or path == setting.path:
            return setting.field
    raise PolicyError(name, value, f"is not known; known are {', '.join(SETTINGS)}, and their names for sysctl")


# -- the kernel


def read(proc: str = PROC) -> Defaults:
    """The values of the calling thread's network namespace. Raises `SysctlError`."""
    _require_linux()
    values = {field: _read(setting, proc) for field, setting in SETTINGS.items()}
    linear = _read_number(f"{proc}/net/ipv4/tcp_syn_linear_timeouts", otherwise=0)
    longest = _read_number(f"{proc}/net/ipv4/tcp_rto_max_ms", otherwise=120_000)
    return Defaults(**values, syn_linear_timeouts=linear, rto_max=longest / 1000)


def change(values: Mapping[str, object], *, proc: str = PROC, root: str | None = None) -> Defaults:
    """Set values, all or none, and return what the kernel has then.

    With `root`, the root directory, they are persisted as well; that failing, nothing is changed either. Connections
    that stand, and have no times of their own, follow the new interval and count at their next probe. The wait before
    the first probe is made longer by a longer idle time, and not made shorter by a shorter one.

    Raises `PolicyError` before anything was changed. `SysctlError` when the kernel refuses one or has something else
    afterwards: by then all have what they had before, or the message says which have not.
    """
    wanted = check(values)
    _require_linux()
    before = {field: _read(SETTINGS[field], proc) for field in wanted}
    written: list[str] = []
    try:
        for field, value in wanted.items():
            _write(SETTINGS[field], value, proc)
            written.append(field)
            _compare(SETTINGS[field], value, proc)
        if root is not None:
            persist(wanted, root)
    except BaseException as exc:
        lost = [field for field in reversed(written) if not _put_back(SETTINGS[field], before[field], proc)]
        if lost and isinstance(exc, SysctlError):
            message = f"{exc.strerror}; {', '.join(lost)} could not be put back"
            raise SysctlError(exc.errno, message, exc.filename) from exc
        raise
    return read(proc)


def _require_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise SysctlError(errno.EOPNOTSUPP, f"the kernel's TCP defaults are Linux's here; this is {sys.platform}")


def _read(setting: Setting, proc: str) -> int:
    return _read_number(f"{proc}/{setting.path}")


def _read_number(path: str, otherwise: int | None = None) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except FileNotFoundError as exc:
        if otherwise is not None:
            return otherwise
        raise SysctlError(exc.errno, "this kernel does not show it: is procfs mounted", path) from exc
    except OSError as exc:
        raise SysctlError(exc.errno, str(exc.strerror), path) from exc
    except ValueError as exc:
        raise SysctlError(errno.EINVAL, "is not a number", path) from exc


def _write(setting: Setting, value: int, proc: str) -> None:
    path = f"{proc}/{setting.path}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d\n" % value)
        finally:
            os.close(fd)
    except OSError as exc:
        raise SysctlError(exc.errno, f"{setting.field}={value}: {exc.strerror}", path) from exc


def _compare(setting: Setting, value: int, proc: str) -> None:
    got = _read(setting, proc)
    if got != value:
        message = f"{setting.field}={value}: the kernel has {got} afterwards"
        raise SysctlError(errno.EINVAL, message, f"{proc}/{setting.path}")


def _put_back(setting: Setting, value: int, proc: str) -> bool:
    try:
        _write(setting, value, proc)
        _compare(setting, value, proc)
    except SysctlError:
        return False
    return True


# -- the next boot


class Assignment(NamedTuple):
    """A line of a file of sysctl.d(5)."""

    path: str
    line: int
    key: str
    """Below /proc/sys, with slashes; may be a pattern of glob(7)."""
    value: str | None
    """None: the line takes the key out (`-key`)."""


class Persisted(NamedTuple):
    """What the file holds."""

    values: dict[str, int]
    """By field."""
    others: list[str]
    """Keys that are not kaio's, which it keeps and never applies."""


def persist(values: Mapping[str, object], root: str = "/") -> str:
    """Write values for the next boot into the file, keep all else that is in it, and return its path.

    Whatever happens, the file is the old one or the new one: it is written under another name, synced, and renamed.
    Raises `PolicyError`, `SysctlError`.
    """
    wanted = check(values)
    _require_linux()
    path = os.path.join(root, FILE)
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, exist_ok=True)
        with _locked(directory) as fd:
            if os.path.islink(path):
                raise SysctlError(errno.ELOOP, "is a symbolic link, which masks it; remove it first", path)
            _replace(path, _merged(_content(path), wanted), fd)
    except SysctlError:
        raise
    except OSError as exc:
        raise SysctlError(exc.errno, str(exc.strerror), path) from exc
    return path


def persisted(root: str = "/") -> Persisted:
    """What the file holds. Raises `SysctlError` when there is none, `PolicyError` for values that cannot be."""
    _require_linux()
    path = os.path.join(root, FILE)
    if not os.path.exists(path):
        raise SysctlError(errno.ENOENT, "nothing was persisted", path)
    values: dict[str, int] = {}
    others: list[str] = []
    for assignment in _assignments(path):
        field = _field_of(assignment.key)
        if field is None:
            others.append(assignment.key)
        elif assignment.value is None:
            values.pop(field, None)
        else:
            word = assignment.value.partition(" ")[0]  # the kernel reads as far as the number goes
            try:
                values.update(parse([f"{field}={word}"]))
            except PolicyError as exc:
                raise PolicyError(field, word, f"{exc.limit}, in {path} line {assignment.line}") from None
    return Persisted(values, others)


def at_boot(root: str = "/") -> dict[str, Assignment]:
    """Which line decides each field's value at the next boot, where one does.

    Files go by name whatever their directory, a later one wins, one in a directory of higher precedence hides its
    namesakes; a plain key wins over patterns (sysctl.d(5)); /etc/sysctl.conf comes last (sysctl(8)). Raises
    `SysctlError` for a file that cannot be read.
    """
    return _deciding(_assigned(root))


def overriding(fields: Iterable[str], root: str = "/") -> dict[str, Assignment]:
    """The lines that win over kaio's file at the next boot, by field, were the fields in it. Raises `SysctlError`."""
    own = os.path.join(root, FILE)
    order = {path: number for number, path in enumerate(_files(root, own))}
    kept = [Assignment(own, 0, SETTINGS[field].path, "") for field in fields]
    keys = {line.key for line in kept}
    lines = [line for line in _assigned(root) if line.key in keys and line.path in order and line.path != own]
    deciding = _deciding(sorted([*kept, *lines], key=lambda line: order[line.path]))
    return {field: line for field, line in deciding.items() if line.path != own}


def _deciding(assignments: Iterable[Assignment]) -> dict[str, Assignment]:
    """Which of the lines, in order, decides each field's value."""
    plain: dict[str, Assignment] = {}
    matched: dict[str, Assignment] = {}
    for assignment in assignments:
        for field, setting in SETTINGS.items():
            if assignment.key == setting.path:
                plain[field] = assignment
            elif assignment.value is not None and _matches(setting.path, assignment.key):
                matched[field] = assignment
    return matched | plain


def _assigned(root: str) -> Iterator[Assignment]:
    """All lines that are read at boot, in order."""
    for path in _files(root):
        yield from _assignments(path)


def _files(root: str, *more: str) -> list[str]:
    """The files that are read at boot, in order; with others in their places, whether they are there or not."""
    found = {os.path.basename(path): path for path in more}
    for directory in _DIRECTORIES:
        try:
            names = os.listdir(os.path.join(root, directory))
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise SysctlError(exc.errno, str(exc.strerror), os.path.join(root, directory)) from exc
        for name in names:
            if name.endswith(".conf") and not name.startswith("."):
                found.setdefault(name, os.path.join(root, directory, name))
    paths = [found[name] for name in sorted(found, key=os.fsencode)]
    paths.append(os.path.join(root, _LAST))
    return [path for path in paths if path in more or (os.path.exists(path) and not os.path.isdir(path))]


def _assignments(path: str) -> Iterator[Assignment]:
    try:
        lines = _content(path).split("\n")
    except OSError as exc:
        raise SysctlError(exc.errno, str(exc.strerror), path) from exc
    for number, line in enumerate(lines, 1):
        parsed = _parsed(line)
        if parsed is not None:
            yield Assignment(path, number, *parsed)


def _parsed(line: str) -> tuple[str, str | None] | None:
    """The key and the value of a line; None for comments and for what is no assignment."""
    text = line.strip()
    if not text or text[0] in "#;":
        return None
    name, equals, value = (part.strip() for part in text.partition("="))
    if equals:
        return _key(name.removeprefix("-")), value
    return (_key(name[1:]), None) if name.startswith("-") else None


def _key(name: str) -> str:
    """A key with slashes. Where its first separator is a dot, dots and slashes have changed places (sysctl.d(5))."""
    first = re.search(r"[./]", name)
    return name.translate(_SWAP) if first is not None and first[0] == "." else name


_SWAP: Final = str.maketrans("./", "/.")


def _field_of(key: str) -> str | None:
    return next((field for field, setting in SETTINGS.items() if setting.path == key), None)


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern of glob(7) means a path: its wildcards stay within a component."""
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _content(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return "# Values that kaio keeps; whatever else is here stays as it is.\n"


def _merged(content: str, wanted: Mapping[str, int]) -> str:
    """The content with the wanted values: each in the place of its first line, or at the end."""
    rest = dict(wanted)
    lines: list[str] = []
    for line in content.removesuffix("\n").split("\n") if content else ():
        parsed = _parsed(line)
        field = _field_of(parsed[0]) if parsed is not None else None
        if field is None or field not in wanted:
            lines.append(line)
        elif field in rest:
            lines.append(f"{SETTINGS[field].sysctl} = {rest.pop(field)}")
    lines += [f"{SETTINGS[field].sysctl} = {value}" for field, value in rest.items()]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[int]:
    """A descriptor of the directory, for one at a time: who else persists, waits, so that no one's values are lost."""
    import fcntl  # noqa: PLC0415 - not on Windows

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _replace(path: str, content: str, directory: int) -> None:
    """Put a new content in the place of a file, for good; `directory` is a descriptor of where it is."""
    # Not *.conf, which sysctl(8) would load; always the same, so that a process that was killed leaves one at most.
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        with open(temporary, "x", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    os.fsync(directory)  # the rename itself, too
