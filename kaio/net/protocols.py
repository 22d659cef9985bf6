"""The protocol classes that users subclass, and the hooks that report a dead peer to them.

Rules kept here: `connection_made`, then at most one `peer_dead`, then one `connection_lost` with the same error. This
also holds if a subclass overrides them without calling `super()`, because the hooks wrap the methods of each class when
it is defined. The loop calls `data_received` directly.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar, Final

from ..errors import DeadPeerError, KeepaliveError
from ..kernel.sockets import apply_or_warn, logger, raw_socket
from ..liveness.health import Health
from ..liveness.limits import Limits
from ..policy import Keepalive, KeepaliveArg, as_policy
from .ending import ENDED, Stage
from .endpoints import Arrival, Endpoint, Handshake, Terms, watched_by
from .transports import WatchedTransport

MYPY = False  # mypy takes it for true, by its name
if MYPY:
    assert os.name == "mypy"  # by which pyright knows that the next line is not for it
    from ._mypy_bases import BufferedProtocol, Protocol
else:
    from asyncio import BufferedProtocol, Protocol

__all__ = ["BufferedKeepaliveProtocol", "KeepaliveProtocol", "Watched"]


class Watched:
    """The common base of `KeepaliveProtocol` and `BufferedKeepaliveProtocol`."""

    __slots__ = ("_kaio",)

    keepalive: ClassVar[KeepaliveArg] = None
    """The policy of this class's connections, unless there is a `keepalive=` argument; None: the default."""

    # before connection_made what it starts with, afterwards the transport; None: refused
    _kaio: Terms | Handshake | Arrival | WatchedTransport | None

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
        """Called when the connection is made, with its `KeepaliveTransport`.

        Typed Any because asyncio's type is wider: an override may say `transport: kaio.KeepaliveTransport`.
        """

    def peer_suspect(self, health: Health) -> None:
        """Called when a probe or a retransmission is unanswered. `peer_recovered` or `peer_dead` follows."""

    def peer_recovered(self, health: Health) -> None:
        """Called when a suspect peer has answered again."""

    def peer_dead(self, error: DeadPeerError) -> None:
        """Called once when the peer no longer answers. `connection_lost` follows with the same error.

        It follows in the loop's next iteration; but after data that the peer sent before, if any is in the socket,
        and so not before the application resumes reading. What is written meanwhile is discarded.
        """

    def draining(self) -> None:
        """Called when the server drains: finish what is under way, and close the transport.

        It is closed at the end of the grace that `Server.drain` was given.
        """

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection is closed, with its error: a `DeadPeerError`, another exception, or None."""

    def eof_received(self) -> bool | None:
        """Called when the peer has sent EOF. As in asyncio, return True to keep the connection open for sending."""

    def _kaio_entry(self, transport: WatchedTransport) -> object:
        """Return the connection's element of `Server.connections`."""
        return transport


_WITH_TERMS: Final = (Handshake, Arrival)


def _lookup(cls: type, name: str) -> Any:
    """Return a class's attribute without calling descriptors."""
    return next(base.__dict__[name] for base in cls.__mro__ if name in base.__dict__)


def _wrap_connection_made(
    function: Callable[[Watched, asyncio.Transport], None],
) -> Callable[[Watched, asyncio.Transport], None]:
    @functools.wraps(function)
    def connection_made(self: Watched, transport: asyncio.Transport) -> None:
        if type(transport) is not WatchedTransport:  # else a call by super(), from an outer hook
            attached: Any = getattr(self, "_kaio", None)
            terms: Terms | None = attached
            if type(attached) is not Terms:  # made by a loop's own method, or a protocol that is used again
                terms = attached.terms if type(attached) in _WITH_TERMS else None
            if terms is None:
                transport = _make_foreign_transport(self, transport)
            elif terms.endpoint is not None and terms.endpoint.refusing:
                self._kaio = None
                transport.abort()
                return
            else:
                transport = _make_transport(self, transport, terms)
                if type(attached) is Arrival:
                    transport.on_arrival(attached)
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
    """The hook around a class's `connection_lost`.

    A descriptor, because a TLS layer's look-up of the method is the last moment at which TCP_INFO can be read (see
    `WatchedTransport.sample_before_close`).
    """

    def __init__(self, function: Callable[[Watched, BaseException | None], None]) -> None:
        @functools.wraps(function)
        def connection_lost(protocol: Watched, exc: BaseException | None) -> None:
            transport: Any = getattr(protocol, "_kaio", function)
            if transport is None:  # refused in connection_made
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
    """Make a protocol's transport, and set its policy if the socket does not have it yet."""
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
    """Make the transport for a connection that was made by a loop's own methods, and set its policy."""
    default: Keepalive | None = getattr(asyncio.get_running_loop(), "keepalive", None)  # on kaio's loop
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
        if endpoint.idle_timeout is not None or endpoint.send_timeout is not None:
            transport.start_timeouts(endpoint.idle_timeout, endpoint.send_timeout)
    return transport


def _set_policy(
    protocol: Watched, inner: asyncio.Transport, policy: Keepalive, *, asked_for: bool = True
) -> tuple[Keepalive, Limits | None] | None:
    """Set a policy on a connection; return None if that fails, which changes nothing."""
    try:
        return policy, watched_by(policy, apply_or_warn(raw_socket(inner), policy, explicit=True))
    except KeepaliveError as exc:
        if asked_for:
            logger.warning("%s: cannot set keepalive %s: %s", type(protocol).__name__, policy, exc.strerror)
        return None


class KeepaliveProtocol(Watched, Protocol):
    """An `asyncio.Protocol` whose `peer_dead` is called when the peer no longer answers.

    Use it with `kaio.serve`, `kaio.create_server` and `kaio.create_connection`, or with the methods of any loop: those
    connections get the policy when they are made.
    """

    __slots__ = ()


class BufferedKeepaliveProtocol(Watched, BufferedProtocol):
    """An `asyncio.BufferedProtocol` with the additional callbacks of `KeepaliveProtocol`."""

    __slots__ = ()
