"""The pytest plugin: the fixture `blackhole`.

Rules kept here: nothing of kaio is imported before a test asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

__all__ = ["blackhole"]


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
