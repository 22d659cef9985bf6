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
from typing import Any, Final, Literal

from ..errors import Cause, DeadPeerError, KeepaliveError, format_address, remember
from ..kernel.descriptors import reset_on_close, unread
from ..kernel.options import SocketLike, platform
from ..kernel.sockets import apply, tcp_info
from ..kernel.tcpinfo import TcpInfo, TcpState
from ..liveness.causes import DEATHS, NO_WAY, dead_peer, fell_silent, is_death
from ..liveness.health import Health, State, judge
from ..liveness.limits import Limits
from ..liveness.watch import Decision, Watch
from ..monitor.counters import Event
from ..monitor.monitor import Monitor, get_monitor
from ..policy import Keepalive, KeepaliveArg, SocketState
from .ending import BEFORE_VERDICT, ENDED, TABLE, Stage, Trigger
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
from .scopes import AliveScope

__all__ = ["KeepaliveTransport", "WatchedTransport"]

_READ_DELAY: Final = 0.5  # seconds for the loop to read a piece of what had arrived
_MAX_READ_DELAY: Final = 5.0  # and at most, between two looks at whether the application reads again
_SHORT_DELAY: Final = 0.01  # seconds; many turns of a loop that is not blocked
_FIRST_CHECK: Final = 0.25  # seconds until it is seen whether a transport that was handed out has been closed
_MAX_CHECK_DELAY: Final = 60.0  # and at most, between two of those
_CLOSED_ERRORS: Final = (OSError, ValueError, AttributeError, RuntimeError)  # what a closed socket or transport raises

_types_without_tls: Final[set[type]] = set()  # types of transports that are never TLS, as far as was seen


class KeepaliveTransport(asyncio.Transport):
    """An asyncio transport that knows its keepalive policy and can be asked how its peer is.

    It is what `KeepaliveProtocol.connection_made` gets. All of `asyncio.Transport` is the loop's own.
    """

    __slots__ = ()

    @property
    def keepalive(self) -> Keepalive | None:
        """The policy of this connection; None when it is not TCP.

        Setting it changes the live connection. Takes what every `keepalive=` takes. Raises `PolicyError`,
        `KeepaliveError`; then nothing has changed.
        """
        raise NotImplementedError

    @keepalive.setter
    def keepalive(self, keepalive: KeepaliveArg) -> None:
        raise NotImplementedError

    @property
    def inner(self) -> asyncio.Transport:
        """The loop's own transport, for what takes no other: `loop.start_tls`, `loop.sendfile`.

        Whoever has it may do what this transport does not see. The peer's death and the connection's end are reported
        all the same, also in a TLS handshake, of whose failure asyncio and uvloop tell no protocol.
        """
        raise NotImplementedError

    @property
    def peername(self) -> Any:
        """The peer's address as asyncio gives it, also after the end."""
        raise NotImplementedError

    def health(self) -> Health:
        """How the peer is now, by a sample of the kernel's TCP_INFO; after its death, how it was then.

        Raises `KeepaliveError` when the connection is not TCP, or has ended in another way.
        """
        raise NotImplementedError

    def while_alive(self) -> AliveScope:
        """A scope, like `asyncio.timeout`, whose block is cancelled when the connection ends meanwhile.

        It then raises `DeadPeerError` when the peer died, `ResetError` when it reset the connection,
        `anyio.EndOfStream` when it closed it, and `anyio.ClosedResourceError` when another task of this side did. A
        peer that only says that it sends no more (EOF) ends no block. Scopes nest, also with asyncio's and anyio's.
        """
        raise NotImplementedError


