"""What `kaio run` does inside the program that it runs: every loop covered, and a sweep now and then for the rest.

Rules kept here: the program starts as Python starts it, with nothing of kaio's between: no frame in its tracebacks, no
thread that a fork would warn of, nothing in its arguments. A child process begins by itself: settings are in the
environment.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import json
import os
import signal
from typing import Final

from ..errors import KaioError
from ..liveness.standing import tally
from ..loop.factories import best_base, cover_loops, install
from ..monitor.survey import survey
from ..monitor.sweeper import Sweeper
from ..policy import Keepalive

__all__ = ["VARIABLE", "Settings", "begin"]

VARIABLE: Final = "KAIO_RUN"
"""The environment variable that holds the settings, after the environment's prefix and a line feed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What `kaio run` was told."""

    keepalive: str
    loop: str | None = None
    """What `asyncio.run` makes: "uvloop", "asyncio"; None: what it would have made."""
    sweep: float | None = 5.0
    """Seconds between sweeps; None: none."""
    report: bool = False
    """Whether a report is printed at exit and on SIGUSR1."""

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def begin(told: str) -> None:
    """Cover this process, by what `kaio run` has put into the environment."""
    settings = Settings(**json.loads(told))
    policy = Keepalive.parse(settings.keepalive)
    if policy.enabled:
        if settings.loop is None:
            cover_loops(policy)
        else:
            install(policy, base=asyncio.SelectorEventLoop if settings.loop == "asyncio" else best_base())
        if settings.sweep is not None:
            Sweeper(policy, settings.sweep).start()
    if settings.report:
        signal.signal(signal.SIGUSR1, lambda *_: _print_report(policy))
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)  # Python would let it kill, from then on
        atexit.register(_print_report, policy)


def _print_report(policy: Keepalive) -> None:
    """On the process's own standard error: it may be closed by now, and the program may be writing to Python's."""
    with contextlib.suppress(KaioError, OSError):
        counted = ", ".join(f"{number} {whose.value}" for whose, number in sorted(tally.items())) or "none"
        text = f"{survey(policy)}\nsockets judged since the start of process {os.getpid()}: {counted}\n"
        os.write(2, text.encode(errors="replace"))
