"""A model of Linux's TCP timers: one end of a connection, its peer and the path between them, in simulated time.

What it models was read in Linux 6.18 (net/ipv4/tcp_timer.c, tcp_output.c, tcp_input.c; kernel/time/timer.c) and is
compared with samples of a real kernel by test_kernel_model. Modelled are the four timers (retransmission, tail loss
probe, persist, keepalive), what each counts and what sets the counts back, TCP_USER_TIMEOUT, TCP_RTO_MAX_MS, packets
that do not leave this host, and the peer's side as far as it shows here: its window, its answers (to what is out of its
window at most twice a second), its own data. Left out, because no counter that the watch reads depends on it: the
congestion window, SACK, Nagle, delayed ACKs.

Times are whole microseconds, from the connection's start; `seconds` and `TcpInfo` have seconds.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections import deque
from typing import Final

from kaio.kernel.tcpinfo import TcpInfo, TcpState

SECOND: Final = 1_000_000
NEVER: Final = 1 << 62

JIFFY: Final = 4_000  # CONFIG_HZ=250
RTO_MIN: Final = 200_000
RTO_MAX: Final = 120 * SECOND
RETRIES: Final = 15  # net.ipv4.tcp_retries2
RESOURCE_PROBE_INTERVAL: Final = 500_000  # TCP_RESOURCE_PROBE_INTERVAL: our own queue is full
INVALID_RATELIMIT: Final = 500_000  # net.ipv4.tcp_invalid_ratelimit
WINDOW: Final = 65_536  # of a peer that reads

_U8: Final = 0xFF
_U32: Final = 0xFFFFFFFF


def seconds(us: int) -> float:
    """Microseconds as seconds."""
    return us / SECOND


def microseconds(s: float) -> int:
    """Seconds as microseconds."""
    return round(s * SECOND)


class Fails(enum.Enum):
    """Why packets do not leave this host."""

    ROUTE = "route"
    """No route: refused before it is counted as a retransmission (__tcp_retransmit_skb, rebuild_header)."""
    FILTER = "filter"
    """An output filter: counted, then refused (EPERM)."""
    QUEUE = "queue"
    """Our own queue drops it (NET_XMIT_DROP): tried again after half a second."""


class _Timer(enum.Enum):
    RETRANSMIT = "retransmit"
    LOSS_PROBE = "tail loss probe"
    PERSIST = "persist"


@dataclasses.dataclass(slots=True, eq=False)
class Question:
    """A packet that the peer must answer, and what became of it."""

    at: int
    kind: str
    """What sent it: "data", or what a timer sent."""
    failed: bool = False
    """It did not leave this host."""
    limited: bool = False
    """The peer would have answered, had it not answered another one just before."""
    answered: int = NEVER
    """When the answer came."""

    @property
    def counted(self) -> bool:
        """Whether the kernel counts it among its questions: what it sends for the first time it does not."""
        return self.kind != "data"


@dataclasses.dataclass(slots=True)
class _Segment:
    start: int
    end: int
    sent: int
    lost: bool = False


@dataclasses.dataclass(slots=True)
class _Packet:
    at: int
    """When it arrives."""
    outward: bool
    start: int = 0
    end: int = 0
    question: Question | None = None
    ack: int = 0
    window: int = 0
    serial: int = 0
    """Of the peer's own data; 0: an ACK alone."""


@dataclasses.dataclass(slots=True)
class Path:
    """What befalls packets."""

    rtt: int = 100
    cut_out: bool = False
    cut_in: bool = False
    loss_out: float = 0.0
    loss_in: float = 0.0
    fails: Fails | None = None
    dice: random.Random = dataclasses.field(default_factory=lambda: random.Random(0))

    def passes(self, outward: bool) -> bool:
        """Whether a packet that is sent now arrives, if the path stays as it is."""
        if self.cut_out if outward else self.cut_in:
            return False
        loss = self.loss_out if outward else self.loss_in
        return not loss or self.dice.random() >= loss


class Peer:
    """The other end: its kernel answers while it is alive; its program reads or does not."""

    def __init__(self) -> None:
        self.alive = True
        self.next = 0  # the next byte that it expects
        self.room: int | None = None  # what it still takes; None: it reads
        self.limited_until = 0  # no answer to what is out of its window before
        self.serial = 0  # of its own data
        self.unacked = 0  # its own data that we have not acknowledged: the serial

    @property
    def window(self) -> int:
        """What it offers."""
        return WINDOW if self.room is None else self.room


