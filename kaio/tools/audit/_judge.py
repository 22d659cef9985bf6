"""The verdict on each place of a file where a connection is made.

Rules kept here: a place that cannot be judged from the file is uncovered; a setting that comes from a variable counts
as on. What the application does itself is considered first, then kaio's event loop, then what the library does by
default.
"""

from __future__ import annotations

import ast
import re
import socket
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from ._calls import argument, callbacks, last_name, shown, values
from ._evidence import Evidence, Verdict
from ._kaio import LOOPS, PROTOCOLS, canonical
from ._libraries import TABLE, Rule
from ._names import Names
from ._reader import Reader
from ._scopes import Where
from ._values import OFF_WORDS, Values, truth

__all__ = ["Judge", "Place"]

_LOCAL: Final = re.compile(r"^((redis\+|http\+)?unix|unix-abstract|memory|filesystem):|\bhost=/")
_TCP_WORDS: Final = {
    "AF_": frozenset({"AF_INET", "AF_INET6", "AF_UNSPEC"}),
    "SOCK_": frozenset({"SOCK_STREAM"}),
    "IPPROTO_": frozenset({"IPPROTO_IP", "IPPROTO_TCP", "IPPROTO_MPTCP"}),
}
_SOCK_FLAGS: Final = frozenset({"SOCK_NONBLOCK", "SOCK_CLOEXEC"})
_ADDRESSES: Final = ("broker", "hostname")
_MODULES: Final = frozenset(name.partition(".")[0] for name in TABLE)
_LOOP_CALLS: Final = frozenset(name.partition(".")[2] for name in TABLE if name.startswith("loop."))


class Place(NamedTuple):
    """Where a connection is made, and whether keepalive is set there."""

    line: int
    call: str
    covered: bool
    why: str


