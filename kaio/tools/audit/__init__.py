"""The places in Python source that make TCP sockets, clients and servers, and what sets keepalive there.

Rules kept here: source is parsed, never imported or run, one file at a time. A name refers to what it was imported or
assigned as where it is used, so that a parameter called `socket` is not the module. A place that cannot be judged from
the file counts as uncovered; a setting that comes from a variable counts as on.

    _libraries    the calls that make connections, and what sets keepalive in each
    _kaio         kaio's own names
    _scopes       scopes and bindings, and the bindings that reach a place
    _reader       one pass through a file's tree, which collects them
    _calls        the arguments of calls
    _names        what the expressions of a file refer to
    _values       the values of arguments
    _evidence     what is done with each connection
    _judge        the verdict on each place
"""

from __future__ import annotations

import ast
import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Final

from ._judge import Judge

__all__ = ["Finding", "audit"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A place that makes a TCP socket, a client or a server; or a file that could not be read."""

    path: str
    line: int
    call: str
    """The full name of what is called, whatever it was imported as; empty when the file could not be read."""
    covered: bool
    why: str
    """What sets keepalive here, or what to do about it."""


def audit(paths: Sequence[str | os.PathLike[str]]) -> list[Finding]:
    """Audit files, and the Python files of directories.

    Hidden directories, virtual environments, `__pycache__` and `node_modules` are skipped unless named explicitly. A
    file that cannot be read or parsed is one finding, with an empty `call`.

    Raises FileNotFoundError for a path that does not exist.
    """
    return [finding for path in _files(paths) for finding in _audit_file(path)]


# -- files

_SKIPPED: Final = frozenset({"__pycache__", "node_modules", "site-packages"})


def _files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """Each Python file once, under the first name it was found by."""
    seen: set[str] = set()
    for given in [os.fspath(path) for path in paths]:
        os.stat(given)
        for path in _walk(given) if os.path.isdir(given) else (given,):
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                yield path


def _walk(top: str) -> Iterator[str]:
    for directory, below, names in os.walk(top):
        below[:] = sorted(
            name
            for name in below
            if not name.startswith(".")
            and name not in _SKIPPED
            and not os.path.exists(os.path.join(directory, name, "pyvenv.cfg"))
        )
        yield from (os.path.join(directory, name) for name in sorted(names) if name.endswith((".py", ".pyw")))


def _audit_file(path: str) -> list[Finding]:
    try:
        with open(path, "rb") as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarnings about the audited source are of no interest here
            tree = ast.parse(source, path)
    except SyntaxError as exc:
        return [Finding(path, exc.lineno or 1, "", False, f"cannot be read, syntax error: {exc.msg}")]
    except OSError as exc:
        return [Finding(path, 1, "", False, f"cannot be read: {exc.strerror}")]
    except (ValueError, RecursionError, MemoryError) as exc:  # null bytes before Python 3.12; nested too deeply
        return [Finding(path, 1, "", False, f"cannot be read: {str(exc) or type(exc).__name__}")]
    try:
        return [Finding(path, *place) for place in Judge(tree).places()]
    except RecursionError as exc:  # ast.unparse of a deeply nested expression
        return [Finding(path, 1, "", False, f"cannot be read: {exc}")]