class Connection:
    """One end of an established connection. `advance` lets time pass; the rest happens now."""

    def __init__(
        self,
        *,
        idle: float,
        interval: float,
        count: int,
        user_timeout: float = 0.0,
        rto: float = 0.204,
        mss: int = 1_460,
        retransmitted_before: int = 0,
        boot: int = 0,
        path: Path | None = None,
    ) -> None:
        self.now = 0
        self.path = path or Path()
        self.peer = Peer()
        self.idle, self.interval, self.count = microseconds(idle), microseconds(interval), count
        self.user_timeout = microseconds(user_timeout)
        self.rto_max = RTO_MAX
        self.state = TcpState.ESTABLISHED
        self.retransmits = self.probes = self.backoff = 0
        self.total_retrans = retransmitted_before
        self.una = self.nxt = self.written = 0
        self.fin_sent = False
        self.snd_wnd = WINDOW
        self.heard_ack = self.heard_data = self.data_sent = 0
        self.died: int | None = None
        self.heard: list[int] = [0]  # when the peer was heard, as TCP_INFO will tell
        self.questions: list[Question] = []
        self.waiting_since: int | None = None
        self._boot = boot  # what the jiffies of the connection's start are
        self.mss = mss  # of the segments that are sent
        self._rto_base = microseconds(rto)  # what an answer sets it back to
        self.rto = self._rto_base
        self._flight: deque[_Segment] = deque()
        self._recovering = 0  # in loss until this byte is acknowledged; 0: not in loss
        self._loss_probe = 0  # TLP episode: up to which byte
        self._retrans_stamp: int | None = None
        self._probes_stamp: int | None = None
        self._timer: _Timer | None = None
        self._timer_set = NEVER  # what was asked for (icsk_timeout)
        self._timer_at = NEVER  # when the timer wheel fires
        self._keepalive_at = self._wheel(self.idle)
        self._wire: list[_Packet] = []
        self._peer_timer = NEVER  # the peer's retransmission timer
        self._peer_rto = self._rto_base
        self._peer_data_taken = 0

    # -- what TCP_INFO says

    def info(self) -> TcpInfo:
        """TCP_INFO now."""
        return TcpInfo(
            state=self.state,
            retransmits=self.retransmits & _U8,
            probes=self.probes & _U8,
            backoff=self.backoff & _U8,
            rto=seconds(self.rto),
            unacked=len(self._flight),
            retrans=0,
            last_data_sent=self._age(self.data_sent),
            last_data_recv=self._age(self.heard_data),
            last_ack_recv=self._age(self.heard_ack),
            rtt=seconds(self.path.rtt),
            total_retrans=self.total_retrans & _U32,
            notsent_bytes=self.written - self.nxt,
            snd_wnd=self.snd_wnd,
        )

    def _age(self, at: int) -> float:
        return (self._jiffies(self.now) - self._jiffies(at)) * JIFFY / SECOND

    def _jiffies(self, at: int) -> int:
        return self._boot + at // JIFFY

    @property
    def waiting(self) -> bool:
        """Whether something waits for the peer."""
        return self.una < self.written and self.state != TcpState.CLOSE

    # -- what the program does

    def send(self, size: int) -> None:
        """Write that many bytes."""
        if self.state != TcpState.CLOSE and not self.fin_sent:
            self._write(size)

    def _write(self, size: int) -> None:
        self.written += size
        self._note_waiting()
        self._push()

    def finish(self) -> None:
        """shutdown(SHUT_WR): a FIN is one byte more."""
        if self.state == TcpState.ESTABLISHED and not self.fin_sent:
            self.fin_sent = True
            self.state = TcpState.FIN_WAIT1
            self._write(1)

    # -- what the peer does

    def peer_sends(self) -> None:
        """The peer's program writes a few bytes."""
        if self.peer.alive:
            self.peer.serial += 1
            self.peer.unacked = self.peer.serial
            self._peer_rto = self._rto_base
            self._peer_transmits()

    def peer_stops_reading(self, room: int) -> None:
        """The peer's program reads no more, and its kernel takes so many bytes yet: less than in flight is a shrink."""
        self.peer.room = room

    def peer_reads(self) -> None:
        """The peer's program reads again: its kernel says that the window is open."""
        if self.peer.room is not None:
            self.peer.room = None
            if self.peer.alive:
                self._answer(None)

    # -- time

    def advance(self, until: int) -> None:
        """Let time pass."""
        while True:
            packet = min(self._wire, key=_arrival, default=None)
            arrives = NEVER if packet is None else packet.at
            at = min(arrives, self._timer_at, self._keepalive_at, self._peer_timer)
            if at > until:
                break
            self.now = at
            if packet is not None and at == arrives:
                self._wire.remove(packet)
                self._arrives(packet)
            elif at == self._timer_at:
                self._fire()
            elif at == self._keepalive_at:
                self._keepalive()
            else:
                self._peer_retransmits()
        self.now = until

    def _wheel(self, delay: int) -> int:
        """When a timer fires that is set for so much later: the longer, the coarser (kernel/time/timer.c)."""
        jiffies = self._jiffies(self.now)
        ahead = -(-delay // JIFFY)
        expires = jiffies + ahead
        shift = 0
        while shift < 24 and ahead >= 63 << shift:
            shift += 3
        expires = ((expires >> shift) + 1) << shift
        return (expires - self._boot) * JIFFY

    def _arm(self, timer: _Timer, delay: int) -> None:
        delay = min(delay, self.rto_max)
        self._timer = timer
        self._timer_set = self.now + delay
        self._timer_at = self._wheel(delay)

    def _disarm(self) -> None:
        self._timer, self._timer_at = None, NEVER

    def _fire(self) -> None:
        timer = self._timer
        self._disarm()
        if timer is _Timer.RETRANSMIT:
            self._retransmit()
        elif timer is _Timer.LOSS_PROBE:
            self._probe_for_loss()
        else:
            self._persist()

    def _die(self) -> None:
        """The kernel gives up: tcp_write_err. The counters stay, the queues go."""
        self.state = TcpState.CLOSE
        self.died = self.now
        self._flight.clear()
        self.backoff = 0
        self._disarm()
        self._keepalive_at = NEVER
        self._note_waiting()

    def _note_waiting(self) -> None:
        if not self.waiting:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = self.now

    # -- sending

    def _transmit(self, start: int, end: int, kind: str) -> int:
        """Send a packet: 0; below 0 when it is refused, above when our own queue drops it."""
        question = Question(self.now, kind, failed=self.path.fails is not None)
        if start < end and not (self.fin_sent and start == self.written - 1):  # a FIN alone is no data
            self.data_sent = self.now
        self.questions.append(question)
        if self.path.fails is not None:
            return 1 if self.path.fails is Fails.QUEUE else -1
        if self.path.passes(outward=True):
            self._wire.append(_Packet(self.now + self.path.rtt // 2, True, start, end, question))
        return 0

    def _send_new(self, end: int) -> int:
        segment = _Segment(self.nxt, end, self.now)
        failed = self._transmit(segment.start, end, "data")
        if not failed:
            first = not self._flight
            self._flight.append(segment)
            self.nxt = end
            if first or self._timer is _Timer.LOSS_PROBE:
                self._arm(_Timer.RETRANSMIT, self.rto)
        return failed

    def _push(self) -> None:
        """tcp_write_xmit: send what the window takes."""
        sent = False
        while self.nxt < self.written and not self._recovering:
            end = min(self.nxt + self.mss, self.written)
            if end > self.una + self.snd_wnd or self._send_new(end):
                break
            sent = True
        if sent:
            self._schedule_loss_probe()
        elif not self._flight and self.nxt < self.written and self._timer is None:
            self._arm(_Timer.PERSIST, max(self.rto, RTO_MIN))

    def _schedule_loss_probe(self) -> bool:
        if not self._flight or self._recovering:
            return False
        delay = 2 * self.path.rtt + (RTO_MIN if len(self._flight) == 1 else 2_000)
        left = self._flight[0].sent + self.rto - self.now
        self._arm(_Timer.LOSS_PROBE, min(delay, left) if left > 0 else delay)
        return True

    def _probe_for_loss(self) -> None:
        """tcp_send_loss_probe: new data if there is any, else the last segment; counted in total_retrans alone."""
        sent = False
        if not self._loss_probe and self._flight:
            end = min(self.nxt + self.mss, self.written)
            if self.nxt < self.written and end <= self.una + self.snd_wnd:
                sent = not self._send_new(end)
            else:
                last = self._flight[-1]
                fits = last.start < self.una + self.snd_wnd or last.start == self.una
                sent = fits and not self._resend(last, "tail loss probe")
            if sent:
                self._loss_probe = self.nxt
        if self._flight:
            self._arm(_Timer.RETRANSMIT, self.rto)

    def _resend(self, segment: _Segment, kind: str) -> int:
        if self.path.fails is Fails.ROUTE:
            self.questions.append(Question(self.now, kind, failed=True))
            return -1
        self.total_retrans += 1
        failed = self._transmit(segment.start, segment.end, kind)
        if not failed:
            segment.sent = self.now
        return failed

    # -- the retransmission timer

    def _retransmit(self) -> None:
        """tcp_retransmit_timer."""
        if not self._flight:
            return
        head = self._flight[0]
        self._loss_probe = 0
        shut = self.snd_wnd == 0
        if self._shrunk_too_long(head) if shut else self._retransmitted_too_long():
            self._die()
            return
        self._recovering = self.nxt
        for segment in self._flight:
            segment.lost = True
        if not shut:
            self.retransmits += 1
        failed = self._resend(head, "retransmission")
        head.lost = False
        if self._retrans_stamp is None:
            self._retrans_stamp = head.sent
        if failed > 0 and not shut:
            self._arm(_Timer.RETRANSMIT, RESOURCE_PROBE_INTERVAL)
            return
        self.backoff += 1
        self.rto = min(2 * self.rto, self.rto_max)
        delay = self.rto
        if self.user_timeout:
            left = self._retrans_stamp + self.user_timeout - self.now
            delay = JIFFY if left <= 0 else min(delay, left)
        self._arm(_Timer.RETRANSMIT, delay)

    def _shrunk_too_long(self, head: _Segment) -> bool:
        """tcp_rtx_probe0_timed_out."""
        since = self._retrans_stamp if self._retrans_stamp is not None else head.sent
        waited = self.now - since
        timeout = 2 * self.rto_max
        if self.user_timeout:
            if waited > self.user_timeout:
                return True
            timeout = min(timeout, self.user_timeout)
        return self._timer_set - self.heard_ack > timeout and waited > timeout

    def _retransmitted_too_long(self) -> bool:
        """retransmits_timed_out."""
        if not self.retransmits or self._retrans_stamp is None:
            return False
        timeout = self.user_timeout
        if not timeout:
            linear = (self.rto_max // RTO_MIN).bit_length() - 1
            doubled = min(RETRIES, linear)
            timeout = ((2 << doubled) - 1) * RTO_MIN + max(0, RETRIES - linear) * self.rto_max
        return self.now - self._retrans_stamp >= timeout

    # -- the persist timer

    def _persist(self) -> None:
        """tcp_probe_timer."""
        if self._flight or self.nxt == self.written:
            self.probes, self._probes_stamp = 0, None
            return
        if self._probes_stamp is None:
            self._probes_stamp = self.now
        elif self.user_timeout and self.now - self._probes_stamp >= self.user_timeout:
            self._die()
            return
        if self.probes >= RETRIES:
            self._die()
            return
        failed = self._wake("window probe")
        if self._flight or self.nxt == self.written:
            self.probes = self.backoff = 0
            self._probes_stamp = None
            return
        self.probes += 1
        if failed <= 0:
            self.backoff = min(self.backoff + 1, RETRIES)
        self._arm(_Timer.PERSIST, self._clamped(self._persist_delay() if failed <= 0 else RESOURCE_PROBE_INTERVAL))

    def _persist_delay(self) -> int:
        doublings = min(self.backoff, (RTO_MAX // RTO_MIN).bit_length())
        return min(max(self.rto, RTO_MIN) << doublings, self.rto_max)

    def _clamped(self, delay: int) -> int:
        if not self.user_timeout or self._probes_stamp is None:
            return delay
        left = self._probes_stamp + self.user_timeout - self.now
        return min(delay, max(left, 2 * JIFFY))

    def _wake(self, kind: str) -> int:
        """tcp_write_wakeup: as much unsent data as the window takes, else a segment that the peer has long had."""
        room = self.una + self.snd_wnd
        if self.nxt < self.written and self.nxt < room:
            failed = self._send_new(min(self.nxt + self.mss, self.written, room))
            if failed:
                self.questions[-1].kind = kind  # and so it is counted
            return failed
        return self._transmit(self.una - 1, self.una - 1, kind)

    # -- the keepalive timer

    def _keepalive(self) -> None:
        """tcp_keepalive_timer."""
        delay = self.idle
        if not self.waiting:
            silence = self.now - max(self.heard_ack, self.heard_data)
            silence -= silence % JIFFY
            if silence >= self.idle:
                if (silence >= self.user_timeout and self.probes) if self.user_timeout else self.probes >= self.count:
                    self._die()
                    return
                if self._wake("keepalive") <= 0:
                    self.probes += 1
                    delay = self.interval
                else:
                    self.questions[-1].kind = "data"  # not counted
                    delay = RESOURCE_PROBE_INTERVAL
            else:
                delay = self.idle - silence
        self._keepalive_at = self._wheel(delay)

    # -- the wire

    def _arrives(self, packet: _Packet) -> None:
        if packet.outward:
            self._peer_hears(packet)
        elif self.state != TcpState.CLOSE:
            self._hears(packet)

    def _answer(self, question: Question | None, serial: int = 0) -> None:
        """The peer sends an ACK, with its own data when that has a serial."""
        if self.path.passes(outward=False):
            at = self.now + self.path.rtt - self.path.rtt // 2
            self._wire.append(
                _Packet(at, False, question=question, ack=self.peer.next, window=self.peer.window, serial=serial)
            )

    def _peer_hears(self, packet: _Packet) -> None:
        peer = self.peer
        if not peer.alive:
            return
        if packet.serial:  # our ACK of its data
            if packet.serial >= peer.unacked:
                peer.unacked, self._peer_timer = 0, NEVER
            return
        if packet.start < packet.end:
            if packet.start <= peer.next < packet.end and (peer.room is None or packet.end - peer.next <= peer.room):
                if peer.room is not None:
                    peer.room -= packet.end - peer.next
                peer.next = packet.end
        elif self.now < peer.limited_until:
            if packet.question is not None:
                packet.question.limited = True
            return
        else:
            peer.limited_until = self.now + INVALID_RATELIMIT
        self._answer(packet.question)

    def _peer_transmits(self) -> None:
        self._answer(None, self.peer.serial)
        self._peer_timer = self.now + self._peer_rto

    def _peer_retransmits(self) -> None:
        self._peer_timer = NEVER
        if self.peer.alive and self.peer.unacked:
            self._peer_rto = min(2 * self._peer_rto, RTO_MAX)
            self._peer_transmits()

    def _hears(self, packet: _Packet) -> None:
        """A segment of the peer's."""
        if packet.question is not None:
            packet.question.answered = min(packet.question.answered, self.now)
        new = packet.serial > self._peer_data_taken
        if packet.serial:
            self._acknowledge(packet.serial)
        if new:
            self._peer_data_taken = packet.serial
            self.heard_data = self.now
        self.heard.append(self.now)
        # In-order data that acknowledges nothing new and leaves the window as it was does not pass through tcp_ack.
        if not (new and packet.ack == self.una and packet.window == self.snd_wnd):
            self._acknowledged(packet)

    def _acknowledge(self, serial: int) -> None:
        if self.path.fails is None and self.path.passes(outward=True):
            self._wire.append(_Packet(self.now + self.path.rtt // 2, True, serial=serial))

    def _acknowledged(self, packet: _Packet) -> None:
        """tcp_ack."""
        if packet.ack < self.una:
            return
        advanced = packet.ack > self.una
        outstanding = bool(self._flight)
        self.una, self.snd_wnd = packet.ack, packet.window
        self.heard_ack = self.now
        self.probes = 0
        if advanced:
            self.retransmits = 0
            self.waiting_since = None
            self._note_waiting()
            if self.fin_sent and self.una == self.written and self.state == TcpState.FIN_WAIT1:
                self.state = TcpState.FIN_WAIT2
        if not outstanding:
            self._window_told()
        elif advanced:
            self._progress()
        self._push()

    def _progress(self) -> None:
        """Data in flight is acknowledged."""
        while self._flight and self._flight[0].end <= self.una:
            self._flight.popleft()
        self.rto, self.backoff = min(self._rto_base, self.rto_max), 0
        if self._loss_probe and self.una >= self._loss_probe:
            self._loss_probe = 0
        if self._recovering and self.una >= self._recovering:
            self._recovering, self._retrans_stamp = 0, None
        if not self._flight:
            self._retrans_stamp = None
            self._disarm()
            return
        lost = [segment for segment in self._flight if segment.lost]
        for segment in lost:
            segment.lost = False
            self._resend(segment, "retransmission")
        if not self._schedule_loss_probe():
            self._arm(_Timer.RETRANSMIT, self.rto)

    def _window_told(self) -> None:
        """tcp_ack_probe: an ACK while nothing is in flight."""
        if self.nxt == self.written:
            return
        if min(self.nxt + self.mss, self.written) <= self.una + self.snd_wnd:
            self.backoff, self._probes_stamp = 0, None
            if self._timer is _Timer.PERSIST:
                self._disarm()
        else:
            self._arm(_Timer.PERSIST, self._clamped(self._persist_delay()))


def _arrival(packet: _Packet) -> int:
    return packet.at
