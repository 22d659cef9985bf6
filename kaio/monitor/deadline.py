"""The kernel's user timeout on a socket that only the kernel ends: one that a sweep found, of whatever owner.

Rules kept here: with stalled="keep" the user timeout is lifted while the peer's window is shut, because the kernel does
not count its answers (net/ipv4/tcp_timer.c, tcp_probe_timer); the watch does, and puts it back when they fail to come.
The kernel then ends the connection when it asks next, which the capped back-off has soon.
"""

from __future__ import annotations

from ..kernel.options import SocketLike, platform
from ..liveness.limits import Limits
from ..liveness.watch import Watch

__all__ = ["Deadline", "cap_backoff"]


class Deadline:
    """What a socket is given, and what looks at it remember."""

    __slots__ = ("_watch", "user_timeout")

    def __init__(self, limits: Limits, user_timeout: float | None, now: float) -> None:
        self._watch = Watch(limits, since=now)
        self.user_timeout: float | None = user_timeout
        """Seconds that it has now; None: none."""

    def look(self, sock: SocketLike, now: float) -> None:
        """Give it the user timeout, or lift it. Raises OSError, `KeepaliveError`."""
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
    """Let the kernel ask at least that often; None: as it did before. Raises OSError.

    Nothing happens where the platform cannot do it.
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
