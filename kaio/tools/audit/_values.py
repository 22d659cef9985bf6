"""The values of arguments, as far as the source spells them out.

Rules kept here: a value that is computed elsewhere, or comes from outside the file, is None: neither on nor off.
"""

from __future__ import annotations

import ast
from typing import Final

from ._calls import argument, last_name, mentions
from ._names import Names
from ._scopes import Where

__all__ = ["OFF_WORDS", "Values", "truth"]

OFF_WORDS: Final = frozenset({"", "0", "off", "no", "false", "none"})


def truth(node: ast.expr | None) -> bool | None:
    """Whether a literal means on; an absent one means off. None for anything but a literal."""
    if node is None:
        return False
    if isinstance(node, ast.Constant):
        return str(node.value).lower() not in OFF_WORDS
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return bool(node.elts)
    return None


def _is_spelt_out(node: ast.expr) -> bool:
    """Whether all of a value is in the source; a class such as Config, if all of its arguments are."""
    if isinstance(node, ast.IfExp):
        return _is_spelt_out(node.body) and _is_spelt_out(node.orelse)
    if isinstance(node, ast.Call):
        return bool(node.keywords) and all(each.arg for each in node.keywords)
    return isinstance(node, (ast.Constant, ast.List, ast.Tuple, ast.Dict))


class Values:
    """Reads the values of expressions, following the names in them to their assignments."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._mentioned: dict[tuple[ast.expr, str], bool] = {}
        self._options: dict[ast.Dict, dict[object, ast.expr]] = {}

    def is_on(self, node: ast.expr, where: Where) -> bool | None:
        """Whether a value turns something on; None when that is decided elsewhere."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            if any(origin.path.endswith("Keepalive.OFF") for origin in self._names.kinds(node, where)):
                return False
            assigned = self._names.values(node, where)
            return truth(assigned[0]) if len(assigned) == 1 else None
        return truth(node)

    def mentions(self, node: ast.expr, where: Where, word: str) -> bool | None:
        """Whether a word occurs in a value; None when the value is made elsewhere."""
        parts = [node]
        for each in ast.walk(node):
            if isinstance(each, ast.Name):
                parts += self._names.values(each, where)
        if any(self._mentions(part, word) for part in parts):
            return True
        known = len(parts) > 1 or _is_spelt_out(node)
        return False if known else None

    def _mentions(self, node: ast.expr, word: str) -> bool:
        key = node, word
        if key not in self._mentioned:  # a long list may be passed in many places
            self._mentioned[key] = mentions(node, word)
        return self._mentioned[key]

    def texts(self, node: ast.expr | None, where: Where) -> list[str] | None:
        """The texts that a value may be; None unless it is known to be a text."""
        found = [node] if not isinstance(node, (ast.Name, ast.Attribute)) else self._names.values(node, where)
        texts = [each.value for each in found if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        return texts if texts and len(texts) == len(found) else None

    def words(self, node: ast.expr | None, where: Where) -> set[str]:
        """The last parts of all names in an expression, as they were imported or assigned."""
        found: set[str] = set()
        for each in ast.walk(node) if node is not None else ():
            if isinstance(each, (ast.Name, ast.Attribute)):
                known = self._names.kinds(each, where)
                found |= {origin.path.rpartition(".")[2] for origin in known} or {last_name(each)}
        return found

    def in_options(self, call: ast.Call, name: str, where: Where) -> ast.expr | None:
        """The value that `**options` pass for a name, when the dictionary is a literal or a call of dict()."""
        for options in [each.value for each in call.keywords if each.arg is None]:
            for each in [options, *self._names.values(options, where)]:
                if isinstance(each, ast.Dict):
                    if name in (known := self._items(each)):
                        return known[name]
                elif isinstance(each, ast.Call) and last_name(each.func) == "dict":
                    return argument(each, len(each.args), name)
        return None

    def _items(self, node: ast.Dict) -> dict[object, ast.expr]:
        """The values of a dictionary's literal keys."""
        if node not in self._options:
            items = zip(node.keys, node.values, strict=True)
            self._options[node] = {key.value: value for key, value in items if isinstance(key, ast.Constant)}
        return self._options[node]
