"""The arguments of calls: what is passed by position or by name, and which parameter receives it.

Rules kept here: only the syntax of one call, or of one call and one definition, is looked at.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

from ._libraries import Rule
from ._scopes import Function, parameters

__all__ = [
    "argument",
    "callbacks",
    "existing_connection",
    "last_name",
    "match_parameters",
    "mentions",
    "shown",
    "values",
]

_LONGEST: Final = 80  # characters of an expression that is shown
_CALLBACKS: Final = frozenset({"protocol_factory", "client_connected_cb", "handler"})


def last_name(node: ast.expr) -> str:
    """The name itself, or the name of an attribute without its owner."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def mentions(node: ast.AST, word: str) -> bool:
    """Whether a word occurs in the names and texts of a piece of source, unless it is that of a value that is off."""
    off: set[ast.expr | None] = set()
    for each in ast.walk(node):  # outer ones first
        match each:
            case ast.keyword(arg=str(text), value=value) if word in text and not _is_off(value):
                return True
            case ast.Dict(keys=keys, values=found):
                off.update(key for key, value in zip(keys, found, strict=True) if _is_off(value))
            case ast.Tuple(elts=[*names, last]) if _is_off(last):
                off.update(names)
            case ast.Attribute(value=owner) if each in off:
                off.add(owner)
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.Constant(value=str(text)) if word in text:
                if each not in off:
                    return True
    return False


def _is_off(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and not node.value


def shown(node: ast.expr) -> str:
    """An expression as it is shown in a reason: in one line, and cut where it is long."""
    try:
        text = " ".join(ast.unparse(node).split())
    except RecursionError:
        return "..."
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def values(call: ast.Call) -> list[ast.expr]:
    """All arguments of a call."""
    return [*call.args, *(each.value for each in call.keywords)]


def argument(call: ast.Call, position: int, *names: str) -> ast.expr | None:
    """The argument that is passed at a position or by one of the names."""
    if position < len(call.args):
        return call.args[position]
    return next((each.value for each in call.keywords if each.arg in names), None)


def callbacks(call: ast.Call) -> list[ast.expr]:
    """The arguments that may be callbacks for new connections: the first one, and those named like one."""
    return [*call.args[:1], *(each.value for each in call.keywords if each.arg in _CALLBACKS)]


def existing_connection(call: ast.Call, rule: Rule) -> ast.expr | None:
    """The argument that passes an existing connection, pool or transport, which is a place of its own."""
    for each in call.keywords:
        if each.arg in rule.elsewhere and not (isinstance(each.value, ast.Constant) and each.value.value is None):
            return each.value
    return None


def match_parameters(call: ast.Call, function: Function) -> Iterator[tuple[ast.arg, ast.expr]]:
    """The parameters of a function, with the arguments that a call passes for them."""
    named = parameters(function)
    bound = bool(named) and named[0].arg in ("self", "cls")
    for parameter, value in zip(named[bound:], call.args, strict=False):
        if isinstance(value, ast.Starred):
            break
        yield parameter, value
    by_name = {each.arg: each for each in (*named, *function.args.kwonlyargs)}
    yield from ((by_name[each.arg], each.value) for each in call.keywords if each.arg in by_name)
