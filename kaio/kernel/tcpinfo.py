"""struct tcp_info, decoded.

Rules kept here: no I/O. Names are the kernel's without their prefix `tcpi_`; times are seconds. The struct grows from
kernel to kernel (include/uapi/linux/tcp.h): a field beyond the length that the kernel returned is None, and fields that
are not in the table below are ignored.
"""

from __future__ import annotations

import enum
import functools
import struct
from typing import Final, NamedTuple

__all__ = ["TcpInfo", "TcpState", "idle_time_from_bytes", "last_data_recv_from_bytes"]


class TcpState(enum.IntEnum):
    """TCP connection states (include/net/tcp_states.h; RFC 9293 3.3.2)."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECV = 12
    BOUND_INACTIVE = 13


class TcpInfo(NamedTuple):
    """The TCP_INFO of a connection at one moment. Times in seconds, sizes in bytes, counts in segments.

    A field is None where the kernel does not report it.
    """

    state: int
    """A `TcpState`, or the number of a state that a newer kernel added."""
    retransmits: int | None = None
    """Retransmission timeouts since data was last acknowledged."""
    probes: int | None = None
    """Keepalive or zero window probes sent since the last answer."""
    backoff: int | None = None
    """Number of times that the timer of retransmissions or window probes was doubled."""
    rto: float | None = None
    unacked: int | None = None
    """Segments sent and not acknowledged."""
    retrans: int | None = None
    last_data_sent: float | None = None
    """Seconds since data was last sent."""
    last_data_recv: float | None = None
    """Seconds since data was last received."""
    last_ack_recv: float | None = None
    """Seconds since an acknowledgement was last received; answers to probes are acknowledgements."""
    rtt: float | None = None
    rttvar: float | None = None
    snd_cwnd: int | None = None
    total_retrans: int | None = None
    bytes_acked: int | None = None
    bytes_received: int | None = None
    segs_out: int | None = None
    segs_in: int | None = None
    notsent_bytes: int | None = None
    """Bytes in the send queue that were never sent; Linux 4.6."""
    min_rtt: float | None = None
    bytes_sent: int | None = None
    """Linux 4.19."""
    snd_wnd: int | None = None
    """The peer's receive window, as last advertised; Linux 5.4."""
    rcv_wnd: int | None = None
    """Linux 6.2."""

    @property
    def silence(self) -> float | None:
        """Seconds since data or an acknowledgement was last received from the peer."""
        heard = [at for at in (self.last_ack_recv, self.last_data_recv) if at is not None]
        return min(heard) if heard else None

    @classmethod
    def from_bytes(cls, data: bytes) -> TcpInfo:
        """Decode Linux's struct tcp_info, as far as it goes. Raises ValueError when it is empty."""
        if not data:
            raise ValueError("struct tcp_info is empty")
        whole, units = _decoder(len(data))
        raw = whole.unpack_from(data)
        info = cls(*[value if unit is None else value / unit for value, unit in zip(raw, units, strict=True)])
        return info._replace(min_rtt=None) if info.min_rtt == _NO_RTT else info


# state, retransmits, probes, unacked, last_data_recv, last_ack_recv, notsent_bytes
_ACTIVITY: Final = struct.Struct("=BxBB20xI24xII84xI")


def idle_time_from_bytes(data: bytes) -> float | None:
    """Seconds since an idle connection last received a segment; None for a connection that is not idle.

    Idle is what the kernel's keepalive timer calls so (net/ipv4/tcp_timer.c, tcp_keepalive_timer): established, with
    nothing in flight and nothing in the send queue; and no probe unanswered. The time is that timer's
    `keepalive_time_elapsed`. None, too, when the struct is too short to tell.

    Most samples of most connections are of this kind, and to decode no more than this takes a tenth of the time.
    """
    if len(data) < _ACTIVITY.size:
        return None
    state, retransmits, probes, unacked, data_recv, ack_recv, notsent = _ACTIVITY.unpack_from(data)
    # 1 is ESTABLISHED: comparing with the enum would take longer than the rest of the function.
    if state != 1 or retransmits or probes or unacked or notsent:
        return None
    return (data_recv if data_recv < ack_recv else ack_recv) / _MS  # type: ignore[no-any-return]


def last_data_recv_from_bytes(data: bytes) -> float | None:
    """Seconds since data was last received; None when the struct is too short to tell."""
    return None if len(data) < 56 else _LAST_DATA.unpack_from(data)[0] / _MS


_LAST_DATA: Final = struct.Struct("=52xI")
_MS: Final = 1_000
_US: Final = 1_000_000
_NO_RTT: Final = (2**32 - 1) / _US  # no round trip was measured yet

# name, offset, format of struct, units per second (None: not a time); in the order of TcpInfo's fields
_LAYOUT: Final[tuple[tuple[str, int, str, int | None], ...]] = (
    ("state", 0, "=B", None),
    ("retransmits", 2, "=B", None),
    ("probes", 3, "=B", None),
    ("backoff", 4, "=B", None),
    ("rto", 8, "=I", _US),
    ("unacked", 24, "=I", None),
    ("retrans", 36, "=I", None),
    ("last_data_sent", 44, "=I", _MS),
    ("last_data_recv", 52, "=I", _MS),
    ("last_ack_recv", 56, "=I", _MS),
    ("rtt", 68, "=I", _US),
    ("rttvar", 72, "=I", _US),
    ("snd_cwnd", 80, "=I", None),
    ("total_retrans", 100, "=I", None),
    ("bytes_acked", 120, "=Q", None),
    ("bytes_received", 128, "=Q", None),
    ("segs_out", 136, "=I", None),
    ("segs_in", 140, "=I", None),
    ("notsent_bytes", 144, "=I", None),
    ("min_rtt", 148, "=I", _US),
    ("bytes_sent", 200, "=Q", None),
    ("snd_wnd", 228, "=I", None),
    ("rcv_wnd", 232, "=I", None),
)


@functools.cache
def _decoder(size: int) -> tuple[struct.Struct, tuple[int | None, ...]]:
    """Return the format of all fields in a struct of that many bytes, and their units per second."""
    code, at = "=", 0
    fields = [field for field in _LAYOUT if field[1] + struct.calcsize(field[2]) <= size]
    for _, offset, kind, _ in fields:
        code += f"{offset - at}x{kind[1]}"
        at = offset + struct.calcsize(kind)
    return struct.Struct(code), tuple(field[3] for field in fields)
