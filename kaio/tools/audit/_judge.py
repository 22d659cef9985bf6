"""What sets keepalive at the places of a file where connections are made.

Rules kept here: what cannot be told from the file counts as uncovered; what the author hands over in a variable, as
covered. What the application says itself comes first, then kaio's loop, then what a library does unasked.
"""

from __future__ import annotations

import ast
import re
import socket
from collections.abc import Iterator
from typing import Final, NamedTuple

from ._libraries import TABLE, Rule
from ._names import Names, argument, brought, callbacks, last_name
from ._reader import Reader, Where

__all__ = ["Judge", "Place"]

_OFF_WORDS: Final = frozenset({"", "0", "off", "no", "false", "none"})
_LOCAL: Final = re.compile(r"^(unix|unix-abstract|redis\+unix|http\+unix):|\bhost=/")
_TCP_WORDS: Final = {
    "AF_": frozenset({"AF_INET", "AF_INET6", "AF_UNSPEC"}),
    "SOCK_": frozenset({"SOCK_STREAM"}),
    "IPPROTO_": frozenset({"IPPROTO_IP", "IPPROTO_TCP", "IPPROTO_MPTCP"}),
}
_SOCK_FLAGS: Final = frozenset({"SOCK_NONBLOCK", "SOCK_CLOEXEC"})
# Of kaio, what takes sockets that are there and sets its policy on them, and what makes asyncio's own calls covered.
_KAIO_TAKES: Final = re.compile(r"kaio\.(\w+\.)*(apply|(create|open)_connection|(create|start)_server|serve|Listener)")
_KAIO_LOOP: Final = re.compile(r"kaio\.(\w+\.)*(run|install|new_event_loop|loop_factory|EventLoopPolicy)")
_KAIO_LOOP_NAME: Final = "kaio:new_event_loop"  # as uvicorn takes it
_KAIO_PROTOCOL: Final = re.compile(r"kaio\.(\w+\.)*(Buffered)?KeepaliveProtocol")
_MODULES: Final = frozenset(name.partition(".")[0] for name in TABLE)
_LOOP_CALLS: Final = frozenset(name.partition(".")[2] for name in TABLE if name.startswith("loop."))


class _Mark(NamedTuple):
    """What was found to be done with a connection."""

    covered: bool
    why: str


class Place(NamedTuple):
    """Where a connection is made."""

    line: int
    call: str
    covered: bool
    why: str


