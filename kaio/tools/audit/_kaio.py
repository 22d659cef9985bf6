"""kaio's own names, as they appear in the source that is audited.

Rules kept here: `kaio.__all__` says which names are public. Which module of the package a name was imported through
makes no difference: `kaio.net.client.connect` is `kaio.connect`.
"""

from __future__ import annotations

from typing import Final

from ... import __all__ as _public

__all__ = ["LOOPS", "PROTOCOLS", "TAKES_SOCKETS", "canonical"]

_PUBLIC: Final = frozenset(_public)


def _names(names: str) -> frozenset[str]:
    return frozenset(f"kaio.{name}" for name in names.split())


TAKES_SOCKETS: Final = _names("apply create_connection open_connection create_server start_server serve Listener")
"""Functions that set the policy on existing sockets which are passed to them."""
LOOPS: Final = _names("run install new_event_loop loop_factory EventLoopPolicy")
"""Names whose use puts the program on kaio's event loop."""
PROTOCOLS: Final = _names("KeepaliveProtocol BufferedKeepaliveProtocol")


def canonical(path: str) -> str:
    """The path with modules of kaio's left out, when it leads to a public name; any other path as it is."""
    package, *modules = path.split(".")
    name = modules.pop() if modules else ""
    if package == "kaio" and name in _PUBLIC and all(each.isidentifier() and each.islower() for each in modules):
        return f"kaio.{name}"
    return path
