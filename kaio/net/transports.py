"""The transport that protocols get.

Rules kept here: messages cost nothing extra: `write` is the inner transport's own method. The kernel is asked about a
connection only after the loop has reported its end. The state of a connection's end is one `Stage` of `ending`.
connection_lost is called by the loop, and by this module where the loop does not call it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import ssl
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any, Final, Literal

from ..errors import Cause, DeadPeerError, IdleTimeoutError, KeepaliveError, format_address, remember
from ..kernel.options import SocketLike, platform
from ..kernel.queues import reset_on_close, unacknowledged, unread
from ..kernel.sockets import apply, tcp_info
from ..kernel.tcpinfo import TcpInfo, TcpState
from ..liveness.causes import DEATHS, NO_WAY, dead_peer, fell_silent, is_death
from ..liveness.health import Health, State, judge
from ..liveness.limits import Limits
from ..liveness.watch import Decision, Watch
from ..monitor.counters import Event
from ..monitor.heartbeats import Heartbeat
from ..monitor.monitor import Monitor, get_monitor
from ..monitor.timeouts import NOT_A_STREAM
from ..policy import Keepalive, KeepaliveArg, SocketState, check_timeout
from .ending import BEFORE_VERDICT, ENDED, TABLE, Stage, Trigger
from .endpoints import Arrival, Endpoint, watched_by
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
from .proxy_protocol import ProxyHeader
from .scopes import AliveScope, Closed, Scope
from .tap import tap

__all__ = ["KeepaliveTransport", "WatchedTransport"]

_READ_DELAY: Final = 0.5  # seconds for the loop to read a part of what was received before the verdict
_MAX_READ_DELAY: Final = 5.0  # and at most, between two checks whether the application has resumed reading
_SHORT_DELAY: Final = 0.01  # seconds; many iterations of a loop that is not blocked
_FIRST_CHECK: Final = 0.25  # seconds until the first check whether an inner transport that was handed out is closed
_MAX_CHECK_DELAY: Final = 60.0  # and at most, between two such checks
_CLOSED_ERRORS: Final = (OSError, ValueError, AttributeError, RuntimeError)  # what a closed socket or transport raises

_types_without_tls: Final[set[type]] = set()  # types of inner transports that were seen without TLS


class KeepaliveTransport(asyncio.Transport):
    """An asyncio transport with a keepalive policy, which can report the health of its peer.

    The argument of `KeepaliveProtocol.connection_made`. The methods of `asyncio.Transport` are those of the loop's own.
    """

    __slots__ = ()

    @property
    def keepalive(self) -> Keepalive | None:
        """The policy of this connection; None if it is not TCP.

        Setting it changes the socket's options at once; it accepts what every `keepalive=` argument does. Raises
        `PolicyError` or `KeepaliveError`, and then changes nothing.
        """
        raise NotImplementedError

    @keepalive.setter
    def keepalive(self, keepalive: KeepaliveArg) -> None:
        raise NotImplementedError

    @property
    def idle_timeout(self) -> float | None:
        """Seconds after which the connection is closed when nothing was received; None: never.

        connection_lost then has an `IdleTimeoutError`. Not counted while reading is paused, nor while data that
        was written waits to be acknowledged. A connection never ends too early, and at most a quarter of the
        timeout and half a second too late. Setting it counts from now. Raises TypeError, ValueError, and
        `KeepaliveError` where the system does not tell when data was received: on Unix sockets, and without
        Linux's TCP_INFO.
        """
        raise NotImplementedError

    @idle_timeout.setter
    def idle_timeout(self, timeout: float | None) -> None:
        raise NotImplementedError

    @property
    def send_timeout(self) -> float | None:
        """Seconds after which the connection is aborted when the peer acknowledged none of the data sent; None: never.

        It bounds how long a peer may be alive and not read; connection_lost then has a `SendTimeoutError`. Setting it
        counts from now. Raises TypeError, ValueError, and `KeepaliveError` as `idle_timeout` does.
        """
        raise NotImplementedError

    @send_timeout.setter
    def send_timeout(self, timeout: float | None) -> None:
        raise NotImplementedError

    @property
    def inner(self) -> asyncio.Transport:
        """The loop's own transport, for functions that accept no other: `loop.start_tls`, `loop.sendfile`.

        Its methods bypass this transport. The peer's death and the connection's end are reported nevertheless, also
        during a TLS handshake, whose failure asyncio and uvloop report to no protocol.
        """
        raise NotImplementedError

    @property
    def peername(self) -> Any:
        """The peer's address, as `get_extra_info("peername")` returns it; also after the end."""
        raise NotImplementedError

    def health(self) -> Health:
        """Return the health of the peer from TCP_INFO; after its death, from the TCP_INFO of that time.

        Raises `KeepaliveError` if the connection is not TCP, or has ended in another way.
        """
        raise NotImplementedError

    def while_alive(self) -> AliveScope:
        """Return a scope, like `asyncio.timeout`, whose block is cancelled when the connection ends.

        The block then raises `DeadPeerError` if the peer died, `ResetError` if it reset the connection,
        `EndOfStream` if it closed it, and `ClosedResourceError` if another task of this side did. A mere
        EOF (half close) from the peer does not end the block. Scopes can be nested, also with asyncio's and anyio's.
        """
        raise NotImplementedError

    def heartbeat(self, heartbeat: Heartbeat | None) -> None:
        """Ask the far application for signs of life from now on; None: no longer.

        A peer that gives none is dead: `DeadPeerError` with the cause HEARTBEAT. Raises TypeError for a
        BufferedProtocol on a Unix socket or with a `content_timeout`, whose data cannot be seen.
        """
        raise NotImplementedError

    async def wait_closed(self) -> None:
        """Wait until connection_lost was called; return at once when it was. What it was told is not raised here."""
        raise NotImplementedError


