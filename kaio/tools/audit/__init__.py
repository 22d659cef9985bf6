"""Where Python source makes TCP sockets, clients and servers, and what sets keepalive there.

Rules kept here: source is only parsed, never imported or run, and only one file at a time is looked at. A name means
what it was imported or assigned as where it is used, so that a parameter called `socket` is not the module. What cannot
be told from the file counts as uncovered, what the author hands over in a variable as covered.

    _libraries    the calls that make connections, and what sets keepalive in each
    _reader       the names of a file, and what each is bound to
    _names        what the expressions of a file stand for
    _judge        what covers each place
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
    """A place where source makes a TCP socket, a client or a server; or a file that could not be read."""

    path: str
    line: int
    call: str
    """What is called, by its full name whatever it was imported as; empty when the file could not be read."""
    covered: bool
    why: str
    """What sets keepalive here, or what to do."""


def audit(paths: Sequence[str | os.PathLike[str]]) -> list[Finding]:
    """Look through files, and through the Python files of directories.

    Hidden directories, virtual environments, `__pycache__` and `node_modules` are left out unless given by name. A file
    that does not parse is a finding of its own, without a call. Raises FileNotFoundError for a path that is not there.
    """
    return [finding for path in _files(paths) for finding in _audit_file(path)]


# -- files

_LEFT_OUT: Final = frozenset({"__pycache__", "node_modules", "site-packages"})


def _files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """Each Python file once, under the name by which it was come upon first."""
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
            and name not in _LEFT_OUT
            and not os.path.exists(os.path.join(directory, name, "pyvenv.cfg"))
        )
        yield from (os.path.join(directory, name) for name in sorted(names) if name.endswith((".py", ".pyw")))


def _audit_file(path: str) -> list[Finding]:
    try:
        with open(path, "rb") as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the source's style, which is not ours to judge
            tree = ast.parse(source, path)
        return [Finding(path, *place) for place in Judge(tree).places()]
    except SyntaxError as exc:
        return [Finding(path, exc.lineno or 1, "", False, f"not read, syntax error: {exc.msg}")]
    except OSError as exc:
        return [Finding(path, 1, "", False, f"not read: {exc.strerror}")]
    except (ValueError, RecursionError, MemoryError) as exc:  # null bytes, before Python 3.12; nested too deeply
        return [Finding(path, 1, "", False, f"not read: {str(exc) or type(exc).__name__}")]
