"""The user timeout of a socket that only the kernel ends, because no event loop watches it.

Rules kept here: with stalled="keep" the user timeout is taken off while the peer's window is shut, because the kernel
would end the connection although the peer answers its window probes (net/ipv4/tcp_timer.c, tcp_probe_timer). The watch
counts the answers, and sets the user timeout again when they fail to come; the kernel then ends the connection at its
next probe, which the capped back-off makes soon.
"""

from __future__ import annotations

from ..kernel.options import SocketLike, platform
from ..liveness.limits import Limits
from ..liveness.watch import Watch

__all__ = ["Deadline", "cap_backoff"]


class Deadline:
    """The user timeout of one socket, and the watch that decides on it."""

    __slots__ = ("_watch", "user_timeout")

    def __init__(self, limits: Limits, user_timeout: float | None, now: float) -> None:
        self._watch = Watch(limits, since=now)
        self.user_timeout: float | None = user_timeout
        """The user timeout that the socket has now, in seconds; None: none."""

    def look(self, sock: SocketLike, now: float) -> None:
        """Set the user timeout or take it off, by a new sample. Raises OSError, `KeepaliveError`."""
        watch = self._watch
        if watch.at_rest and self.user_timeout is not None and platform.idle_time(sock) is not None:
            return
        decision = watch.look(platform.tcp_info(sock), now)
        wanted = None if decision.spare else watch.limits.user_timeout
        if wanted != self.user_timeout:
            platform.set_user_timeout(sock, wanted)
            self.user_timeout = wanted
        cap_backoff(watch, sock, decision.cap)


def cap_backoff(watch: Watch, sock: SocketLike, seconds: float | None) -> None:
    """Cap the kernel's back-off (TCP_RTO_MAX_MS); None restores what it was. Raises OSError.

    Does nothing on a platform without such an option.
    """
    if seconds == watch.cap:
        return
    watch.cap = seconds
    if seconds is not None:
        before = platform.cap_backoff(sock, seconds)
        watch.backoff = before if watch.backoff is None else watch.backoff
    elif watch.backoff is not None:
        platform.cap_backoff(sock, watch.backoff / 1000)
        watch.backoff = None
