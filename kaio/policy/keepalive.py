"""`Keepalive`: how a connection's peer is watched.

Rules kept here: every policy that exists is valid. A value that the kernel would refuse, and a user timeout that would
end a connection after one lost probe, is a `PolicyError` when the policy is made. Times are seconds, rounded up to the
kernel's unit: whole seconds, and whole milliseconds for the user timeout.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from decimal import Decimal
from typing import ClassVar, NamedTuple, TypeAlias

from ..errors import PolicyError
from .fields import AUTO, MAX_COUNT, MAX_SECONDS, MAX_USER_TIMEOUT_MS, Auto, Stalled
from .text import parse_libkeepalive, parse_policy
from .units import format_seconds, format_times

__all__ = ["Keepalive", "KeepaliveArg", "Step", "as_policy"]


class Step(NamedTuple):
    """One event in the life of a connection whose peer fell silent: `at` seconds after the last segment heard."""

    at: float
    event: str


@dataclasses.dataclass(frozen=True, slots=True)
class Keepalive:
    """A keepalive policy.

    The kernel sends the first probe after `idle` seconds of silence, then one every `interval` seconds, and gives the
    peer up when `count` of them went unanswered (tcp(7)): a dead idle peer is found after `detection_time`.

    Raises `PolicyError` for anything that the kernel would not take, and for a user timeout that would kill a peer
    after a single lost probe (RFC 9293 3.8.4, MUST-29).
    """

    idle: float | None = 20
    """Seconds of silence before the first probe, 1 to 32767; default 20; None: the system's."""
    interval: float | None = 10
    """Seconds between probes, 1 to 32767; default 10; None: the system's."""
    count: int | None = 4
    """Unanswered probes that mean death, 1 to 127; default 4; None: the system's."""
    _: dataclasses.KW_ONLY
    user_timeout: float | Auto | None = AUTO
    """Seconds that sent data may go unacknowledged, up to 2147483.647. AUTO (the default): the detection time. None:
    for as long as the kernel retransmits (tcp_retries2, about 15 minutes). With stalled="drop" the kernel enforces it,
    and is late by up to one retransmission timeout where a router answers with ICMP unreachable (RFC 6069)."""
    stalled: Stalled = "keep"
    """What becomes of a peer that is alive but takes no data for the user timeout: "keep" (the default) or "drop"."""
    enabled: bool = dataclasses.field(default=True, init=False)
    """False for `Keepalive.OFF` only."""

    OFF: ClassVar[Keepalive]
    """No keepalive and no user timeout."""
    SYSTEM: ClassVar[Keepalive]
    """Keepalive with the system's times (on Linux tcp_keepalive_time, _intvl, _probes), and no user timeout."""

    def __post_init__(self) -> None:
        put = object.__setattr__  # frozen for everybody else
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
                f"is the detection time, {longest:g} s, and must be at most {MAX_USER_TIMEOUT_MS / 1000} s",
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

    # -- what follows from it

    @property
    def detection_time(self) -> float | None:
        """Seconds from the last segment heard to the verdict on an idle connection: idle + interval * count.

        With stalled="drop" a user timeout that was given takes the place of the count, as in the kernel (tcp(7)), and
        is looked at when a probe is due. `math.inf` for OFF; None where one of the three is left to the system.
        """
        if not self.enabled:
            return math.inf
        if self.idle is None or self.interval is None or self.count is None:
            return None
        return self.idle + self.interval * self._intervals(self.idle, self.interval, self.count)

    def _intervals(self, idle: float, interval: float, count: int) -> int:
        """How many intervals follow the idle time before the kernel gives an idle peer up."""
        if self.stalled == "drop" and isinstance(self.user_timeout, (int, float)):
            return max(1, math.ceil((self.user_timeout - idle) / interval))
        return count

    @property
    def effective_user_timeout(self) -> float | None:
        """The user timeout in seconds with AUTO resolved; None: unbounded, or AUTO of times left to the system."""
        return self.detection_time if isinstance(self.user_timeout, Auto) else self.user_timeout

    def filled(self, *, idle: float | None, interval: float | None, count: int | None) -> Keepalive:
        """This policy with the given values where it left them to the system.

        Raises `PolicyError` where the user timeout is too short for those values.
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
        """What happens on an idle connection whose peer dies, in seconds after the last segment heard from it.

        Empty for OFF. Raises `PolicyError` where a time is left to the system: see `filled`.
        """
        if not self.enabled:
            return ()
        if self.idle is None or self.interval is None or self.count is None:
            field = "idle" if self.idle is None else "interval" if self.interval is None else "count"
            raise PolicyError(field, None, "is left to the system; give it with filled() for a timeline")
        idle, interval = self.idle, self.interval
        probes = self._intervals(idle, interval, self.count)
        steps = [Step(idle + interval * n, f"probe {n + 1} of {probes}") for n in range(probes)]
        return (*steps, Step(idle + interval * probes, "dead"))

    # -- ways to make one

    @classmethod
    def detect(cls, within: float) -> Keepalive:
        """The best policy for finding dead peers: its detection time is at most `within` seconds (2 or more).

        At least a third of the time is silence, then four probes follow; below 5 s there are fewer. Of a fraction of a
        second the whole seconds count. Beyond 98299 s the kernel's limits make the detection time shorter than asked.
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
        """The policy for getting past a middlebox that forgets connections silent for `against` seconds (3 or more).

        The first probe comes at half of that and its successor at three quarters, so that one may be lost; the last
        quarter is spare because the kernel's long timers fire up to an eighth late (kernel/time/timer.c).
        """
        limit = _number("against", against)
        if limit < 3:
            raise PolicyError("against", against, "must be at least 3 s: the kernel counts in whole seconds")
        limit = min(limit, 2 * MAX_SECONDS)
        return cls(max(1, math.floor(limit / 2)), max(1, math.floor(limit / 4)), 4)

    @classmethod
    def parse(cls, text: str) -> Keepalive:
        """A policy from its text.

        - `20s:10s:4`: idle, interval, count, as nginx's so_keepalive has them; an empty one is the system's; more may
          follow, `20s:10s:4,user_timeout=1m,stalled=drop`
        - `on`, `off`: `Keepalive.SYSTEM`, `Keepalive.OFF`
        - `idle=20s,count=4,user_timeout=1m,stalled=drop`: what is not named has its default; `system` leaves a time to
          the system, `user_timeout` also takes `auto` and `none`
        - `detect=30s`, `hold=350s`: the classmethods of that name

        Times are numbers with ms, s, m, h or d, also joined (`1m30s`); a bare number is seconds.
        Raises `PolicyError`.
        """
        if not isinstance(text, str):
            raise PolicyError("keepalive", text, "must be a string such as '20s:10s:4'")
        words = {"on": cls.SYSTEM, "off": cls.OFF}
        return parse_policy(text, cls, words, {"detect": cls.detect, "hold": cls.hold})

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Keepalive:
        """The policy that the environment asks for, else `Keepalive()`.

        KAIO_KEEPALIVE takes what `parse` takes, and wins. Otherwise libkeepalive's variables count: KEEPALIVE=off, and
        KEEPIDLE, KEEPINTVL (seconds) and KEEPCNT in place of the defaults. Empty variables count as absent.
        Raises `PolicyError` that names the variable.
        """
        env = os.environ if environ is None else environ
        spec = env.get("KAIO_KEEPALIVE", "").strip()
        if spec:
            try:
                return cls.parse(spec)
            except PolicyError as exc:
                raise PolicyError("KAIO_KEEPALIVE", spec, f"{exc.field}: {exc.limit}") from exc
        return parse_libkeepalive(env, cls, cls.OFF)

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
"""What every argument named `keepalive=` takes."""


def as_policy(keepalive: KeepaliveArg) -> Keepalive:
    """The policy that an argument named `keepalive=` means.

    A policy or its text; True: `Keepalive()`, whatever the environment says; False: `Keepalive.OFF`; None: the
    default, `Keepalive.from_env()`.
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


# -- checking values


def _number(field: str, value: object) -> float:
    """A finite number above 0 that is not a boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PolicyError(field, value, "must be a number of seconds")
    # int() and float() rid subclasses (numpy's, IntEnum) of their own repr; an int may be too large for a float.
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
    # By way of its shortest decimal form, so that 8.41 is 8410 ms and not one more for binary's sake.
    milliseconds = math.ceil(Decimal(repr(number)) * 1000)
    if milliseconds > MAX_USER_TIMEOUT_MS:
        raise PolicyError("user_timeout", value, f"must be at most {MAX_USER_TIMEOUT_MS / 1000} s")
    return milliseconds / 1000


# -- the two constants, made here because the checks above must exist first


def _off() -> Keepalive:
    off = Keepalive(None, None, None, user_timeout=None)
    object.__setattr__(off, "enabled", False)
    return off


Keepalive.OFF = _off()
Keepalive.SYSTEM = Keepalive(None, None, None, user_timeout=None)
