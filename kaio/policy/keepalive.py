"""`Keepalive`: a keepalive policy.

Rules kept here: every policy that exists is valid. A value outside the kernel's limits, and a user timeout that would
end a connection after one lost probe, raises `PolicyError` when the policy is created. Times are seconds, rounded up to
the kernel's unit: whole seconds, and whole milliseconds for the user timeout.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import socket
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, ClassVar, NamedTuple, TypeAlias

from ..errors import KeepaliveError, PolicyError
from . import libraries
from .fields import AUTO, MAX_COUNT, MAX_SECONDS, MAX_USER_TIMEOUT_MS, Auto, Stalled
from .text import parse_libkeepalive, parse_policy
from .units import format_seconds, format_times

__all__ = ["Keepalive", "KeepaliveArg", "Step", "as_policy"]


class Step(NamedTuple):
    """An event on an idle connection whose peer is dead: `at` seconds after the last segment was received from it."""

    at: float
    event: str


@dataclasses.dataclass(frozen=True, slots=True)
class Keepalive:
    """A keepalive policy.

    The kernel sends the first probe when nothing was received for `idle` seconds, then one every `interval` seconds,
    and drops the connection when `count` probes were not answered (tcp(7)): the death of an idle peer is detected
    after `detection_time`.

    Raises `PolicyError` for values outside the kernel's limits, and for a user timeout that would end a connection
    after a single lost probe (RFC 9293 3.8.4, MUST-29).
    """

    idle: float | None = 20
    """Seconds without a segment from the peer before the first probe, 1 to 32767; default 20; None: the system's
    value."""
    interval: float | None = 10
    """Seconds between probes, 1 to 32767; default 10; None: the system's value."""
    count: int | None = 4
    """Unanswered probes before the connection is dropped, 1 to 127; default 4; None: the system's value."""
    _: dataclasses.KW_ONLY
    user_timeout: float | Auto | None = AUTO
    """Seconds that sent data may stay unacknowledged, up to 2147483.647. AUTO (the default): the detection time. None:
    as long as the kernel retransmits it (tcp_retries2, about 15 minutes). With stalled="drop" the kernel enforces it,
    up to one retransmission timeout late when a router answers with ICMP unreachable (RFC 6069)."""
    stalled: Stalled = "keep"
    """What happens to a peer that is alive but accepts no data for the user timeout: "keep" (the default) or "drop"."""
    enabled: bool = dataclasses.field(default=True, init=False)
    """False for `Keepalive.OFF` only."""

    OFF: ClassVar[Keepalive]
    """No keepalive and no user timeout."""
    SYSTEM: ClassVar[Keepalive]
    """Keepalive with the system's times (on Linux tcp_keepalive_time, _intvl, _probes), and no user timeout."""

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen
        put(self, "idle", _whole_seconds("idle", self.idle))
        put(self, "interval", _whole_seconds("interval", self.interval))
        put(self, "count", _count(self.count))
        put(self, "user_timeout", _user_timeout(self.user_timeout))
        if self.stalled not in ("keep", "drop"):
            raise PolicyError("stalled", self.stalled, "must be 'keep' or 'drop'")
        self._check_one_lost_probe()
        longest = self.detection_time
        if self.stalled == "drop" and self.user_timeout is AUTO and longest and longest * 1000 > MAX_USER_TIMEOUT_MS:
            raise PolicyError(
                "user_timeout",
                AUTO,
                f"is the detection time, {longest:g} s, but must be at most {MAX_USER_TIMEOUT_MS / 1000} s",
            )

    def _check_one_lost_probe(self) -> None:
        if not isinstance(self.user_timeout, (int, float)) or self.count == 1:
            return
        if self.idle is not None and self.interval is not None and self.user_timeout < self.idle + 2 * self.interval:
            least = self.idle + 2 * self.interval
            raise PolicyError(
                "user_timeout",
                self.user_timeout,
                f"must be at least idle + 2 * interval = {least:g} s, or a single lost probe would end the connection",
            )

    # -- derived values

    @property
    def detection_time(self) -> float | None:
        """Seconds from the last segment received to the end of an idle connection: idle + interval * count.

        With stalled="drop" an explicit user timeout replaces the count, as in the kernel (tcp(7)), which checks it
        when a probe is due. `math.inf` for OFF; None when one of the three fields is None.
        """
        if not self.enabled:
            return math.inf
        if self.idle is None or self.interval is None or self.count is None:
            return None
        return self.idle + self.interval * self._intervals(self.idle, self.interval, self.count)

    def _intervals(self, idle: float, interval: float, count: int) -> int:
        """Number of intervals between the first probe and the end of an idle connection."""
        if self.stalled == "drop" and isinstance(self.user_timeout, (int, float)):
            return max(1, math.ceil((self.user_timeout - idle) / interval))
        return count

    @property
    def effective_user_timeout(self) -> float | None:
        """The user timeout in seconds, with AUTO resolved. None: unbounded, or AUTO while `detection_time` is None."""
        return self.detection_time if isinstance(self.user_timeout, Auto) else self.user_timeout

    def filled(self, *, idle: float | None, interval: float | None, count: int | None) -> Keepalive:
        """Return a copy in which the given values replace the fields that are None.

        Raises `PolicyError` when the user timeout is too short for those values.
        """
        if not self.enabled:
            return self
        return dataclasses.replace(
            self,
            idle=idle if self.idle is None else self.idle,
            interval=interval if self.interval is None else self.interval,
            count=count if self.count is None else self.count,
        )

    def timeline(self) -> tuple[Step, ...]:
        """List the probes and the end of an idle connection whose peer is dead.

        Empty for OFF. Raises `PolicyError` when a field is None: see `filled`.
        """
        if not self.enabled:
            return ()
        if self.idle is None or self.interval is None or self.count is None:
            field = "idle" if self.idle is None else "interval" if self.interval is None else "count"
            raise PolicyError(field, None, "is left to the system, but a timeline needs a number; see filled()")
        idle, interval = self.idle, self.interval
        probes = self._intervals(idle, interval, self.count)
        steps = [Step(idle + interval * n, f"probe {n + 1} of {probes}") for n in range(probes)]
        return (*steps, Step(idle + interval * probes, "dead"))

    # -- constructors

    @classmethod
    def detect(cls, within: float) -> Keepalive:
        """Create a policy that detects a dead peer within `within` seconds (2 or more).

        Idle is at least a third of that time, and four probes follow; fewer below 5 s. Fractions of a second are
        dropped. Above 98299 s the detection time is shorter than `within`, because of the kernel's limits.
        """
        whole = math.floor(_number("within", within))
        if whole < 2:
            raise PolicyError("within", within, "must be at least 2 s: the kernel counts in whole seconds")
        whole = min(whole, 3 * MAX_SECONDS)
        count = min(4, whole - 1)
        interval = max(1, whole // 6)
        return cls(min(whole - interval * count, MAX_SECONDS), interval, count)

    @classmethod
    def hold(cls, against: float) -> Keepalive:
        """Create a policy for a middlebox that drops connections idle for `against` seconds (3 or more).

        The first probe is sent at half of that time and the second at three quarters, so that one may be lost. The last
        quarter is a reserve: kernel timers above 16 s may fire up to 12.5 % late (kernel/time/timer.c).
        """
        limit = _number("against", against)
        if limit < 3:
            raise PolicyError("against", against, "must be at least 3 s: the kernel counts in whole seconds")
        limit = min(limit, 2 * MAX_SECONDS)
        return cls(max(1, math.floor(limit / 2)), max(1, math.floor(limit / 4)), 4)

    @classmethod
    def parse(cls, text: str) -> Keepalive:
        """Create a policy from text.

        - `20s:10s:4`: idle, interval and count, as in nginx's so_keepalive. An empty one is the system's value. More
          fields may follow: `20s:10s:4,user_timeout=1m,stalled=drop`
        - `on`, `off`: `Keepalive.SYSTEM`, `Keepalive.OFF`
        - `idle=20s,count=4,user_timeout=1m,stalled=drop`: fields that are not named have their defaults. `system` is
          the system's value of a time or the count; `user_timeout` accepts `auto` and `none`
        - `detect=30s`, `hold=350s`: the classmethods of those names; `stalled` may follow: `detect=30s,stalled=drop`

        Times are numbers with a unit, ms, s, m, h or d, and may be joined (`1m30s`); a number without one is seconds.
        Raises `PolicyError`.
        """
        if not isinstance(text, str):
            raise PolicyError("keepalive", text, "must be a string such as '20s:10s:4'")
        words = {"on": cls.SYSTEM, "off": cls.OFF}
        tasks = {"detect": cls.detect, "hold": cls.hold}
        return parse_policy(text, cls, words, tasks, _with_stalled)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Keepalive:
        """Create the default policy from environment variables; `Keepalive()` where none of them is set.

        KAIO_KEEPALIVE has the text that `parse` accepts, and takes precedence over libkeepalive's variables:
        KEEPALIVE=off; KEEPIDLE, KEEPINTVL (seconds) and KEEPCNT, which replace the defaults. An empty variable counts
        as not set. Raises `PolicyError`, which names the variable.
        """
        env = os.environ if environ is None else environ
        spec = env.get("KAIO_KEEPALIVE", "").strip()
        if spec:
            try:
                return cls.parse(spec)
            except PolicyError as exc:
                raise PolicyError("KAIO_KEEPALIVE", spec, f"{exc.field}: {exc.limit}") from exc
        return parse_libkeepalive(env, cls, cls.OFF)

    # -- for libraries that make their own sockets, on any loop or none

    def socket_options(self) -> list[libraries.SocketOption]:
        """Return the policy as arguments of setsockopt: (level, option, value), for this platform.

        For `socket_options=` of httpx's, httpx2's and httpcore's transports, and of urllib3's pools (requests).

        The kernel alone enforces such a policy. The user timeout is in it with stalled="keep", too, because without a
        monitor nothing else bounds how long a request may stay unacknowledged; a peer that is alive and accepts no
        data for that long is then dropped. Give the policy `user_timeout=None` to spare it, and lose the bound.

        Raises `KeepaliveError` for a field that the platform cannot set.
        """
        return libraries.socket_options(self)

    def socket_factory(self, addr_info: tuple[Any, ...]) -> socket.socket:
        """Make a socket with the policy for an element of getaddrinfo's answer.

        For `socket_factory=` of aiohttp.TCPConnector and aiohappyeyeballs.start_connection. The options are those of
        `socket_options`, and are read back. Raises `KeepaliveError` where the kernel refuses one or has another value.
        """
        family, kind, proto = addr_info[:3]
        sock = socket.socket(family, kind, proto)
        try:
            if family in (socket.AF_INET, socket.AF_INET6):
                for level, option, value in self.socket_options():
                    _set_and_compare(sock, level, option, value)
        except BaseException:
            sock.close()
            raise
        return sock

    def libpq(self) -> dict[str, int]:
        """Return the policy as libpq's connection parameters: keepalives, keepalives_idle and so on, tcp_user_timeout.

        For `psycopg.connect(**policy.libpq())` and SQLAlchemy's `connect_args=`. What `socket_options` says of the user
        timeout applies. libpq ignores what the platform cannot set.
        """
        return libraries.libpq(self)

    def redis(self) -> dict[str, Any]:
        """Return the policy as redis-py's arguments: socket_keepalive and socket_keepalive_options.

        What `socket_options` says of the user timeout applies. Raises `KeepaliveError` as it does.
        """
        return libraries.redis(self)

    def __str__(self) -> str:
        if not self.enabled:
            return "off"
        if self == Keepalive.SYSTEM:
            return "on"
        named = [format_times(self.idle, self.interval, self.count)]
        if self.user_timeout is None:
            named.append("user_timeout=none")
        elif self.user_timeout is not AUTO:
            named.append(f"user_timeout={format_seconds(self.user_timeout)}")
        if self.stalled != "keep":
            named.append(f"stalled={self.stalled}")
        return ",".join(named)

    def __repr__(self) -> str:
        if not self.enabled:
            return "Keepalive.OFF"
        if self == Keepalive.SYSTEM:
            return "Keepalive.SYSTEM"
        extra = "" if self.user_timeout is AUTO else f", user_timeout={self.user_timeout!r}"
        extra += "" if self.stalled == "keep" else f", stalled={self.stalled!r}"
        return f"Keepalive({self.idle!r}, {self.interval!r}, {self.count!r}{extra})"


KeepaliveArg: TypeAlias = Keepalive | str | bool | None
"""The type of every argument named `keepalive=`."""


def as_policy(keepalive: KeepaliveArg) -> Keepalive:
    """Convert an argument named `keepalive=` to a policy.

    A policy stays as it is and text is parsed. True: `Keepalive()`, whatever the environment says. False:
    `Keepalive.OFF`. None: the default, `Keepalive.from_env()`. Raises `PolicyError`.
    """
    if isinstance(keepalive, Keepalive):
        return keepalive
    if keepalive is None:
        return Keepalive.from_env()
    if isinstance(keepalive, bool):
        return Keepalive() if keepalive else Keepalive.OFF
    if isinstance(keepalive, str):
        return Keepalive.parse(keepalive)
    raise PolicyError(
        "keepalive",
        keepalive,
        "must be a Keepalive, a string such as '20s:10s:4' or 'detect=30s', True, False or None",
    )


def _set_and_compare(sock: socket.socket, level: int, option: int, value: int) -> None:
    try:
        sock.setsockopt(level, option, value)
        has = sock.getsockopt(level, option)
    except OSError as exc:
        raise KeepaliveError(exc.errno, f"option {option} of level {level}: {value}: {exc.strerror}") from exc
    if has != value and not (value == 1 and level == socket.SOL_SOCKET and has):  # the BSDs return the flag's bit
        raise KeepaliveError(errno.EINVAL, f"option {option} of level {level}: set to {value}, but it is {has}")


def _with_stalled(policy: Keepalive, stalled: str) -> Keepalive:
    if stalled not in ("keep", "drop"):
        raise PolicyError("stalled", stalled, "must be 'keep' or 'drop'")
    return dataclasses.replace(policy, stalled="drop" if stalled == "drop" else "keep")


# -- checking values


def _number(field: str, value: object) -> float:
    """Check that a value is a finite number above 0 and not a boolean, and return it as an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PolicyError(field, value, "must be a number of seconds")
    # Subclasses (numpy's, IntEnum) have a repr of their own, which must not get into that of a policy. An int is not
    # converted to a float, for which it may be too large.
    number = float(value) if isinstance(value, float) else int(value)
    if isinstance(number, float) and not math.isfinite(number):
        raise PolicyError(field, value, "must be finite")
    if number <= 0:
        raise PolicyError(field, value, "must be above 0")
    return number


def _whole_seconds(field: str, value: object) -> int | None:
    if value is None:
        return None
    whole = math.ceil(_number(field, value))
    if whole > MAX_SECONDS:
        raise PolicyError(field, value, f"must be at most {MAX_SECONDS} s")
    return whole


def _count(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise PolicyError("count", value, "must be a whole number of probes")
    if not 1 <= value <= MAX_COUNT:
        raise PolicyError("count", value, f"must be from 1 to {MAX_COUNT}")
    return value


def _user_timeout(value: object) -> float | Auto | None:
    if value is None or isinstance(value, Auto):
        return value
    number = _number("user_timeout", value)
    # Decimal, because 8.41 * 1000 is 8410.000000000002 and would be rounded up to 8411 ms.
    milliseconds = math.ceil(Decimal(repr(number)) * 1000)
    if milliseconds > MAX_USER_TIMEOUT_MS:
        raise PolicyError("user_timeout", value, f"must be at most {MAX_USER_TIMEOUT_MS / 1000} s")
    return milliseconds / 1000


# -- the two constants, which need the checks above


def _off() -> Keepalive:
    off = Keepalive(None, None, None, user_timeout=None)
    object.__setattr__(off, "enabled", False)
    return off


Keepalive.OFF = _off()
Keepalive.SYSTEM = Keepalive(None, None, None, user_timeout=None)
