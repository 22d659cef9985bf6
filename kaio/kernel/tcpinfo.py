"""struct tcp_info: what the kernel knows of a connection.

Rules kept here: decoding only, no I/O. The names are the kernel's without their `tcpi_`; times are seconds. The struct
grows with every few kernels: a field that lies beyond what the kernel returned is None, what lies beyond our table is
ignored (include/uapi/linux/tcp.h).
"""

from __future__ import annotations

import enum
import functools
import struct
from typing import Final, NamedTuple

__all__ = ["TcpInfo", "TcpState", "at_rest"]


class TcpState(enum.IntEnum):
    """The states of a connection (include/net/tcp_states.h; RFC 9293 3.3.2)."""

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
    """A sample of a connection's TCP_INFO. Times in seconds, sizes in bytes, counts in segments.

    None: this kernel does not say.
    """

    state: int
    """A `TcpState`, or a number that a newer kernel has."""
    retransmits: int | None = None
    """Retransmissions of the oldest unacknowledged segment that went unanswered so far."""
    probes: int | None = None
    """Keepalive or window probes that went unanswered so far."""
    backoff: int | None = None
    """How often the retransmission or window probe timer was doubled."""
    rto: float | None = None
    unacked: int | None = None
    """Segments in flight."""
    retrans: int | None = None
    last_data_sent: float | None = None
    """Seconds since data was last sent."""
    last_data_recv: float | None = None
    """Seconds since data was last received."""
    last_ack_recv: float | None = None
    """Seconds since any acknowledgement was last received, answers to probes among them."""
    rtt: float | None = None
    rttvar: float | None = None
    snd_cwnd: int | None = None
    total_retrans: int | None = None
    bytes_acked: int | None = None
    bytes_received: int | None = None
    segs_out: int | None = None
    segs_in: int | None = None
    notsent_bytes: int | None = None
    """Bytes written and not yet sent; Linux 4.6."""
    min_rtt: float | None = None
    bytes_sent: int | None = None
    """Linux 4.19."""
    snd_wnd: int | None = None
    """The window that the peer offered last; Linux 5.4."""
    rcv_wnd: int | None = None
    """Linux 6.2."""

    @property
    def silence(self) -> float | None:
        """Seconds since any segment was heard from the peer."""
        heard = [at for at in (self.last_ack_recv, self.last_data_recv) if at is not None]
        return min(heard) if heard else None

    @classmethod
    def from_bytes(cls, data: bytes) -> TcpInfo:
        """Decode Linux's struct tcp_info by its length. Raises ValueError when there is not even a state."""
        if not data:
            raise ValueError("struct tcp_info is empty")
        whole, units = _decoder(len(data))
        raw = whole.unpack_from(data)
        info = cls(*[value if unit is None else value / unit for value, unit in zip(raw, units, strict=True)])
        return info._replace(min_rtt=None) if info.min_rtt == _NO_RTT else info


_REST: Final = struct.Struct("=BxBB20xI24xII84xI")  # state, retransmits, probes, unacked, last heard (2), notsent_bytes


def at_rest(data: bytes) -> float | None:
    """How long an established connection was silent with which all is well: seconds. None: decode the sample.

    Most looks at most connections find this, and it is a tenth of the work.
    """
    if len(data) < _REST.size:
        return None
    state, retransmits, probes, unacked, data_heard, heard, unsent = _REST.unpack_from(data)
    # 1 is ESTABLISHED: to compare with an enum takes longer than all else here
    if state != 1 or retransmits or probes or unacked or unsent:
        return None
    return (data_heard if data_heard < heard else heard) / _MS  # type: ignore[no-any-return]


_MS: Final = 1_000
_US: Final = 1_000_000
_NO_RTT: Final = (2**32 - 1) / _US  # none was measured yet

# name, offset, struct code, units a second (None: as it is); in the order of TcpInfo's fields
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
    """For a struct of that many bytes: what unpacks its fields in one go, and their units a second."""
    code, at = "=", 0
    fields = [field for field in _LAYOUT if field[1] + struct.calcsize(field[2]) <= size]
    for _, offset, kind, _ in fields:
        code += f"{offset - at}x{kind[1]}"
        at = offset + struct.calcsize(kind)
    return struct.Struct(code), tuple(field[3] for field in fields)
