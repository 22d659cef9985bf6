"""The policy that a connection starts with, and the endpoint that accepted it.

Rules kept here: a `keepalive=` argument is parsed once. Terms are immutable: a connection gets the endpoint's when it
is accepted, and connection_made compares them with those that the endpoint has by then. If the policy was changed in
between, the socket is set again; no other connection pays for a change.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..addresses import Address, TcpAddress
from ..errors import PolicyError
from ..liveness.limits import Limits, limits_of
from ..policy import Keepalive, KeepaliveArg, SocketState, as_policy

if TYPE_CHECKING:
    from ..monitor.counters import Counters
    from ..monitor.monitor import Monitor
    from .gate import Gate, PeerKey
    from .proxy_protocol import ProxyHeader

__all__ = [
    "REFUSED",
    "Arrival",
    "AttachingFactory",
    "Endpoint",
    "Handshake",
    "PolicyChoice",
    "ProtocolFactory",
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
        raise PolicyError(
            "keepalive", str(keepalive), f"must be left out: {address} is not TCP, and only TCP has keepalive"
        )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """The policy of one connection when its transport is made."""

    policy: Keepalive | None
    """The policy that its socket has already; None: it is not TCP."""
    limits: Limits | None
    """The times by which the monitor watches it; None: it is not watched."""
    source: KeepaliveArg = None
    """As in `PolicyChoice`."""
    explicit: bool = False
    """As in `PolicyChoice`: then the protocol's own `keepalive` does not count."""
    endpoint: Endpoint | None = None
    """The endpoint that accepted the connection; None for one that was made by connecting."""


class Endpoint:
    """The connections that one listener accepted for one server, and the policy of the next one."""

    __slots__ = (
        "arrivals",
        "by_hand",
        "choice",
        "counters",
        "gate",
        "handshakes",
        "idle_timeout",
        "live",
        "loop",
        "make",
        "monitor",
        "on_empty",
        "on_leave",
        "owners",
        "refusing",
        "send_timeout",
        "setup_tasks",
        "terms",
    )

    def __init__(self, choice: PolicyChoice) -> None:
        self.set_policy(choice)
        self.make: AttachingFactory | None = None  # None: it does not accept
        self.counters: Counters | None = None  # the server's
        self.loop: asyncio.AbstractEventLoop | None = None  # the loop on which connections are accepted
        self.monitor: Monitor | None = None  # the loop's
        self.by_hand: bool = False  # whether each accepted socket is set in connection_made
        self.refusing: bool = False  # whether connections are aborted in connection_made: the server's block was left
        self.live: set[Any] = set()  # open connections: `Connection` or `KeepaliveTransport`
        self.setup_tasks: set[asyncio.Task[None]] = set()  # tasks that make the transports of accepted sockets
        self.handshakes: set[int] = set()  # TLS handshakes where the loop accepts, by id: see `Handshake`
        self.on_empty: Callable[[], None] | None = None  # called when the last of all these has ended
        self.on_leave: Callable[[], None] | None = None  # called when one of them has ended
        self.gate: Gate | None = None  # the listener's limits
        self.arrivals: dict[object, Arrival] = {}  # what is known of open connections from before they were made
        self.owners: tuple[Any, Any] = (None, None)  # the server and the listener
        self.idle_timeout: float | None = None  # of new connections
        self.send_timeout: float | None = None

    def set_policy(self, choice: PolicyChoice, state: SocketState | None = None) -> None:
        """Set the policy of new connections. `state` is what the kernel has on the listening socket."""
        self.choice: PolicyChoice = choice
        limits = None if choice.policy is None else watched_by(choice.policy, state)
        self.terms: Terms = Terms(choice.policy, limits, choice.source, choice.explicit, self)

    def refuse(self) -> None:
        """Abort the connections that have no transport yet. TLS handshakes of the loop's cannot be cancelled here."""
        self.refusing = True
        for task in self.setup_tasks:
            task.cancel()

    def is_empty(self) -> bool:
        """Whether no connection is open, and none that was accepted can still become one."""
        return not (self.live or self.setup_tasks or (self.handshakes and not self.refusing))

    def left(self) -> None:
        """A connection is no longer about to be made: it was, or it has failed."""
        if self.on_leave is not None:
            self.on_leave()
        if self.make is None:  # closed, and somebody may wait for the last to end
            self.check_empty()

    def check_empty(self) -> None:
        """Call `on_empty` if the last connection has ended."""
        if self.on_empty is not None and self.is_empty():
            self.on_empty()


class Arrival:
    """A connection that is looked at before its protocol is made. Its protocol refers to it until connection_made."""

    __slots__ = ("header", "is_made", "key", "terms")

    def __init__(self, terms: Terms, key: PeerKey | None, header: ProxyHeader | None) -> None:
        self.terms: Terms = terms
        self.key: PeerKey | None = key  # by which it is counted among those of its peer; None: it is not
        self.header: ProxyHeader | None = header  # of the PROXY protocol
        self.is_made: bool = False  # connection_made was called

    def leave(self) -> None:
        """The connection has ended: count it no more."""
        assert self.terms.endpoint is not None
        gate = self.terms.endpoint.gate
        if self.key is not None and gate is not None:
            gate.leave(self.key)


class Handshake:
    """A TLS handshake where the loop accepts. Its protocol refers to it until connection_made.

    uvloop does not report a handshake that fails: all that can be seen is that it drops the protocol, and this with it.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Terms) -> None:
        self.terms: Terms = terms  # of its connection
        assert terms.endpoint is not None
        terms.endpoint.handshakes.add(id(self))

    def __del__(self) -> None:
        endpoint = self.terms.endpoint
        assert endpoint is not None
        endpoint.handshakes.discard(id(self))
        if endpoint.loop is not None and (endpoint.make is None or endpoint.on_leave is not None):
            # In the loop: the garbage collector may run this in any thread.
            with contextlib.suppress(RuntimeError):  # the loop is closed
                endpoint.loop.call_soon_threadsafe(endpoint.left)


def watched_by(policy: Keepalive, state: SocketState | None) -> Limits | None:
    """The monitor's limits for a policy, with the kernel's values where it leaves times to the system."""
    return limits_of(with_system_times(policy, state))


def with_system_times(policy: Keepalive, state: SocketState | None) -> Keepalive:
    """A policy with the kernel's values where it leaves times to the system."""
    if policy.detection_time is None and state is not None and state.enabled:
        return policy.filled(idle=state.idle, interval=state.interval, count=state.count)
    return policy


ProtocolFactory: TypeAlias = Callable[[], asyncio.BaseProtocol]
AttachingFactory: TypeAlias = Callable[[Terms | Handshake | Arrival], asyncio.BaseProtocol]
"""Makes a protocol and attaches to it the terms of its connection, its TLS handshake or its arrival."""

REFUSED: Final = Terms(None, None, endpoint=Endpoint(PolicyChoice(None)))
"""The terms of a connection whose creation was cancelled: it is aborted in connection_made."""
assert REFUSED.endpoint is not None
REFUSED.endpoint.refusing = True
