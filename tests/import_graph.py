"""The import graph of the package, read from its source: `python -m tests.import_graph` prints it by rooms.

Imports count that are made at run time, also those inside functions; those under `if TYPE_CHECKING:` do not.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping

import kaio

ROOT = pathlib.Path(kaio.__file__).parent

# Rooms, from the ground up. A module imports from the rooms before its own, and from its own without a cycle.
ROOMS = [
    "errors",
    "policy",
    "addresses",
    "asgi",
    "kernel",
    "liveness",
    "monitor",
    "net",
    "loop",
    "kaio",  # the package's own names
    "tools",
    "testing",
    "cli",
    "__main__",
]

Graph = Mapping[str, set[str]]


def module_name(path: pathlib.Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    """The room of a module: the module or package at the top level that it is, or is in."""
    return module.split(".")[1] if "." in module else module


def _is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node
    children = node.orelse if isinstance(node, ast.If) and _is_type_checking(node) else ast.iter_child_nodes(node)
    for child in children:
        yield from _import_statements(child)


def imported(source: str, module: str, *, is_package: bool) -> set[str]:
    """The modules of kaio that a module's source imports."""
    found: set[str] = set()
    for statement in _import_statements(ast.parse(source)):
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


def read_graph() -> dict[str, set[str]]:
    """Each module of the package with those that it imports."""
    return {
        name: imported(path.read_text("utf-8"), name, is_package=path.name == "__init__.py")
        for name, path in FILES.items()
    }


GRAPH = read_graph()


def by_rooms(graph: Graph) -> dict[str, set[str]]:
    """Each room with those that its modules import from."""
    rooms: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, others in graph.items():
        rooms[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}
    return rooms


def longest_chain(graph: Graph) -> tuple[str, ...]:
    """The longest chain of imports; the graph must have no cycle."""

    @functools.cache
    def chain(module: str) -> tuple[str, ...]:
        return (module, *max(map(chain, graph.get(module, ())), key=len, default=()))

    return max(map(chain, sorted(graph)), key=len)


def without_detours(graph: Graph) -> set[tuple[str, str]]:
    """The arrows that are left when those go that a longer way says, too."""

    @functools.cache
    def reached(room: str) -> frozenset[str]:
        return frozenset(graph[room]).union(*map(reached, graph[room]))

    return {
        (room, other)
        for room, others in graph.items()
        for other in others
        if not any(other in reached(between) for between in others)
    }


def mermaid() -> str:
    """The rooms as a Mermaid diagram: an arrow from each to those it stands on."""
    rooms = by_rooms(GRAPH)
    drawn = sorted(without_detours(rooms), key=lambda pair: (ROOMS.index(pair[0]), ROOMS.index(pair[1])))
    names = {room for pair in drawn for room in pair} - {"kaio", "__main__"}
    return "\n".join(["flowchart BT", *(f"    {a} --> {b}" for a, b in drawn if {a, b} <= names)])


def count(pattern: str) -> int:
    """How often a pattern stands in the package's source."""
    return sum(len(re.findall(pattern, path.read_text("utf-8"))) for path in FILES.values())


def report() -> str:
    """The graph by rooms, and its measures, as text."""
    rooms = by_rooms(GRAPH)
    lines = [f"{'room':<10} {'modules':>7} {'lines':>6}  imports from"]
    for room in ROOMS:
        files = [path for name, path in FILES.items() if room_of(name) == room]
        size = sum(len(path.read_text("utf-8").splitlines()) for path in files)
        others = " ".join(each for each in ROOMS if each in rooms[room])
        lines.append(f"{room:<10} {len(files):>7} {size:>6}  {others}")
    lines += [
        f"longest chain of rooms: {len(longest_chain(rooms))}: {' > '.join(longest_chain(rooms))}",
        f"longest chain of modules: {len(longest_chain(GRAPH))}: {' > '.join(longest_chain(GRAPH))}",
        f"Any: {count(r'[^A-Za-z_]Any[^A-Za-z_]')} times",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
