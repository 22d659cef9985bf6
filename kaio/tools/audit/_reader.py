"""The names of a Python file: where each gets which meaning, and where each call stands.

Rules kept here: one way through the tree, without recursion, since generated source nests deeper than Python's stack.
Nothing is concluded here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

__all__ = [
    "Arm",
    "Binding",
    "Definition",
    "Function",
    "Position",
    "Reader",
    "Scope",
    "Where",
    "dotted",
    "parameters",
    "start",
]

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Definition: TypeAlias = Function | ast.ClassDef
_Comprehension: TypeAlias = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_Meaning: TypeAlias = str | ast.expr | ast.arg | Definition | None
Position: TypeAlias = tuple[int, int]
Arm: TypeAlias = tuple[ast.AST, int]  # a compound statement, and which of its blocks


class Where(NamedTuple):
    """Where an expression stands: in which scope, and in which blocks of it, the outermost first."""

    scope: Scope
    arms: tuple[Arm, ...] = ()

    def within(self, statement: ast.AST, block: int) -> Where:
        return Where(self.scope, (*self.arms, (statement, block)))


class Binding(NamedTuple):
    """A name gets a meaning: that of a value, of an imported path, a parameter or a definition; None: any other."""

    end: Position
    where: Where
    meaning: _Meaning


class Scope:
    """The names of a module, class, function or comprehension, and the attributes that are assigned in it."""

    def __init__(self, node: ast.AST, parent: Scope | None) -> None:
        self.node = node
        self.parent = parent
        self.bindings: dict[str, list[Binding]] = {}  # by the name, or by the dotted text of an attribute
        self.declared: dict[str, type[ast.AST]] = {}  # names that `global` and `nonlocal` send elsewhere
        self.stars: list[str] = []  # modules of which everything was imported

    def add(self, name: str, binding: Binding) -> None:
        self.bindings.setdefault(name, []).append(binding)

    def chain(self) -> Iterator[Scope]:
        """Where Python looks a name up: here and outwards, but not in the classes around a function."""
        scope: Scope | None = self
        while scope is not None:
            if scope is self or not isinstance(scope.node, ast.ClassDef):
                yield scope
            scope = scope.parent

    def method_of(self, name: str) -> Scope | None:
        """The scope of the class, where the name is the first parameter of one of its methods."""
        for scope in self.chain():
            if name in scope.bindings:
                around = scope.parent
                if around is not None and isinstance(around.node, ast.ClassDef) and name == _first_name(scope.node):
                    return around
                return None
        return None


def _note(name: str, where: Where, end: Position, meaning: _Meaning) -> None:
    """A name gets a meaning in the scope of a place."""
    where.scope.add(name, Binding(end, where, meaning))


def parameters(function: Function) -> list[ast.arg]:
    """Those that can be given by place."""
    return [*function.args.posonlyargs, *function.args.args]


def _first_name(node: ast.AST) -> str | None:
    named = parameters(node) if isinstance(node, Function) else []
    return named[0].arg if named else None


def start(node: ast.expr | ast.stmt) -> Position:
    return node.lineno, node.col_offset


def _end(node: ast.expr | ast.stmt | ast.pattern) -> Position:
    return node.end_lineno or 0, node.end_col_offset or 0


def dotted(node: ast.expr) -> str | None:
    """The dotted text of a name or of an attribute of one."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


# What calls a function that it is given, and at which place.
_CALLERS: Final = {"to_thread": 0, "run_in_executor": 1, "run_sync": 0, "submit": 0}