class WatchedTransport(KeepaliveTransport):
    """A `KeepaliveTransport` as kaio itself knows it: with what the monitor and the protocols' hooks need of it.

    It is a `WatchedConnection` to the monitor. What is named here without an underscore is for kaio's own modules.
    """

    __slots__ = (
        "__weakref__",
        "_endpoint",
        "_monitor",
        "_peername",
        "_policy",
        "_protocol",
        "_sample",
        "_timer",
        "closer",
        "due",
        "entry",
        "inode",
        "limits",
        "loop_transport",
        "scopes",
        "stage",
        "verdict",
        "watch",
        "watched_fd",
        "write",
    )

    loop_transport: asyncio.Transport  # the loop's own
    _endpoint: Endpoint | None  # where it came from; None once it has ended
    entry: object  # what stands for it in the endpoint's live set
    _policy: Keepalive | None  # how it is watched; None: not TCP
    limits: Limits | None  # by which times the monitor watches it; None: not at all
    _monitor: Monitor  # the loop's
    _protocol: object  # the user's; None once it has ended
    verdict: BaseException | None  # what connection_lost will come with, known before the loop knows
    scopes: list[AliveScope] | None  # who is to be cancelled when it ends
    due: int  # the monitor's
    watched_fd: int  # the monitor's
    watch: Watch | None  # the monitor's
    inode: int  # the monitor's
    stage: Stage  # how far it is on the way to its end
    closer: object  # the task in which this side has closed it, or True; False: it has not
    _timer: asyncio.TimerHandle | None  # the next step towards the end, where the loop may not bring it by itself
    _sample: TcpInfo | None  # TCP_INFO of the dead socket
    _peername: object  # where a layer between forgets it when it ends

    def __init__(
        self,
        inner: asyncio.Transport,
        protocol: object,
        endpoint: Endpoint | None,
        policy: Keepalive | None,
        limits: Limits | None,
    ) -> None:
        self.loop_transport = inner
        self.write = inner.write
        self._protocol = protocol
        self._endpoint = endpoint
        self._policy = policy
        self.limits = limits
        self.stage = Stage.OPEN
        self.closer = False
        self._sample = self._peername = self.verdict = self.scopes = self._timer = None
        self.watch = None
        self.inode = 0
        self.due = self.watched_fd = -1
        self._monitor = monitor = endpoint.monitor if endpoint and endpoint.monitor else get_monitor()
        monitor.counters.watched += 1
        if limits is not None:
            monitor.add(self)

    # -- asyncio's

    write: Callable[[bytes | bytearray | memoryview], None]  # type: ignore[assignment]
    """The inner transport's own method, as it is."""

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        if self.verdict is None:
            self.loop_transport.writelines(list_of_data)

    def write_eof(self) -> None:
        if self.verdict is None:
            self.loop_transport.write_eof()

    def can_write_eof(self) -> bool:
        return self.loop_transport.can_write_eof()

    def get_extra_info(self, name: str, default: object = None) -> Any:
        return self.loop_transport.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.loop_transport.get_protocol()

    def is_closing(self) -> bool:
        return self.loop_transport.is_closing()

    def is_reading(self) -> bool:
        return self.loop_transport.is_reading()

    def get_write_buffer_size(self) -> int:
        return self.loop_transport.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self.loop_transport.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.loop_transport.set_write_buffer_limits(high, low)

    def close(self) -> None:
        """Close the connection once what was written has left; harmless when it is closing already.

        Not bound like the others: asyncio's TLS transport comes apart when it is closed twice.
        """
        self.mark_closing()
        if self.stage is Stage.ENDING:
            self._force_close()
        elif not self.loop_transport.is_closing():
            self.loop_transport.close()

    def abort(self) -> None:
        """Close the connection at once, and drop what has not left, as in asyncio."""
        self.mark_closing()
        if self.stage is Stage.ENDING:
            self._force_close()
        else:
            self.loop_transport.abort()

    def pause_reading(self) -> None:
        """Stop reading, as in asyncio. The peer's death is reported all the same."""
        self.loop_transport.pause_reading()
        self._monitor.watch_errors(self)

    def resume_reading(self) -> None:
        """Read again, as in asyncio."""
        self.loop_transport.resume_reading()
        if self.stage is Stage.VERDICT:
            self._schedule(_READ_DELAY, self._continue_final_read, _READ_DELAY, True)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection to another protocol, as in asyncio.

        A `KeepaliveProtocol` goes on being told of the peer's death. Another one gets what the loop tells it: the
        connection keeps its policy, and is no longer the monitor's nor in `Server.connections`.
        """
        if protocol is not self._protocol:
            self.call_back("_kaio_handed_over", protocol)
        # By name: the protocols are a row above, and any class that has the slot will do.
        if hasattr(type(protocol), "_kaio"):
            protocol._kaio = self  # type: ignore[attr-defined]
            self._protocol = protocol
        elif not self.ended:
            for scope in list(self.scopes or ()):
                scope.ended(RuntimeError("another protocol has taken the connection over"))
            self._advance(Trigger.RELEASED)
            self._unregister()
        self.loop_transport.set_protocol(protocol)

    @property
    def keepalive(self) -> Keepalive | None:
        return self._policy

    @keepalive.setter
    def keepalive(self, keepalive: KeepaliveArg) -> None:
        apply(self, keepalive)

    def _kaio_follow(self, policy: Keepalive, state: SocketState) -> None:
        """The socket has another policy from now on."""
        self._policy = policy
        if not self.ended:
            self._monitor.change_limits(self, watched_by(policy, state))

    @property
    def inner(self) -> asyncio.Transport:
        self.start_close_checks()
        return self.loop_transport

    @property
    def peername(self) -> Any:
        if self._peername is not None:
            return self._peername
        try:
            return self.loop_transport.get_extra_info("peername")
        except AttributeError:  # uvloop, not TCP: it asks the socket, and has none any more
            return None

    def health(self) -> Health:
        return judge(self._sample if self._sample is not None else tcp_info(self.loop_transport))

    def __repr__(self) -> str:
        try:
            closing = self.loop_transport.is_closing()
            state = "closed" if self.ended else "closing" if closing else str(self.health().state)
        except KeepaliveError:
            state = "open"
        return f"<KeepaliveTransport to {format_address(self.peername)} keepalive={str(self._policy)!r} {state}>"

    def while_alive(self) -> AliveScope:
        return AliveScope(self)

    # -- for the monitor

    def get_socket(self) -> SocketLike:
        return self.loop_transport.get_extra_info("socket")  # type: ignore[no-any-return]

    def on_look(self, sock: SocketLike, decision: Decision) -> None:
        """Nothing more is to be done."""

    def on_kernel_end(self, sample: TcpInfo | None) -> None:
        """A loop that listens reports that; from one that does not, the error is taken and delivered.

        Reading SO_ERROR takes the error from the inner transport, so it is read only here.
        """
        if self.stage not in BEFORE_VERDICT:
            return
        inner = self.loop_transport
        sending = is_sending_file(inner)  # which has reading paused, and may take the error first
        lent = self._timer is not None  # a TLS layer may hear of it and tell nobody
        try:
            sock = self.get_socket()
            if sample is None and self._policy is not None:
                with contextlib.suppress(KeepaliveError):  # a platform that does not tell
                    sample = platform.tcp_info(sock)
            if sample is not None and sample.state != TcpState.CLOSE:
                return  # both have closed their halves, say; SO_ERROR may give what is no end yet
            if self.stage is Stage.HALF_CLOSED or not inner.is_reading():
                number = take_error(sock)
                if number:
                    self.end_dead(OSError(number, os.strerror(number)), None, sample)
                    return
            if sample is not None and (sending or lent):
                error = self._error_from(sample)
                if sending:
                    self.end_dead(error, None, sample)
                else:
                    self._schedule(_SHORT_DELAY, self._check_closed, _FIRST_CHECK, error)
        except _CLOSED_ERRORS:
            return

    def _error_from(self, sample: TcpInfo) -> OSError:
        """What ended a connection whose error somebody else has taken."""
        silent = fell_silent(sample, platform.read(self.get_socket()))
        number = errno.ETIMEDOUT if silent else errno.ECONNRESET
        return OSError(number, os.strerror(number))

    def call_back(self, name: str, argument: object) -> None:
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

    def make_event(self, kind: Literal["suspect", "recovered"], health: Health) -> Event:
        event = Event(kind, self, health, None)
        self._count(event)
        return event

    def _count(self, event: Event) -> None:
        if self._endpoint is not None and self._endpoint.counters is not None:
            self._endpoint.counters.count(event)

    def end_dead(self, exc: OSError, cause: Cause | None, sample: TcpInfo | None) -> None:
        """End the connection with a verdict that the loop has not heard, or would not hear.

        What the peer had sent before stays in the socket while the application has reading paused; it is read, and the
        end follows it, when reading resumes. Otherwise the end comes in the loop's next turn.
        """
        if self.stage not in BEFORE_VERDICT:
            return
        if cause is not None:  # the monitor's own
            with contextlib.suppress(*_CLOSED_ERRORS):
                exc, cause = with_reason(self.get_socket(), exc, cause)
        self.verdict = self._convert_error(exc, cause, sample)
        self._advance(Trigger.VERDICT)
        self._monitor.discard(self)
        self.write = _discard_write  # a write that fails would end it with what had arrived unread
        self._report_verdict()
        if self.stage is Stage.VERDICT:
            self._start_final_read()
        elif self.stage is Stage.ENDING:
            self._force_close()

    def _report_verdict(self) -> None:
        """Tell who waits that the connection has ended."""
        error = self.verdict
        if isinstance(error, DeadPeerError):
            self.call_back("peer_dead", error)
        elif error is not None:
            self.call_back("_kaio_ending", error)
        for scope in list(self.scopes or ()):
            scope.ended(error)

    # -- after a verdict

    def _start_final_read(self) -> None:
        """There is a verdict: see whether something of what the peer had sent waits to be read before the end."""
        inner = self.loop_transport
        with contextlib.suppress(*_CLOSED_ERRORS):
            sock = self.get_socket()
            held = is_held_back(inner)
            if not inner.is_closing() and (held or unread(sock)):
                if not held and inner.get_extra_info("sslcontext") is None:
                    end_reading(sock)
                if is_sending_file(inner):
                    stop_sending_file(sock)
                self._schedule(_READ_DELAY, self._continue_final_read, _READ_DELAY, not held and inner.is_reading())
                return
        self._advance(Trigger.READ_ALL)
        self._force_close()

    def _continue_final_read(self, delay: float, was_reading: bool) -> None:
        """Once all that a dead peer had sent is read, the end is due. Streams resume reading past this transport.

        Twice in a row: a TLS layer needs a turn to pass on what the socket no longer holds.
        """
        if self.stage is not Stage.VERDICT:
            return
        inner = self.loop_transport
        with contextlib.suppress(*_CLOSED_ERRORS):
            if not inner.is_closing():
                reading = inner.is_reading() and not is_held_back(inner)
                if not (reading and was_reading) or unread(self.get_socket()):
                    delay = _READ_DELAY if reading else min(2 * delay, _MAX_READ_DELAY)
                    self._schedule(delay, self._continue_final_read, delay, reading)
                    return
        self._advance(Trigger.READ_ALL)
        self._force_close()

    def _force_close(self) -> None:
        """End a dead connection in the loop's next turn, and wait for nothing that it still has to say."""
        if is_sending_file(self.loop_transport):
            with contextlib.suppress(*_CLOSED_ERRORS):
                stop_sending_file(self.get_socket())
            self._schedule(_SHORT_DELAY, self._force_close)
            return
        with contextlib.suppress(*_CLOSED_ERRORS):
            reset_on_close(self.get_socket())
        with contextlib.suppress(*_CLOSED_ERRORS):
            force_close(self.loop_transport, self.verdict)
        self._schedule(_SHORT_DELAY, self._check_closed, _FIRST_CHECK, None)

    # -- an end of which nobody tells

    def start_close_checks(self) -> None:
        """The inner transport is handed out. What is put over it may keep its end to itself.

        The TLS of asyncio and of uvloop calls no connection_lost when the connection ends in the handshake: so it is
        seen from time to time, and after any error, whether the transport was closed.
        """
        if self._timer is None and self.stage in BEFORE_VERDICT:
            with contextlib.suppress(RuntimeError):  # no loop is running: nothing can be put over it there
                self._schedule(_FIRST_CHECK, self._check_closed, _FIRST_CHECK, None)
                self._monitor.watch_errors(self)

    def _check_closed(self, delay: float, error: OSError | None) -> None:
        """See whether the loop's transport is closed though connection_lost has not come."""
        if is_closed(self.loop_transport):
            self.on_socket_closed(error)
        elif not self.ended:
            self._schedule(delay, self._check_closed, min(2 * delay, _MAX_CHECK_DELAY), None)

    def on_socket_closed(self, error: OSError | None = None) -> None:
        """The socket is closed and connection_lost has not come: if it does not come in a few turns, call it here."""
        if not self.ended:
            loop = asyncio.get_running_loop()
            if error is None and not self.closer:
                error = self._missed_error(loop.time())
            # Through the queue in which a TLS layer puts its own call, so that this one comes after it.
            self._schedule(_SHORT_DELAY, loop.call_soon, self._call_connection_lost, error)

    def _missed_error(self, now: float) -> OSError | None:
        """What ended a connection whose socket was closed before it could be asked; None: as far as is known, nothing.

        The loop may hear of an error, and close, before the error watch does.
        """
        watch, limits = self.watch, self.limits
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

    def _call_connection_lost(self, error: OSError | None) -> None:
        if not self.ended:
            self.call_back("connection_lost", error)
            if not self.ended:  # not one of kaio's protocols, whose hooks do that
                self.on_connection_lost(error)
            self._advance(Trigger.SUPPLIED)

    # -- moving on

    @property
    def ended(self) -> bool:
        """Whether connection_lost has been passed on, or the connection is another protocol's."""
        return self.stage in ENDED

    def _advance(self, trigger: Trigger) -> None:
        self.stage = TABLE[self.stage].get(trigger, self.stage)  # `next_stage`, without the call

    def _schedule(self, delay: float, step: Callable[..., object], *arguments: object) -> None:
        """What is to be done towards the end after a while; there is one such thing at a time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay, step, *arguments)

    def mark_closing(self) -> None:
        """This side closes the connection."""
        self.closer = self.closer or _current_task() or True
        self._advance(Trigger.CLOSE)

    # -- the end, called by the protocol's hooks

    def on_half_close(self) -> None:
        """The peer sends no more and the protocol keeps the connection: the loop no longer listens."""
        self._advance(Trigger.EOF)
        if self.stage is Stage.HALF_CLOSED:
            self._monitor.watch_errors_soon(self)

    def deliver_unread(self, exc: BaseException | None) -> None:
        """Deliver what had arrived, if the loop has given the connection up with some of it unread.

        Both loops do when a write fails: the peer has reset the connection while reading was paused, say.
        """
        protocol, inner = self._protocol, self.loop_transport
        if exc is None or self.stage not in (Stage.OPEN, Stage.VERDICT):
            return
        try:
            if inner.get_protocol() is protocol and inner.get_extra_info("sslcontext") is None:
                sock = self.get_socket()
                left = unread(sock)
                while left > 0 and (data := os.read(sock.fileno(), left)):
                    left -= len(data)
                    self._feed_protocol(protocol, data)
        except _CLOSED_ERRORS:
            return

    def _feed_protocol(self, protocol: object, data: bytes) -> None:
        """Call back the protocol with data, of whichever of asyncio's kinds it is."""
        if not isinstance(protocol, asyncio.BufferedProtocol):
            self.call_back("data_received", data)
            return
        while data:
            room = memoryview(protocol.get_buffer(len(data))).cast("B")
            count = min(len(room), len(data))
            if not count:
                return
            room[:count] = data[:count]
            self.call_back("buffer_updated", count)
            data = data[count:]

    def ends_final_read(self) -> bool:
        """At an end of file: whether it is no such thing, but the end of what a dead peer had sent."""
        if self.stage is Stage.VERDICT:
            self._advance(Trigger.READ_ALL)
            self._force_close()
        return self.stage is Stage.ENDING

    def sample_before_close(self, protocol: object) -> None:
        """Read what tells why the connection died, if a layer between will close the socket before we are told.

        asyncio's and uvloop's TLS look connection_lost up, put it on the loop's queue, and then the socket is closed:
        only the look-up comes early enough.
        """
        inner = self.loop_transport
        if self.verdict is not None or (type(inner) in _types_without_tls and inner.get_protocol() is protocol):
            return
        try:
            if inner.get_extra_info("sslcontext") is None and inner.get_protocol() is protocol:
                _types_without_tls.add(type(inner))
                return
            self._peername = inner.get_extra_info("peername")
            sample = tcp_info(inner)
        except (KeepaliveError, AttributeError):  # AttributeError: asyncio's TLS transport once it was closed twice
            return
        if judge(sample).state is State.DEAD:
            self._sample = sample

    def on_connection_lost(self, exc: BaseException | None) -> BaseException | None:
        """The connection is gone: what its protocol is to be told."""
        if exc is None and self.verdict is None and not self.scopes and self._policy is not None:  # most ends
            self.stage = Stage.LOST
            self._unregister()
            return None
        news = self.verdict is None and (exc is not None or self.scopes)
        if news:
            self.verdict = self._convert_error(exc, None, self._sample)
        self._advance(Trigger.LOST)
        if news:
            self._report_verdict()
        if self._policy is None:  # not TCP: uvloop knows the name no longer than the socket
            self._peername = self.peername
        verdict, self.verdict = self.verdict, remember(self.verdict)
        self._unregister()
        return verdict

    def _unregister(self) -> None:
        """Leave every table."""
        self.limits = None
        self._monitor.discard(self)
        self._monitor.counters.watched -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        endpoint, entry = self._endpoint, self.entry
        self._endpoint = self.entry = self._protocol = self.scopes = None
        if endpoint is not None:
            endpoint.live.discard(entry)
            if not endpoint.live and endpoint.on_empty is not None:
                endpoint.on_empty()

    def _convert_error(
        self, exc: BaseException | None, cause: Cause | None, sample: TcpInfo | None
    ) -> BaseException | None:
        """What ended the connection, as kaio says it; a death is counted and logged here."""
        if not isinstance(exc, OSError) or isinstance(exc, ssl.SSLError):
            return exc
        if exc.errno not in DEATHS and exc.errno not in NO_WAY:
            return exc
        if sample is None and self._policy is not None:  # None: not TCP
            with contextlib.suppress(*_CLOSED_ERRORS):
                sample = platform.tcp_info(self.get_socket())
        if cause is None and not is_death(exc.errno, sample):
            return exc
        self._sample = sample
        error = dead_peer(exc, cause, self._sample, peername=self.peername, policy=self._policy)
        event = Event("dead", self, None, error)
        self._count(event)
        self._monitor.emit(event)
        return error


def _current_task() -> object:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop is running
        return None


def _discard_write(data: bytes | bytearray | memoryview) -> None:
    """What is written after a verdict is dropped, as asyncio drops what is written after the end."""
