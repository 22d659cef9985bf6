"""`Pending`: what `connect` and `serve` return, to be awaited or entered."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

__all__ = ["Pending"]


class _AsyncCloseable(Protocol):
    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...


T = TypeVar("T", bound=_AsyncCloseable)


class Pending(Generic[T]):
    """A connection or server to be made: by `await`, or by `async with`, which closes it at its end."""

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._made: T | None = None
        self._used = False

    def __await__(self) -> Generator[Any, Any, T]:
        self._used = True
        return self._make().__await__()

    if not TYPE_CHECKING:  # a type checker finds the mistake itself

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"there is no {name!r} yet: write `await kaio...(...)`, or `async with`")

    def __del__(self) -> None:
        if not self._used:
            warnings.warn("connect() or serve() was never awaited", RuntimeWarning, source=self, stacklevel=2)

    async def __aenter__(self) -> T:
        if self._made is not None:
            raise RuntimeError("this has been entered already")
        self._used = True
        self._made = await self._make()
        await self._made.__aenter__()
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._made is not None
        return await self._made.__aexit__(kind, exc, trace)
