"""The drop-in event loop: factories of it, `run`, the policy, and what covers a program that never heard of kaio.

Rules kept here: importing this changes nothing. A base makes the loop, and `covering` is put over it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from ..monitor.survey import Report, survey
from ..policy import Keepalive, KeepaliveArg, as_policy
from .covering import Covering, loop_class, take_over

__all__ = [
    "EventLoopPolicy",
    "best_base",
    "cover_loops",
    "install",
    "loop_class",
    "loop_factory",
    "new_event_loop",
    "report",
    "run",
]

T = TypeVar("T")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def loop_factory(keepalive: KeepaliveArg = None, *, base: LoopFactory | None = None) -> LoopFactory:
    """A factory of loops that cover their sockets, for `asyncio.Runner(loop_factory=...)` and whatever takes one.

    `base` makes the loop that is covered: any factory or loop class, asyncio's, uvloop's, another's; None: uvloop's
    where there is uvloop, else asyncio's. The loop is its base in all else.

    Raises `PolicyError` at once; the factory TypeError for a base whose loops cannot be covered.
    """
    policy = as_policy(keepalive)
    make = base if base is not None else best_base()

    def factory() -> asyncio.AbstractEventLoop:
        loop = make()
        try:
            take_over(loop, policy)
        except TypeError:
            if isinstance(loop, asyncio.AbstractEventLoop):
                loop.close()
            raise
        return loop

    return factory


def best_base() -> LoopFactory:
    """uvloop's loops where there is uvloop, else asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415 - not everywhere
    except ImportError:
        if sys.platform == "win32":
            return asyncio.ProactorEventLoop
        return asyncio.SelectorEventLoop
    return uvloop.new_event_loop


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop that covers its sockets, with the default policy: for `loop_factory=` and uvicorn's `--loop`."""
    return loop_factory()()


def run(
    main: Coroutine[Any, Any, T],
    *,
    keepalive: KeepaliveArg = None,
    debug: bool | None = None,
    base: LoopFactory | None = None,
) -> T:
    """`asyncio.run` on a loop that covers its sockets. `keepalive` and `base` are `loop_factory`'s."""
    with asyncio.Runner(debug=debug, loop_factory=loop_factory(keepalive, base=base)) as runner:
        return runner.run(main)


def report() -> Report:
    """Every TCP socket of this process under the running loop's policy: covered or not, and why; print it for a table.

    Raises RuntimeError when the running loop is not kaio's or none is running; `KeepaliveError` on systems without
    /proc.
    """
    loop = asyncio.get_running_loop()
    if not isinstance(loop, Covering):
        raise RuntimeError(f"{loop!r} is not kaio's: use kaio.run, kaio.new_event_loop or kaio run")
    return survey(loop.keepalive)


# -- for programs that make their loops themselves

if TYPE_CHECKING:

    class EventLoopPolicy(asyncio.DefaultEventLoopPolicy):
        """An event loop policy whose loops cover their sockets; up to Python 3.15. Arguments as `loop_factory`'s."""

        def __init__(self, keepalive: KeepaliveArg = None, *, base: LoopFactory | None = None) -> None: ...

else:

    def __getattr__(name: str) -> Any:
        """The policy class is made when it is first asked for: policies are deprecated from Python 3.14 on."""
        if name != "EventLoopPolicy":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if sys.version_info >= (3, 16):
            raise AttributeError("Python 3.16 has no event loop policies: use kaio.run, loop_factory= or kaio.install")
        return _policy_class()


@functools.cache
def _policy_class() -> type[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        base_policy: Any = asyncio.DefaultEventLoopPolicy

    class EventLoopPolicy(base_policy):  # type: ignore[misc]
        """An event loop policy whose loops cover their sockets; up to Python 3.15. Arguments as `loop_factory`'s."""

        def __init__(self, keepalive: KeepaliveArg = None, *, base: LoopFactory | None = None) -> None:
            super().__init__()
            if base is asyncio.new_event_loop:  # which asks the policy, so that it would be this one
                base = asyncio.get_event_loop_policy().new_event_loop
            self._loop_factory = loop_factory(keepalive, base=base)

    EventLoopPolicy.__qualname__ = "EventLoopPolicy"
    return EventLoopPolicy


def install(keepalive: KeepaliveArg = None, *, base: LoopFactory | None = None) -> None:
    """From now on `asyncio.run`, `asyncio.Runner` and `asyncio.new_event_loop` make loops that cover their sockets.

    Sets the event loop policy; on Python 3.16 and later, which has none, it replaces `asyncio.new_event_loop`. Where
    you call `asyncio.run` yourself, `kaio.run` is simpler. Arguments as `loop_factory`'s. Raises `PolicyError`.
    """
    if sys.version_info >= (3, 16):
        _replace_new_event_loop(loop_factory(keepalive, base=base))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop_policy(_policy_class()(keepalive, base=base))


def _replace_new_event_loop(factory: LoopFactory) -> None:
    """What Runner calls is asyncio.events.new_event_loop, by its module."""
    for module in (asyncio, asyncio.events, asyncio.runners):
        if hasattr(module, "new_event_loop"):
            setattr(module, "new_event_loop", factory)  # noqa: B010 - typed as a function of its own


def cover_loops(policy: Keepalive) -> None:
    """Every loop that this process makes from now on covers its sockets, whoever makes it, and however.

    For `kaio run`: programs name asyncio's and uvloop's classes, hold their factories as default arguments, or set
    policies of their own. What all of them do in the end is to make an object of one of these classes.
    """
    classes: list[Any] = [asyncio.SelectorEventLoop]
    with contextlib.suppress(ImportError):
        import uvloop  # noqa: PLC0415 - not everywhere

        classes.append(uvloop.Loop)
    for each in classes:
        each.__init__ = _covered_from_birth(each.__init__, policy)


def _covered_from_birth(init: Callable[..., None], policy: Keepalive) -> Callable[..., None]:
    @functools.wraps(init)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not isinstance(self, Covering):
            take_over(self, policy)

    return make
