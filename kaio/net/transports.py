"""The transport that protocols get.

Rules kept here: nothing is added to what is done for each message: `write` is the inner transport's own method. The
kernel is asked about a connection only after the loop has reported its death. How far a connection is on the way to its
end is one stage of `ending`; connection_lost is the loop's to call, and called here where a loop does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import ssl
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Literal

from anyio import ClosedResourceError, EndOfStream

from ..errors import Cause, DeadPeerError, KeepaliveError, as_stream_error, format_address, remember
from ..kernel.descriptors import reset_on_close, unread
from ..kernel.options import SocketLike, platform
from ..kernel.sockets import apply, tcp_info
from ..kernel.tcpinfo import TcpInfo, TcpState
from ..liveness.causes import DEATHS, NO_WAY, dead_peer, fell_silent, is_death
from ..liveness.health import Health, State, judge
from ..liveness.limits import Limits
from ..liveness.watch import Decision, Watch
from ..monitor.monitor import Event, Monitor, get_monitor
from ..policy import Keepalive, KeepaliveArg, SocketState
from .ending import OVER, TABLE, UNDECIDED, Happening, Stage
from .endpoints import Endpoint, watched_by
from .internals import (
    end_reading,
    force_close,
    is_closed,
    is_held_back,
    is_sending_file,
    stop_sending_file,
    take_error,
    with_reason,
)

__all__ = ["AliveScope", "KeepaliveTransport"]

_PATIENCE: Final = 0.5  # seconds for the loop to read a piece of what had arrived
_LONGEST: Final = 5.0  # and at most, between two looks at whether the application reads again
_MOMENT: Final = 0.01  # seconds; many turns of a loop that is not blocked
_FIRST_CHECK: Final = 0.25  # seconds until it is seen whether a transport that was handed out has been closed
_LAST_CHECK: Final = 60.0  # and at most, between two of those
_CLOSED: Final = (OSError, ValueError, AttributeError, RuntimeError)  # what a closed socket or transport raises

_without_layers: Final[set[type]] = set()  # types of transports that are never TLS, as far as was seen


class KeepaliveTransport(asyncio.Transport):
    """An asyncio transport that knows its keepalive policy and can be asked how its peer is.

    It is what `KeepaliveProtocol.connection_made` gets. All of `asyncio.Transport` is the loop's own.
    """

    __slots__ = (
        "__weakref__",
        "_closer",
        "_due",
        "_endpoint",
        "_entry",
        "_inner",
        "_inode",
        "_limits",
        "_monitor",
        "_peername",
        "_policy",
        "_protocol",
        "_sample",
        "_scopes",
        "_stage",
        "_timer",
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
    _watch: Watch | None  # the monitor's
    _inode: int  # the monitor's
    _stage: Stage  # how far it is on the way to its end
    _closer: object  # the task in which this side has closed it, or True; False: it has not
    _timer: asyncio.TimerHandle | None  # the next step towards the end, where the loop may not bring it by itself
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
        self._stage = Stage.OPEN
        self._closer = False
        self._sample = self._peername = self._verdict = self._scopes = self._timer = None
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
        if self._verdict is None:
            self._inner.writelines(list_of_data)

    def write_eof(self) -> None:
        if self._verdict is None:
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
        self._close_here()
        if self._stage is Stage.ENDING:
            self._drop()
        elif not self._inner.is_closing():
            self._inner.close()

    def abort(self) -> None:
        """Close the connection at once, and drop what has not left, as in asyncio."""
        self._close_here()
        if self._stage is Stage.ENDING:
            self._drop()
        else:
            self._inner.abort()

    def pause_reading(self) -> None:
        """Stop reading, as in asyncio. The peer's death is reported all the same."""
        self._inner.pause_reading()
        self._monitor.watch_errors(self)

    def resume_reading(self) -> None:
        """Read again, as in asyncio."""
        self._inner.resume_reading()
        if self._stage is Stage.VERDICT:
            self._next(_PATIENCE, self._read_out, _PATIENCE, True)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection to another protocol, as in asyncio.

        A `KeepaliveProtocol` goes on being told of the peer's death. Another one gets what the loop tells it: the
        connection keeps its policy, and is no longer the monitor's nor in `Server.connections`.
        """
        if protocol is not self._protocol:
            self._tell("_handed_over", protocol)
        # By name: the protocols are a row above, and any class that has the slot will do.
        if hasattr(type(protocol), "_kaio"):
            protocol._kaio = self  # type: ignore[attr-defined]
            self._protocol = protocol
        elif not self._ended:
            for scope in list(self._scopes or ()):
                scope.ended(RuntimeError("another protocol has taken the connection over"))
            self._move(Happening.RELEASED)
            self._leave()
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
        """The loop's own transport, for what takes no other: `loop.start_tls`, `loop.sendfile`.

        Whoever has it may do what this transport does not see. The peer's death and the connection's end are reported
        all the same, also in a TLS handshake, of whose failure asyncio and uvloop tell no protocol.
        """
        self._lend()
        return self._inner

    @property
    def peername(self) -> Any:
        """The peer's address as asyncio gives it, also after the end."""
        if self._peername is not None:
            return self._peername
        try:
            return self._inner.get_extra_info("peername")
        except AttributeError:  # uvloop, not TCP: it asks the socket, and has none any more
            return None

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

    def _kernel_ended(self, sample: TcpInfo | None) -> None:
        """A loop that listens reports that; from one that does not, the error is taken and delivered.

        Reading SO_ERROR takes the error from the inner transport, so it is read only here.
        """
        if self._stage not in UNDECIDED:
            return
        inner = self._inner
        sending = is_sending_file(inner)  # which has reading paused, and may take the error first
        lent = self._timer is not None  # a TLS layer may hear of it and tell nobody
        try:
            sock = self._socket()
            if sample is None and self._policy is not None:
                with contextlib.suppress(KeepaliveError):  # a platform that does not tell
                    sample = platform.tcp_info(sock)
            if sample is not None and sample.state != TcpState.CLOSE:
                return  # both have closed their halves, say; SO_ERROR may give what is no end yet
            if self._stage is Stage.HALF_CLOSED or not inner.is_reading():
                number = take_error(sock)
                if number:
                    self._condemn(OSError(number, os.strerror(number)), None, sample)
                    return
            if sample is not None and (sending or lent):
                error = self._error_in(sample)
                if sending:
                    self._condemn(error, None, sample)
                else:
                    self._next(_MOMENT, self._check, _FIRST_CHECK, error)
        except _CLOSED:
            return

    def _error_in(self, sample: TcpInfo) -> OSError:
        """What ended a connection whose error somebody else has taken."""
        silent = fell_silent(sample, platform.read(self._socket()))
        number = errno.ETIMEDOUT if silent else errno.ECONNRESET
        return OSError(number, os.strerror(number))

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
        if self._stage not in UNDECIDED:
            return
        if cause is not None:  # the monitor's own
            with contextlib.suppress(*_CLOSED):
                exc, cause = with_reason(self._socket(), exc, cause)
        self._verdict = self._translate(exc, cause, sample)
        self._move(Happening.JUDGED)
        self._monitor.forget(self)
        self.write = _write_nothing  # a write that fails would end it with what had arrived unread
        self._pass_verdict()
        if self._stage is Stage.VERDICT:
            self._begin_to_read_out()
        elif self._stage is Stage.ENDING:
            self._drop()

    def _pass_verdict(self) -> None:
        """Tell who waits that the connection has ended."""
        error = self._verdict
        if isinstance(error, DeadPeerError):
            self._tell("peer_dead", error)
        elif error is not None:
            self._tell("_end_is_known", error)
        for scope in list(self._scopes or ()):
            scope.ended(error)

    # -- after a verdict

    def _begin_to_read_out(self) -> None:
        """There is a verdict: see whether something of what the peer had sent waits to be read before the end."""
        inner = self._inner
        with contextlib.suppress(*_CLOSED):
            sock = self._socket()
            held = is_held_back(inner)
            if not inner.is_closing() and (held or unread(sock)):
                if not held and inner.get_extra_info("sslcontext") is None:
                    end_reading(sock)
                if is_sending_file(inner):
                    stop_sending_file(sock)
                self._next(_PATIENCE, self._read_out, _PATIENCE, not held and inner.is_reading())
                return
        self._move(Happening.READ)
        self._drop()

    def _read_out(self, delay: float, was_reading: bool) -> None:
        """Once all that a dead peer had sent is read, the end is due. Streams resume reading past this transport.

        Twice in a row: a TLS layer needs a turn to pass on what the socket no longer holds.
        """
        if self._stage is not Stage.VERDICT:
            return
        inner = self._inner
        with contextlib.suppress(*_CLOSED):
            if not inner.is_closing():
                reading = inner.is_reading() and not is_held_back(inner)
                if not (reading and was_reading) or unread(self._socket()):
                    delay = _PATIENCE if reading else min(2 * delay, _LONGEST)
                    self._next(delay, self._read_out, delay, reading)
                    return
        self._move(Happening.READ)
        self._drop()

    def _drop(self) -> None:
        """End a dead connection in the loop's next turn, and wait for nothing that it still has to say."""
        if is_sending_file(self._inner):
            with contextlib.suppress(*_CLOSED):
                stop_sending_file(self._socket())
            self._next(_MOMENT, self._drop)
            return
        with contextlib.suppress(*_CLOSED):
            reset_on_close(self._socket())
        with contextlib.suppress(*_CLOSED):
            force_close(self._inner, self._verdict)
        self._next(_MOMENT, self._check, _FIRST_CHECK, None)

    # -- an end of which nobody tells

    def _lend(self) -> None:
        """The inner transport is handed out. What is put over it may keep its end to itself.

        The TLS of asyncio and of uvloop calls no connection_lost when the connection ends in the handshake: so it is
        seen from time to time, and after any error, whether the transport was closed.
        """
        if self._timer is None and self._stage in UNDECIDED:
            with contextlib.suppress(RuntimeError):  # no loop is running: nothing can be put over it there
                self._next(_FIRST_CHECK, self._check, _FIRST_CHECK, None)
                self._monitor.watch_errors(self)

    def _check(self, delay: float, error: OSError | None) -> None:
        """See whether the loop's transport is closed though connection_lost has not come."""
        if is_closed(self._inner):
            self._closed_unheard(error)
        elif not self._ended:
            self._next(delay, self._check, min(2 * delay, _LAST_CHECK), None)

    def _closed_unheard(self, error: OSError | None = None) -> None:
        """The socket is closed and connection_lost has not come: if it does not come in a few turns, call it here."""
        if not self._ended:
            loop = asyncio.get_running_loop()
            if error is None and not self._closer:
                error = self._error_unheard(loop.time())
            # Through the queue in which a TLS layer puts its own call, so that this one comes after it.
            self._next(_MOMENT, loop.call_soon, self._call_lost, error)

    def _error_unheard(self, now: float) -> OSError | None:
        """What ended a connection whose socket was closed before it could be asked; None: as far as is known, nothing.

        The loop may hear of an error, and close, before the error watch does.
        """
        watch, limits = self._watch, self._limits
        ended = None if watch is None else watch.at_end(watch.silence(now))
        if ended is None or limits is None or self._policy is None:
            return None
        bound = limits.user_timeout or self._policy.effective_user_timeout
        has = SocketState(
            enabled=True, idle=limits.idle, interval=limits.interval, count=limits.count, user_timeout=bound
        )
        if not fell_silent(ended, has):
            return None
        self._sample = ended
        return TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def _call_lost(self, error: OSError | None) -> None:
        if not self._ended:
            self._tell("connection_lost", error)
            if not self._ended:  # not one of kaio's protocols, whose hooks do that
                self._end(error)
            self._move(Happening.TOLD)

    # -- moving on

    @property
    def _ended(self) -> bool:
        """Whether connection_lost has been passed on, or the connection is another protocol's."""
        return self._stage in OVER

    def _move(self, happening: Happening) -> None:
        self._stage = TABLE[self._stage].get(happening, self._stage)  # `after`, without the call

    def _next(self, delay: float, step: Callable[..., object], *arguments: Any) -> None:
        """What is to be done towards the end after a while; there is one such thing at a time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay, step, *arguments)

    def _close_here(self) -> None:
        """This side closes the connection."""
        self._closer = self._closer or _current_task() or True
        self._move(Happening.CLOSE)

    # -- the end, called by the protocol's hooks

    def _saw_eof(self) -> None:
        """The peer sends no more and the protocol keeps the connection: the loop no longer listens."""
        self._move(Happening.EOF)
        if self._stage is Stage.HALF_CLOSED:
            self._monitor.watch_errors_soon(self)

    def _read_rest(self, exc: BaseException | None) -> None:
        """Deliver what had arrived, if the loop has given the connection up with some of it unread.

        Both loops do when a write fails: the peer has reset the connection while reading was paused, say.
        """
        protocol, inner = self._protocol, self._inner
        if exc is None or self._stage not in (Stage.OPEN, Stage.VERDICT):
            return
        try:
            if inner.get_protocol() is protocol and inner.get_extra_info("sslcontext") is None:
                sock = self._socket()
                left = unread(sock)
                while left > 0 and (data := os.read(sock.fileno(), left)):
                    left -= len(data)
                    self._pass_on(protocol, data)
        except _CLOSED:
            return

    def _pass_on(self, protocol: Any, data: bytes) -> None:
        """Call back the protocol with data, of whichever of asyncio's kinds it is."""
        if not isinstance(protocol, asyncio.BufferedProtocol):
            self._tell("data_received", data)
            return
        while data:
            room = memoryview(protocol.get_buffer(len(data))).cast("B")
            count = min(len(room), len(data))
            if not count:
                return
            room[:count] = data[:count]
            self._tell("buffer_updated", count)
            data = data[count:]

    def _is_read(self) -> bool:
        """At an end of file: whether it is no such thing, but the end of what a dead peer had sent."""
        if self._stage is Stage.VERDICT:
            self._move(Happening.READ)
            self._drop()
        return self._stage is Stage.ENDING

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
        if exc is None and self._verdict is None and not self._scopes and self._policy is not None:  # most ends
            self._stage = Stage.LOST
            self._leave()
            return None
        news = self._verdict is None and (exc is not None or self._scopes)
        if news:
            self._verdict = self._translate(exc, None, self._sample)
        self._move(Happening.LOST)
        if news:
            self._pass_verdict()
        if self._policy is None:  # not TCP: uvloop knows the name no longer than the socket
            self._peername = self.peername
        verdict, self._verdict = self._verdict, remember(self._verdict)
        self._leave()
        return verdict

    def _leave(self) -> None:
        """Leave every table."""
        self._limits = None
        self._monitor.forget(self)
        self._monitor.counters.watched -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        endpoint, entry = self._endpoint, self._entry
        self._endpoint = self._entry = self._protocol = self._scopes = None
        if endpoint is not None:
            endpoint.live.discard(entry)
            if not endpoint.live and endpoint.on_empty is not None:
                endpoint.on_empty()

    def _translate(
        self, exc: BaseException | None, cause: Cause | None, sample: TcpInfo | None
    ) -> BaseException | None:
        """What ended the connection, as kaio says it; a death is counted and logged here."""
        if not isinstance(exc, OSError) or isinstance(exc, ssl.SSLError):
            return exc
        if exc.errno not in DEATHS and exc.errno not in NO_WAY:
            return exc
        if sample is None and self._policy is not None:  # None: not TCP
            with contextlib.suppress(*_CLOSED):
                sample = platform.tcp_info(self._socket())
        if cause is None and not is_death(exc.errno, sample):
            return exc
        self._sample = sample
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
                reason, self._reason = self._reason, None
                assert reason is not None
                try:
                    raise reason.with_traceback(None) from reason.__cause__
                finally:
                    del reason  # its traceback holds this frame

    def ended(self, error: BaseException | None) -> None:
        """The connection has ended: cancel the block, and remember what to raise."""
        closed_here = self._transport._closer
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


def _write_nothing(data: bytes | bytearray | memoryview) -> None:
    """What is written after a verdict is dropped, as asyncio drops what is written after the end."""
