"""What the expressions of a Python file stand for: which library's function, or what a call has made.

Rules kept here: a name means what it was imported or assigned as on the ways that lead to its place. What may be one
thing or another is both; what cannot be told is nothing. Sockets are followed through assignments, attributes of self,
arguments of the file's own functions and callbacks, but not out of functions that return them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from ._libraries import TABLE, Rule
from ._reader import Arm, Binding, Definition, Function, Position, Scope, Where, dotted, parameters, start

__all__ = ["Names", "Origin", "argument", "brought", "callbacks", "last_name"]


class Origin(NamedTuple):
    """What an expression stands for, as far as can be told."""

    path: str
    """A dotted name; with `()` behind it what a call of that returns."""
    made: ast.Call | None = None
    """The call that made it, or what it was taken from."""
    definition: Definition | None = None
    """The function or class of this file that it is, or is made by."""


Origins: TypeAlias = frozenset[Origin]
_UNKNOWN: Final[Origins] = frozenset()

# What hands on the connection that it is given, what is given to a function, and what is taken from a connection.
_PASSING: Final = frozenset(
    {"wait_for", "shield", "ensure_future", "create_task", "gather", "run", "run_until_complete"}
    | {"closing", "aclosing", "enter_context", "enter_async_context", "wrap_socket"}
)
_TAKING: Final = frozenset({"get_extra_info", "extra", "accept", "dup", "__enter__", "__aenter__"})
_CALLBACKS: Final = frozenset({"protocol_factory", "client_connected_cb", "handler"})
_DEEPEST: Final = 50  # links of a chain that are followed; Python's own stack allows for some more
_PARTS: Final = frozenset({"sock", "socket", "sockets", "transport"})
_LOOP_MAKERS: Final = re.compile(r"(^|\.)(get_running_loop|get_event_loop|new_event_loop|get_loop)\(\)$")
_LOOP_CLASSES: Final = re.compile(
    r"^(asyncio|uvloop|winloop)\.(\w+\.)*(\w*EventLoop|Loop)\(\)$|^kaio\.loop_factory\(\)\(\)$"
)
_LOOP_NAME: Final = re.compile(r"(^|_)(event_?)?loop$")


class Names:
    """What the expressions of a file stand for."""

    def __init__(
        self,
        calls: Sequence[tuple[ast.Call, Where]],
        indirect: Mapping[ast.Call, ast.Call],
        scopes: Mapping[ast.AST, Scope],
    ) -> None:
        self._scopes = scopes
        self._indirect = indirect
        self._known: dict[ast.AST, Origins] = {}
        self._depth = 0
        self._given: dict[ast.arg, list[tuple[ast.expr, Where]]] = {}  # to parameters, by the file's own calls
        given = [each for call, where in calls for each in self._gifts(call, where)]
        for parameter, value, where in given:
            self._given.setdefault(parameter, []).append((value, where))
        self._known.clear()  # parameters were not known yet

    def of(self, node: ast.expr, where: Where) -> Origins:
        """What an expression may stand for; nothing when that cannot be told."""
        if node not in self._known:
            if self._depth == _DEEPEST:
                return _UNKNOWN
            self._known[node] = _UNKNOWN  # until it is known: what refers to itself adds nothing
            self._depth += 1
            self._known[node] = self._look(node, where)
            self._depth -= 1
        return self._known[node]

    def _look(self, node: ast.expr, where: Where) -> Origins:
        match node:
            case ast.Name():
                return self._name(node, where)
            case ast.Attribute():
                return self._attribute(node, where)
            case ast.Call():
                return self._call(node, where)
            case ast.Await() | ast.Starred() | ast.NamedExpr() | ast.Subscript():
                return self.of(node.value, where)
            case ast.IfExp():
                return self.of(node.body, where) | self.of(node.orelse, where)
            case ast.BoolOp():
                return self._any(node.values, where)
            case ast.Tuple() | ast.List() | ast.Set():
                return self._any(node.elts, where)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self.of(node.elt, Where(self._scopes[node]))
            case ast.Lambda():
                return frozenset({Origin("<lambda>", definition=node)})
        return _UNKNOWN

    def _any(self, nodes: Iterable[ast.expr], where: Where) -> Origins:
        return _UNKNOWN.union(*(self.of(node, where) for node in nodes))

    def made(self, node: ast.expr, where: Where) -> set[ast.Call]:
        """The calls that may have made what an expression stands for, itself and not something of it."""
        return {each.made for each in self.of(node, where) if each.made is not None and each.path.endswith("()")}

    def values(self, node: ast.expr, where: Where) -> list[ast.expr]:
        """What a name was assigned, where all of it is written out in this file."""
        bindings = _bindings(node, where)
        values = [binding.meaning for binding in bindings if isinstance(binding.meaning, ast.expr)]
        return values if len(values) == len(bindings) else []

    def classes(self, callback: ast.expr, where: Where) -> Iterator[ast.ClassDef]:
        """The classes of this file that a protocol factory makes."""
        for origin in self.of(callback, where):
            if isinstance(origin.definition, ast.ClassDef):
                yield origin.definition
            elif isinstance(origin.definition, ast.Lambda) and isinstance(origin.definition.body, ast.Call):
                made = self.of(origin.definition.body, Where(self._scopes[origin.definition]))
                yield from (each.definition for each in made if isinstance(each.definition, ast.ClassDef))

    def bases(self, definition: ast.ClassDef) -> set[str]:
        """The names of a class's bases, and of theirs."""
        names: set[str] = set()
        seen: set[ast.AST] = set()
        todo = [definition]
        while todo:
            seen.add(each := todo.pop())
            around = self._scopes[each].parent or self._scopes[each]
            for origin in self._any(each.bases, Where(around)):
                names.add(origin.path)
                if isinstance(origin.definition, ast.ClassDef) and origin.definition not in seen:
                    todo.append(origin.definition)
        return names

    def _name(self, node: ast.Name, where: Where) -> Origins:
        bindings = _bindings(node, where)
        if bindings:
            return self._meanings(bindings)
        stars = [star for scope in where.scope.chain() for star in scope.stars]
        return frozenset(Origin(f"{star}.{node.id}") for star in stars)

    def _attribute(self, node: ast.Attribute, where: Where) -> Origins:
        assigned = _bindings(node, where)
        if any(_is_certain(binding, where) for binding in assigned):
            return self._meanings(assigned)
        root, _, rest = (dotted(node) or "").partition(".")
        owner = where.scope.method_of(root)
        known = self._meanings([*assigned, *(owner.bindings.get(rest, ()) if owner is not None else ())])
        return known | _UNKNOWN.union(*(self._part(origin, node.attr) for origin in self.of(node.value, where)))

    def _part(self, origin: Origin, name: str) -> Origins:
        if isinstance(origin.definition, ast.ClassDef):
            own = self._scopes[origin.definition].bindings.get(name)
            if own is not None:
                return self._meanings(own)
        if origin.made is not None and name in _PARTS:
            return frozenset({origin})
        return frozenset({Origin(f"{origin.path}.{name}", origin.made)})

    def _meanings(self, bindings: Iterable[Binding]) -> Origins:
        return _UNKNOWN.union(*map(self._meaning, bindings))

    def _meaning(self, binding: Binding) -> Origins:
        meaning, where = binding.meaning, binding.where
        if isinstance(meaning, str):
            return frozenset({Origin(meaning)})
        if isinstance(meaning, ast.arg):
            return self._parameter(meaning, where)
        if isinstance(meaning, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return frozenset({Origin(f"<file>.{meaning.name}", definition=meaning)})
        return _UNKNOWN if meaning is None else self.of(meaning, where)

    def _parameter(self, parameter: ast.arg, where: Where) -> Origins:
        """What a parameter's annotation says, and what the file's own calls give it."""
        if parameter not in self._known:
            self._known[parameter] = _UNKNOWN
            annotation = parameter.annotation
            if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
                annotation = _parsed(annotation)
            said = () if annotation is None else self._types(annotation, where)
            given = (self.of(value, there) for value, there in self._given.get(parameter, ()))
            self._known[parameter] = frozenset(said).union(*given)
        return self._known[parameter]

    def _types(self, annotation: ast.expr, where: Where) -> Iterator[Origin]:
        """An instance of each class that is named in an annotation."""
        for node in ast.walk(annotation):
            if isinstance(node, (ast.Name, ast.Attribute)):
                for origin in self.of(node, Where(where.scope)):
                    yield Origin(f"{origin.path}()", definition=origin.definition)

    def _call(self, node: ast.Call, where: Where) -> Origins:
        place = self.place(node, where)
        if place is not None:
            made_elsewhere = brought(node, TABLE[place])
            if made_elsewhere is not None:
                return self.of(made_elsewhere, where)
            definition = next((each.definition for each in self.of(node.func, where)), None)
            return frozenset({Origin(f"{place}()", node, definition)})
        if node in self._indirect and self.place(self._indirect[node], where) is not None:
            return self.of(self._indirect[node], where)
        origins = [each for each in self.of(node.func, where) if not isinstance(each.definition, Function)]
        names = {each.path.rpartition(".")[2] for each in origins}
        if (last_name(node.func) in _PASSING and not names) or names & _PASSING:
            return self._any(node.args, where)
        if "functools.partial" in {each.path for each in origins} and node.args:
            return self.of(node.args[0], where)
        return frozenset(
            Origin(each.path.rpartition(".")[0], each.made)
            if each.made is not None and each.path.rpartition(".")[2] in _TAKING
            else Origin(f"{each.path}()", node, each.definition)
            for each in origins
        )

    # -- what parameters are given

    def _gifts(self, call: ast.Call, where: Where) -> Iterator[tuple[ast.arg, ast.expr, Where]]:
        for origin in self.of(call.func, where):
            function = origin.definition
            if isinstance(function, ast.ClassDef):
                function = _method(function, "__init__")
            if isinstance(function, Function):
                yield from ((each, value, where) for each, value in _match(call, function))
        # A callback is given the connection: a protocol, a handler of streams, a handler of a listener's connections.
        source: ast.expr | None = call if self.place(call, where) else None
        if source is None and isinstance(call.func, ast.Attribute) and call.func.attr == "serve":
            source = call.func.value
        if source is not None:
            for callback in callbacks(call):
                yield from ((each, source, where) for each in self._receivers(callback, where))

    def _receivers(self, callback: ast.expr, where: Where) -> Iterator[ast.arg]:
        """The parameters by which a callback gets a connection."""
        for definition in self.classes(callback, where):
            made = _method(definition, "connection_made")
            yield from parameters(made)[1:2] if made is not None else ()
        for origin in self.of(callback, where):
            if isinstance(origin.definition, Function):
                yield from (each for each in parameters(origin.definition) if each.arg not in ("self", "cls"))

    # -- loops

    def place(self, call: ast.Call, where: Where) -> str | None:
        """The name in the table of what is called, if it is there."""
        function = call.func
        if isinstance(function, ast.Attribute):
            name = f"loop.{function.attr}"
            if name in TABLE and self.is_loop(function.value, where):
                return name
        for origin in self.of(function, where):
            if origin.path in TABLE:
                return origin.path
            if isinstance(origin.definition, ast.ClassDef) and not origin.path.endswith("()"):
                known = sorted(self.bases(origin.definition) & TABLE.keys())
                if known:
                    return known[0]
        return None

    def is_loop(self, node: ast.expr, where: Where) -> bool:
        """Whether something is an event loop, by what it is or, where that cannot be told, by its name."""
        paths = {origin.path for origin in self.of(node, where)}
        if any(_LOOP_MAKERS.search(path) or _LOOP_CLASSES.search(path) for path in paths):
            return True
        if any(path.endswith("()") for path in paths):
            return False
        if isinstance(node, ast.Call):
            return bool(_LOOP_MAKERS.search(f"{last_name(node.func)}()"))
        return bool(_LOOP_NAME.search(last_name(node)))


def last_name(node: ast.expr) -> str:
    """The name that something goes by, without what it belongs to."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def callbacks(call: ast.Call) -> list[ast.expr]:
    """What a call may be given to call with the connections that it makes."""
    return [*call.args[:1], *(each.value for each in call.keywords if each.arg in _CALLBACKS)]


def argument(call: ast.Call, position: int, *names: str) -> ast.expr | None:
    """What a call is given by place or by name."""
    if position < len(call.args):
        return call.args[position]
    return next((each.value for each in call.keywords if each.arg in names), None)


def brought(call: ast.Call, rule: Rule) -> ast.expr | None:
    """The argument that brings a connection which has a place of its own."""
    for each in call.keywords:
        if each.arg in rule.elsewhere and not (isinstance(each.value, ast.Constant) and each.value.value is None):
            return each.value
    return None


def _bindings(node: ast.expr, where: Where) -> list[Binding]:
    """The bindings that a name, or an attribute of one, may have where it stands."""
    text = dotted(node)
    for scope in where.scope.chain():
        if text in scope.bindings:
            return _reaching(scope.bindings[text], where if scope is where.scope else None, start(node))
    return []


def _reaching(bindings: Sequence[Binding], where: Where | None, position: Position) -> list[Binding]:
    """The bindings that a name may have at a place of its own scope, or, without one, when the scope is done."""
    if where is None:
        where, live = Where(bindings[0].where.scope), list(bindings)
    else:
        possible = [binding for binding in bindings if not _exclude_each_other(binding.where.arms, where.arms)]
        before = [binding for binding in possible if binding.end <= position]
        live = before or possible  # what is bound below only was bound by a loop's last turn
    certain = [number for number, binding in enumerate(live) if _is_certain(binding, where)]
    return live[certain[-1] :] if certain else live


def _is_certain(binding: Binding, where: Where) -> bool:
    """Whether the way to a place leads past a binding that comes before it."""
    arms = binding.where.arms
    return where.arms[: len(arms)] == arms


def _exclude_each_other(some: Sequence[Arm], others: Sequence[Arm]) -> bool:
    """Whether two places are in different arms of one `if` or `match`."""
    for (statement, block), (other, other_block) in zip(some, others, strict=False):
        if statement is not other:
            return False
        if block != other_block:
            return isinstance(statement, (ast.If, ast.Match))
    return False


def _method(definition: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    found = (each for each in definition.body if isinstance(each, ast.FunctionDef) and each.name == name)
    return next(found, None)


def _parsed(annotation: ast.Constant) -> ast.expr | None:
    try:
        return ast.parse(str(annotation.value), mode="eval").body
    except (SyntaxError, ValueError):
        return None


def _match(call: ast.Call, function: Function) -> Iterator[tuple[ast.arg, ast.expr]]:
    """A call's arguments and the parameters that take them."""
    named = parameters(function)
    bound = bool(named) and named[0].arg in ("self", "cls")
    for parameter, value in zip(named[bound:], call.args, strict=False):
        if isinstance(value, ast.Starred):
            break
        yield parameter, value
    by_name = {each.arg: each for each in (*named, *function.args.kwonlyargs)}
    yield from ((by_name[each.arg], each.value) for each in call.keywords if each.arg in by_name)
