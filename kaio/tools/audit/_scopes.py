"""The scopes of a Python file: which name is bound where, and which bindings reach the place where it is used.

Rules kept here: a binding is an assignment, an import, a parameter or a definition. One that may or may not have been
executed before a use (in another branch, further down in a loop) reaches it beside the earlier ones.
"""

from __future__ import annotations

import ast
import bisect
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

__all__ = [
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
_MOST_LIVE: Final = 50
_MOST_LOOKED_AT: Final = 500

Arm: TypeAlias = tuple[ast.AST, int]  # a compound statement, and the number of one of its blocks


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

    def add(self, name: str, binding: Binding) -> None:
        self.bindings.setdefault(name, []).append(binding)

    def chain(self) -> Iterator[Scope]:
        """The scopes in which Python looks a name up: this one, and those around it that are not classes."""
        scope: Scope | None = self
        while scope is not None:
            if scope is self or not isinstance(scope.node, ast.ClassDef):
                yield scope
            scope = scope.parent

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
            return _reaching(scope.bindings[text], where if scope is where.scope else None, start(node))
    return []


def _reaching(candidates: Sequence[Binding], where: Where | None, position: Position) -> list[Binding]:
    """The bindings in effect at a place of their own scope; without a place, when the scope has been executed.

    The candidates are in the order of the source.
    """
    if where is None:
        return _live(candidates, len(candidates), Where(candidates[0].where.scope))
    before = bisect.bisect_right(candidates, position, key=_end_of)
    # A name that is bound only further down was bound by an earlier turn of a loop.
    return _live(candidates, before, where) or _live(candidates, len(candidates), where)


def _live(candidates: Sequence[Binding], before: int, where: Where) -> list[Binding]:
    """Those of the first candidates that are in effect, from the last certain one on.

    They are looked at from the last one backwards, and not all of them: a name that is bound in thousands of branches
    would otherwise take the square of that time.
    """
    found: list[Binding] = []
    for number in range(before - 1, max(-1, before - 1 - _MOST_LOOKED_AT), -1):
        binding = candidates[number]
        if not _exclude_each_other(binding.where.arms, where.arms):
            found.append(binding)
            if is_certain(binding, where) or len(found) == _MOST_LIVE:
                break
    return found[::-1]


def _end_of(binding: Binding) -> Position:
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
