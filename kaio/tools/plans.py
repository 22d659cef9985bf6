"""What a policy means: when and how a peer's death is detected in each state, and what probing costs.

Rules kept here: arithmetic on a policy and on the kernel's defaults, no I/O. The times are those to which the kernel's
timers are set; timers above 16 s may fire up to 12.5 % late (kernel/time/timer.c).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from ..policy import Keepalive, Step
from .sysctls import Defaults

__all__ = ["ACK_BYTES", "Cost", "Fate", "cost", "duration", "fates"]

ACK_BYTES: Final = 52
"""A probe, or its answer, as an IPv4 packet: 20 bytes of IP, 20 of TCP, 12 of the option for timestamps (RFC 7323)."""


class Fate(NamedTuple):
    """What happens when the peer dies while the connection is in some state."""

    state: str
    found_after: float
    """Seconds from the peer's last segment until detection, on a connection of kaio's; `math.inf`: never."""
    found_alone: float
    """The same for other sockets with the policy's options, on asyncio's or uvloop's event loop."""
    steps: tuple[Step, ...]
    """What happens until then on a connection of kaio's."""


def fates(policy: Keepalive, system: Defaults) -> tuple[Fate, ...]:
    """Return what happens under a policy when the peer dies, for each state of a connection.

    Assumes that data is sent, or the window is shut, at the moment of death. Raises `PolicyError` for a policy that
    leaves times to the system: see `Keepalive.filled`.
    """
    bound = math.inf if policy.effective_user_timeout is None else policy.effective_user_timeout
    dropped = bound if policy.stalled == "drop" else math.inf  # by the kernel's TCP_USER_TIMEOUT
    retried, attempt = system.unacknowledged_time, system.connecting_time
    # TCP_USER_TIMEOUT replaces tcp_retries2 for data, but the number of window probes remains limited
    # (retransmits_timed_out() and tcp_probe_timer() in net/ipv4/tcp_timer.c).
    resent_alone = retried if math.isinf(dropped) else dropped
    resent = min(bound, resent_alone)
    waits = itertools.chain(system.retry_waits, itertools.repeat(system.rto_max))
    idle = policy.timeline()
    dead = idle[-1].at if idle else math.inf
    shut, connecting = min(bound, retried), min(bound, attempt)
    most = system.rto_max
    return (
        Fate("idle", dead, dead, idle),
        Fate("sent data unacknowledged", resent, resent_alone, _steps("resent", waits, resent, most)),
        Fate("window shut", shut, min(dropped, retried), _steps("window probe", system.retry_waits, shut, most)),
        Fate("connecting", connecting, min(dropped, attempt), _steps("SYN again", system.syn_waits, connecting, most)),
        Fate("reading paused", dead, math.inf, idle),
    )


def _steps(event: str, waits: Iterable[float], end: float, most: float) -> tuple[Step, ...]:
    """List an event after each wait, up to the end. From the longest wait on, one step stands for all."""
    steps: list[Step] = []
    at, before = 0.0, 0.0
    for wait in waits:
        at = round(at + wait, 3)
        if at >= end:
            break
        if wait == before == most:
            steps.append(Step(at, f"{event}, and every {most:g} s"))
            break
        steps.append(Step(at, event))
        before = wait
    return (*steps, Step(end, "dead"))


class Cost(NamedTuple):
    """The network traffic of a number of idle connections, in both directions together."""

    probes: float
    """Probes per second while all peers answer."""
    bytes: float
    """Bytes of IPv4 per second while all peers answer, probes and answers."""
    probes_in_vain: float
    """Probes per second when no peer answers."""


def cost(policy: Keepalive, connections: int) -> Cost:
    """Calculate the traffic of idle connections; busy connections are not probed.

    Raises `PolicyError` for a policy that leaves times to the system.
    """
    probes = policy.timeline()[:-1]
    if not probes:
        return Cost(0.0, 0.0, 0.0)
    assert policy.interval is not None
    # After an answer, the next probe is sent after the idle time, but not before the interval.
    a_second = connections / max(probes[0].at, policy.interval)
    return Cost(a_second, a_second * 2 * ACK_BYTES, connections / policy.interval)


def duration(seconds: float) -> str:
    """Format a duration, such as 2 h 11 min 15 s; `never` for `math.inf`."""
    if math.isinf(seconds):
        return "never"
    minutes, rest = divmod(round(seconds, 3), 60)
    days, hours = divmod(int(minutes), 1440)
    parts = ((days, "d"), (hours // 60, "h"), (hours % 60, "min"), (round(rest, 3), "s"))
    return " ".join(f"{number:g} {unit}" for number, unit in parts if number) or "0 s"
