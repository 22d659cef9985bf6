"""Telling systemd how this service is (sd_notify(3)): ready, reloading, stopping, and still alive.

Rules kept here: without NOTIFY_SOCKET nothing is done and nothing costs anything. A message is never waited for, and a
service manager that does not hear it is no reason to fail.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time

__all__ = ["Notifier", "notify"]


def notify(*assignments: str) -> bool:
    """Send assignments such as "READY=1" or "STATUS=3 clients" to the service manager; return whether it was sent.

    False without a service manager that asked for it (NOTIFY_SOCKET), and when it could not be reached. "RELOADING=1"
    has the time added that systemd wants with it (MONOTONIC_USEC). Raises ValueError for an assignment without a name,
    or with a newline.
    """
    for each in assignments:
        name, equals, _ = each.partition("=")
        if not name or not equals or "\n" in each or not (name.isascii() and name.replace("_", "").isalnum()):
            raise ValueError(f"{each!r}: must be NAME=value in one line")
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")) or not assignments:
        return False
    lines = list(assignments)
    if "RELOADING=1" in lines:
        lines.append(f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode("utf-8", "surrogateescape"), _address(where))
    except OSError:
        return False
    return True


def _address(where: str) -> str | bytes:
    return b"\0" + os.fsencode(where[1:]) if where.startswith("@") else where


class Notifier:
    """Within the block, tells the service manager that the service is alive, if it asks (WATCHDOG_USEC).

    The loop's own timer does it: a loop that hangs lets the service be restarted.
    """

    def __init__(self) -> None:
        self._interval = _watchdog_interval()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Notifier:
        if self._interval is not None:
            self._loop = asyncio.get_running_loop()
            self._tell()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def ready(self) -> None:
        """The service accepts connections."""
        notify("READY=1")

    def stopping(self, within: float) -> None:
        """The service comes to its end, which may take that many seconds."""
        notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(min(within, 1e9) * 1e6)}")

    def _tell(self) -> None:
        assert self._interval is not None
        notify("WATCHDOG=1")
        self._timer = self._loop.call_later(self._interval, self._tell)


def _watchdog_interval() -> float | None:
    """Return half of the time that the watchdog allows in seconds; None when it does not watch this process."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not (microseconds.isascii() and microseconds.isdigit()) or not os.environ.get("NOTIFY_SOCKET"):
        return None
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return max(0.01, int(microseconds) / 2e6)
