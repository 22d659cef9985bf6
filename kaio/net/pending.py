"""`Promise` and `Pending`: what the functions return that connect and serve, to be awaited or entered."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

__all__ = ["Pending", "Promise"]


class _AsyncCloseable(Protocol):
    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...


R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T", bound=_AsyncCloseable)


class Promise(Coroutine[Any, Any, R_co], Generic[R_co]):
    """A coroutine in every respect, which a subclass can give more uses: to be entered, or iterated over."""

    def __init__(self, make: Callable[[], Awaitable[R_co]]) -> None:
        self._make = make
        self._used = False
        self._running: Generator[Any, Any, R_co] | None = None
        self.__name__: str = type(self).__name__  # for the repr of a task, as a coroutine has it
        self.__qualname__: str = self.__name__

    def __await__(self) -> Generator[Any, Any, R_co]:
        self._used = True
        return self._make().__await__()

    # A coroutine's own methods, for `asyncio.create_task` and the like.

    def send(self, value: Any, /) -> Any:
        if self._running is None:
            self._running = self.__await__()
        return self._running.send(value)

    def throw(self, *exc: Any) -> Any:
        if self._running is None:
            self._running = self.__await__()
        return self._running.throw(*exc)

    def close(self) -> None:
        self._used = True
        if self._running is not None:
            self._running.close()

    def __del__(self) -> None:
        if not self._used:
            message = f"{type(self).__name__} was never awaited: write `await kaio...(...)`"
            warnings.warn(message, RuntimeWarning, source=self, stacklevel=2)


class Pending(Promise[T]):
    """A connection or server to be made: by `await`, or by `async with`, which closes it at its end."""

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        super().__init__(make)
        self._made: T | None = None

    if not TYPE_CHECKING:  # a type checker finds the mistake itself

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"there is no {name!r} yet: write `await kaio...(...)`, or `async with`")

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
