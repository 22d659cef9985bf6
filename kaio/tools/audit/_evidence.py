"""What a file does with the connections it makes: options that are set on them, and functions they are passed to.

Rules kept here: evidence belongs to the call that made the connection. Of several pieces, one that covers it wins.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from ._calls import argument, mentions, shown, values
from ._kaio import TAKES_SOCKETS
from ._names import Names
from ._platform import may_be_linux
from ._scopes import Where
from ._values import Values

__all__ = ["Evidence", "Verdict"]


_HOW: Final = "set SO_KEEPALIVE"
_METHODS: Final = frozenset({"set_keepalive", "setTcpKeepAlive"})  # paramiko's and Twisted's


class Verdict(NamedTuple):
    """Whether keepalive is set on a connection, and why."""

    covered: bool
    why: str


class Evidence:
    """What the calls of a file say about the connections that other calls make."""

    def __init__(
        self,
        calls: Iterable[tuple[ast.Call, Where]],
        names: Names,
        values: Values,
        line_name: Callable[[int], str],
    ) -> None:
        self._line_name = line_name
        self._names = names
        self._values = values
        self._verdicts: dict[ast.Call, Verdict] = {}
        self._by_made: dict[frozenset[ast.Call], Verdict] = {}
        self._setting_classes: dict[ast.AST, bool] = {}
        passed: set[frozenset[ast.Call]] = set()
        for call, where in calls:
            passed.update(self._read(call, where))
        self.passed_to_asyncio = frozenset[ast.Call]().union(*passed)
        """The calls whose sockets are passed to asyncio or to a method of an event loop."""
        for made, verdict in self._by_made.items():
            for call in made:
                self._verdicts[call] = _better(verdict, self._verdicts.get(call))

    def about(self, call: ast.Call) -> Verdict | None:
        """What was found about the connection that a call makes."""
        return self._verdicts.get(call)

    def class_sets_it(self, call: ast.Call, where: Where) -> bool:
        """Whether the call instantiates a class of this file whose source mentions SO_KEEPALIVE."""
        return any(self._sets_it(origin.definition) for origin in self._names.kinds(call.func, where))

    def _sets_it(self, definition: ast.AST | None) -> bool:
        if not isinstance(definition, ast.ClassDef):
            return False
        if definition not in self._setting_classes:
            self._setting_classes[definition] = mentions(definition, "SO_KEEPALIVE")
        return self._setting_classes[definition]

    def _read(self, call: ast.Call, where: Where) -> Iterator[frozenset[ast.Call]]:
        """Read one call. Yields the calls that made what it passes to asyncio."""
        function = call.func
        asyncio = False
        if isinstance(function, ast.Attribute):
            self._add(function.value, where, self._method(function.attr, call, where))
            asyncio = self._names.is_loop(function.value, where)
        for origin in self._names.kinds(function, where):
            asyncio = asyncio or origin.path.startswith("asyncio.")
            if origin.path in TAKES_SOCKETS:
                self._pass_to_kaio(origin.path, call, where)
        if asyncio:
            yield from (self._names.made(value, where) for value in values(call))

    def _add(self, node: ast.expr, where: Where, verdict: Verdict | None) -> None:
        if verdict is not None:
            made = self._names.made(node, where)
            self._by_made[made] = _better(verdict, self._by_made.get(made))

    # -- methods of a connection

    def _method(self, name: str, call: ast.Call, where: Where) -> Verdict | None:
        """What a method does for the object that it is called on."""
        if name == "setsockopt":
            return self._setsockopt(call, where)
        line = self._line_name(call.lineno)
        if name == "ioctl" and "SIO_KEEPALIVE_VALS" in self._values.words(argument(call, 0), where):
            return Verdict(False, f"SIO_KEEPALIVE_VALS on {line} is for Windows only: elsewhere, {_HOW}")
        if name in _METHODS and call.args and len(call.args) == 1:
            on = self._values.is_on(call.args[0], where) is not False
            return Verdict(on, f"{name}() is called on {line}" if on else f"{name}() turns it off on {line}")
        if name == "mount" and self._adapter_sets_it(argument(call, 1), where):
            return Verdict(True, f"the adapter on {self._line_name(call.lineno)} sets it")
        return None

    def _setsockopt(self, call: ast.Call, where: Where) -> Verdict | None:
        verdict = self._option(call, where)
        if verdict is not None and verdict.covered and not may_be_linux(where):
            return Verdict(False, f"{verdict.why}, but not on Linux: there, {_HOW}")
        return verdict

    def _option(self, call: ast.Call, where: Where) -> Verdict | None:
        on = f"SO_KEEPALIVE is set on {self._line_name(call.lineno)}"
        if len(call.args) == 1 and isinstance(call.args[0], ast.Starred):  # setsockopt(*option)
            return Verdict(True, on) if "SO_KEEPALIVE" in self._values.words(call.args[0].value, where) else None
        if len(call.args) != 3 or "SO_KEEPALIVE" not in self._values.words(call.args[1], where):
            return None
        level = self._values.words(call.args[0], where)
        if level and not level & {"SOL_SOCKET"} and any(word.startswith(("SOL_", "IPPROTO_")) for word in level):
            return None  # the same number is a different option at that level
        value = self._values.is_on(call.args[2], where)
        if value is None:
            return Verdict(True, f"{on}, to the value of `{shown(call.args[2])}`")
        return Verdict(value, on if value else f"SO_KEEPALIVE is turned off on {self._line_name(call.lineno)}")

    def _adapter_sets_it(self, node: ast.expr | None, where: Where) -> bool:
        for origin in self._names.kinds(node, where) if node is not None else ():
            if origin.path.rpartition(".")[2] in ("TCPKeepAliveAdapter()", "SocketOptionsAdapter()"):
                return True
        return isinstance(node, ast.Call) and self.class_sets_it(node, where)

    # -- functions that a connection is passed to

    def _pass_to_kaio(self, path: str, call: ast.Call, where: Where) -> None:
        policy = argument(call, 1 if path == "kaio.apply" else len(call.args), "policy", "keepalive")
        if policy is not None and self._values.is_on(policy, where) is False:
            return
        for value in values(call):
            self._add(value, where, Verdict(True, f"it is passed to {path} on {self._line_name(call.lineno)}"))


def _better(verdict: Verdict, known: Verdict | None) -> Verdict:
    """The first of two verdicts that covers; else the one that was known."""
    return verdict if known is None or verdict.covered > known.covered else known