class Judge:
    """Judges the places of one file."""

    def __init__(self, tree: ast.Module, line_name: Callable[[int], str] = "line {}".format) -> None:
        """Read a tree; `line_name` says in the reasons where a line is."""
        self._line_name = line_name
        reader = Reader(tree)
        self._calls = reader.calls if _may_have_places(reader) else []
        self._names = Names(self._calls, reader.indirect, reader.scopes)
        self._values = Values(self._names)
        self._evidence = Evidence(self._calls, self._names, self._values, line_name)
        self._kaio_loop = self._line_of_kaio_loop(reader)

    def places(self) -> Iterator[Place]:
        """In the order of the source."""
        for call, where in self._calls:
            place = self._names.place(call, where)
            if place is not None and self._makes_tcp(place, call, where):
                yield Place(call.lineno, place, *self._judge(place, call, where))

    # -- whether it is TCP

    def _makes_tcp(self, place: str, call: ast.Call, where: Where) -> bool:
        rule = TABLE[place]
        if self._names.existing(call, rule, where) is not None or _is_local(call) or self._is_unix(rule, call, where):
            return False
        if place not in ("socket.socket", "socket.SocketType", "trio.socket.socket"):
            return True
        parts: dict[str, ast.expr] = dict(zip(("family", "type", "proto", "fileno"), call.args, strict=False))
        parts.update((each.arg, each.value) for each in call.keywords if each.arg)
        if truth(parts.get("fileno")) is not False:
            return False  # wraps an existing socket
        return all(
            self._may_be_tcp(parts.get(name), where, prefix)
            for name, prefix in (("family", "AF_"), ("type", "SOCK_"), ("proto", "IPPROTO_"))
        )

    def _is_unix(self, rule: Rule, call: ast.Call, where: Where) -> bool:
        """Whether the address is one of a Unix socket or a pipe, as this library writes them."""
        address = argument(call, 0, "address", "host")
        texts = self._values.texts(address, where)
        if rule.pair:
            family = self._values.texts(argument(call, 1, "family"), where)
            return family != ["AF_INET"] if family else texts is not None or truth(address) is False
        return rule.local is not None and texts is not None and all(re.search(rule.local, text) for text in texts)

    def _may_be_tcp(self, node: ast.expr | None, where: Where, prefix: str) -> bool:
        """Whether an argument of socket.socket allows for TCP; one that cannot be resolved does."""
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value in {-1, 0, *(getattr(socket, word, -1) for word in _TCP_WORDS[prefix])}
        words = {word for word in self._values.words(node, where) if word.startswith(prefix)} - _SOCK_FLAGS
        return not words or bool(words & _TCP_WORDS[prefix])

    # -- whether it is covered

    def _judge(self, place: str, call: ast.Call, where: Where) -> Verdict:
        rule = TABLE[place]
        found = self._evidence.about(call)
        if found is not None and found.covered:
            return found
        if self._evidence.class_sets_it(call, where):
            return Verdict(True, "its class sets SO_KEEPALIVE")
        by_argument = self._by_argument(rule, call, where)
        if rule.alternative is not None and (by_argument is None or not by_argument.covered):
            other = self._by_argument(rule.alternative, call, where)
            by_argument = other if other is not None and other.covered else by_argument
        if by_argument is not None and by_argument.covered:
            return by_argument
        if rule.on_loop and self._has_kaio_protocol(call, where):
            return Verdict(True, "its protocol is a subclass of kaio's, which sets a policy")
        if self._kaio_loop and (rule.on_loop or call in self._evidence.passed_to_asyncio):
            return Verdict(True, f"runs on kaio's loop, see {self._line_name(self._kaio_loop)}")
        if by_argument is None and rule.itself is not None and self._speaks(rule, call, where):
            return Verdict(True, rule.itself)
        return found or Verdict(False, rule.advice)

    def _speaks(self, rule: Rule, call: ast.Call, where: Where) -> bool:
        """Whether the address is one for which the library sets keepalive by itself."""
        if rule.schemes is None:
            return True
        addresses = [each for each in (argument(call, 0), argument(call, len(call.args), *_ADDRESSES)) if each]
        found = [text for each in addresses for text in self._values.texts(each, where) or ()]
        if not addresses:
            return re.search(rule.schemes, "") is not None
        return any(re.search(rule.schemes, text) for text in found)

    def _by_argument(self, rule: Rule, call: ast.Call, where: Where) -> Verdict | None:
        """The verdict of the rule's argument; None when it is not passed."""
        name = rule.argument
        if name is None:
            return None
        value = argument(call, len(call.args) if rule.position is None else rule.position, name)
        value = value or self._values.in_options(call, name, where)
        if value is None:
            text = _in_address(call, name)
            return None if text is None else Verdict(text.lower() not in OFF_WORDS, f"{name}={text} in the address")
        if rule.mentions is not None:
            known = self._values.mentions(value, where, rule.mentions)
            text = f"{rule.mentions} is in {name}="
        else:
            known = self._values.is_on(value, where)
            text = f"{name}={shown(value)}"
        if known is False:
            return Verdict(False, rule.advice)
        return Verdict(True, text if known else f"{name}= is passed, with the value of `{shown(value)}`")

    def _has_kaio_protocol(self, call: ast.Call, where: Where) -> bool:
        """Whether the protocol that is passed to asyncio is a subclass of kaio's."""
        return any(
            self._names.bases(definition) & PROTOCOLS
            for callback in callbacks(call)
            for definition in self._names.classes(callback, where)
        )

    def _line_of_kaio_loop(self, reader: Reader) -> int | None:
        """The first line that puts the program on kaio's loop."""
        lines = [
            node.lineno
            for node, where in (reader.names if "kaio" in reader.modules else ())
            if any(origin.path in LOOPS for origin in self._names.kinds(node, where))
        ]
        for call, _ in self._calls:
            lines += [each.value.lineno for each in call.keywords if _names_kaio_loop(each.value)]
        return min(lines, default=None)


def _may_have_places(reader: Reader) -> bool:
    """Whether a file imports or calls anything that the table knows: most do not, and are skipped."""
    return bool(_MODULES & reader.modules) or any(last_name(call.func) in _LOOP_CALLS for call, _ in reader.calls)


def _names_kaio_loop(node: ast.expr) -> bool:
    """Whether this is the text `kaio:new_event_loop`, the form in which uvicorn accepts a loop."""
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    return ":" in text and canonical(text.replace(":", ".")) in LOOPS


def _is_local(call: ast.Call) -> bool:
    """Whether an argument asks for a Unix socket."""
    for name, value in [("", each) for each in call.args] + [(each.arg, each.value) for each in call.keywords]:
        if name in ("uds", "unix_socket_path", "unix_socket") and truth(value) is not False:
            return True
        text = value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
        if _LOCAL.search(text) or (name == "host" and text.startswith("/")):
            return True
        if last_name(value) == "UnixDomainSocketConnection":
            return True
    return False


def _in_address(call: ast.Call, name: str) -> str | None:
    """The value of an option in an address or a connection string, when that is a literal."""
    for value in values(call):
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found = re.search(rf"\b{name}=([^&\s]*)", value.value)
            if found:
                return found[1]
    return None