class Reader:
    """Goes through a tree once, without recursion, and notes the bindings of each scope and where each call stands."""

    def __init__(self, tree: ast.Module) -> None:
        self.calls: list[tuple[ast.Call, Where]] = []
        self.indirect: dict[ast.Call, ast.Call] = {}
        """What is called by way of another call: `asyncio.to_thread(function, argument)` is `function(argument)`."""
        self.names: list[tuple[ast.Name | ast.Attribute, Where]] = []
        self.scopes: dict[ast.AST, Scope] = {}
        self.modules: set[str] = set()
        """The packages of which something is imported, by their first names."""
        todo: list[tuple[ast.AST, Where]] = [(tree, Where(self._open(tree, None)))]
        while todo:
            node, where = todo.pop()
            visit = getattr(self, f"_{type(node).__name__.lower()}", None)
            todo += visit(node, where) if visit else self._children(node, where)
        for scope in self.scopes.values():
            self._send_elsewhere(scope)
            for bindings in scope.bindings.values():
                bindings.sort(key=lambda binding: binding.end)
        self.calls.sort(key=lambda call: start(call[0]))

    def _open(self, node: ast.AST, parent: Scope | None) -> Scope:
        self.scopes[node] = scope = Scope(node, parent)
        return scope

    def _send_elsewhere(self, scope: Scope) -> None:
        """What a function says to be global or nonlocal is bound there, at times unknown."""
        for name, how in scope.declared.items():
            outer = [other for other in scope.chain() if other is not scope]
            holders = outer[-1:] if how is ast.Global else [other for other in outer if name in other.bindings][:1]
            for binding in scope.bindings.pop(name, ()):
                for holder in holders:
                    at_times = Where(binding.where.scope, ((scope.node, 0),))
                    holder.add(name, Binding(binding.end, at_times, binding.meaning))

    def _bind(self, target: ast.AST, where: Where, end: Position, value: ast.expr | None) -> None:
        """A target of an assignment gets a value, or a part of it."""
        if isinstance(target, ast.Starred):
            self._bind(target.value, where, end, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            values: Sequence[ast.expr | None] = [value] * len(target.elts)
            if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
                values = value.elts
            for each, part in zip(target.elts, values, strict=True):
                self._bind(each, where, end, part)
        elif isinstance(target, (ast.Name, ast.Attribute)) and (text := dotted(target)):
            _note(text, where, end, value)
            owner = where.scope.method_of(text.partition(".")[0]) if isinstance(target, ast.Attribute) else None
            if owner is not None:  # self.x is known in all methods
                owner.add(text.partition(".")[2], Binding(end, where, value))

    @staticmethod
    def _children(node: ast.AST, where: Where) -> list[tuple[ast.AST, Where]]:
        return [(child, where) for child in ast.iter_child_nodes(node)]

    @staticmethod
    def _blocks(
        node: ast.AST, where: Where, *blocks: Iterable[ast.AST], otherwise: Iterable[ast.AST] = ()
    ) -> list[tuple[ast.AST, Where]]:
        """Blocks that may or may not be run, and what is run in any case."""
        found = [(child, where.within(node, number)) for number, block in enumerate(blocks) for child in block]
        return found + [(child, where) for child in otherwise]

    # -- by the kind of node

    def _call(self, node: ast.Call, where: Where) -> list[tuple[ast.AST, Where]]:
        self.calls.append((node, where))
        place = _CALLERS.get(node.func.attr if isinstance(node.func, ast.Attribute) else "")
        if place is not None and len(node.args) > place:
            called = ast.Call(node.args[place], node.args[place + 1 :], node.keywords)
            self.indirect[node] = ast.copy_location(called, node)
            self.calls.append((called, where))
        return self._children(node, where)

    def _name(self, node: ast.Name, where: Where) -> list[tuple[ast.AST, Where]]:
        if isinstance(node.ctx, ast.Load):
            self.names.append((node, where))
        return []

    def _attribute(self, node: ast.Attribute, where: Where) -> list[tuple[ast.AST, Where]]:
        if isinstance(node.ctx, ast.Load):
            self.names.append((node, where))
        return self._children(node, where)

    def _import(self, node: ast.Import, where: Where) -> list[tuple[ast.AST, Where]]:
        for alias in node.names:
            self.modules.add(alias.name.partition(".")[0])
            name, path = (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
            _note(name, where, _end(node), path)
        return []

    def _importfrom(self, node: ast.ImportFrom, where: Where) -> list[tuple[ast.AST, Where]]:
        module = "." * node.level + (node.module or "")
        self.modules.add(module.partition(".")[0])
        for alias in node.names:
            if alias.name == "*":
                where.scope.stars.append(module)
            else:
                _note(alias.asname or alias.name, where, _end(node), f"{module}.{alias.name}")
        return []

    def _assign(self, node: ast.Assign, where: Where) -> list[tuple[ast.AST, Where]]:
        for target in node.targets:
            self._bind(target, where, _end(node), node.value)
        return self._children(node, where)

    def _annassign(self, node: ast.AnnAssign, where: Where) -> list[tuple[ast.AST, Where]]:
        if node.value is not None:
            self._bind(node.target, where, _end(node), node.value)
        return self._children(node, where)

    def _augassign(self, node: ast.AugAssign, where: Where) -> list[tuple[ast.AST, Where]]:
        self._bind(node.target, where, _end(node), None)
        return self._children(node, where)

    def _namedexpr(self, node: ast.NamedExpr, where: Where) -> list[tuple[ast.AST, Where]]:
        holder = where
        while isinstance(holder.scope.node, _Comprehension) and holder.scope.parent is not None:
            holder = Where(holder.scope.parent)  # PEP 572: a comprehension's walrus binds outside of it
        self._bind(node.target, holder, _end(node), node.value)
        return self._children(node, where)

    def _with(self, node: ast.With | ast.AsyncWith, where: Where) -> list[tuple[ast.AST, Where]]:
        for item in node.items:
            if item.optional_vars is not None:
                self._bind(item.optional_vars, where, _end(item.optional_vars), item.context_expr)
        return self._children(node, where)

    def _for(self, node: ast.For | ast.AsyncFor, where: Where) -> list[tuple[ast.AST, Where]]:
        self._bind(node.target, where.within(node, 0), _end(node.iter), node.iter)
        return self._blocks(node, where, [*node.body, node.target], node.orelse, otherwise=[node.iter])

    _asyncwith = _with
    _asyncfor = _for

    def _if(self, node: ast.If | ast.While, where: Where) -> list[tuple[ast.AST, Where]]:
        return self._blocks(node, where, node.body, node.orelse, otherwise=[node.test])

    _while = _if

    def _try(self, node: ast.Try, where: Where) -> list[tuple[ast.AST, Where]]:
        return self._blocks(node, where, node.body, node.handlers, node.orelse, otherwise=node.finalbody)

    _trystar = _try

    def _excepthandler(self, node: ast.ExceptHandler, where: Where) -> list[tuple[ast.AST, Where]]:
        if node.name:
            _note(node.name, where, (node.lineno, node.col_offset), None)
        return self._children(node, where)

    def _match(self, node: ast.Match, where: Where) -> list[tuple[ast.AST, Where]]:
        return self._blocks(node, where, *([case] for case in node.cases), otherwise=[node.subject])

    def _matchas(self, node: ast.MatchAs | ast.MatchStar, where: Where) -> list[tuple[ast.AST, Where]]:
        if node.name:
            _note(node.name, where, _end(node), None)
        return self._children(node, where)

    _matchstar = _matchas

    def _matchmapping(self, node: ast.MatchMapping, where: Where) -> list[tuple[ast.AST, Where]]:
        if node.rest:
            _note(node.rest, where, _end(node), None)
        return self._children(node, where)

    def _global(self, node: ast.Global | ast.Nonlocal, where: Where) -> list[tuple[ast.AST, Where]]:
        where.scope.declared.update(dict.fromkeys(node.names, type(node)))
        return []

    _nonlocal = _global

    def _functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef, where: Where) -> list[tuple[ast.AST, Where]]:
        _note(node.name, where, _end(node), node)
        inside = self._function(node, where)
        outside: list[ast.AST] = [*node.decorator_list, *_defaults(node)]
        return [(child, where) for child in outside] + [(child, inside) for child in node.body]

    _asyncfunctiondef = _functiondef

    def _lambda(self, node: ast.Lambda, where: Where) -> list[tuple[ast.AST, Where]]:
        return [(node.body, self._function(node, where)), *((child, where) for child in _defaults(node))]

    def _function(self, node: Function, where: Where) -> Where:
        inside = Where(self._open(node, where.scope))
        arguments = node.args
        extra = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
        for each in (*parameters(node), *arguments.kwonlyargs, *extra):
            inside.scope.bindings[each.arg] = [Binding((0, 0), Where(where.scope, where.arms), each)]
        return inside

    def _classdef(self, node: ast.ClassDef, where: Where) -> list[tuple[ast.AST, Where]]:
        _note(node.name, where, _end(node), node)
        inside = Where(self._open(node, where.scope))
        outside: list[ast.AST] = [*node.decorator_list, *node.bases, *node.keywords]
        return [(child, where) for child in outside] + [(child, inside) for child in node.body]

    def _listcomp(self, node: _Comprehension, where: Where) -> list[tuple[ast.AST, Where]]:
        inside = Where(self._open(node, where.scope))
        for generator in node.generators:
            self._bind(generator.target, inside, (0, 0), generator.iter)
        first = node.generators[0].iter
        rest = [
            child for each in node.generators for child in (each.target, each.iter, *each.ifs) if child is not first
        ]
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        return [(first, where), *((child, inside) for child in (*rest, *results))]

    _setcomp = _dictcomp = _generatorexp = _listcomp


def _defaults(function: Function) -> list[ast.expr]:
    return [*function.args.defaults, *(each for each in function.args.kw_defaults if each is not None)]
