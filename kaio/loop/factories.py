"""The drop-in event loop: factories of it, `run`, the policy, and what covers a program that never heard of kaio.

Rules kept here: importing this changes nothing. A base makes the loop, and `covering` is put over it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ..monitor.survey import Report, survey
from ..policy import Keepalive, KeepaliveArg, as_policy
from .covering import Covering, cover_loop, loop_class

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
            cover_loop(loop, policy)
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
        """Make the policy class when it is first asked for: asyncio's is deprecated from Python 3.14 on."""
        if name != "EventLoopPolicy":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if not _has_policies():
            raise AttributeError("this Python has no event loop policies: use kaio.run, loop_factory= or kaio.install")
        return _policy_class()


def _has_policies() -> bool:
    """Up to Python 3.15."""
    return hasattr(asyncio, "set_event_loop_policy")


@contextlib.contextmanager
def _deprecated() -> Iterator[None]:
    """Use asyncio's policies: what Python warns of is for those who choose to use them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@functools.cache
def _policy_class() -> type[Any]:
    with _deprecated():
        base_policy: Any = asyncio.DefaultEventLoopPolicy

    class EventLoopPolicy(base_policy):  # type: ignore[misc]
        """An event loop policy whose loops cover their sockets. Arguments as `loop_factory`'s.

        Policies are deprecated since Python 3.14, which warns where one is set, and gone in Python 3.16; `install`
        works everywhere.
        """

        def __init__(self, keepalive: KeepaliveArg = None, *, base: LoopFactory | None = None) -> None:
            super().__init__()
            if base is asyncio.new_event_loop:  # which asks the policy, so that it would be this one
                with _deprecated():
                    base = asyncio.get_event_loop_policy().new_event_loop
            self._loop_factory = loop_factory(keepalive, base=base)

    EventLoopPolicy.__qualname__ = "EventLoopPolicy"
    return EventLoopPolicy


def install(keepalive: KeepaliveArg = None, *, base: LoopFactory | None = None) -> None:
    """Let every loop that this process makes from now on cover its sockets, whoever makes it.

    `base` is for those who do not say which loop they want: `asyncio.run`, `asyncio.Runner` and
    `asyncio.new_event_loop` make that one. uvicorn and others name uvloop's loops or asyncio's and get what they name.
    A loop that was made before keeps what it has; the last call counts for those that are made after it. Arguments
    as `loop_factory`'s. Raises `PolicyError`.

    Sets the event loop policy, without the warning that Python 3.14 and later give; where there are no policies
    (Python 3.16), replaces `asyncio.new_event_loop`. Where you call `asyncio.run` yourself, `kaio.run` is simpler.
    """
    policy = as_policy(keepalive)
    if _has_policies():
        made = _policy_class()(policy, base=base)
        with _deprecated():
            asyncio.set_event_loop_policy(made)
    else:
        factory = loop_factory(policy, base=base)
        for module in (asyncio, asyncio.events):  # asyncio.Runner asks the second
            setattr(module, "new_event_loop", factory)  # noqa: B010 - typed as a function of its own
    cover_loops(policy)


_everywhere: Keepalive | None = None  # the policy of every loop that is made, once cover_loops was called
_wrapped: Final[set[type]] = set()  # the classes whose __init__ covers


def cover_loops(policy: Keepalive) -> None:
    """Let every loop that this process makes from now on cover its sockets, whoever makes it, and however.

    Programs name asyncio's and uvloop's classes, hold their factories as default arguments, or set policies of their
    own. What all of them do in the end is to make an object of one of these classes. The last call counts.
    """
    global _everywhere  # noqa: PLW0603 - as are the classes
    _everywhere = policy
    for each in _loop_classes():
        if each not in _wrapped:
            _wrapped.add(each)
            each.__init__ = _covered_from_birth(each.__init__)  # type: ignore[method-assign]


def _loop_classes() -> Iterator[type[asyncio.AbstractEventLoop]]:
    """Those that libraries make objects of, or derive their own from."""
    yield asyncio.SelectorEventLoop
    if sys.platform == "win32":
        yield asyncio.ProactorEventLoop
    for module, name in (("uvloop", "Loop"), ("rloop", "RLoop"), ("zuvloop", "Loop"), ("winloop", "Loop")):
        with contextlib.suppress(ImportError):
            yield getattr(importlib.import_module(module), name)


def _covered_from_birth(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if _everywhere is not None and not isinstance(self, Covering):
            cover_loop(self, _everywhere)

    return make
