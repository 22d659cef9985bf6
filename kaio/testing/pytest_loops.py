"""What `--kaio-loop` registers with pytest: the hooks by which pytest-asyncio and anyio's plugin make kaio's loops.

Rules kept here: a loop that the suite chooses is the base, and is covered; a loop that is kaio's already keeps its own
policy. Neither of the two plugins is imported or required. The hooks are registered only when a loop is asked for:
pytest-asyncio takes a hook that answers None for an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import sys
from collections.abc import Generator, Mapping
from typing import Any, cast

import pytest

from ..errors import PolicyError
from ..loop.covering import Covering
from ..loop.factories import LoopFactory, best_base, loop_factory
from ..policy import Keepalive, as_policy

__all__ = ["Covered", "CoveredLoops"]


@dataclasses.dataclass(frozen=True)
class Covered:
    """A factory of `base`'s loops, covered with a policy.

    Two of the same base and policy are equal: pytest-asyncio makes a new loop wherever a module's next test has a
    factory that is not equal to the last test's.
    """

    base: LoopFactory
    policy: Keepalive

    def __call__(self) -> asyncio.AbstractEventLoop:
        loop = self.base()
        return loop if isinstance(loop, Covering) else loop_factory(self.policy, base=lambda: loop)()


class CoveredLoops:
    """The hooks, for one base and one policy. Raises `pytest.UsageError` for an invalid policy or a missing uvloop."""

    def __init__(self, loop: str, keepalive: str, source: str) -> None:
        try:
            self._base: LoopFactory = best_base() if loop == "auto" else _base(loop)
        except ImportError as exc:
            raise pytest.UsageError(f"kaio's loop over {loop}: {exc}") from None
        try:
            self._policy = as_policy(keepalive or None)
        except PolicyError as exc:
            raise pytest.UsageError(f"{source}: {exc}" if keepalive else str(exc)) from None
        self._loop = f"auto ({self._base.__module__.partition('.')[0]})" if loop == "auto" else loop

    def check_plugins(self, config: pytest.Config) -> None:
        """Warn of tests that no plugin would run on this loop: they run as before, and look as if they did not."""
        asyncio_plugin = config.pluginmanager.has_plugin("asyncio")
        if asyncio_plugin and not hasattr(config.hook, "pytest_asyncio_loop_factories"):
            warning = "--kaio-loop does not reach the tests of this pytest-asyncio, which takes loops from 1.4 on"
        elif not asyncio_plugin and not config.pluginmanager.has_plugin("anyio"):
            warning = "--kaio-loop has no effect: there is neither pytest-asyncio nor anyio's plugin"
        else:
            return
        config.issue_config_time_warning(pytest.PytestConfigWarning(warning), 2)

    def pytest_report_header(self) -> str:
        """Say which loop the suite runs on."""
        return f"kaio: loop={self._loop}, keepalive={self._policy}"

    @pytest.hookimpl(wrapper=True, optionalhook=True)
    def pytest_asyncio_loop_factories(self) -> Generator[None, Any, Any]:
        """For pytest-asyncio: the suite's own factories, covered; or one, whose name is in no test's name."""
        factories = yield
        if factories is None:
            return {"kaio": Covered(self._base, self._policy)}
        if not isinstance(factories, Mapping):
            return factories  # a mistake, and pytest-asyncio says which
        return {name: self._covered(factory) for name, factory in factories.items()}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        """For anyio's plugin: the fixture `anyio_backend`, whoever defines it, gets a loop factory.

        The fixture's value is replaced and not the fixture: so the suite keeps its parameters, its scope and its names
        of tests.
        """
        value = yield
        cached = fixturedef.cached_result
        if fixturedef.argname == "anyio_backend" and cached is not None:
            value = self._backend(value)
            fixturedef.cached_result = (value, cached[1], None)
        return value

    def _backend(self, backend: Any) -> Any:
        """A value of the fixture, with kaio's loop in its options; trio's, and an invalid one, as it is."""
        options: dict[str, Any]
        match backend:
            case "asyncio":
                options = {}
            case ("asyncio", dict()):
                options = backend[1]
            case _:
                return backend
        base = options.get("loop_factory")
        if base is None:
            base = _base("uvloop" if options["use_uvloop"] else "asyncio") if "use_uvloop" in options else self._base
        return "asyncio", {**options, "loop_factory": self._covered(base)}

    def _covered(self, factory: Any) -> Any:
        return Covered(cast("LoopFactory", factory), self._policy) if callable(factory) else factory


def _base(name: str) -> LoopFactory:
    """The loops that a name means. Raises ImportError."""
    if name == "asyncio":
        if sys.platform == "win32":
            return asyncio.ProactorEventLoop
        return asyncio.SelectorEventLoop
    package = importlib.import_module("winloop" if sys.platform == "win32" else "uvloop")  # as anyio's use_uvloop
    make: LoopFactory = package.new_event_loop
    return make
