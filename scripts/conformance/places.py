"""Where suites run: an environment and files of their own in a cache, and a network of their own.

Rules kept here: nothing is installed but into the cache, `.conformance/` in the repository. A run sees no address but
loopback's: suites that look up names, or count on free ports, meet neither the Internet nor each other. Where this
system lets nobody make namespaces, they share the machine's network, and that is said.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from typing import Final

__all__ = ["Place", "PlaceError"]

_ROOT: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_CACHE: Final = os.path.join(_ROOT, ".conformance")
_FOREIGN: Final = (
    "PYTHON",
    "PYTEST",
    "KAIO",
    "KEEP",
    "CONFORMANCE",
    "VIRTUAL_ENV",
)  # variables that change what is run
# $0 is a hosts file in which localhost is an address of both families: suites take that for granted.
_INSIDE: Final = 'ip link set lo up && mount --bind "$0" /etc/hosts && exec "$@"'


class PlaceError(Exception):
    """Something that the suites need cannot be had; in one line."""


class Place:
    """What one interpreter's runs share."""

    def __init__(self, python: str) -> None:
        version = _output([python, "-c", "import platform as p; print(p.python_implementation(), p.python_version())"])
        self.version: str = version.strip()
        self.path: str = os.path.join(_CACHE, self.version.replace(" ", "-").lower())
        self.python: str = os.path.join(self.path, "venv", "bin", "python")
        self._base = python
        os.makedirs(self.path, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix="conformance-")
        self.scratch: str = self._scratch.name  # goes with this object
        self._prefix = self._network()

    @property
    def isolated(self) -> bool:
        """Whether runs have a network of their own."""
        return bool(self._prefix)

    def install(self, requirements: Sequence[str]) -> None:
        """Make the environment that has just these packages, unless it is there."""
        stamp = os.path.join(self.path, "requirements")
        wanted = "\n".join(requirements)
        if os.path.exists(stamp) and _text(stamp) == wanted:
            return
        shutil.rmtree(os.path.join(self.path, "venv"), ignore_errors=True)
        _output([self._base, "-m", "venv", os.path.join(self.path, "venv")])
        _output([self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
        with open(stamp, "w", encoding="utf-8") as file:
            file.write(wanted)

    def source(self, name: str, version: str) -> str:
        """The directory of a distribution's tests and configuration, without its code: the installed one is tested."""
        path = os.path.join(self.path, f"{name}-{version}")
        if os.path.exists(path):
            return path
        arguments = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", name, "--dest", self.scratch]
        _output([self.python, "-m", "pip", "download", *arguments, f"{name}=={version}"])
        archives = glob.glob(os.path.join(self.scratch, f"{name}-{version}.tar.gz"))
        if not archives:
            raise PlaceError(f"the index has no source distribution of {name} {version}")
        with tarfile.open(archives[0]) as archive:
            members = [member for member in archive.getmembers() if _is_of_tests(member.name)]
            archive.extractall(f"{path}.new", members=members, filter="data")
        os.rename(os.path.join(f"{path}.new", f"{name}-{version}"), path)
        os.rmdir(f"{path}.new")
        return path

    def command(self, *arguments: str) -> list[str]:
        """A Python with these arguments, in a network of its own."""
        return [*self._prefix, self.python, *arguments]

    def variables(self, loop: str | None) -> dict[str, str]:
        """The environment variables of a run; `loop` is what `substitute` puts in place."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        kept["PYTHONPATH"] = os.pathsep.join((os.path.join(_ROOT, "scripts", "conformance", "site"), _ROOT))
        if loop is not None:
            kept["CONFORMANCE_LOOP"] = loop
        return kept

    def _network(self) -> list[str]:
        hosts = os.path.join(self.scratch, "hosts")
        with open(hosts, "w", encoding="utf-8") as file:
            file.write(f"127.0.0.1 localhost {os.uname().nodename}\n::1 localhost\n")
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        prefix = ["unshare", "--net", "--mount", *user, "sh", "-c", _INSIDE, hosts]
        try:
            _output([*prefix, sys.executable, "-c", ""])
        except PlaceError:
            return []
        return prefix


def _is_of_tests(name: str) -> bool:
    parts = name.split("/")
    return parts[1:2] == ["tests"] or parts[1:] == ["pyproject.toml"]


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as exc:
        raise PlaceError(f"{command[0]}: {exc.strerror}") from None
    if done.returncode:
        complaint = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise PlaceError(f"{' '.join(command)}: {complaint[0]}")
    return done.stdout


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
