"""The pytest plugin: the fixture `blackhole`, and `--kaio-loop`, which runs a suite on kaio's loop.

Rules kept here: pytest imports this module in every run on a machine that has kaio, so it imports nothing that pytest
has not imported already. Without the option no hook of an event loop is registered and no loop is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

__all__ = ["blackhole", "pytest_addoption", "pytest_configure"]

_LOOPS: Final = ("auto", "asyncio", "uvloop", "off")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--kaio-loop` and `--kaio-keepalive`, and the ini options of the same names."""
    group = parser.getgroup("kaio", "kaio: keepalive on every TCP socket")
    loop = "run asynchronous tests on kaio's event loop, over asyncio's or uvloop's; auto: uvloop where it is installed"
    keepalive = "the policy of those loops, for example 20s:10s:4 or detect=30s; default: as in kaio.run"
    group.addoption("--kaio-loop", nargs="?", const="auto", metavar="|".join(_LOOPS), help=loop)
    group.addoption("--kaio-keepalive", metavar="POLICY", help=keepalive)
    parser.addini("kaio_loop", f"{loop} ({', '.join(_LOOPS)})", type="string", default="off")
    parser.addini("kaio_keepalive", keepalive, type="string", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks that choose the loop, if a loop is asked for. The command line takes precedence."""
    loop = _loop(config)
    if loop is None:
        if config.getoption("kaio_keepalive") is not None:
            raise pytest.UsageError("--kaio-keepalive has no effect without --kaio-loop")
        return

    from .pytest_loops import CoveredLoops  # noqa: PLC0415 - which imports the loop

    loops = CoveredLoops(loop, *_setting(config, "kaio_keepalive"))
    loops.check_plugins(config)
    config.pluginmanager.register(loops, "kaio-loops")


def _loop(config: pytest.Config) -> str | None:
    """The name of the loop that is asked for; None for off."""
    loop, source = _setting(config, "kaio_loop")
    if loop not in _LOOPS:
        # argparse takes the next argument for an option's optional value: `pytest --kaio-loop tests`.
        hint = f"; write --kaio-loop=auto {loop} to run what is in {loop}" if source.startswith("--") else ""
        raise pytest.UsageError(f"{source}: {loop!r} is none of {', '.join(_LOOPS)}{hint}")
    return None if loop == "off" else loop


def _setting(config: pytest.Config, name: str) -> tuple[str, str]:
    """The value of an option, and where it is from."""
    value = config.getoption(name)
    if value is not None:
        return value, f"--{name.replace('_', '-')}"
    return config.getini(name), name


@pytest.fixture
def blackhole() -> Iterator[Callable[..., contextlib.AbstractContextManager[None]]]:
    """`kaio.testing.blackhole`, whose peers are back at the end of the test in any case.

    Use it as `with blackhole(their_end): ...`, or enter it with an ExitStack. The test is skipped, with the reason,
    where the kernel forbids it.
    """
    from kaio.testing import blackhole as make  # noqa: PLC0415
    from kaio.testing import lacking  # noqa: PLC0415

    reason = lacking()
    if reason is not None:
        pytest.skip(reason)
    with contextlib.ExitStack() as back:

        @contextlib.contextmanager
        def tracked(*endpoints: Any) -> Iterator[None]:
            with contextlib.ExitStack() as own:
                own.enter_context(make(*endpoints))
                back.push(own)
                yield

        yield tracked