class Judge:
    """The places of one file, and what covers each."""

    def __init__(self, tree: ast.Module) -> None:
        reader = Reader(tree)
        self._calls = reader.calls if _may_have_places(reader) else []
        self._names = Names(self._calls, reader.indirect, reader.scopes)
        self._marks: dict[ast.Call, _Mark] = {}
        self._used_by_loop: set[ast.Call] = set()
        self._kaio_loop = self._line_of_kaio_loop(reader)
        for call, where in self._calls:
            self._note(call, where)

    def places(self) -> Iterator[Place]:
        """In the order of the source."""
        for call, where in self._calls:
            place = self._names.place(call, where)
            if place is not None and self._makes_tcp(place, call, where):
                mark = self._judge(place, call, where)
                yield Place(call.lineno, place, mark.covered, mark.why)

    # -- whether it is TCP at all

    def _makes_tcp(self, place: str, call: ast.Call, where: Where) -> bool:
        if brought(call, TABLE[place]) is not None or self._is_local(call):
            return False
        if place not in ("socket.socket", "socket.SocketType"):
            return True
        parts: dict[str, ast.expr] = dict(zip(("family", "type", "proto", "fileno"), call.args, strict=False))
        parts.update((each.arg, each.value) for each in call.keywords if each.arg)
        if _truth(parts.get("fileno")) is not False:
            return False  # it takes up a socket that is there already
        return all(
            self._may_be(parts.get(name), where, prefix)
            for name, prefix in (("family", "AF_"), ("type", "SOCK_"), ("proto", "IPPROTO_"))
        )

    def _may_be(self, node: ast.expr | None, where: Where, prefix: str) -> bool:
        """Whether an argument of socket.socket leaves it TCP; what cannot be told does."""
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value in {-1, 0, *(getattr(socket, word, -1) for word in _TCP_WORDS[prefix])}
        words = {word for word in self._words(node, where) if word.startswith(prefix)} - _SOCK_FLAGS
        return not words or bool(words & _TCP_WORDS[prefix])

    def _words(self, node: ast.expr | None, where: Where) -> set[str]:
        """The last parts of all names in an expression, as they were imported or assigned."""
        found: set[str] = set()
        for each in ast.walk(node) if node is not None else ():
            if isinstance(each, (ast.Name, ast.Attribute)):
                known = self._names.of(each, where)
                found |= {origin.path.rpartition(".")[2] for origin in known} or {last_name(each)}
        return found

    def _is_local(self, call: ast.Call) -> bool:
        """Whether it is told a Unix socket."""
        for name, value in [("", each) for each in call.args] + [(each.arg, each.value) for each in call.keywords]:
            if name in ("uds", "unix_socket_path", "unix_socket") and _truth(value) is not False:
                return True
            text = value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
            if _LOCAL.search(text) or (name == "host" and text.startswith("/")):
                return True
            if last_name(value) == "UnixDomainSocketConnection":
                return True
        return False

    # -- what is done with what was made

    def _note(self, call: ast.Call, where: Where) -> None:
        """Remember what a call does for the connections that it is about."""
        function = call.func
        if isinstance(function, ast.Attribute):
            if function.attr == "setsockopt":
                self._mark(function.value, where, self._option(call, where))
            elif function.attr == "ioctl" and "SIO_KEEPALIVE_VALS" in self._words(argument(call, 0), where):
                self._mark(function.value, where, _Mark(True, f"SIO_KEEPALIVE_VALS is set on line {call.lineno}"))
            elif function.attr == "mount" and self._adapter_sets_it(argument(call, 1), where):
                self._mark(function.value, where, _Mark(True, f"the adapter of line {call.lineno} sets it"))
            if self._names.is_loop(function.value, where):
                self._handed_to_loop(call, where)
        for origin in self._names.of(function, where):
            if origin.path.startswith("asyncio."):
                self._handed_to_loop(call, where)
            if _KAIO_TAKES.fullmatch(origin.path):
                self._handed_to_kaio(origin.path, call, where)

    def _mark(self, node: ast.expr, where: Where, mark: _Mark | None) -> None:
        if mark is None:
            return
        for call in self._names.made(node, where):
            known = self._marks.get(call)
            if known is None or mark.covered > known.covered:
                self._marks[call] = mark

    def _option(self, call: ast.Call, where: Where) -> _Mark | None:
        """What setsockopt says of keepalive."""
        on = f"SO_KEEPALIVE is set on line {call.lineno}"
        if len(call.args) == 1 and isinstance(call.args[0], ast.Starred):  # setsockopt(*option)
            return _Mark(True, on) if "SO_KEEPALIVE" in self._words(call.args[0].value, where) else None
        if len(call.args) != 3 or "SO_KEEPALIVE" not in self._words(call.args[1], where):
            return None
        level = self._words(call.args[0], where)
        if level and not level & {"SOL_SOCKET"} and any(word.startswith(("SOL_", "IPPROTO_")) for word in level):
            return None  # the same number is another option there
        value = self._value(call.args[2], where)
        if value is None:
            return _Mark(True, f"{on}, as `{ast.unparse(call.args[2])}` says")
        return _Mark(value, on if value else f"SO_KEEPALIVE is turned off on line {call.lineno}")

    def _adapter_sets_it(self, node: ast.expr | None, where: Where) -> bool:
        for origin in self._names.of(node, where) if node is not None else ():
            if origin.path.rpartition(".")[2] in ("TCPKeepAliveAdapter()", "SocketOptionsAdapter()"):
                return True
        return isinstance(node, ast.Call) and self._class_sets_it(node, where)

    def _class_sets_it(self, call: ast.Call, where: Where) -> bool:
        """Whether what is made is of a class of this file that has something to do with the option."""
        definitions = {origin.definition for origin in self._names.of(call.func, where)}
        return any("SO_KEEPALIVE" in ast.unparse(each) for each in definitions if isinstance(each, ast.ClassDef))

    def _handed_to_loop(self, call: ast.Call, where: Where) -> None:
        for value in [*call.args, *(each.value for each in call.keywords)]:
            self._used_by_loop |= self._names.made(value, where)

    def _handed_to_kaio(self, path: str, call: ast.Call, where: Where) -> None:
        policy = argument(call, 1 if path.endswith(".apply") else len(call.args), "policy", "keepalive")
        if policy is not None and self._value(policy, where) is False:
            return
        for value in [*call.args, *(each.value for each in call.keywords)]:
            self._mark(value, where, _Mark(True, f"{path} is called on it on line {call.lineno}"))

    # -- judgement

    def _judge(self, place: str, call: ast.Call, where: Where) -> _Mark:
        """What covers a place, or that nothing does."""
        rule = TABLE[place]
        mark = self._marks.get(call)
        if mark is not None and mark.covered:
            return mark
        if self._class_sets_it(call, where):
            return _Mark(True, "its class sets SO_KEEPALIVE")
        by_argument = self._by_argument(rule, call, where)
        if by_argument is not None and by_argument.covered:
            return by_argument
        if rule.on_loop and self._has_kaio_protocol(call, where):
            return _Mark(True, "its protocol is kaio's, and has a policy")
        if self._kaio_loop and (rule.on_loop or call in self._used_by_loop):
            return _Mark(True, f"runs on kaio's loop, see line {self._kaio_loop}")
        if by_argument is None and rule.itself is not None:
            return _Mark(True, rule.itself)
        return mark or _Mark(False, rule.advice)

    def _by_argument(self, rule: Rule, call: ast.Call, where: Where) -> _Mark | None:
        """What the argument that counts says; None when it is not given."""
        name = rule.argument
        if name is None:
            return None
        value = argument(call, len(call.args) if rule.position is None else rule.position, name)
        value = value or self._in_options(call, name, where)
        if value is None:
            text = _in_address(call, name)
            return None if text is None else _Mark(text.lower() not in _OFF_WORDS, f"{name}={text} in the address")
        if rule.mentions is not None:
            known = self._mentions(value, where, rule.mentions)
            text = f"{rule.mentions} is in {name}="
        else:
            known = self._value(value, where)
            text = f"{name}={ast.unparse(value)}"
        if known is False:
            return _Mark(False, rule.advice)
        return _Mark(True, text if known else f"{name}= is given, as `{ast.unparse(value)}` says")

    def _in_options(self, call: ast.Call, name: str, where: Where) -> ast.expr | None:
        """What `**options` give a call, where their dictionary is written out."""
        for options in [each.value for each in call.keywords if each.arg is None]:
            for each in [options, *self._names.values(options, where)]:
                if isinstance(each, ast.Dict):
                    for key, value in zip(each.keys, each.values, strict=True):
                        if isinstance(key, ast.Constant) and key.value == name:
                            return value
                elif isinstance(each, ast.Call) and last_name(each.func) == "dict":
                    return argument(each, len(each.args), name)
        return None

    def _value(self, node: ast.expr, where: Where) -> bool | None:
        """Whether a value turns something on; None when it is not told here."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            if any(origin.path.endswith("Keepalive.OFF") for origin in self._names.of(node, where)):
                return False
            assigned = self._names.values(node, where)
            return _truth(assigned[0]) if len(assigned) == 1 else None
        return _truth(node)

    def _mentions(self, node: ast.expr, where: Where, word: str) -> bool | None:
        """Whether a value has a word in it; None when it is made elsewhere."""
        parts = [node]
        for each in ast.walk(node):
            if isinstance(each, ast.Name):
                parts += self._names.values(each, where)
        if any(word in ast.unparse(part) for part in parts):
            return True
        known = isinstance(node, (ast.Constant, ast.List, ast.Tuple, ast.Dict)) or len(parts) > 1
        return False if known else None

    def _has_kaio_protocol(self, call: ast.Call, where: Where) -> bool:
        """Whether the protocol that asyncio is given is a subclass of kaio's."""
        for callback in callbacks(call):
            for definition in self._names.classes(callback, where):
                if any(_KAIO_PROTOCOL.fullmatch(base) for base in self._names.bases(definition)):
                    return True
        return False

    def _line_of_kaio_loop(self, reader: Reader) -> int | None:
        """Where the file's program is put on kaio's loop."""
        lines = [
            node.lineno
            for node, where in (reader.names if "kaio" in reader.modules else ())
            if any(_KAIO_LOOP.fullmatch(origin.path) for origin in self._names.of(node, where))
        ]
        for call, _ in self._calls:
            given = [each.value for each in call.keywords if isinstance(each.value, ast.Constant)]
            lines += [each.lineno for each in given if each.value == _KAIO_LOOP_NAME]
        return min(lines, default=None)


def _may_have_places(reader: Reader) -> bool:
    """Whether a file is worth the work: most import nothing of what is known."""
    return bool(_MODULES & reader.modules) or any(last_name(call.func) in _LOOP_CALLS for call, _ in reader.calls)


def _in_address(call: ast.Call, name: str) -> str | None:
    """What an address or a connection string that is written out says of an option."""
    for value in [*call.args, *(each.value for each in call.keywords)]:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found = re.search(rf"\b{name}=([^&\s]*)", value.value)
            if found:
                return found[1]
    return None


def _truth(node: ast.expr | None) -> bool | None:
    """Whether a value that is written out counts as on; None when it is not written out."""
    if node is None:
        return False
    if isinstance(node, ast.Constant):
        return str(node.value).lower() not in _OFF_WORDS
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return bool(node.elts)
    return None
