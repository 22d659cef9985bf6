"""The scopes of a Python file: which name is bound where, and which bindings reach the place where it is used.

Rules kept here: a binding is an assignment, an import, a parameter or a definition. One that may or may not have been
executed before a use (in another branch, further down in a loop) reaches it beside the earlier ones; of more than
fifty, only the nearest do, so that the time for a file grows as its length.
"""

from __future__ import annotations

import ast
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

__all__ = [
    "MOST",
    "Arm",
    "Binding",
    "Definition",
    "Function",
    "Meaning",
    "Position",
    "Scope",
    "Where",
    "bindings",
    "dotted",
    "end",
    "is_certain",
    "parameters",
    "start",
]

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Definition: TypeAlias = Function | ast.ClassDef
Meaning: TypeAlias = str | ast.expr | ast.arg | Definition | None
Position: TypeAlias = tuple[int, int]
Arm: TypeAlias = tuple[ast.AST, int]  # a compound statement, and the number of one of its blocks

MOST: Final = 50
"""The number of bindings that may be in effect for one name at one place."""
_SEARCHED: Final = 10 * MOST  # bindings that are looked at, with those that exclude the place


class Where(NamedTuple):
    """The place of an expression: its scope, and the blocks around it, outermost first."""

    scope: Scope
    arms: tuple[Arm, ...] = ()

    def within(self, statement: ast.AST, block: int) -> Where:
        return Where(self.scope, (*self.arms, (statement, block)))

    def bind(self, name: str, done: Position, meaning: Meaning) -> None:
        """Bind a name in the scope of this place."""
        self.scope.add(name, Binding(done, self, meaning))


class Binding(NamedTuple):
    """What a name is bound to: a value, the path of an import, a parameter or a definition; None: anything else."""

    end: Position  # where the binding statement ends
    where: Where
    meaning: Meaning


class Scope:
    """The names of a module, class, function or comprehension, and the attributes that are assigned in it."""

    def __init__(self, node: ast.AST, parent: Scope | None) -> None:
        self.node = node
        self.parent = parent
        self.bindings: dict[str, list[Binding]] = {}  # by the name, or by the dotted text of an attribute
        self.declared: dict[str, type[ast.AST]] = {}  # names that are `global` or `nonlocal` here
        self.stars: list[str] = []  # modules from which `*` was imported
        self._executed: dict[str, list[Binding]] = {}

    def add(self, name: str, binding: Binding) -> None:
        self.bindings.setdefault(name, []).append(binding)

    def executed(self, name: str) -> list[Binding]:
        """The bindings of a name that are in effect when all of this scope has been executed."""
        if name not in self._executed:
            found = self.bindings[name]
            certain = (number for number in range(len(found) - 1, 0, -1) if not found[number].where.arms)
            self._executed[name] = found[next(certain, 0) :]
        return self._executed[name]

    def chain(self) -> Iterator[Scope]:
        """The scopes in which Python looks a name up: this one, and those around it that are not classes."""
        scope: Scope | None = self
        while scope is not None:
            if scope is self or not isinstance(scope.node, ast.ClassDef):
                yield scope
            scope = scope.parent

    def method(self, name: str) -> ast.FunctionDef | None:
        """A method that is defined in this class itself."""
        found = (each.meaning for each in self.bindings.get(name, ()))
        return next((each for each in found if isinstance(each, ast.FunctionDef)), None)

    def method_of(self, name: str) -> Scope | None:
        """The scope of the class, when the name is the first parameter of one of its methods."""
        for scope in self.chain():
            if name in scope.bindings:
                around = scope.parent
                if around is not None and isinstance(around.node, ast.ClassDef) and name == _first_name(scope.node):
                    return around
                return None
        return None


# -- syntax


def parameters(function: Function) -> list[ast.arg]:
    """The parameters that accept positional arguments."""
    return [*function.args.posonlyargs, *function.args.args]


def _first_name(node: ast.AST) -> str | None:
    named = parameters(node) if isinstance(node, Function) else []
    return named[0].arg if named else None


def start(node: ast.expr | ast.stmt) -> Position:
    return node.lineno, node.col_offset


def end(node: ast.expr | ast.stmt | ast.pattern) -> Position:
    return node.end_lineno or 0, node.end_col_offset or 0


def dotted(node: ast.expr) -> str | None:
    """The dotted text of a name, or of an attribute of a name; None for other expressions."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


# -- the bindings that reach a place


def bindings(node: ast.expr, where: Where) -> list[Binding]:
    """The bindings that may be in effect for a name, or an attribute of one, at the place where it is used."""
    text = dotted(node)
    for scope in where.scope.chain():
        if text in scope.bindings:
            return scope.executed(text) if scope is not where.scope else _reaching(scope.bindings[text], where, node)
    return []


def _reaching(candidates: Sequence[Binding], where: Where, node: ast.expr) -> list[Binding]:
    """The bindings in effect at a place of their own scope."""
    done = bisect_right(candidates, start(node), key=_end)
    before = _live((candidates[number] for number in range(done - 1, -1, -1)), where)
    # a name that is bound only further down was bound by an earlier turn of a loop
    return before or _live((candidates[number] for number in range(len(candidates) - 1, done - 1, -1)), where)


def _live(latest_first: Iterable[Binding], where: Where) -> list[Binding]:
    """The last binding that is certainly executed before a place, and those after it that may be."""
    found: list[Binding] = []
    for binding in islice(latest_first, _SEARCHED):
        if not _exclude_each_other(binding.where.arms, where.arms):
            found.append(binding)
            if len(found) == MOST or is_certain(binding, where):
                break
    return found[::-1]


def _end(binding: Binding) -> Position:
    return binding.end


def is_certain(binding: Binding, where: Where) -> bool:
    """Whether a binding that comes before a place is always executed before it."""
    arms = binding.where.arms
    return where.arms[: len(arms)] == arms


def _exclude_each_other(some: Sequence[Arm], others: Sequence[Arm]) -> bool:
    """Whether two places are in different branches of one `if` or `match`."""
    for (statement, block), (other, other_block) in zip(some, others, strict=False):
        if statement is not other:
            return False
        if block != other_block:
            return isinstance(statement, (ast.If, ast.Match))
    return False
