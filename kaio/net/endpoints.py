"""What a connection starts with: its terms, and the endpoint that accepted it.

Rules kept here: terms never change. A connection is given them when it is accepted, and has them compared with the
endpoint's when its protocol is told of it; what was changed in between is then set by hand. So a change costs the
connections that it overtakes, and no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Final

from ..addresses import Address, TcpAddress
from ..errors import PolicyError
from ..liveness.limits import Limits, limits_of
from ..monitor.counters import Counters
from ..monitor.monitor import Monitor
from ..policy import Keepalive, KeepaliveArg, SocketState, as_policy

__all__ = [
    "REFUSED",
    "Endpoint",
    "Handshake",
    "PolicyChoice",
    "Terms",
    "choose_policy",
    "refuse_keepalive",
    "watched_by",
    "with_system_times",
]


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyChoice:
    """A policy, and who chose it."""

    policy: Keepalive | None
    """None: for an address that is not TCP."""
    source: KeepaliveArg = None
    """The protocol class's `keepalive` that `policy` was made from."""
    explicit: bool = False
    """Whether a `keepalive=` argument chose it."""


def choose_policy(keepalive: KeepaliveArg, *, factory: object = None, address: Address | None = None) -> PolicyChoice:
    """Parse a `keepalive=` argument: the one place at which an argument becomes a policy.

    The argument wins over the `keepalive` attribute of the protocol factory, and that over the environment, which is
    read only when neither is given. For an address that is not TCP there is no policy; asking for one is a
    `PolicyError`.
    """
    if address is not None and not isinstance(address, TcpAddress):
        refuse_keepalive(address, keepalive)
        return PolicyChoice(None)
    if keepalive is not None:
        return PolicyChoice(as_policy(keepalive), explicit=True)
    source: KeepaliveArg = getattr(factory, "keepalive", None)
    return PolicyChoice(as_policy(source), source)


def refuse_keepalive(address: Address, keepalive: KeepaliveArg) -> None:
    """Raise `PolicyError` when keepalive is asked for at an address that is not TCP."""
    if keepalive is not None and as_policy(keepalive).enabled:
        raise PolicyError("keepalive", str(keepalive), f"must be left out: {address} is not TCP, which alone has it")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What a connection starts with."""

    policy: Keepalive | None
    """What its socket has already; None: it is not TCP."""
    limits: Limits | None
    """How the monitor watches it; None: not at all."""
    source: KeepaliveArg = None
    """The protocol class's own default that `policy` was made from."""
    explicit: bool = False
    """Whether a `keepalive=` argument said so, which wins over the protocol's own."""
    endpoint: Endpoint | None = None
    """Where it was accepted; None: it was not, but connected."""


class Endpoint:
    """What the connections that one listener accepted for one server have in common."""

    __slots__ = (
        "by_hand",
        "choice",
        "counters",
        "handshakes",
        "live",
        "loop",
        "make",
        "monitor",
        "on_empty",
        "refusing",
        "setup_tasks",
        "terms",
    )

    def __init__(self, choice: PolicyChoice) -> None:
        self.set_policy(choice)
        self.make: Callable[[Terms], asyncio.BaseProtocol] | None = None  # makes protocols; None: it accepts no more
        self.counters: Counters | None = None  # the server's
        self.loop: asyncio.AbstractEventLoop | None = None  # that accepts
        self.monitor: Monitor | None = None  # the loop's
        self.by_hand: bool = False  # whether each accepted socket is to be set when its protocol is told of it
        self.refusing: bool = False  # whether what still comes is turned away: its server has been left
        self.live: set[Any] = set()  # those that are open, as the user knows them
        self.setup_tasks: set[asyncio.Task[None]] = set()  # make the transports of accepted sockets
        self.handshakes: set[int] = set()  # those under way where the loop accepts: see `Handshake`
        self.on_empty: Callable[[], None] | None = None  # called when the last of all these has ended

    def set_policy(self, choice: PolicyChoice, state: SocketState | None = None) -> None:
        """Let new connections start with this policy. `state` is what the kernel has on the listening socket."""
        self.choice: PolicyChoice = choice
        limits = None if choice.policy is None else watched_by(choice.policy, state)
        self.terms: Terms = Terms(choice.policy, limits, choice.source, choice.explicit, self)

    def refuse(self) -> None:
        """Turn away what was accepted and does not stand yet. Handshakes of the loop's own end when they can."""
        self.refusing = True
        for task in self.setup_tasks:
            task.cancel()

    def is_empty(self) -> bool:
        """Whether nothing is open, and nothing will be of what was accepted."""
        return not (self.live or self.setup_tasks or (self.handshakes and not self.refusing))

    def check_empty(self) -> None:
        """Something has ended: say so if it was the last."""
        if self.on_empty is not None and self.is_empty():
            self.on_empty()


class Handshake:
    """A TLS handshake under way where the loop accepts. The protocol refers to it until it is told of its connection.

    uvloop tells nobody of a handshake that fails: all that can be seen is that it drops the protocol.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Terms) -> None:
        self.terms: Terms = terms  # what its connection starts with
        assert terms.endpoint is not None
        terms.endpoint.handshakes.add(id(self))

    def __del__(self) -> None:
        endpoint = self.terms.endpoint
        assert endpoint is not None
        endpoint.handshakes.discard(id(self))
        if endpoint.make is None and endpoint.loop is not None and endpoint.is_empty():
            # Not at once: this may be the garbage collector, in any thread.
            with contextlib.suppress(RuntimeError):  # the loop is closed
                endpoint.loop.call_soon_threadsafe(endpoint.check_empty)


def watched_by(policy: Keepalive, state: SocketState | None) -> Limits | None:
    """How a connection is watched, with the kernel's values where the policy leaves times to the system."""
    return limits_of(with_system_times(policy, state))


def with_system_times(policy: Keepalive, state: SocketState | None) -> Keepalive:
    """A policy with the kernel's values where it leaves times to the system."""
    if policy.detection_time is None and state is not None and state.enabled:
        return policy.filled(idle=state.idle, interval=state.interval, count=state.count)
    return policy


REFUSED: Final = Terms(None, None, endpoint=Endpoint(PolicyChoice(None)))
"""The terms of a connection that nobody waits for any more: its transport is aborted as soon as there is one."""
assert REFUSED.endpoint is not None
REFUSED.endpoint.refusing = True
