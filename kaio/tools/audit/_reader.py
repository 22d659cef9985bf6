"""One pass through the tree of a Python file: the bindings of each scope, and the place of each call.

Rules kept here: the tree is walked once, without recursion, because generated source is nested deeper than Python's
stack allows. Bindings are collected, not interpreted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from ._scopes import Binding, Function, Position, Scope, Where, dotted, end, parameters, start

__all__ = ["Reader"]

_Comprehension: TypeAlias = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_Todo: TypeAlias = list[tuple[ast.AST, Where]]

# Functions that call the function which they are passed, and the position of that argument.
_CALLERS: Final = {"to_thread": 0, "run_in_executor": 1, "run_sync": 0, "submit": 0}


class Reader:
    """Walks a tree once and collects its scopes with their bindings, its calls and its names, each with its place."""

    def __init__(self, tree: ast.Module) -> None:
        self.calls: list[tuple[ast.Call, Where]] = []
        self.indirect: dict[ast.Call, ast.Call] = {}
        """The call that another call makes: `asyncio.to_thread(function, argument)` calls `function(argument)`."""
        self.names: list[tuple[ast.Name | ast.Attribute, Where]] = []
        self.scopes: dict[ast.AST, Scope] = {}
        self.modules: set[str] = set()
        """The top-level packages from which something is imported."""
        todo: _Todo = [(tree, Where(self._open(tree, None)))]
        while todo:
            node, where = todo.pop()
            visit = getattr(self, f"_{type(node).__name__.lower()}", None)
            todo += visit(node, where) if visit else self._children(node, where)
        for scope in self.scopes.values():
            self._move_declared(scope)
            for bindings in scope.bindings.values():
                bindings.sort(key=lambda binding: binding.end)
        self.calls.sort(key=lambda call: start(call[0]))

    def _open(self, node: ast.AST, parent: Scope | None) -> Scope:
        self.scopes[node] = scope = Scope(node, parent)
        return scope

    def _move_declared(self, scope: Scope) -> None:
        """Move bindings of `global` and `nonlocal` names to the scopes that own them, where their order is unknown."""
        for name, how in scope.declared.items():
            outer = [other for other in scope.chain() if other is not scope]
            holders = outer[-1:] if how is ast.Global else [other for other in outer if name in other.bindings][:1]
            for binding in scope.bindings.pop(name, ()):
                for holder in holders:
                    unordered = Where(binding.where.scope, ((scope.node, 0),))
                    holder.add(name, Binding(binding.end, unordered, binding.meaning))

    def _bind(self, target: ast.AST, where: Where, done: Position, value: ast.expr | None) -> None:
        """Bind the target of an assignment to its value, or the parts of the target to those of the value."""
        if isinstance(target, ast.Starred):
            self._bind(target.value, where, done, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            values: Sequence[ast.expr | None] = [value] * len(target.elts)
            if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
                values = value.elts
            for each, part in zip(target.elts, values, strict=True):
                self._bind(each, where, done, part)
        elif isinstance(target, (ast.Name, ast.Attribute)) and (text := dotted(target)):
            where.bind(text, done, value)
            owner = where.scope.method_of(text.partition(".")[0]) if isinstance(target, ast.Attribute) else None
            if owner is not None:  # self.x is visible in all methods
                owner.add(text.partition(".")[2], Binding(done, where, value))

    @staticmethod
    def _children(node: ast.AST, where: Where) -> _Todo:
        return [(child, where) for child in ast.iter_child_nodes(node)]

    @staticmethod
    def _blocks(node: ast.AST, where: Where, *blocks: Iterable[ast.AST], otherwise: Iterable[ast.AST] = ()) -> _Todo:
        """The nodes of blocks that may or may not be executed, and `otherwise`, those that always are."""
        found = [(child, where.within(node, number)) for number, block in enumerate(blocks) for child in block]
        return found + [(child, where) for child in otherwise]

    # -- by node type

    def _call(self, node: ast.Call, where: Where) -> _Todo:
        self.calls.append((node, where))
        place = _CALLERS.get(node.func.attr if isinstance(node.func, ast.Attribute) else "")
        if place is not None and len(node.args) > place:
            called = ast.Call(node.args[place], node.args[place + 1 :], node.keywords)
            self.indirect[node] = ast.copy_location(called, node)
            self.calls.append((called, where))
        return self._children(node, where)

    def _name(self, node: ast.Name, where: Where) -> _Todo:
        if isinstance(node.ctx, ast.Load):
            self.names.append((node, where))
        return []

    def _attribute(self, node: ast.Attribute, where: Where) -> _Todo:
        if isinstance(node.ctx, ast.Load):
            self.names.append((node, where))
        return self._children(node, where)

    def _import(self, node: ast.Import, where: Where) -> _Todo:
        for alias in node.names:
            self.modules.add(alias.name.partition(".")[0])
            name, path = (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
            where.bind(name, end(node), path)
        return []

    def _importfrom(self, node: ast.ImportFrom, where: Where) -> _Todo:
        module = "." * node.level + (node.module or "")
        self.modules.add(module.partition(".")[0])
        for alias in node.names:
            if alias.name == "*":
                where.scope.stars.append(module)
            else:
                where.bind(alias.asname or alias.name, end(node), f"{module}.{alias.name}")
        return []

    def _assign(self, node: ast.Assign, where: Where) -> _Todo:
        for target in node.targets:
            self._bind(target, where, end(node), node.value)
        return self._children(node, where)

    def _annassign(self, node: ast.AnnAssign, where: Where) -> _Todo:
        if node.value is not None:
            self._bind(node.target, where, end(node), node.value)
        return self._children(node, where)

    def _augassign(self, node: ast.AugAssign, where: Where) -> _Todo:
        self._bind(node.target, where, end(node), None)
        return self._children(node, where)

    def _namedexpr(self, node: ast.NamedExpr, where: Where) -> _Todo:
        holder = where
        while isinstance(holder.scope.node, _Comprehension) and holder.scope.parent is not None:
            holder = Where(holder.scope.parent)  # PEP 572: := in a comprehension binds in the scope around it
        self._bind(node.target, holder, end(node), node.value)
        return self._children(node, where)

    def _with(self, node: ast.With | ast.AsyncWith, where: Where) -> _Todo:
        for item in node.items:
            if item.optional_vars is not None:
                self._bind(item.optional_vars, where, end(item.optional_vars), item.context_expr)
        return self._children(node, where)

    def _for(self, node: ast.For | ast.AsyncFor, where: Where) -> _Todo:
        self._bind(node.target, where.within(node, 0), end(node.iter), node.iter)
        return self._blocks(node, where, [*node.body, node.target], node.orelse, otherwise=[node.iter])

    _asyncwith = _with
    _asyncfor = _for

    def _if(self, node: ast.If, where: Where) -> _Todo:
        """Read all arms of an `elif` chain as blocks of one statement: nested, a long chain takes quadratic time."""
        found = self._blocks(node, where, node.body, otherwise=[node.test])
        last, number = node, 0
        while len(last.orelse) == 1 and isinstance(last.orelse[0], ast.If):
            last, number = last.orelse[0], number + 1
            inside = where.within(node, number)
            found += [(child, inside) for child in last.body]
            found.append((last.test, where.within(last, 0)))
        inside = where.within(node, number + 1)
        return found + [(child, inside) for child in last.orelse]

    def _while(self, node: ast.While, where: Where) -> _Todo:
        return self._blocks(node, where, node.body, node.orelse, otherwise=[node.test])

    def _try(self, node: ast.Try, where: Where) -> _Todo:
        return self._blocks(node, where, node.body, node.handlers, node.orelse, otherwise=node.finalbody)

    _trystar = _try

    def _excepthandler(self, node: ast.ExceptHandler, where: Where) -> _Todo:
        if node.name:
            where.bind(node.name, (node.lineno, node.col_offset), None)
        return self._children(node, where)

    def _match(self, node: ast.Match, where: Where) -> _Todo:
        return self._blocks(node, where, *([case] for case in node.cases), otherwise=[node.subject])

    def _matchas(self, node: ast.MatchAs | ast.MatchStar, where: Where) -> _Todo:
        if node.name:
            where.bind(node.name, end(node), None)
        return self._children(node, where)

    _matchstar = _matchas

    def _matchmapping(self, node: ast.MatchMapping, where: Where) -> _Todo:
        if node.rest:
            where.bind(node.rest, end(node), None)
        return self._children(node, where)

    def _global(self, node: ast.Global | ast.Nonlocal, where: Where) -> _Todo:
        where.scope.declared.update(dict.fromkeys(node.names, type(node)))
        return []

    _nonlocal = _global

    def _functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef, where: Where) -> _Todo:
        where.bind(node.name, end(node), node)
        inside = self._function(node, where)
        outside: list[ast.AST] = [*node.decorator_list, *_defaults(node)]
        return [(child, where) for child in outside] + [(child, inside) for child in node.body]

    _asyncfunctiondef = _functiondef

    def _lambda(self, node: ast.Lambda, where: Where) -> _Todo:
        return [(node.body, self._function(node, where)), *((child, where) for child in _defaults(node))]

    def _function(self, node: Function, where: Where) -> Where:
        inside = Where(self._open(node, where.scope))
        arguments = node.args
        extra = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
        for each in (*parameters(node), *arguments.kwonlyargs, *extra):
            inside.scope.bindings[each.arg] = [Binding((0, 0), Where(where.scope, where.arms), each)]
        return inside

    def _classdef(self, node: ast.ClassDef, where: Where) -> _Todo:
        where.bind(node.name, end(node), node)
        inside = Where(self._open(node, where.scope))
        outside: list[ast.AST] = [*node.decorator_list, *node.bases, *node.keywords]
        return [(child, where) for child in outside] + [(child, inside) for child in node.body]

    def _listcomp(self, node: _Comprehension, where: Where) -> _Todo:
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
