"""`Retry`: when to connect again, and when not.

Rules kept here: no I/O. The delays grow exponentially and are drawn with full jitter, so that clients that lost the
same server at the same time do not come back at the same time. An attempt counts as failed until its connection has
lasted: a server that accepts and closes is not called again and again without a delay.
"""

from __future__ import annotations

import dataclasses
import random
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final

from ..errors import ConnectionEnded, KeepaliveError

__all__ = ["Backoff", "Retry", "check_retry"]

_MOST_DOUBLINGS: Final = 60
_UNKNOWN_NAME: Final = frozenset(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_SERVICE") if hasattr(socket, name)
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When to connect again after an attempt that failed or a connection that ended. Times in seconds.

    Before the n-th attempt after those that are made at once, the delay is random, between 0 and
    `initial_delay * 2 ** (n - 1)`, but at most `max_delay` (exponential backoff with full jitter). A connection that
    stood for `lasting` seconds begins all of it anew.

    Raises ValueError and TypeError, which name the field.
    """

    attempts: int | None = None
    """Attempts in a row, until one of them makes a connection that lasts; then the last error is raised. None: no
    limit; 1: no second attempt."""
    timeout: float | None = None
    """Seconds for them all, counted from the first attempt, and again from the end of a connection that lasted. An
    attempt under way is cancelled. None: no limit."""
    at_once: int = 1
    """Attempts that are made without a delay. 0: the first of a row is delayed, too, so that thousands of clients whose
    server was replaced do not come back at once."""
    initial_delay: float = 0.5
    """The longest possible delay before the first attempt that is not made at once."""
    max_delay: float = 30.0
    """The longest possible delay."""
    lasting: float = 10.0
    """How long a connection must have stood to count as a success."""
    final: Callable[[Exception], bool] | None = None
    """Called with each error; if it returns true, the error is raised and nothing is tried again. None: a certificate
    that cannot be verified and a name that does not exist are final, but only until there was a connection: what
    worked once may be mended. Errors that are neither OSErrors nor `ConnectionEnded` are always final, and so is a
    policy that the platform cannot set."""

    def __post_init__(self) -> None:
        for name in ("attempts", "at_once"):
            value = getattr(self, name)
            if value is None and name == "attempts":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r}: must be a whole number")
            least = 1 if name == "attempts" else 0
            if value < least:
                raise ValueError(f"{name}={value!r}: must be at least {least}")
        for name in ("timeout", "initial_delay", "max_delay", "lasting"):
            value = getattr(self, name)
            if value is None and name == "timeout":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r}: must be a number of seconds")
            if not (value > 0 or (value == 0 and name == "lasting")) or value == float("inf"):
                raise ValueError(f"{name}={value!r}: must be a positive number of seconds")
        if self.initial_delay > self.max_delay:
            raise ValueError(f"initial_delay={self.initial_delay!r}: must be at most max_delay={self.max_delay!r}")
        if self.final is not None and not callable(self.final):
            raise TypeError(f"final={self.final!r}: must be a function of an exception")


def check_retry(retry: Any) -> Retry | None:
    """Return an argument named `retry=`. Raises TypeError."""
    if retry is not None and not isinstance(retry, Retry):
        raise TypeError(f"retry={retry!r}: must be a kaio.Retry or None")
    return retry


class Backoff:
    """Where a row of attempts stands."""

    def __init__(self, retry: Retry, now: float, draw: Callable[[], float] = random.random) -> None:
        self.retry: Retry = retry
        self.attempts: int = 0  # in this row
        self.error: Exception | None = None  # of the last attempt, or of the connection that has ended
        self._draw = draw
        self._since = now
        self._connected_before = False

    def delay(self) -> float:
        """Return the seconds to wait before the next attempt, drawn anew each time."""
        retry = self.retry
        beyond = self.attempts - retry.at_once
        if beyond < 0:
            return 0.0
        longest = retry.initial_delay * 2.0 ** min(beyond, _MOST_DOUBLINGS)
        return min(longest, retry.max_delay) * self._draw()

    def left(self, now: float) -> float | None:
        """Return the seconds that are left for the row; None: no limit."""
        return None if self.retry.timeout is None else max(0.0, self._since + self.retry.timeout - now)

    def exhausted(self) -> bool:
        """Return whether there may be no further attempt."""
        return self.retry.attempts is not None and self.attempts >= self.retry.attempts

    def failed(self, error: Exception) -> bool:
        """Note a failed attempt; return whether its error is final."""
        self.error = error
        if not isinstance(error, (OSError, ConnectionEnded)) or isinstance(error, KeepaliveError):
            return True
        if self.retry.final is not None:
            return bool(self.retry.final(error))
        if self._connected_before:
            return False
        unknown = isinstance(error, socket.gaierror) and error.errno in _UNKNOWN_NAME
        return unknown or isinstance(error, ssl.SSLCertVerificationError)

    def connected(self) -> None:
        """Note that there is a connection, which need not last."""
        self._connected_before = True
        self.error = None  # its traceback refers to the frames of the attempt

    def ended(self, error: Exception, lasted: float, now: float) -> bool:
        """Note the end of a connection that stood for so many seconds; return whether its error is final."""
        self.error = error
        if lasted >= self.retry.lasting:
            self.attempts = 0
            self._since = now
        return self.is_final_end(error)

    def is_final_end(self, error: Exception) -> bool:
        """Return whether no other connection is to be made after one that has ended with this error."""
        return self.retry.final is not None and bool(self.retry.final(error))