class WatchedTransport(KeepaliveTransport):
    """The implementation of `KeepaliveTransport`, with the interface for the monitor and the protocols' hooks.

    To the monitor it is a `WatchedConnection`. Names without an underscore that `KeepaliveTransport` does not have are
    for kaio's own modules.
    """

    __slots__ = (
        "__weakref__",
        "_monitor",
        "_peername",
        "_policy",
        "_protocol",
        "_sample",
        "_timer",
        "closer",
        "due",
        "endpoint",
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
    endpoint: Endpoint | None  # that accepted it; None if none did
    entry: object  # its element of the endpoint's live set
    _policy: Keepalive | None  # None: it is not TCP
    limits: Limits | None  # the times by which the monitor watches it; None: it does not
    _monitor: Monitor  # the loop's
    _protocol: object  # the user's protocol; None once it has ended
    verdict: BaseException | None  # the argument of the connection_lost that is to come
    scopes: list[Scope] | None  # what waits for its end
    due: int  # set by the monitor
    watched_fd: int  # set by the monitor
    watch: Watch | None  # set by the monitor
    inode: int  # set by the monitor
    stage: Stage  # the state of its end
    closer: object  # the task that has closed it, or True outside of tasks; False: this side has not closed it
    _timer: asyncio.TimerHandle | None  # the next step towards its end that does not depend on the loop
    _sample: TcpInfo | None  # TCP_INFO of the dead socket
    _peername: object  # kept for inner transports that lose it at the end

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
        self.endpoint = endpoint
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
    """The inner transport's bound method."""

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        if self.verdict is None:
            self.loop_transport.writelines(list_of_data)

    def write_eof(self) -> None:
        if self.verdict is None:
            self.loop_transport.write_eof()

    def can_write_eof(self) -> bool:
        return self.loop_transport.can_write_eof()

    def get_extra_info(self, name: str, default: object = None) -> Any:
        if name == "peername" and self._peername is not None:
            return self._peername
        if name == "proxy_header":
            return self._proxy_header or default
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
        """Close the connection once everything written has been sent; does nothing if it is closing already.

        asyncio's TLS transport raises AttributeError after it was closed twice.
        """
        self.mark_closing()
        if self.stage is Stage.ENDING:
            self._force_close()
        elif not self.loop_transport.is_closing():
            self.loop_transport.close()

    def abort(self) -> None:
        """Close the connection at once and discard what has not been sent, as in asyncio."""
        self.mark_closing()
        if self.stage is Stage.ENDING:
            self._force_close()
        else:
            self.loop_transport.abort()

    def pause_reading(self) -> None:
        """Pause reading, as in asyncio. The peer's death is reported nevertheless."""
        self.loop_transport.pause_reading()
        self._monitor.watch_errors(self)

    def resume_reading(self) -> None:
        """Resume reading, as in asyncio."""
        self.loop_transport.resume_reading()
        if self._monitor.timeouts:
            self._monitor.timeouts.on_resume(self)
        if self.stage is Stage.VERDICT:
            self._schedule(_READ_DELAY, self._continue_final_read, _READ_DELAY, True)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Hand the connection to another protocol, as in asyncio.

        A `KeepaliveProtocol` keeps getting `peer_dead` and the other callbacks. With any other protocol the connection
        keeps its policy, but is no longer watched by the monitor nor in `Server.connections`.
        """
        if protocol is not self._protocol:
            self.call_back("_kaio_handed_over", protocol)
        # Not by isinstance: `protocols` imports this module, and any class with the slot will do.
        if hasattr(type(protocol), "_kaio"):
            protocol._kaio = self  # type: ignore[attr-defined]
            self._protocol = protocol
            self._enter_anew(protocol)
        elif not self.ended:
            for scope in list(self.scopes or ()):
                scope.ended(RuntimeError("the connection was handed over to another protocol"))
            self._advance(Trigger.RELEASED)
            self._unregister()
        self.loop_transport.set_protocol(protocol)
        if self._monitor.heartbeats:
            self._monitor.heartbeats.on_new_protocol(self)

    def _enter_anew(self, protocol: object) -> None:
        """Be in `Server.connections` as the new protocol has it: a server that drains tells that one."""
        endpoint, entry = self.endpoint, getattr(protocol, "_kaio_entry", None)
        if endpoint is not None and entry is not None and not self.ended:
            endpoint.live.discard(self.entry)
            self.entry = entry(self)
            endpoint.live.add(self.entry)

    @property
    def keepalive(self) -> Keepalive | None:
        return self._policy

    @keepalive.setter
    def keepalive(self, keepalive: KeepaliveArg) -> None:
        apply(self, keepalive)

    def _kaio_follow(self, policy: Keepalive, state: SocketState) -> None:
        """Called after another policy was set on the socket."""
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
        except AttributeError:  # a Unix connection on uvloop, which asks the socket, after it was closed
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

    async def wait_closed(self) -> None:
        if self.ended:
            return
        closed = Closed()
        if self.scopes is None:
            self.scopes = []
        self.scopes.append(closed)
        try:
            await closed.future
        finally:
            if self.scopes is not None:
                self.scopes.remove(closed)

    def _kaio_drain(self) -> None:
        if not self.is_closing():
            self.call_back("draining")

    # -- timeouts

    @property
    def idle_timeout(self) -> float | None:
        return self._monitor.timeouts.of(self)[0]

    @idle_timeout.setter
    def idle_timeout(self, timeout: float | None) -> None:
        self.set_timeouts(check_timeout("idle_timeout", timeout), self.send_timeout)

    @property
    def send_timeout(self) -> float | None:
        return self._monitor.timeouts.of(self)[1]

    @send_timeout.setter
    def send_timeout(self, timeout: float | None) -> None:
        self.set_timeouts(self.idle_timeout, check_timeout("send_timeout", timeout))

    def set_timeouts(self, idle: float | None, send: float | None) -> None:
        """Set both timeouts. Raises `KeepaliveError` where they cannot be had."""
        if self.receive_wait() is NOT_A_STREAM and not self.tells_silence():
            for name, value in {"idle_timeout": idle, "send_timeout": send}.items():
                if value is not None:
                    what = f"{name}={value!r}: the system does not tell when this socket last received or sent data"
                    raise KeepaliveError(errno.EOPNOTSUPP, what)
        self._monitor.timeouts.set(self, idle, send)

    def start_timeouts(self, idle: float | None, send: float | None) -> None:
        """Set both timeouts of a new connection, which can have them."""
        self._monitor.timeouts.set(self, idle, send)

    def heartbeat(self, heartbeat: Heartbeat | None) -> None:
        if not isinstance(heartbeat, (Heartbeat, NoneType)):
            raise TypeError(f"heartbeat() takes a kaio.Heartbeat or None, got {heartbeat!r}")
        self._monitor.heartbeats.set(self, heartbeat)

    def tells_silence(self) -> bool:
        try:
            return tcp_info(self.loop_transport).last_data_recv is not None
        except KeepaliveError:
            return False

    def show_data(self) -> None:
        """Let the monitor's heartbeats see all data on its way to the protocol."""
        protocol = self.loop_transport.get_protocol()
        if tap(protocol):
            self.loop_transport.set_protocol(protocol)  # uvloop keeps its method

    def ask(self, data: bytes) -> None:
        self.write(data)

    def on_data(self, data: bytes) -> None:
        """Called by a tapped protocol before it gets the data."""
        self._monitor.heartbeats.on_data(self, data)

    def unread(self) -> int:
        return unread(self.get_socket())

    def unacknowledged(self) -> int:
        return unacknowledged(self.get_socket())

    def receive_wait(self) -> Any:
        wait = getattr(self._protocol, "_kaio_receive_wait", None)
        return NOT_A_STREAM if wait is None else wait()

    def send_wait(self) -> object:
        wait = getattr(self._protocol, "_kaio_send_wait", None)
        return None if wait is None else wait()

    def is_listening(self) -> bool:
        return self.stage is Stage.OPEN and self.is_reading()

    # -- called by the monitor

    def get_socket(self) -> SocketLike:
        return self.loop_transport.get_extra_info("socket")  # type: ignore[no-any-return]

    def on_look(self, sock: SocketLike, decision: Decision) -> None:
        """Do nothing."""

    def on_kernel_end(self, sample: TcpInfo | None) -> None:
        """Take the error from the socket and end the connection if the loop, which is not reading, would not notice.

        Reading SO_ERROR clears it, so that the inner transport cannot get the error any more: it is read only here.
        """
        if self.stage not in BEFORE_VERDICT:
            return
        inner = self.loop_transport
        sending = is_sending_file(inner)  # reading is paused then, and sendfile may take the error first
        lent = self._timer is not None  # a TLS layer may get the error and not report it
        try:
            sock = self.get_socket()
            if sample is None and self._policy is not None:
                with contextlib.suppress(KeepaliveError):  # not available on this platform
                    sample = platform.tcp_info(sock)
            if sample is not None and sample.state != TcpState.CLOSE:
                return  # both sides have sent FIN, for example; SO_ERROR may not be final
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
        """Infer from TCP_INFO what ended a connection whose SO_ERROR is cleared."""
        silent = fell_silent(sample, platform.read(self.get_socket()))
        number = errno.ETIMEDOUT if silent else errno.ECONNRESET
        return OSError(number, os.strerror(number))

    def call_back(self, name: str, *arguments: object) -> None:
        protocol = self._protocol
        method = getattr(protocol, name, None)
        if method is None:  # a protocol of another kind, after set_protocol
            return
        try:
            method(*arguments)
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
        if self.endpoint is not None and self.endpoint.counters is not None:
            self.endpoint.counters.count(event)

    def end_dead(self, exc: OSError, cause: Cause | None, sample: TcpInfo | None) -> None:
        """End the connection with an error that the loop does not know, or would not report.

        connection_lost follows in the loop's next iteration; but after data that the peer sent before, if there is any
        in the socket, and so not before the application resumes reading.
        """
        if self.stage not in BEFORE_VERDICT:
            return
        if cause is not None:  # a verdict of the monitor, not of the kernel
            with contextlib.suppress(*_CLOSED_ERRORS):
                exc, cause = with_reason(self.get_socket(), exc, cause)
        self._end(self._convert_error(exc, cause, sample))

    def end_silent(self, silence: float) -> None:
        """End the connection because the far application has given no sign of life for so many seconds."""
        if self.stage not in BEFORE_VERDICT:
            return
        exc = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        with contextlib.suppress(KeepaliveError):  # not TCP
            self._sample = tcp_info(self.loop_transport)
        error = dead_peer(
            exc, Cause.HEARTBEAT, self._sample, peername=self.peername, policy=self._policy, silence=silence
        )
        self._report_death(error)
        self._end(error)

    def _end(self, verdict: BaseException | None) -> None:
        """End the connection with this verdict."""
        self.verdict = verdict
        self._advance(Trigger.VERDICT)
        self._monitor.discard(self)
        self.write = _discard_write  # a write that fails would close the socket before its data is read
        self._report_verdict()
        if self.stage is Stage.VERDICT:
            self._start_final_read()
        elif self.stage is Stage.ENDING:
            self._force_close()

    def _report_verdict(self) -> None:
        """Report the verdict to the protocol and end the scopes."""
        error = self.verdict
        if isinstance(error, DeadPeerError):
            self.call_back("peer_dead", error)
        elif error is not None:
            self.call_back("_kaio_ending", error)
        for scope in list(self.scopes or ()):
            scope.ended(error)

    # -- after a verdict

    def _start_final_read(self) -> None:
        """Let the loop read what the peer sent before the verdict; without any such data, end the connection."""
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
        """End the connection once the socket is empty and was read at two checks in a row; else check again later.

        Two, because a TLS layer needs an iteration of the loop to deliver what it has read. Checked by time, because
        asyncio's streams resume the inner transport and not this one.
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
        """Close a dead connection in the loop's next iteration, and discard what has not been sent."""
        if is_sending_file(self.loop_transport):
            with contextlib.suppress(*_CLOSED_ERRORS):
                stop_sending_file(self.get_socket())
            self._schedule(_SHORT_DELAY, self._force_close)
            return
        if not isinstance(self.verdict, IdleTimeoutError):  # whose peer may be alive, and is owed nothing
            with contextlib.suppress(*_CLOSED_ERRORS):
                reset_on_close(self.get_socket())
        with contextlib.suppress(*_CLOSED_ERRORS):
            force_close(self.loop_transport, self.verdict)
        self._schedule(_SHORT_DELAY, self._check_closed, _FIRST_CHECK, None)

    # -- an end that the loop does not report

    def start_close_checks(self) -> None:
        """Check from time to time, and after any error, whether the inner transport was closed.

        For inner transports that were handed out: the TLS of asyncio and of uvloop, put over one by `loop.start_tls`,
        does not call connection_lost when the connection ends during the handshake.
        """
        if self._timer is None and self.stage in BEFORE_VERDICT:
            with contextlib.suppress(RuntimeError):  # no running loop, so no start_tls either
                self._schedule(_FIRST_CHECK, self._check_closed, _FIRST_CHECK, None)
                self._monitor.watch_errors(self)

    def _check_closed(self, delay: float, error: OSError | None) -> None:
        """Check whether the inner transport is closed without a call of connection_lost."""
        if is_closed(self.loop_transport):
            self.on_socket_closed(error)
        elif not self.ended:
            self._schedule(delay, self._check_closed, min(2 * delay, _MAX_CHECK_DELAY), None)

    def on_socket_closed(self, error: OSError | None = None) -> None:
        """Call connection_lost unless the loop does so within a few iterations."""
        if not self.ended:
            loop = asyncio.get_running_loop()
            if error is None and not self.closer:
                error = self._missed_error(loop.time())
            # With call_soon, as a TLS layer calls connection_lost, so that this call comes after that one.
            self._schedule(_SHORT_DELAY, loop.call_soon, self._call_connection_lost, error)

    def _missed_error(self, now: float) -> OSError | None:
        """Infer from the last check what ended a connection whose socket is closed already; None: no error is known.

        The loop may get an error, and close the socket, before the error watch does.
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
            if not self.ended:  # not a protocol of kaio's, whose hook does that
                self.on_connection_lost(error)
            self._advance(Trigger.SUPPLIED)

    # -- the stages of the end

    @property
    def ended(self) -> bool:
        """Whether connection_lost was called, or another protocol has taken the connection over."""
        return self.stage in ENDED

    def _advance(self, trigger: Trigger) -> None:
        self.stage = TABLE[self.stage].get(trigger, self.stage)  # `next_stage`, without the call

    def _schedule(self, delay: float, step: Callable[..., object], *arguments: object) -> None:
        """Call a step after a delay, instead of the one that was scheduled before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay, step, *arguments)

    def mark_closing(self) -> None:
        """Record that this side closes the connection, and in which task."""
        self.closer = self.closer or _current_task() or True
        self._advance(Trigger.CLOSE)

    # -- called by the protocol's hooks

    def on_arrival(self, arrival: Arrival) -> None:
        """The connection, which was looked at before, is made: it has the peer that its PROXY header names."""
        endpoint = self.endpoint
        assert endpoint is not None
        arrival.is_made = True
        endpoint.arrivals[self] = arrival
        if arrival.header is not None and arrival.header.source is not None:
            self._peername = arrival.header.source

    @property
    def _proxy_header(self) -> ProxyHeader | None:
        arrival = None if self.endpoint is None else self.endpoint.arrivals.get(self)
        return None if arrival is None else arrival.header

    def on_half_close(self) -> None:
        """Watch for errors after an EOF at which the protocol keeps the connection open: the loop no longer reads."""
        self._advance(Trigger.EOF)
        if self.stage is Stage.HALF_CLOSED:
            self._monitor.watch_errors_soon(self)

    def deliver_unread(self, exc: BaseException | None) -> None:
        """Deliver data that the loop has left in the socket.

        Both loops do so when a write fails, for example after the peer has reset the connection while reading was
        paused.
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
        """Deliver data to an `asyncio.Protocol` or `asyncio.BufferedProtocol`."""
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
        """At an EOF: return whether it only marks the end of what a dead peer had sent; if so, close the connection."""
        if self.stage is Stage.VERDICT:
            self._advance(Trigger.READ_ALL)
            self._force_close()
        return self.stage is Stage.ENDING

    def sample_before_close(self, protocol: object) -> None:
        """Read TCP_INFO if a TLS layer is going to close the socket before it calls connection_lost.

        The TLS of asyncio and of uvloop looks connection_lost up, passes it to call_soon and closes the socket. The
        look-up is the only moment that is early enough.
        """
        inner = self.loop_transport
        if self.verdict is not None or (type(inner) in _types_without_tls and inner.get_protocol() is protocol):
            return
        try:
            if inner.get_extra_info("sslcontext") is None and inner.get_protocol() is protocol:
                _types_without_tls.add(type(inner))
                return
            if self._peername is None:
                self._peername = inner.get_extra_info("peername")
            sample = tcp_info(inner)
        except (KeepaliveError, AttributeError):  # AttributeError: asyncio's TLS transport that was closed twice
            return
        if judge(sample).state is State.DEAD:
            self._sample = sample

    def on_connection_lost(self, exc: BaseException | None) -> BaseException | None:
        """Record the end of the connection and return the error for the protocol's connection_lost."""
        # Nearly all connections end like this.
        if exc is None and self.verdict is None and not self.scopes and self._policy is not None:
            self.stage = Stage.LOST
            self._unregister()
            return None
        news = self.verdict is None and (exc is not None or self.scopes)
        if news:
            self.verdict = self._convert_error(exc, None, self._sample)
        self._advance(Trigger.LOST)
        if news:
            self._report_verdict()
        if self._policy is None:  # not TCP: uvloop loses it with the socket
            self._peername = self.peername
        verdict, self.verdict = self.verdict, remember(self.verdict)
        self._unregister()
        return verdict

    def _unregister(self) -> None:
        """Remove the connection from the monitor and from its endpoint."""
        self.limits = None
        self.closer = self.closer is not False  # a handler's task refers to its connection
        self._monitor.discard(self)
        self._monitor.counters.watched -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        timeouts, heartbeats = self._monitor.timeouts, self._monitor.heartbeats
        if timeouts:
            timeouts.discard(self)
        if heartbeats:
            heartbeats.discard(self)
        endpoint, entry, scopes = self.endpoint, self.entry, self.scopes
        self.entry = self._protocol = self.scopes = None
        if scopes:
            for scope in scopes:
                scope.lost()
        if endpoint is not None:
            endpoint.live.discard(entry)
            if endpoint.arrivals:
                arrival = endpoint.arrivals.pop(self, None)
                if arrival is not None:
                    arrival.leave()
            if endpoint.on_leave is not None:
                endpoint.on_leave()
            if not endpoint.live and endpoint.on_empty is not None:
                endpoint.on_empty()

    def _convert_error(
        self, exc: BaseException | None, cause: Cause | None, sample: TcpInfo | None
    ) -> BaseException | None:
        """Convert an error to a `DeadPeerError` if it means that the peer is dead; count and log it then."""
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
        self._report_death(error)
        return error

    def _report_death(self, error: DeadPeerError) -> None:
        """Count and log a death."""
        event = Event("dead", self, None, error)
        self._count(event)
        self._monitor.emit(event)


def _current_task() -> object:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop is running
        return None


def _discard_write(data: bytes | bytearray | memoryview) -> None:
    """Discard what is written after a verdict, as asyncio does after the end."""
