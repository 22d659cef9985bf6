"""What the expressions of a Python file refer to: a library's function, or the result of a call.

Rules kept here: a name refers to whatever the bindings that reach its place refer to. An expression that may refer to
several things refers to all of them; one that cannot be resolved refers to nothing. Sockets are followed through
assignments, attributes of self, arguments of the file's own functions and callbacks, but not through return values.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from ._calls import callbacks, existing_connection, last_name, match_parameters
from ._kaio import canonical
from ._libraries import TABLE, Rule
from ._scopes import MOST, Binding, Definition, Function, Scope, Where, bindings, dotted, is_certain, parameters

__all__ = ["Names", "Origin"]


class Origin(NamedTuple):
    """One thing that an expression may refer to."""

    path: str
    """The dotted name; followed by `()`, the result of calling it."""
    made: ast.Call | None = None
    """The call that made it, or that made the object it was taken from."""
    definition: Definition | None = None
    """The function or class of this file that it is, or that made it."""


Origins: TypeAlias = frozenset[Origin]
_UNKNOWN: Final[Origins] = frozenset()

# Functions that return the connection that is passed to them; methods and attributes that return one of a connection's.
_PASSING: Final = frozenset(
    {"wait_for", "shield", "ensure_future", "create_task", "gather", "run", "run_until_complete"}
    | {"closing", "aclosing", "enter_context", "enter_async_context", "wrap_socket"}
)
_TAKING: Final = frozenset({"get_extra_info", "extra", "accept", "dup", "get_transport", "__enter__", "__aenter__"})
_PARTS: Final = frozenset({"sock", "socket", "sockets", "transport"})
_LOOP_MAKERS: Final = re.compile(r"(^|\.)(get_running_loop|get_event_loop|new_event_loop|get_loop)\(\)$")
_LOOP_CLASSES: Final = re.compile(
    r"^(asyncio|uvloop|winloop)\.(\w+\.)*(\w*EventLoop|Loop)\(\)$|^kaio\.loop_factory\(\)\(\)$"
)
_LOOP_NAME: Final = re.compile(r"(^|_)(event_?)?loop$")
_MAX_DEPTH: Final = 50  # nested expressions that are resolved; each takes several frames of Python's stack


class Names:
    """Resolves the expressions of a file."""

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
        # By the identity of the objects that they are about, which are kept beside them.
        self._united: dict[int, tuple[Sequence[Binding], Origins]] = {}
        self._kinds: dict[int, tuple[Origins, Origins]] = {}
        self._made: dict[int, tuple[Origins, frozenset[ast.Call]]] = {}
        self._parts: dict[tuple[int, str], tuple[Origins, Origins]] = {}
        self._arguments: dict[ast.arg, list[tuple[ast.expr, Where]]] = {}  # by parameter, from the file's own calls
        found = [each for call, where in calls for each in self._find_arguments(call, where)]
        for parameter, value, where in found:
            self._arguments.setdefault(parameter, []).append((value, where))
        for known in (self._known, self._united, self._kinds, self._made, self._parts):
            known.clear()  # these were resolved without the arguments

    def of(self, node: ast.expr, where: Where) -> Origins:
        """All that an expression may refer to; empty when it cannot be resolved."""
        if node not in self._known:
            if self._depth == _MAX_DEPTH:
                return _UNKNOWN
            self._known[node] = _UNKNOWN  # while it is being resolved: a reference to itself adds nothing
            self._depth += 1
            self._known[node] = self._resolve(node, where)
            self._depth -= 1
        return self._known[node]

    def _resolve(self, node: ast.expr, where: Where) -> Origins:
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
        return _union(self.of(node, where) for node in nodes)

    def kinds(self, node: ast.expr, where: Where) -> Origins:
        """One of each kind of things that an expression may refer to, whichever call made it."""
        known = self.of(node, where)
        if len(known) < 2:
            return known
        if id(known) not in self._kinds:
            kinds = {(each.path, each.definition): each for each in known}
            self._kinds[id(known)] = known, frozenset(kinds.values())
        return self._kinds[id(known)][1]

    def made(self, node: ast.expr, where: Where) -> frozenset[ast.Call]:
        """The calls that may have made the object that an expression refers to."""
        known = self.of(node, where)
        if id(known) not in self._made:
            calls = (each.made for each in known if each.made is not None and each.path.endswith("()"))
            self._made[id(known)] = known, frozenset(calls)
        return self._made[id(known)][1]

    def values(self, node: ast.expr, where: Where) -> list[ast.expr]:
        """The values that a name was assigned, when all of its bindings are assignments."""
        found = bindings(node, where)
        values = [binding.meaning for binding in found if isinstance(binding.meaning, ast.expr)]
        return values if len(values) == len(found) else []

    def classes(self, callback: ast.expr, where: Where) -> Iterator[ast.ClassDef]:
        """The classes of this file whose instances a protocol factory returns."""
        for origin in self.kinds(callback, where):
            if isinstance(origin.definition, ast.ClassDef):
                yield origin.definition
            elif isinstance(origin.definition, ast.Lambda) and isinstance(origin.definition.body, ast.Call):
                made = self.of(origin.definition.body, Where(self._scopes[origin.definition]))
                yield from (each.definition for each in made if isinstance(each.definition, ast.ClassDef))

    def bases(self, definition: ast.ClassDef) -> set[str]:
        """The names of a class's direct and indirect bases."""
        names: set[str] = set()
        seen: set[ast.AST] = set()
        todo = [definition]
        while todo and len(seen) < MOST:
            seen.add(each := todo.pop())
            around = self._scopes[each].parent or self._scopes[each]
            for origin in self._any(each.bases, Where(around)):
                names.add(origin.path)
                if isinstance(origin.definition, ast.ClassDef) and origin.definition not in seen:
                    todo.append(origin.definition)
        return names

    def _name(self, node: ast.Name, where: Where) -> Origins:
        found = bindings(node, where)
        if found:
            return self._meanings(found)
        stars = [star for scope in where.scope.chain() for star in scope.stars[-MOST:]]
        return frozenset(Origin(canonical(f"{star}.{node.id}")) for star in stars)

    def _attribute(self, node: ast.Attribute, where: Where) -> Origins:
        assigned = bindings(node, where)
        if any(is_certain(binding, where) for binding in assigned):
            return self._meanings(assigned)
        root, _, rest = (dotted(node) or "").partition(".")
        owner = where.scope.method_of(root)
        known = [self._meanings(assigned)]
        if owner is not None and rest in owner.bindings:
            known.append(self._meanings(owner.bindings[rest]))
        return _union([*known, self._parts_of(self.of(node.value, where), node.attr)])

    def _parts_of(self, owners: Origins, name: str) -> Origins:
        key = id(owners), name
        if key not in self._parts:
            self._parts[key] = owners, _union([self._part(origin, name) for origin in owners])
        return self._parts[key][1]

    def _part(self, origin: Origin, name: str) -> Origins:
        if isinstance(origin.definition, ast.ClassDef):
            own = self._scopes[origin.definition].bindings.get(name)
            if own is not None:
                return self._meanings(own)
            instance = "()" if origin.path.endswith("()") else ""
            inherited = {f"{base}{instance}.{name}" for base in self.bases(origin.definition)} & TABLE.keys()
            if inherited:
                return frozenset(Origin(method, origin.made) for method in inherited)
        if origin.made is not None and name in _PARTS:
            return frozenset({origin})
        return frozenset({Origin(canonical(f"{origin.path}.{name}"), origin.made)})

    def _meanings(self, found: Sequence[Binding]) -> Origins:
        if len(found) <= MOST:
            return _union([self._meaning(binding) for binding in found])
        if id(found) not in self._united:  # all bindings of a name, which is the same list at each place
            self._united[id(found)] = found, _UNKNOWN
            self._united[id(found)] = found, _union([self._meaning(binding) for binding in found])
        return self._united[id(found)][1]

    def _meaning(self, binding: Binding) -> Origins:
        meaning, where = binding.meaning, binding.where
        if isinstance(meaning, str):
            return frozenset({Origin(canonical(meaning))})
        if isinstance(meaning, ast.arg):
            return self._parameter(meaning, where)
        if isinstance(meaning, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return frozenset({Origin(f"<file>.{meaning.name}", definition=meaning)})
        return _UNKNOWN if meaning is None else self.of(meaning, where)

    def _parameter(self, parameter: ast.arg, where: Where) -> Origins:
        """What a parameter's annotation names, and what the file's own calls pass for it."""
        if parameter not in self._known:
            self._known[parameter] = _UNKNOWN
            annotation = parameter.annotation
            if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
                annotation = _parsed(annotation)
            annotated = () if annotation is None else self._types(annotation, where)
            passed = (self.of(value, there) for value, there in self._arguments.get(parameter, ()))
            self._known[parameter] = _union([frozenset(annotated), *passed])
        return self._known[parameter]

    def _types(self, annotation: ast.expr, where: Where) -> Iterator[Origin]:
        """An instance of each class that an annotation names."""
        for node in ast.walk(annotation):
            if isinstance(node, (ast.Name, ast.Attribute)):
                for origin in self.of(node, Where(where.scope)):
                    yield Origin(f"{origin.path}()", definition=origin.definition)

    def _call(self, node: ast.Call, where: Where) -> Origins:
        place = self.place(node, where)
        if place is not None:
            existing = self.existing(node, TABLE[place], where)
            if existing is not None:
                return self.of(existing, where)
            definition = next((each.definition for each in self.kinds(node.func, where)), None)
            return frozenset({Origin(f"{place}()", node, definition)})
        if node in self._indirect and self.place(self._indirect[node], where) is not None:
            return self.of(self._indirect[node], where)
        origins = [each for each in self.kinds(node.func, where) if not isinstance(each.definition, Function)]
        names = {each.path.rpartition(".")[2] for each in origins}
        if (last_name(node.func) in _PASSING and not names) or names & _PASSING:
            return self._any(node.args, where)
        if last_name(node.func) in _PARTS and origins and all(each.made for each in origins):
            return self.of(node.func, where)  # a method that returns the socket
        if "functools.partial" in {each.path for each in origins} and node.args:
            return self.of(node.args[0], where)
        if names & _TAKING:  # each connection of its own listener
            origins = [each for each in self.of(node.func, where) if not isinstance(each.definition, Function)]
        return frozenset(
            Origin(each.path.rpartition(".")[0], each.made)
            if each.made is not None and each.path.rpartition(".")[2] in _TAKING
            else Origin(f"{each.path}()", node, each.definition)
            for each in origins
        )

    def existing(self, call: ast.Call, rule: Rule, where: Where) -> ast.expr | None:
        """The argument that passes an existing connection, pool or transport, which is a place of its own."""
        first = call.args[0] if call.args and rule.wraps else None
        return first if first is not None and self.made(first, where) else existing_connection(call, rule)

    # -- the arguments that parameters receive

    def _find_arguments(self, call: ast.Call, where: Where) -> Iterator[tuple[ast.arg, ast.expr, Where]]:
        for origin in self.kinds(call.func, where):
            function = origin.definition
            if isinstance(function, ast.ClassDef):
                function = self._scopes[function].method("__init__")
            if isinstance(function, Function):
                yield from ((each, value, where) for each, value in match_parameters(call, function))
        # Callbacks receive the connection: protocols, handlers of streams, handlers of a listener's connections.
        source: ast.expr | None = call if self.place(call, where) else None
        if source is None and isinstance(call.func, ast.Attribute) and call.func.attr == "serve":
            source = call.func.value
        if source is not None:
            for callback in callbacks(call):
                yield from ((each, source, where) for each in self._connection_parameters(callback, where))

    def _connection_parameters(self, callback: ast.expr, where: Where) -> Iterator[ast.arg]:
        """The parameters of a callback that receive a connection."""
        for definition in self.classes(callback, where):
            made = self._scopes[definition].method("connection_made")
            yield from parameters(made)[1:2] if made is not None else ()
        for origin in self.kinds(callback, where):
            if isinstance(origin.definition, Function):
                yield from (each for each in parameters(origin.definition) if each.arg not in ("self", "cls"))

    # -- loops

    def place(self, call: ast.Call, where: Where) -> str | None:
        """The name in the table of the function that is called; None when the table does not have it."""
        function = call.func
        if isinstance(function, ast.Attribute):
            name = f"loop.{function.attr}"
            if name in TABLE and self.is_loop(function.value, where):
                return name
        for origin in self.kinds(function, where):
            if origin.path in TABLE:
                return origin.path
            if isinstance(origin.definition, ast.ClassDef) and not origin.path.endswith("()"):
                known = sorted(self.bases(origin.definition) & TABLE.keys())
                if known:
                    return known[0]
        return None

    def is_loop(self, node: ast.expr, where: Where) -> bool:
        """Whether an expression is an event loop: by what it refers to, or else by its name."""
        paths = {origin.path for origin in self.kinds(node, where)}
        if any(_LOOP_MAKERS.search(path) or _LOOP_CLASSES.search(path) for path in paths):
            return True
        if any(path.endswith("()") for path in paths):
            return False
        if isinstance(node, ast.Call):
            return bool(_LOOP_MAKERS.search(f"{last_name(node.func)}()"))
        return bool(_LOOP_NAME.search(last_name(node)))


def _union(known: Iterable[Origins]) -> Origins:
    """All of several sets; the same object if only one has anything, since copies of a large one take long."""
    some = list({id(each): each for each in known if each}.values())
    return some[0] if len(some) == 1 else _UNKNOWN.union(*some)


def _parsed(annotation: ast.Constant) -> ast.expr | None:
    try:
        return ast.parse(str(annotation.value), mode="eval").body
    except (SyntaxError, ValueError):
        return None
