"""The three suites: where their tests are, and how they are run."""

from __future__ import annotations

import dataclasses
import glob
import os
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

from .places import Place, PlaceError

__all__ = ["NAMES", "Suite", "prepared"]

NAMES: Final = ("cpython", "uvloop", "anyio")

_WINDOWS: Final = ("test_proactor_events", "test_windows_events", "test_windows_utils")
_SOURCES: Final = ("test_sourcecode",)  # reads uvloop's sources as a linter does

_REQUIREMENTS: Final = (
    "aiohappyeyeballs",
    "aiohttp>=3.10.5",
    "blockbuster>=1.5.29",
    "hypothesis>=6.100",
    "psutil>=5.9",
    "pyOpenSSL~=26.4",
    "pytest>=9",
    "pytest-mock>=3.14",
    "pytest-timeout>=2.4",
    "trustme>=1",
    "truststore>=0.9.1",
)


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite that is ready to run."""

    name: str
    directory: str  # in which its programs run
    modules: tuple[str, ...]  # as its program takes them
    runner: str  # unittest or pytest
    loop: str  # what `substitute` puts in place

    def arguments(self, module: str, job: str) -> tuple[str, ...]:
        """Those of the Python that runs a job."""
        if self.runner == "unittest":
            return ("-m", "scripts.conformance.run_unittest", job)
        # The recorder watches the clock of each test; the suite's own watch would stop some hangs, and go on in others.
        unused = ("-p", "no:cacheprovider", "-o", "timeout=0")
        return ("-m", "pytest", "-p", "scripts.conformance.plugin", "--job", job, *unused, module)


def prepared(place: Place, names: Sequence[str]) -> list[Suite]:
    """Get what the suites need, and say what is in them."""
    libraries = {name: version(name) for name in ("anyio", "uvloop")}  # those that kaio itself is tested with
    place.install([*_REQUIREMENTS, *(f"{name}=={number}" for name, number in libraries.items())])
    suites: list[Suite] = []
    if "cpython" in names:
        suites.append(_cpython(place))
    if "uvloop" in names:
        suites.append(_uvloop(place, libraries["uvloop"]))
    if "anyio" in names:
        suites.append(_anyio(place, libraries["anyio"]))
    return suites


def _cpython(place: Place) -> Suite:
    locate = "import test.test_asyncio as package; print(package.__path__[0])"
    found = subprocess.run([place.python, "-c", locate], capture_output=True, text=True, check=False)
    if found.returncode:
        raise PlaceError(
            f"{place.version} is installed without its tests (test.test_asyncio): use one built from source (pyenv, "
            "python.org), install Debian's libpython3.X-testsuite, or leave the suite out"
        )
    modules = tuple(f"test.test_asyncio.{name}" for name in _modules(found.stdout.strip()) if name not in _WINDOWS)
    return Suite("cpython", place.scratch, modules, "unittest", "class")


def _uvloop(place: Place, number: str) -> Suite:
    directory = place.source("uvloop", number)
    modules = _modules(os.path.join(directory, "tests"))
    return Suite(
        "uvloop", directory, tuple(f"tests.{name}" for name in modules if name not in _SOURCES), "unittest", "class"
    )


def _anyio(place: Place, number: str) -> Suite:
    directory = place.source("anyio", number)
    paths = [f"tests/{name}.py" for name in _modules(os.path.join(directory, "tests"))]
    paths += [f"tests/streams/{name}.py" for name in _modules(os.path.join(directory, "tests", "streams"))]
    return Suite("anyio", directory, tuple(paths), "pytest", "factory")


def _modules(directory: str) -> list[str]:
    return sorted(
        os.path.basename(path).removesuffix(".py") for path in glob.glob(os.path.join(directory, "test_*.py"))
    )
