"""The package as a whole: its rows, its names, and what importing it does."""

from __future__ import annotations

import ast
import importlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

import kaio

ROOT = pathlib.Path(kaio.__file__).parent

# A module imports from the rows above its own, and from its own row as long as there is no cycle. What stands for a
# package stands for all in it.
ROWS = [
    ["errors"],
    ["policy", "addresses"],
    ["kernel"],
    ["liveness"],
    ["monitor"],
    ["net"],
    ["loop"],
    ["kaio"],  # the package's own names
    ["tools"],
    ["cli", "testing"],
    ["__main__"],
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}


def module_name(path: pathlib.Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
ROOMS = [name for name, path in FILES.items() if len(ast.parse(path.read_text("utf-8")).body) == 1]
"""Packages that have a map of what is in them, and no names of their own."""
PUBLIC = [name for name in FILES if name not in ROOMS and not any(part.startswith("_") for part in name.split("."))]


def row_of(module: str) -> int:
    """The row of a module of the package, or of the package that it is in."""
    return ROW[module.split(".")[1] if "." in module else module]


def is_type_checking(node: ast.If) -> bool:
    """Whether this is `if TYPE_CHECKING:`, whose imports are not made."""
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that are made at run time, also those inside functions."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node
    children = node.orelse if isinstance(node, ast.If) and is_type_checking(node) else ast.iter_child_nodes(node)
    for child in children:
        yield from import_statements(child)


def imported(source: str, module: str, *, is_package: bool) -> set[str]:
    """The modules of kaio that a module's source imports."""
    found: set[str] = set()
    for statement in import_statements(ast.parse(source)):
        if isinstance(statement, ast.Import):
            found.update(alias.name for alias in statement.names)
            continue
        base = statement.module or ""
        if statement.level:
            here = module.split(".") if is_package else module.split(".")[:-1]
            here = here[: len(here) - statement.level + 1]
            base = ".".join([*here, base] if base else here)
        names = {f"{base}.{alias.name}" for alias in statement.names}
        modules = names & FILES.keys()
        found |= modules
        if names - modules:
            found.add(base)
    return {name for name in found if name.split(".")[0] == "kaio"} - {module}


GRAPH = {
    name: imported(path.read_text("utf-8"), name, is_package=path.name == "__init__.py") for name, path in FILES.items()
}


@pytest.mark.parametrize("module", FILES)
def test_each_module_imports_only_from_rows_above(module: str) -> None:
    """The map in kaio/__init__.py is true; a module that is added gets its place in ROWS."""
    assert {other for other in GRAPH[module] if row_of(other) > row_of(module)} == set()


def test_imports_have_no_cycle() -> None:
    """Every module can be imported first."""
    try:
        order = list(TopologicalSorter(GRAPH).static_order())
    except CycleError as exc:
        pytest.fail(f"modules import each other: {exc.args[1]}")
    assert order.index("kaio.errors") < order.index("kaio.policy") < order.index("kaio.loop.factories")


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
