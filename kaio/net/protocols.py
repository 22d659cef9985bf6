"""The protocols that users subclass, and the hooks by which they hear of a dead peer.

Rules kept here: `connection_made`, then at most one `peer_dead`, then one `connection_lost` with the same error; also
when a subclass overrides any of them without calling `super()`, because the hooks are put around whatever a class
ends up with when it is defined. Data goes from the loop to `data_received` untouched.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

from ..errors import DeadPeerError, KeepaliveError
from ..kernel.sockets import apply_or_warn, logger, raw_socket
from ..liveness.health import Health
from ..liveness.limits import Limits
from ..policy import Keepalive, KeepaliveArg, as_policy
from .ending import ENDED, Stage
from .endpoints import Endpoint, Handshake, Terms, watched_by
from .transports import WatchedTransport

MYPY = False  # mypy takes it for true, by its name
if MYPY:
    assert os.name == "mypy"  # by which pyright knows that the next line is not for it
    from ._mypy_bases import BufferedProtocol, Protocol
else:
    from asyncio import BufferedProtocol, Protocol

__all__ = ["BufferedKeepaliveProtocol", "KeepaliveProtocol", "Watched"]


class Watched:
    """What `KeepaliveProtocol` and `BufferedKeepaliveProtocol` have in common."""

    __slots__ = ("_kaio",)

    keepalive: ClassVar[KeepaliveArg] = None
    """The policy of this class's connections where no `keepalive=` argument says otherwise; None: the default."""

    # what it starts with before connection_made, the transport from then on; None: turned away
    _kaio: Terms | Handshake | WatchedTransport | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        made, lost, eof = (_lookup(cls, name) for name in ("connection_made", "connection_lost", "eof_received"))
        if not hasattr(made, "_kaio_hook"):
            setattr(cls, "connection_made", _wrap_connection_made(made))  # noqa: B010 - the class has the method already
        if not isinstance(lost, _ConnectionLost):
            setattr(cls, "connection_lost", _ConnectionLost(lost))  # noqa: B010
        if not hasattr(eof, "_kaio_hook"):
            setattr(cls, "eof_received", _wrap_eof_received(eof))  # noqa: B010

    def connection_made(self, transport: Any) -> None:
        """The connection stands. `transport` is a `KeepaliveTransport`: asyncio's, with `.keepalive` and `.health()`.

        Typed Any because asyncio's type is wider: an override may say `transport: kaio.KeepaliveTransport`.
        """

    def peer_suspect(self, health: Health) -> None:
        """A probe or a retransmission went unanswered. `peer_recovered` or `peer_dead` follows."""

    def peer_recovered(self, health: Health) -> None:
        """The peer that was suspect was heard again."""

    def peer_dead(self, error: DeadPeerError) -> None:
        """The peer no longer answers. Called once; `connection_lost` follows with the same error.

        It follows in the loop's next turn; after what the peer had sent before, while that is still to be read: so not
        before reading resumes, when the application has paused it. What is written meanwhile is dropped.
        """

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone: None for an ordinary end, the `DeadPeerError`, or what else ended it."""

    def eof_received(self) -> bool | None:
        """The peer sends no more. As in asyncio: a true answer keeps our half of the connection open."""

    def _kaio_entry(self, transport: WatchedTransport) -> object:
        """What stands for the connection in `Server.connections`."""
        return transport


def _lookup(cls: type, name: str) -> Any:
    """What a class has under a name, not bound and not asked."""
    return next(base.__dict__[name] for base in cls.__mro__ if name in base.__dict__)


def _wrap_connection_made(
    function: Callable[[Watched, asyncio.Transport], None],
) -> Callable[[Watched, asyncio.Transport], None]:
    @functools.wraps(function)
    def connection_made(self: Watched, transport: asyncio.Transport) -> None:
        if type(transport) is not WatchedTransport:  # through super() it is ours already
            terms = getattr(self, "_kaio", None)
            if type(terms) is not Terms:  # made by a bare loop, or a protocol that is used again
                terms = terms.terms if type(terms) is Handshake else None
            if terms is None:
                transport = _make_foreign_transport(self, transport)
            elif terms.endpoint is not None and terms.endpoint.refusing:
                self._kaio = None
                transport.abort()
                return
            else:
                transport = _make_transport(self, transport, terms)
        function(self, transport)

    connection_made._kaio_hook = True  # type: ignore[attr-defined]
    return connection_made


def _wrap_eof_received(function: Callable[[Watched], bool | None]) -> Callable[[Watched], bool | None]:
    @functools.wraps(function)
    def eof_received(self: Watched) -> bool | None:
        transport = getattr(self, "_kaio", None)
        if type(transport) is not WatchedTransport:
            return function(self)
        if transport.verdict is not None and transport.ends_final_read():
            return None
        keep_open = function(self)
        if keep_open:
            transport.on_half_close()
        return keep_open

    eof_received._kaio_hook = True  # type: ignore[attr-defined]
    return eof_received


class _ConnectionLost:
    """`connection_lost` of one class. A descriptor, because a TLS layer's look-up of it is the last moment at which
    the socket can be asked why it died (see `WatchedTransport.sample_before_close`)."""

    def __init__(self, function: Callable[[Watched, BaseException | None], None]) -> None:
        @functools.wraps(function)
        def connection_lost(protocol: Watched, exc: BaseException | None) -> None:
            transport: object = getattr(protocol, "_kaio", function)
            if transport is None:  # turned away before it was made
                return
            if type(transport) is WatchedTransport:
                stage = transport.stage
                if stage is Stage.LOST_BY_KAIO:  # kaio has called it already
                    return
                if stage not in ENDED:
                    if exc is not None:
                        transport.deliver_unread(exc)
                    exc = transport.on_connection_lost(exc)
            function(protocol, exc)

        functools.update_wrapper(self, function)
        self._function = connection_lost

    def __get__(self, protocol: Watched | None, owner: type | None = None) -> _ConnectionLost | MethodType:
        if protocol is None:
            return self
        transport = getattr(protocol, "_kaio", None)
        if type(transport) is WatchedTransport and transport.stage not in ENDED:
            transport.sample_before_close(protocol)
        return MethodType(self._function, protocol)

    def __call__(self, protocol: Watched, exc: BaseException | None) -> None:
        self._function(protocol, exc)


def _make_transport(protocol: Watched, inner: asyncio.Transport, terms: Terms) -> WatchedTransport:
    """Make the transport that a protocol gets, with the policy that it is to have."""
    endpoint = terms.endpoint
    now = terms if endpoint is None else endpoint.terms
    own: KeepaliveArg = protocol.keepalive
    policy, limits = terms.policy, terms.limits
    if policy is not None and now.policy is not None:
        if not (now.explicit or own is now.source):
            policy, limits = _set_policy(protocol, inner, as_policy(own)) or (policy, limits)
        elif now is not terms or (endpoint is not None and endpoint.by_hand):
            policy, limits = _set_policy(protocol, inner, now.policy) or (policy, limits)
    return _attach(protocol, inner, endpoint, policy, limits)


def _make_foreign_transport(protocol: Watched, inner: asyncio.Transport) -> WatchedTransport:
    """Make the transport of a connection that kaio has neither accepted nor made."""
    default: Keepalive | None = getattr(asyncio.get_running_loop(), "keepalive", None)  # kaio's loop has one
    own: KeepaliveArg = protocol.keepalive
    policy = as_policy(own if own is not None else default)
    given = _set_policy(protocol, inner, policy, asked_for=own is not None)
    return _attach(protocol, inner, None, *(given or (None, None)))


def _attach(
    protocol: Watched,
    inner: asyncio.Transport,
    endpoint: Endpoint | None,
    policy: Keepalive | None,
    limits: Limits | None,
) -> WatchedTransport:
    protocol._kaio = transport = WatchedTransport(inner, protocol, endpoint, policy, limits)
    transport.entry = entry = protocol._kaio_entry(transport)
    if endpoint is not None:
        endpoint.live.add(entry)
    return transport


def _set_policy(
    protocol: Watched, inner: asyncio.Transport, policy: Keepalive, *, asked_for: bool = True
) -> tuple[Keepalive, Limits | None] | None:
    """Set a policy on a connection that does not have it yet; None when that fails: then it has what it had."""
    try:
        return policy, watched_by(policy, apply_or_warn(raw_socket(inner), policy, explicit=True))
    except KeepaliveError as exc:
        if asked_for:
            logger.warning("%s: keepalive %s cannot be had: %s", type(protocol).__name__, policy, exc.strerror)
        return None


class KeepaliveProtocol(Watched, Protocol):
    """An `asyncio.Protocol` that hears of its peer's death.

    Use it with `kaio.serve`, `kaio.create_server` and `kaio.create_connection`, or with a bare loop's methods: there
    its policy is set when the connection is made, without the loop's help.
    """

    __slots__ = ()


class BufferedKeepaliveProtocol(Watched, BufferedProtocol):
    """An `asyncio.BufferedProtocol` that hears of its peer's death. Otherwise as `KeepaliveProtocol`."""

    __slots__ = ()
