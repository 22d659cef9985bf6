"""struct tcp_info, decoded by its length."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from kaio import TcpInfo, TcpState
from kaio.kernel.tcpinfo import idle_time_from_bytes

# include/uapi/linux/tcp.h, struct tcp_info, from its first byte to tcpi_total_rto_time; all values differ.
WORDS = {
    "state": 1, "ca_state": 250, "retransmits": 2, "probes": 3,
    "backoff": 4, "options": 251, "wscale": 252, "flags": 253,
    "rto": 204_000, "ato": 1001, "snd_mss": 1002, "rcv_mss": 1003,
    "unacked": 5, "sacked": 1004, "lost": 1005, "retrans": 6, "fackets": 1006,
    "last_data_sent": 7_001, "last_ack_sent": 1007, "last_data_recv": 9_003, "last_ack_recv": 8_002,
    "pmtu": 1008, "rcv_ssthresh": 1009, "rtt": 25_500, "rttvar": 12_250, "snd_ssthresh": 1010, "snd_cwnd": 10,
    "advmss": 1011, "reordering": 1012, "rcv_rtt": 1013, "rcv_space": 1014, "total_retrans": 11,
    "pacing_rate": 2**63, "max_pacing_rate": 2**64 - 1, "bytes_acked": 2**40 + 1, "bytes_received": 2**41 + 2,
    "segs_out": 12, "segs_in": 13, "notsent_bytes": 14, "min_rtt": 24_125, "data_segs_in": 1015, "data_segs_out": 1016,
    "delivery_rate": 1017, "busy_time": 1018, "rwnd_limited": 1019, "sndbuf_limited": 1020,
    "delivered": 1021, "delivered_ce": 1022, "bytes_sent": 2**42 + 3, "bytes_retrans": 1023,
    "dsack_dups": 1024, "reord_seen": 1025, "rcv_ooopack": 1026, "snd_wnd": 15, "rcv_wnd": 16, "rehash": 1027,
    "total_rto": 28, "total_rto_recoveries": 29, "total_rto_time": 1030,
}  # fmt: skip
RECORD = struct.pack("=8B 24I 4Q 6I 4Q 2I 2Q 6I 2HI", *WORDS.values())

MILLISECONDS = ("last_data_sent", "last_data_recv", "last_ack_recv")
MICROSECONDS = ("rto", "rtt", "rttvar", "min_rtt")
FIELDS = list(TcpInfo._fields)


def expected(field: str) -> float:
    """The value in the record, in seconds where it is a time."""
    unit = 1000 if field in MILLISECONDS else 1_000_000 if field in MICROSECONDS else 1
    return WORDS[field] / unit if unit > 1 else WORDS[field]


# The fields that fit into a struct of that many bytes.
FITTING = {
    1: FIELDS[: FIELDS.index("state") + 1],
    8: FIELDS[: FIELDS.index("backoff") + 1],
    104: FIELDS[: FIELDS.index("total_retrans") + 1],
    192: FIELDS[: FIELDS.index("min_rtt") + 1],
    232: FIELDS[: FIELDS.index("snd_wnd") + 1],
    280: FIELDS,
    512: FIELDS,
}


def test_the_record_has_the_kernels_size_and_offsets() -> None:
    """Checks the record that the other tests decode."""
    assert len(RECORD) == 248
    assert RECORD[68:72] == struct.pack("=I", WORDS["rtt"])
    assert RECORD[228:232] == struct.pack("=I", WORDS["snd_wnd"])


@pytest.mark.parametrize("length", FITTING)
def test_fields_within_the_length_are_decoded(length: int) -> None:
    """Fields beyond the end are None; fields that are not in the table are ignored."""
    info = TcpInfo.from_bytes(RECORD.ljust(512, b"\xff")[:length])
    assert {field: getattr(info, field) for field in FIELDS} == {
        field: expected(field) if field in FITTING[length] else None for field in FIELDS
    }


@pytest.mark.parametrize(("length", "last"), [(231, "bytes_sent"), (235, "snd_wnd"), (103, "snd_cwnd")])
def test_a_truncated_field_is_none(length: int, last: str) -> None:
    """All bytes of a field have to be there."""
    info = TcpInfo.from_bytes(RECORD[:length])
    assert getattr(info, last) is not None
    assert getattr(info, FIELDS[FIELDS.index(last) + 1]) is None


def test_an_empty_struct_is_refused() -> None:
    """It does not have even the state."""
    with pytest.raises(ValueError, match="empty"):
        TcpInfo.from_bytes(b"")


def test_any_other_length_is_decoded() -> None:
    """A kernel may return a struct of any length."""
    for length in range(1, 281):
        assert TcpInfo.from_bytes(RECORD.ljust(280, b"\0")[:length]).state == TcpState.ESTABLISHED


def test_a_state_of_a_newer_kernel_is_a_number() -> None:
    """It is not an error."""
    assert TcpInfo.from_bytes(b"\x63").state == 99


@pytest.mark.parametrize(
    ("ack", "data", "silence"), [(8.0, 9.0, 8.0), (9.0, 8.0, 8.0), (None, 8.0, 8.0), (8.0, None, 8.0), (0.0, 8.0, 0.0)]
)
def test_silence_lasts_since_the_last_segment_of_any_kind(
    ack: float | None, data: float | None, silence: float
) -> None:
    """Data or acknowledgement, whichever was received last."""
    assert TcpInfo(state=1, last_ack_recv=ack, last_data_recv=data).silence == silence


def test_silence_is_unknown_where_the_kernel_does_not_say() -> None:
    """It is None."""
    assert TcpInfo(state=1).silence is None


def test_states_have_the_kernels_numbers() -> None:
    """Those of include/net/tcp_states.h."""
    assert " ".join(state.name for state in TcpState) == (
        "ESTABLISHED SYN_SENT SYN_RECV FIN_WAIT1 FIN_WAIT2 TIME_WAIT CLOSE CLOSE_WAIT LAST_ACK LISTEN CLOSING"
        " NEW_SYN_RECV BOUND_INACTIVE"
    )
    assert [int(state) for state in TcpState] == list(range(1, 14))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a loopback connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        theirs = listener.accept()[0]
        with theirs:
            yield ours, theirs


def test_the_kernels_own_struct_is_decoded(pair: tuple[socket.socket, socket.socket]) -> None:
    """A real connection is ESTABLISHED, has a round trip time, and counts its bytes."""
    ours, theirs = pair
    ours.sendall(b"hello")
    assert theirs.recv(5, socket.MSG_WAITALL) == b"hello"
    info = TcpInfo.from_bytes(theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512))
    assert info.state == TcpState.ESTABLISHED
    assert info.bytes_received == 5
    assert (info.probes, info.retransmits, info.unacked, info.notsent_bytes) == (0, 0, 0, 0)
    assert info.rtt is not None
    assert 0 < info.rtt < 1
    assert info.rto is not None
    assert 0.1 < info.rto < 10
    assert info.silence is not None
    assert 0 <= info.silence < 5


def test_sockets_without_a_peer_have_a_state() -> None:
    """CLOSE for a new socket, LISTEN for a listening one."""
    with socket.socket() as fresh, socket.create_server(("127.0.0.1", 0)) as listener:
        for sock, state in ((fresh, TcpState.CLOSE), (listener, TcpState.LISTEN)):
            assert TcpInfo.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)).state == state


def record(**changed: int) -> bytes:
    """A struct tcp_info of an idle connection, with some fields changed."""
    idle = WORDS | {"retransmits": 0, "probes": 0, "unacked": 0, "notsent_bytes": 0} | changed
    return struct.pack("=8B 24I 4Q 6I 4Q 2I 2Q 6I 2HI", *idle.values())


def test_the_idle_time_is_the_silence_of_the_whole_sample() -> None:
    """The time since data or an acknowledgement was received, whichever is shorter."""
    assert idle_time_from_bytes(record()) == 8.002 == TcpInfo.from_bytes(record()).silence
    assert idle_time_from_bytes(record(last_ack_recv=10_000)) == 9.003


@pytest.mark.parametrize(
    "changed",
    [{"state": 8}, {"state": 7}, {"retransmits": 1}, {"probes": 1}, {"unacked": 1}, {"notsent_bytes": 1}],
    ids=str,
)
def test_a_connection_that_is_not_idle_has_no_idle_time(changed: dict[str, int]) -> None:
    """Nor has one whose struct is too short."""
    assert idle_time_from_bytes(record(**changed)) is None
    assert idle_time_from_bytes(record()[:147]) is None
    assert idle_time_from_bytes(record()[:148]) is not None
