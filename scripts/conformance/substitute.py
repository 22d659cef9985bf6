"""Put another loop where asyncio and uvloop make theirs.

Rules kept here: only names that make loops are replaced, as soon as their module has been imported and before anybody
looks them up; nothing is imported that the suite did not ask for, but for kaio and what it imports, when asyncio is.
What a suite subclasses stays a class, with the constructor of its base. What is put in place bears the name and module
of what it replaces, because suites read there which library's rules a loop follows. Every loop made is counted: a suite
that never met kaio's loop proves nothing, and the table shows it.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final, TypeAlias

__all__ = ["install", "made"]

_Maker: TypeAlias = Callable[..., Any]  # a loop class, or a factory of loops

_made = 0


def made() -> int:
    """How many of the loops put in place this process has made."""
    return _made


def install(how: str) -> None:
    """Make this process run over kaio's loop: its "class", or what its "factory" makes; or the harness's "control"."""
    sys.meta_path.insert(0, _Hook(_REPLACEMENTS[how]))


def _classes_of_asyncio(asyncio: Any, mixed: Callable[[type], type]) -> None:
    stand_in = _stand_in(asyncio.SelectorEventLoop, mixed)
    for module in (asyncio, asyncio.unix_events):
        for name in ("SelectorEventLoop", "EventLoop"):  # EventLoop: Python 3.13
            if hasattr(module, name):
                setattr(module, name, stand_in)
    _default_policy(asyncio)._loop_factory = stand_in


def _class_of_uvloop(uvloop: Any, mixed: Callable[[type], type]) -> None:
    uvloop.Loop = _stand_in(uvloop.Loop, mixed)  # uvloop.new_event_loop looks there


def _factory_of_asyncio(asyncio: Any) -> None:
    _default_policy(asyncio)._loop_factory = staticmethod(_kaio_factory(asyncio.SelectorEventLoop))


def _factory_of_uvloop(uvloop: Any) -> None:
    uvloop.new_event_loop = _kaio_factory(uvloop.new_event_loop)


def _default_policy(asyncio: Any) -> Any:
    """The class that makes loops by default: asyncio.run and new_event_loop ask it, in all versions of Python."""
    return asyncio.unix_events._UnixDefaultEventLoopPolicy


def _kaio_class(base: type) -> type:
    from kaio.loop.factories import loop_class  # noqa: PLC0415 - the control runs without it

    return loop_class(base)


def _empty_class(base: type) -> type:
    return type(base.__name__, (base,), {})


def _stand_in(base: type, mixed: Callable[[type], type]) -> type:
    """The mixed class of `base` under its name, counting its loops."""
    above: Any = mixed(base)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _count()
        above.__init__(self, *args, **kwargs)

    namespace = {"__init__": init, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (above,), namespace)


def _kaio_factory(base: _Maker) -> _Maker:
    """kaio's factory over `base`, under its name, counting its loops."""

    @functools.cache
    def factory() -> _Maker:
        from kaio.loop.factories import loop_factory  # noqa: PLC0415 - pytest must see plugins of anyio's before kaio does

        return loop_factory(base=base)

    @functools.wraps(base, updated=())
    def make() -> Any:
        _count()
        return factory()()

    return make


def _count() -> None:
    global _made  # noqa: PLW0603 - the count of the process
    _made += 1


_REPLACEMENTS: Final[dict[str, dict[str, Callable[[Any], None]]]] = {
    "class": {
        "asyncio": functools.partial(_classes_of_asyncio, mixed=_kaio_class),
        "uvloop": functools.partial(_class_of_uvloop, mixed=_kaio_class),
    },
    "factory": {"asyncio": _factory_of_asyncio, "uvloop": _factory_of_uvloop},
    "control": {
        "asyncio": functools.partial(_classes_of_asyncio, mixed=_empty_class),
        "uvloop": functools.partial(_class_of_uvloop, mixed=_empty_class),
    },
}


class _Hook:
    """Has modules changed when they have been imported."""

    def __init__(self, replacements: dict[str, Callable[[Any], None]]) -> None:
        self._awaited = dict(replacements)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        replace = self._awaited.pop(fullname, None)
        if replace is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _then(spec.loader, replace)
        return spec


def _then(loader: Any, replace: Callable[[Any], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        replace(module)

    loader.exec_module = exec_module
