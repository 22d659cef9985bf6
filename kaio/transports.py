"""The transport that protocols get, and the endpoint that it came from.

Rules kept here: nothing stands between user code and the inner transport. A method of the inner transport is bound to
ours when it is first asked for, and from then on a call costs what it costs on the bare loop. The kernel is asked
about a connection only after the loop has reported its death.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable
from typing import Any, Final

from .errors import DeadPeerError, KeepaliveError, format_address
from .keepalive import apply, tcp_info
from .policy import Keepalive, KeepaliveArg, as_policy
from .tcpinfo import TcpInfo
from .verdict import DEATHS, Health, State, cause_of_death, judge

__all__ = ["Endpoint", "KeepaliveTransport"]

# The methods of asyncio.Transport; each is a slot that shadows the base class's until it is bound.
_METHODS: Final = frozenset(
    {
        "abort",
        "can_write_eof",
        "get_extra_info",
        "get_protocol",
        "get_write_buffer_limits",
        "get_write_buffer_size",
        "is_closing",
        "is_reading",
        "pause_reading",
        "resume_reading",
        "set_write_buffer_limits",
        "write",
        "write_eof",
        "writelines",
    }
)


class Endpoint:
    """What the connections of one listener, or of one call to connect, have in common."""

    __slots__ = ("by_hand", "explicit", "live", "on_empty", "policy", "source")

    def __init__(self, policy: Keepalive | None, *, source: KeepaliveArg = None, explicit: bool = False) -> None:
        self.policy: Keepalive | None = policy  # what their sockets have already; None: not TCP
        self.source: KeepaliveArg = source  # the protocol class's own default that `policy` was made from
        self.explicit: bool = explicit  # whether a keepalive= argument said so, which wins over the protocol's own
        self.by_hand: bool = False  # whether each accepted socket is to be set when its protocol is told of it
        self.live: set[Any] = set()  # those that are open, as the user knows them
        self.on_empty: Callable[[], None] | None = None  # called when the last of them has ended

    def discard(self, entry: Any) -> None:
        """A connection has ended."""
        self.live.discard(entry)
        if not self.live and self.on_empty is not None:
            self.on_empty()


class KeepaliveTransport(asyncio.Transport):
    """An asyncio transport that knows its keepalive policy and can be asked how its peer is.

    It is what `KeepaliveProtocol.connection_made` gets. All of `asyncio.Transport` is the loop's own.
    """

    __slots__ = (
        "__weakref__",
        "_ended",
        "_endpoint",
        "_entry",
        "_inner",
        "_peername",
        "_policy",
        "_sample",
        *sorted(_METHODS),
    )

    _inner: asyncio.Transport  # the loop's own
    _endpoint: Endpoint | None  # where it came from; None once it has ended
    _entry: Any  # what stands for it in the endpoint's live set
    _policy: Keepalive | None  # how it is watched; None: not TCP
    _ended: bool  # whether connection_lost has been passed on
    _sample: TcpInfo | None  # TCP_INFO of the dead socket
    _peername: Any  # where a layer between forgets it when it ends

    def __init__(self, inner: asyncio.Transport, endpoint: Endpoint | None, policy: Keepalive | None) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._policy = policy
        self._ended = False
        self._sample = None
        self._peername = None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name in _METHODS:
            setattr(self, name, value)
        return value

    def close(self) -> None:
        """Close the connection once what was written has left; harmless when it is closing already.

        Not bound like the others: asyncio's TLS transport comes apart when it is closed twice.
        """
        if not self._inner.is_closing():
            self._inner.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection to another protocol, as in asyncio.

        A `KeepaliveProtocol` goes on being told of the peer's death; another one gets what the loop tells.
        """
        # By name: the protocols are a row above, and any class that has the slot will do.
        if hasattr(type(protocol), "_kaio"):
            protocol._kaio = self  # type: ignore[attr-defined]
        self._inner.set_protocol(protocol)

    @property
    def keepalive(self) -> Keepalive | None:
        """The policy of this connection; None when it is not TCP.

        Setting it changes the live connection. Takes what every `keepalive=` takes. Raises `PolicyError`,
        `KeepaliveError`; then nothing has changed.
        """
        return self._policy

    @keepalive.setter
    def keepalive(self, keepalive: KeepaliveArg) -> None:
        policy = as_policy(keepalive)
        apply(self._inner, policy)
        self._policy = policy

    @property
    def peername(self) -> Any:
        """The peer's address as asyncio gives it, also after the end."""
        return self._peername or self._inner.get_extra_info("peername")

    def health(self) -> Health:
        """How the peer is now, by a sample of the kernel's TCP_INFO; after its death, how it was then.

        Raises `KeepaliveError` when the connection is not TCP, or has ended in another way.
        """
        return judge(self._sample if self._sample is not None else tcp_info(self._inner))

    def __repr__(self) -> str:
        try:
            state = "closed" if self._ended else "closing" if self._inner.is_closing() else str(self.health().state)
        except KeepaliveError:
            state = "open"
        return f"<KeepaliveTransport to {format_address(self.peername)} keepalive={str(self._policy)!r} {state}>"

    # -- the end, called by the protocol's hooks

    def _examine(self, protocol: asyncio.BaseProtocol) -> None:
        """Read what tells why the connection died, if a layer between will close the socket before we are told.

        asyncio's and uvloop's TLS look connection_lost up, put it on the loop's queue, and then the socket is closed:
        only the look-up comes early enough.
        """
        inner = self._inner
        try:
            if inner.get_extra_info("sslcontext") is None and inner.get_protocol() is protocol:
                return
            self._peername = inner.get_extra_info("peername")
            sample = tcp_info(inner)
        except (KeepaliveError, AttributeError):  # AttributeError: asyncio's TLS transport once it was closed twice
            return
        if judge(sample).state is State.DEAD:
            self._sample = sample

    def _end(self, exc: BaseException | None) -> BaseException | None:
        """The connection is gone: what its protocol is to be told."""
        self._ended = True
        if self._endpoint is not None:
            self._endpoint.discard(self._entry)
        self._endpoint = self._entry = None
        number = exc.errno if isinstance(exc, OSError) and not isinstance(exc, ssl.SSLError) else None
        if number is None or number not in DEATHS:
            return exc
        if self._sample is None:
            try:
                self._sample = tcp_info(self._inner)
            except (KeepaliveError, AttributeError):
                pass
        sample = self._sample
        silence = None if sample is None else sample.silence
        error = DeadPeerError(
            cause_of_death(number, sample),
            number,
            silence=math.nan if silence is None else silence,
            peername=self.peername,
            policy=self._policy,
            info=sample,
        )
        error.__cause__ = exc
        return error
