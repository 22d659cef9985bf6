"""The transport that protocols get, and the endpoint that it came from.

Rules kept here: nothing is added to what is done for each message: `write` is the inner transport's own method. The
kernel is asked about a connection only after the loop has reported its death.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Literal

from anyio import ClosedResourceError, EndOfStream

from ._sockopt import SocketLike, platform
from .descriptors import reset_on_close, unread
from .errors import Cause, DeadPeerError, KeepaliveError, as_stream_error, format_address
from .keepalive import apply, tcp_info
from .monitor import Counters, Event, Monitor, get_monitor
from .policy import Keepalive, KeepaliveArg, SocketState
from .tcpinfo import TcpInfo
from .verdict import DEATHS, Health, Limits, State, dead_peer, judge, limits_of
from .watch import Decision, Watch

__all__ = ["AliveScope", "Endpoint", "KeepaliveTransport", "watched_by"]

_PATIENCE: Final = 0.5  # seconds for the loop to bring the end by itself

_without_layers: Final[set[type]] = set()  # types of transports that are never TLS, as far as was seen


class Endpoint:
    """What the connections of one listener, or of one call to connect, have in common."""

    __slots__ = (
        "by_hand",
        "counters",
        "explicit",
        "limits",
        "live",
        "monitor",
        "on_empty",
        "policy",
        "refusing",
        "source",
    )

    def __init__(self, policy: Keepalive | None, *, source: KeepaliveArg = None, explicit: bool = False) -> None:
        self.policy: Keepalive | None = policy  # what their sockets have already; None: not TCP
        self.limits: Limits | None = None if policy is None else limits_of(policy)  # how the monitor watches them
        self.counters: Counters | None = None  # the server's
        self.monitor: Monitor | None = None  # the loop's, where there is one loop
        self.source: KeepaliveArg = source  # the protocol class's own default that `policy` was made from
        self.explicit: bool = explicit  # whether a keepalive= argument said so, which wins over the protocol's own
        self.by_hand: bool = False  # whether each accepted socket is to be set when its protocol is told of it
        self.refusing: bool = False  # whether what still comes is turned away: its server has been left
        self.live: set[Any] = set()  # those that are open, as the user knows them
        self.on_empty: Callable[[], None] | None = None  # called when the last of them has ended

    def take(self, policy: Keepalive, state: SocketState | None) -> None:
        """From now on they start with this policy; `state` is what the kernel made of it."""
        self.policy = policy
        self.limits = watched_by(policy, state)


def watched_by(policy: Keepalive, state: SocketState | None) -> Limits | None:
    """How a connection is watched, with the kernel's values where the policy leaves times to the system."""
    if policy.enabled and state is not None and state.enabled:
        policy = policy.filled(idle=state.idle, interval=state.interval, count=state.count)
    return limits_of(policy)


