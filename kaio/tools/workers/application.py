"""What `module:name` means: a handler, or a protocol class.

Rules kept here: whatever is wrong is an `AppError` of one line. When the application's own code raised, the error has a
traceback, which begins with the application's first frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias, cast

import kaio

__all__ = ["AppError", "Application", "ProtocolClass", "check", "find", "make", "split"]

ProtocolClass: TypeAlias = type[kaio.KeepaliveProtocol] | type[kaio.BufferedKeepaliveProtocol]
Application: TypeAlias = Callable[[kaio.Connection], Awaitable[object]] | ProtocolClass

_KAIO: Final = os.path.dirname(kaio.__file__) + os.sep
_CALLERS: Final = (_KAIO, os.path.dirname(importlib.__file__) + os.sep, "<frozen importlib", contextlib.__file__)
"""Beginnings of the names of files that come before the application's in a traceback."""


class AppError(Exception):
    """An application that cannot be served."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace
        """The traceback of the application's own error; empty when there is none."""


def split(reference: str) -> tuple[str, str]:
    """Split `module:name`. Raises ValueError."""
    module, colon, name = reference.partition(":")
    if not colon:
        raise ValueError(f"{reference!r} must be MODULE:NAME, such as app:handler")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ValueError(f"{reference!r} must be MODULE:NAME, two dotted names with a colon between")
    return module, name


def find(reference: str) -> Any:
    """Import the module, and return what has the name. Raises `AppError`."""
    module, name = split(reference)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is not None and f"{module}.".startswith(f"{exc.name}.") and _users(exc.__traceback__) is None:
            raise AppError(
                f"there is no module {exc.name} in {sys.path[0] or '.'} or on the rest of the path"
            ) from None
        raise _failed(f"importing {module} failed", exc) from None
    except (Exception, SystemExit) as exc:
        raise _failed(f"importing {module} failed", exc) from None
    where = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise AppError(f"{where} has no {part}") from None
        where += f".{part}"
    return found


async def make(reference: str, factory: Any, stack: contextlib.AsyncExitStack) -> Any:
    """Call a factory, and return what it makes: returns, awaits to, or yields as an async context manager.

    The context is left with the stack. Raises `AppError`.
    """
    if not callable(factory):
        raise AppError(f"{reference} is {_kind(factory)}, which --factory cannot call")
    if (problem := _does_not_take(factory)) is not None:
        raise AppError(f"--factory calls {reference} without arguments: {problem}")
    try:
        made: Any = factory()
        if inspect.isawaitable(made):
            made = await made
        kind = type(made)
        if hasattr(kind, "__aenter__") and hasattr(kind, "__aexit__"):
            made = await stack.enter_async_context(made)
    except (Exception, SystemExit) as exc:
        raise _failed(f"{reference} failed", exc) from None
    return made


def check(what: str, found: Any) -> Application:
    """Return a handler, or a protocol class with kaio's callbacks. Raises `AppError`, in which `what` names it."""
    if isinstance(found, type):
        return _protocol_class(what, found)
    if not callable(found):
        raise AppError(f"{what} is {_kind(found)}: neither an async function nor a protocol class")
    if not any(inspect.iscoroutinefunction(each) for each in (found, type(found).__call__)):
        raise AppError(f"{what} is not an async function; to call it for one, use --factory")
    if (problem := _does_not_take(found, "the connection")) is not None:
        raise AppError(f"{what} is called with one argument, the connection: {problem}")
    return cast("Application", found)


def _protocol_class(what: str, found: type[Any]) -> ProtocolClass:
    """A protocol class that is none of kaio's gets its callbacks: else the end of the server would cut it off."""
    if issubclass(found, (asyncio.DatagramProtocol, asyncio.SubprocessProtocol)):
        raise AppError(f"{what} is a class of protocols that have no streams")
    if not issubclass(found, asyncio.BaseProtocol):
        raise AppError(f"{what} is a class, but not of asyncio protocols")
    if issubclass(found, (kaio.KeepaliveProtocol, kaio.BufferedKeepaliveProtocol)):
        return found
    base = kaio.BufferedKeepaliveProtocol if issubclass(found, asyncio.BufferedProtocol) else kaio.KeepaliveProtocol
    own = {"__module__": found.__module__, "__qualname__": found.__qualname__, "__doc__": found.__doc__}
    try:
        made: Any = type(found.__name__, (found, base), own)
    except TypeError as exc:
        raise AppError(f"{what} must derive from kaio.{base.__name__}: {exc}") from None
    protocol_class: ProtocolClass = made
    return protocol_class


def _does_not_take(function: Any, *arguments: object) -> str | None:
    """Why a function cannot be called so; None when it can, or when nobody knows."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as exc:
        return str(exc)
    except ValueError:  # some of C have no signature
        return None
    return None


def _kind(thing: object) -> str:
    return "a module" if inspect.ismodule(thing) else f"of type {type(thing).__qualname__}"


def _failed(what: str, exc: BaseException) -> AppError:
    lines = "".join(traceback.format_exception(type(exc), exc, _users(exc.__traceback__)))
    return AppError(f"{what}: {traceback.format_exception_only(exc)[-1].strip()}", lines)


def _users(trace: Any) -> Any:
    """A traceback from its first frame that is the application's."""
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_CALLERS):
        trace = trace.tb_next
    return trace
