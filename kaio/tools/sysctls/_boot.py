"""The files of sysctl.d(5): persisting values for the next boot, and which line decides a value at boot.

Rules kept here: kaio's file is replaced atomically; lines for other settings are kept.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from ...errors import PolicyError
from ..locks import lock
from ._settings import SETTINGS, SysctlError, check, field_of, parse, path_of, require_linux

__all__ = [
    "DIRECTORIES",
    "FILE",
    "Assignment",
    "Persisted",
    "at_boot",
    "overriding",
    "persist",
    "persisted",
    "persisting",
]

FILE: Final = "etc/sysctl.d/60-kaio.conf"
"""The file for the values at the next boot, relative to the root directory."""

# By precedence: of several files with one name, only the first is read. sysctl.d(5) lacks the last one.
DIRECTORIES: Final = ("etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d", "lib/sysctl.d")
_LOCK: Final = "run/kaio/sysctl.lock"
_PATIENCE: Final = 5.0  # seconds to wait for another command
_LAST: Final = "etc/sysctl.conf"  # sysctl --system reads it after all of them


class Assignment(NamedTuple):
    """A line of a file of sysctl.d(5)."""

    path: str
    line: int
    key: str
    """A path relative to /proc/sys, or a glob(7) pattern of paths."""
    value: str | None
    """None: the line excludes the key (`-key`)."""


class Persisted(NamedTuple):
    """The content of kaio's file."""

    values: dict[str, int]
    """By field."""
    others: list[str]
    """Keys of other settings, which kaio keeps and never applies."""


def persist(values: Mapping[str, object], root: str = "/") -> str:
    """Write values for the next boot to kaio's file, keep its other lines, and return its path.

    The replacement is atomic: the new file is written under another name, synced and renamed.
    Raises `PolicyError`, `SysctlError`.
    """
    wanted = check(values)
    with persisting(root) as write:
        return write(wanted)


@contextlib.contextmanager
def persisting(root: str) -> Iterator[Callable[[Mapping[str, int]], str]]:
    """Lock kaio's file, and yield a function that writes values as `persist` does.

    What is done within the block is done by one command at a time. Raises `SysctlError`, before the block if the file
    cannot be locked or written to.
    """
    require_linux()
    path = os.path.join(root, FILE)
    directory = os.path.dirname(path)

    def write(wanted: Mapping[str, int]) -> str:
        try:
            if os.path.islink(path):
                raise SysctlError(errno.ELOOP, "is a symbolic link, which masks the file; remove it first", path)
            _replace(path, _merged(_content(path), wanted))
        except SysctlError:
            raise
        except OSError as exc:
            raise SysctlError(exc.errno, str(exc.strerror), path) from exc
        return path

    try:
        os.makedirs(directory, exist_ok=True)
        held = _locked(os.path.join(root, _LOCK))
    except SysctlError:
        raise
    except OSError as exc:
        raise SysctlError(exc.errno, str(exc.strerror), path) from exc
    try:
        yield write
    finally:
        os.close(held)


def persisted(root: str = "/") -> Persisted:
    """Read kaio's file. Raises `SysctlError` when it does not exist, `PolicyError` for invalid values."""
    require_linux()
    path = os.path.join(root, FILE)
    if not os.path.exists(path):
        raise SysctlError(errno.ENOENT, "no values are persisted", path)
    values: dict[str, int] = {}
    others: list[str] = []
    for assignment in _assignments(path):
        field = field_of(assignment.key)
        if field is None:
            others.append(assignment.key)
        elif assignment.value is None:
            values.pop(field, None)
        else:
            word = assignment.value.partition(" ")[0]  # the kernel ignores what follows the number
            try:
                values.update(parse([f"{field}={word}"]))
            except PolicyError as exc:
                raise PolicyError(field, word, f"{exc.limit}, in {path} line {assignment.line}") from None
    return Persisted(values, others)


def at_boot(root: str = "/") -> dict[str, Assignment]:
    """Return the line that decides each field's value at the next boot; fields without such a line are left out.

    Files are read in the order of their names, whatever their directory, and the last value wins. A file hides those of
    the same name in directories of lower precedence; a plain key wins over patterns (sysctl.d(5)); /etc/sysctl.conf is
    read last (sysctl(8)). Raises `SysctlError` for a file that cannot be read.
    """
    return _deciding(_assigned(root))


def overriding(fields: Iterable[str], root: str = "/") -> dict[str, Assignment]:
    """Return the lines that would override these fields of kaio's file at boot, by field. Raises `SysctlError`."""
    own = os.path.join(root, FILE)
    order = {path: number for number, path in enumerate(_files(root, own))}
    kept = [Assignment(own, 0, SETTINGS[field].path, "") for field in fields]
    keys = {line.key for line in kept}
    lines = [line for line in _assigned(root) if line.key in keys and line.path in order and line.path != own]
    deciding = _deciding(sorted([*kept, *lines], key=lambda line: order[line.path]))
    return {field: line for field, line in deciding.items() if line.path != own}


def _deciding(assignments: Iterable[Assignment]) -> dict[str, Assignment]:
    """Return which of the lines, in order, decides each field's value."""
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
    """Iterate over all lines that are read at boot, in order."""
    for path in _files(root):
        yield from _assignments(path)


def _files(root: str, *more: str) -> list[str]:
    """List the files that are read at boot, in order, with `more` in their places even if they do not exist."""
    found = {os.path.basename(path): path for path in more}
    for directory in DIRECTORIES:
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
    """Return the path and the value of a line; None for comments and lines that assign nothing."""
    text = line.strip()
    if not text or text[0] in "#;":
        return None
    name, equals, value = (part.strip() for part in text.partition("="))
    if equals:
        return path_of(name.removeprefix("-")), value
    return (path_of(name[1:]), None) if name.startswith("-") else None


def _matches(path: str, pattern: str) -> bool:
    """Whether a glob(7) pattern matches a path; wildcards do not match slashes."""
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _content(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return "# Values that kaio keeps; whatever else is here stays as it is.\n"


def _merged(content: str, wanted: Mapping[str, int]) -> str:
    """Return the content with the wanted values, each in place of its first line, or at the end."""
    rest = dict(wanted)
    lines: list[str] = []
    for line in content.removesuffix("\n").split("\n") if content else ():
        parsed = _parsed(line)
        field = field_of(parsed[0]) if parsed is not None else None
        if field is None or field not in wanted:
            lines.append(line)
        elif field in rest:
            lines.append(f"{SETTINGS[field].sysctl} = {rest.pop(field)}")
    lines += [f"{SETTINGS[field].sysctl} = {value}" for field, value in rest.items()]
    return "\n".join(lines) + "\n"


def _locked(path: str) -> int:
    """Lock the lock file, so that concurrent calls do not lose each other's values; return its descriptor.

    Only its owner can open that file. What others may read, as files and directories in /etc, they can lock for ever.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if not lock(fd, time.monotonic() + _PATIENCE):
            raise SysctlError(errno.EAGAIN, f"is locked{_by_whom(fd)}; nothing was changed", path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _by_whom(fd: int) -> str:
    """Who holds the lock of a file, in words, if /proc/locks tells."""
    found = os.fstat(fd)
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError), open("/proc/locks", encoding="ascii") as file:
        for words in map(str.split, file):
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == place:
                return f" by process {words[4]}"
    return ""


def _replace(path: str, content: str) -> None:
    """Replace a file's content atomically and durably."""
    # Not *.conf, which sysctl(8) would load. A fixed name, so that killed processes leave one file at most.
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
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # makes the rename durable
    finally:
        os.close(directory)