class KeepaliveTransport(asyncio.Transport):
    """An asyncio transport that knows its keepalive policy and can be asked how its peer is.

    It is what `KeepaliveProtocol.connection_made` gets. All of `asyncio.Transport` is the loop's own.
    """

    __slots__ = (
        "__weakref__",
        "_closed_here",
        "_due",
        "_ended",
        "_endpoint",
        "_entry",
        "_half_closed",
        "_inner",
        "_inode",
        "_limits",
        "_monitor",
        "_peername",
        "_policy",
        "_protocol",
        "_sample",
        "_scopes",
        "_verdict",
        "_watch",
        "_watched_fd",
        "write",
    )

    _inner: asyncio.Transport  # the loop's own
    _endpoint: Endpoint | None  # where it came from; None once it has ended
    _entry: Any  # what stands for it in the endpoint's live set
    _policy: Keepalive | None  # how it is watched; None: not TCP
    _limits: Limits | None  # by which times the monitor watches it; None: not at all
    _monitor: Monitor  # the loop's
    _protocol: Any  # the user's; None once it has ended
    _verdict: BaseException | None  # what connection_lost will come with, known before the loop knows
    _scopes: list[AliveScope] | None  # who is to be cancelled when it ends
    _due: int  # the monitor's
    _watched_fd: int  # the monitor's
    _half_closed: bool  # the peer sends no more, and the loop no longer listens
    _watch: Watch | None  # the monitor's
    _inode: int  # the monitor's
    _closed_here: object  # the task in which this side has closed it, or True; False: it has not
    _ended: bool  # whether connection_lost has been passed on
    _sample: TcpInfo | None  # TCP_INFO of the dead socket
    _peername: Any  # where a layer between forgets it when it ends

    def __init__(
        self,
        inner: asyncio.Transport,
        protocol: Any,
        endpoint: Endpoint | None,
        policy: Keepalive | None,
        limits: Limits | None,
    ) -> None:
        self._inner = inner
        self.write = inner.write
        self._protocol = protocol
        self._endpoint = endpoint
        self._policy = policy
        self._limits = limits
        self._ended = self._half_closed = self._closed_here = False
        self._sample = self._peername = self._verdict = self._scopes = None
        self._watch = None
        self._inode = 0
        self._due = self._watched_fd = -1
        self._monitor = monitor = endpoint.monitor if endpoint and endpoint.monitor else get_monitor()
        monitor.counters.watched += 1
        if limits is not None:
            monitor.welcome(self)

    # -- asyncio's

    write: Callable[[bytes | bytearray | memoryview], None]  # type: ignore[assignment]
    """The inner transport's own method, as it is."""

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self._inner.writelines(list_of_data)

    def write_eof(self) -> None:
        self._inner.write_eof()

    def can_write_eof(self) -> bool:
        return self._inner.can_write_eof()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._inner.get_protocol()

    def is_closing(self) -> bool:
        return self._inner.is_closing()

    def is_reading(self) -> bool:
        return self._inner.is_reading()

    def get_write_buffer_size(self) -> int:
        return self._inner.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._inner.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._inner.set_write_buffer_limits(high, low)

    def close(self) -> None:
        """Close the connection once what was written has left; harmless when it is closing already.

        Not bound like the others: asyncio's TLS transport comes apart when it is closed twice.
        """
        self._closed_here = self._closed_here or _current_task() or True
        if not self._inner.is_closing():
            self._inner.close()

    def abort(self) -> None:
        """Close the connection at once, and drop what has not left, as in asyncio."""
        self._closed_here = self._closed_here or _current_task() or True
        self._inner.abort()

    def pause_reading(self) -> None:
        """Stop reading, as in asyncio. The peer's death is reported all the same."""
        self._inner.pause_reading()
        self._monitor.watch_errors(self)

    def resume_reading(self) -> None:
        """Read again, as in asyncio."""
        self._inner.resume_reading()
        if self._verdict is not None and not self._ended:
            asyncio.get_running_loop().call_later(_PATIENCE, self._drop_when_read)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection to another protocol, as in asyncio.

        A `KeepaliveProtocol` goes on being told of the peer's death. Another one gets what the loop tells it: the
        connection keeps its policy, and is no longer the monitor's nor in `Server.connections`.
        """
        # By name: the protocols are a row above, and any class that has the slot will do.
        if hasattr(type(protocol), "_kaio"):
            protocol._kaio = self  # type: ignore[attr-defined]
            self._protocol = protocol
        elif not self._ended:
            for scope in list(self._scopes or ()):
                scope.ended(RuntimeError("another protocol has taken the connection over"))
            self._let_go()
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
        apply(self, keepalive)

    def _follow(self, policy: Keepalive, state: SocketState) -> None:
        """The socket has another policy from now on."""
        self._policy = policy
        if not self._ended:
            self._monitor.begin_anew(self, watched_by(policy, state))

    @property
    def inner(self) -> asyncio.Transport:
        """The loop's own transport, for what takes no other: `loop.start_tls`, `loop.sendfile`."""
        return self._inner

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

    def while_alive(self) -> AliveScope:
        """A scope, like `asyncio.timeout`, whose block is cancelled when the connection ends meanwhile.

        It then raises `DeadPeerError` when the peer died, `ResetError` when it reset the connection,
        `anyio.EndOfStream` when it closed it, and `anyio.ClosedResourceError` when another task of this side did. A
        peer that only says that it sends no more (EOF) ends no block. Scopes nest, also with asyncio's and anyio's.
        """
        return AliveScope(self)

    # -- for the monitor

    def _socket(self) -> SocketLike:
        return self._inner.get_extra_info("socket")  # type: ignore[no-any-return]

    def _looked(self, sock: SocketLike, decision: Decision) -> None:
        """Nothing more is to be done."""

    def _closed_unheard(self) -> None:
        """connection_lost is on its way."""

    def _kernel_ended(self, sample: TcpInfo | None) -> None:
        """A loop that listens reports that; from one that does not, the error is taken and delivered.

        Reading SO_ERROR takes the error from the inner transport, so it is read only here.
        """
        if not self._half_closed and self._inner.is_reading():
            return
        try:
            number = self._socket().getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except (OSError, ValueError, AttributeError):
            return
        if number:
            self._condemn(OSError(number, os.strerror(number)), None, sample)

    def _tell(self, name: str, argument: object) -> None:
        protocol = self._protocol
        method = getattr(protocol, name, None)
        if method is None:  # another kind of protocol has taken over
            return
        try:
            method(argument)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"Exception in {name}()", "exception": exc, "transport": self, "protocol": protocol}
            )

    def _event(self, kind: Literal["suspect", "recovered"], health: Health) -> Event:
        event = Event(kind, self, health, None)
        self._count(event)
        return event

    def _count(self, event: Event) -> None:
        if self._endpoint is not None and self._endpoint.counters is not None:
            self._endpoint.counters.count(event)

    def _condemn(self, exc: OSError, cause: Cause | None, sample: TcpInfo | None) -> None:
        """End the connection with a verdict that the loop has not heard, or would not hear.

        What the peer had sent before stays in the socket while the application has reading paused; it is read, and the
        end follows it, when reading resumes. Otherwise the end comes in the loop's next turn.
        """
        if self._ended or self._verdict is not None:
            return
        if sample is not None:
            self._sample = sample
        self._verdict = self._translate(exc, cause)
        self._monitor.forget(self)
        self._pass_verdict()
        if not self._wait_until_read():
            self._drop()

    def _wait_until_read(self) -> bool:
        """Whether something of what the peer had sent waits to be read, and the end with it."""
        inner = self._inner
        if self._half_closed or inner.is_closing():
            return False
        sock = self._socket()
        try:
            # A TLS layer may hold data of its own.
            if not inner.is_reading() and inner.get_extra_info("sslcontext") is not None:
                return True
            if not unread(sock):
                return False
            _end_reading(sock)
        except (OSError, ValueError, AttributeError):
            return False
        if inner.is_reading():
            asyncio.get_running_loop().call_later(_PATIENCE, self._drop_when_read)
        return True

    def _pass_verdict(self) -> None:
        """Tell who waits that the connection has ended."""
        error = self._verdict
        if isinstance(error, DeadPeerError):
            self._tell("peer_dead", error)
        for scope in list(self._scopes or ()):
            scope.ended(error)

    def _drop(self) -> None:
        """End a dead connection in the loop's next turn, and wait for nothing that it still has to say."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            reset_on_close(self._socket())
        self._inner.abort()

    def _drop_when_read(self) -> None:
        """The application reads again what a dead peer had sent: once all is read, the end is due."""
        if self._ended or not self._inner.is_reading():  # paused again: the next resume_reading leads here
            return
        try:
            more = unread(self._socket())
        except (OSError, ValueError, AttributeError):
            more = False
        if more:
            asyncio.get_running_loop().call_later(_PATIENCE, self._drop_when_read)
        else:
            self._drop()

    # -- the end, called by the protocol's hooks

    def _saw_eof(self) -> None:
        """The peer sends no more and the protocol keeps the connection: the loop no longer listens."""
        self._half_closed = True
        if not self._ended:
            self._monitor.watch_errors_soon(self)

    def _examine(self, protocol: asyncio.BaseProtocol) -> None:
        """Read what tells why the connection died, if a layer between will close the socket before we are told.

        asyncio's and uvloop's TLS look connection_lost up, put it on the loop's queue, and then the socket is closed:
        only the look-up comes early enough.
        """
        inner = self._inner
        if self._verdict is not None or (type(inner) in _without_layers and inner.get_protocol() is protocol):
            return
        try:
            if inner.get_extra_info("sslcontext") is None and inner.get_protocol() is protocol:
                _without_layers.add(type(inner))
                return
            self._peername = inner.get_extra_info("peername")
            sample = tcp_info(inner)
        except (KeepaliveError, AttributeError):  # AttributeError: asyncio's TLS transport once it was closed twice
            return
        if judge(sample).state is State.DEAD:
            self._sample = sample

    def _end(self, exc: BaseException | None) -> BaseException | None:
        """The connection is gone: what its protocol is to be told."""
        if self._verdict is None and (exc is not None or self._scopes):
            self._verdict = self._translate(exc, None)
            self._ended = True
            self._pass_verdict()
        self._let_go()
        return self._verdict

    def _let_go(self) -> None:
        """Leave every table."""
        self._ended = True
        self._limits = None
        self._monitor.forget(self)
        self._monitor.counters.watched -= 1
        endpoint, entry = self._endpoint, self._entry
        self._endpoint = self._entry = self._protocol = self._scopes = None
        if endpoint is not None:
            endpoint.live.discard(entry)
            if not endpoint.live and endpoint.on_empty is not None:
                endpoint.on_empty()

    def _translate(self, exc: BaseException | None, cause: Cause | None) -> BaseException | None:
        """What ended the connection, as kaio says it; a death is counted and logged here."""
        number = exc.errno if isinstance(exc, OSError) and not isinstance(exc, ssl.SSLError) else None
        if number is None or number not in DEATHS:
            return exc
        if self._sample is None and self._policy is not None:  # None: not TCP
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self._sample = platform.tcp_info(self._socket())
        assert isinstance(exc, OSError)
        error = dead_peer(exc, cause, self._sample, peername=self.peername, policy=self._policy)
        event = Event("dead", self, None, error)
        self._count(event)
        self._monitor.emit(event)
        return error


class AliveScope:
    """What `while_alive()` returns: `async with connection.while_alive(): ...`."""

    __slots__ = ("_cancelling", "_fired", "_reason", "_task", "_transport")

    def __init__(self, transport: KeepaliveTransport) -> None:
        self._transport = transport
        self._task: asyncio.Task[Any] | None = None
        self._cancelling: int = 0  # cancellations that were there before ours
        self._fired: bool = False
        self._reason: BaseException | None = None

    async def __aenter__(self) -> AliveScope:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("while_alive() must be used in a task")
        if self._task is not None:
            raise RuntimeError("this scope has been entered already")
        transport = self._transport
        if transport._ended or transport._verdict is not None:
            raise as_stream_error(transport._verdict) or ClosedResourceError()
        self._task = task
        self._cancelling = task.cancelling()
        if transport._scopes is None:
            transport._scopes = []
        transport._scopes.append(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        scopes = self._transport._scopes
        if scopes is not None and self in scopes:
            scopes.remove(self)
        if self._fired:
            assert self._task is not None
            # As in asyncio.timeout: a cancellation from outside, on top of ours, stays one.
            if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
                reason = self._reason
                assert reason is not None
                raise reason.with_traceback(None) from reason.__cause__

    def ended(self, error: BaseException | None) -> None:
        """The connection has ended: cancel the block, and remember what to raise."""
        closed_here = self._transport._closed_here
        if self._fired or (error is None and closed_here is self._task):  # the block closes its own connection
            return
        self._fired = True
        # Closed by the peer, unless it was this side: then it was closing already.
        clean: BaseException = ClosedResourceError() if closed_here else EndOfStream()
        self._reason = as_stream_error(error) or clean
        assert self._task is not None
        self._task.cancel()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop is running
        return None


def _end_reading(sock: SocketLike) -> None:
    """Let an end of file follow what the socket holds. uvloop's stand-in for a socket has no shutdown()."""
    with socket.socket(fileno=os.dup(sock.fileno())) as twin, contextlib.suppress(OSError):  # ENOTCONN: it does already
        twin.shutdown(socket.SHUT_RD)
