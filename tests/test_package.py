"""The package as a whole: its rows, its names, and what importing it does."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

import kaio

from .import_graph import FILES, GRAPH, ROOMS, by_rooms, imported, longest_chain, report, room_of

WITHOUT_NAMES = [name for name, path in FILES.items() if len(ast.parse(path.read_text("utf-8")).body) == 1]
"""Packages that have a map of what is in them, and no names of their own."""
PUBLIC = [
    name for name in FILES if name not in WITHOUT_NAMES and not any(part.startswith("_") for part in name.split("."))
]
FLOORS = 10  # of rooms, fewer than
CHAIN = 14  # of modules, fewer than; a change that makes it shorter lowers this


@pytest.mark.parametrize("module", FILES)
def test_each_module_imports_only_from_rooms_below(module: str) -> None:
    """The map in kaio/__init__.py is true; a room that is added gets its place in ROOMS."""
    floor = {room: number for number, room in enumerate(ROOMS)}
    assert {other for other in GRAPH[module] if floor[room_of(other)] > floor[room_of(module)]} == set()


def test_imports_have_no_cycle() -> None:
    """Every module can be imported first."""
    try:
        order = list(TopologicalSorter(GRAPH).static_order())
    except CycleError as exc:
        pytest.fail(f"modules import each other: {exc.args[1]}")
    assert order.index("kaio.errors") < order.index("kaio.policy") < order.index("kaio.loop.factories")


def test_the_house_is_low() -> None:
    """The import graph by rooms, printed (pytest -s shows it); few rooms stand on each other, and few modules."""
    print(report())
    rooms = by_rooms(GRAPH)
    del rooms["__main__"]  # a file that calls cli
    assert len(longest_chain(rooms)) < FLOORS
    assert len(longest_chain(GRAPH)) < CHAIN


@pytest.mark.parametrize("module", FILES)
def test_private_modules_are_imported_from_their_own_package(module: str) -> None:
    """A module with an underscore is nobody else's; ruff's SLF rules say the same of attributes."""
    for other in GRAPH[module]:
        parts = other.split(".")
        for number, part in enumerate(parts):
            if part.startswith("_") and not part.startswith("__"):
                package = ".".join(parts[:number])
                assert module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("module", FILES)
def test_private_names_are_imported_by_nobody(module: str) -> None:
    """What another module needs has a public name."""
    tree = ast.parse(FILES[module].read_text("utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    private = {name for name in names if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if not any(other.endswith(f".{name}") for other in FILES)} == set()


@pytest.mark.parametrize(
    ("source", "module", "is_package", "expected"),
    [
        ("from .errors import KaioError", "kaio.policy", False, {"kaio.errors"}),
        ("from .. import errors, policy", "kaio.net.client", False, {"kaio.errors", "kaio.policy"}),
        ("from ...errors import KaioError", "kaio.kernel.options.linux", False, {"kaio.errors"}),
        ("from . import linux as here", "kaio.kernel.options", True, {"kaio.kernel.options.linux"}),
        ("from .base import Platform", "kaio.kernel.options", True, {"kaio.kernel.options.base"}),
        ("import kaio.errors, socket", "kaio.net.client", False, {"kaio.errors"}),
        ("from kaio import Keepalive", "kaio.net.client", False, {"kaio"}),
        ("def f():\n    from .net.server import serve", "kaio.errors", False, {"kaio.net.server"}),
        ("if TYPE_CHECKING:\n    from .policy import Keepalive", "kaio.errors", False, set()),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from .policy import K", "kaio.errors", False, {"kaio.policy"}),
        ("if x:\n    from .policy import Keepalive", "kaio.errors", False, {"kaio.policy"}),
        ("import asyncio", "kaio.errors", False, set()),
    ],
)
def test_imports_are_found(source: str, module: str, is_package: bool, expected: set[str]) -> None:
    """The walk that the tests above rely on sees every way to import, and would tell of a wrong one."""
    assert imported(source, module, is_package=is_package) == expected


def test_the_map_names_every_module() -> None:
    """kaio/__init__.py draws the package."""
    drawn = str(kaio.__doc__).replace("/", " ").split()
    there = {name.split(".")[1] for name in FILES if "." in name} - {"__main__"}
    assert {name for name in there if name not in drawn} == set()


# -- names


@pytest.mark.parametrize("module", [name for name in PUBLIC if name != "kaio.__main__"])
def test_public_modules_say_what_is_public(module: str) -> None:
    """`__all__` is there, is sorted, and names only what exists, each once."""
    there = importlib.import_module(module)
    names = there.__all__
    assert list(names) == sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert [name for name in names if not hasattr(there, name)] == []


@pytest.mark.parametrize("module", FILES)
def test_modules_begin_with_what_they_own(module: str) -> None:
    """Each file opens with a docstring."""
    assert ast.get_docstring(ast.parse(FILES[module].read_text("utf-8")))


def test_what_kaio_exports_is_public_where_it_comes_from() -> None:
    """A name of the package is the same object in its own module, and in that module's `__all__`."""
    for name in kaio.__all__:
        thing = getattr(kaio, name)
        if hasattr(thing, "__module__") and isinstance(thing, type):
            home = importlib.import_module(thing.__module__)
            assert getattr(home, name) is thing
            assert name in home.__all__


def test_star_import_gives_what_all_names() -> None:
    """And nothing else."""
    names: dict[str, object] = {}
    exec("from kaio import *", names)
    assert set(names) - {"__builtins__"} == set(kaio.__all__)


# -- importing

HEAVY = ["click", "rich", "pytest", "_pytest", "typer", "kaio.cli", "kaio.testing", "hypothesis", "unittest", "trustme"]
LOOK = """
import asyncio.events
before = getattr(asyncio.events, "_event_loop_policy", None)
import kaio
assert before is None
assert getattr(asyncio.events, "_event_loop_policy", None) is None, "the event loop policy was touched"
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter, for which every warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_importing_kaio_is_quiet_and_light() -> None:
    """No output, no warning, and neither the tools nor what they need."""
    done = run("-X", "importtime", "-c", "import kaio; kaio.connect, kaio.serve, kaio.run")
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [line for line in lines if not line.startswith("import time:")] == []
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert "kaio.policy" in modules
    heavy = {name for name in modules if any(name == each or name.startswith(f"{each}.") for each in HEAVY)}
    assert heavy == set()


def test_importing_kaio_leaves_the_event_loop_policy_alone() -> None:
    """Which loop a program runs on is its own business."""
    done = run("-c", LOOK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["kaio.errors", "kaio.policy", "kaio.kernel.sockets", "kaio.testing"])
def test_any_module_can_be_the_first(module: str) -> None:
    """No order of imports is needed."""
    done = run("-c", f"import {module}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
