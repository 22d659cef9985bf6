"""The two programs that give a cgroup's TCP sockets their policy, and the counters that they keep.

The *giver* runs when a socket of the cgroup connects, before its SYN is sent, and when the handshake of an incoming
connection is complete, before accept(2) returns it. What is set on the socket afterwards therefore wins. What the
application has chosen before, on the socket or on the listening socket from which it inherits, stands: if it has set
one of the times, all its options do. A user timeout alone stands too, and the times are set beside it.

The *guard* runs before each setsockopt(2) on such a socket. When the application sets a time of its own, the policy's
user timeout must not stay beside it; when it sets a user timeout, the policy's probes may have to go. Otherwise the two
together could end a live connection because of one lost probe, which RFC 9293 3.8.4 forbids: Redis, which sets 300 s,
100 s and 3 probes on what it accepts, would do so with a user timeout of 60 s.

The kernel keeps 0 in a socket's fields as long as the sysctls decide, so that they tell a choice from a default in any
network namespace, whatever its sysctls are or will be. getsockopt(2) reports both alike.

Rules kept here: a socket is changed only after everything was read; SO_KEEPALIVE is set after the times, so that there
are no probes with half of them. No I/O.
"""

from __future__ import annotations

import mmap
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from ...errors import PolicyError
from ...policy import Keepalive
from ..bpf import Assembler, Register

__all__ = ["FIELDS", "Counters", "Ports", "giver", "guard", "parse_ports"]

R0, R1, R2, R3, R4, R5, R6, R7, _, _, R10 = Register

# struct bpf_sock_ops
_OP: Final = 0
_REMOTE_PORT: Final = 64  # in the network's byte order
_LOCAL_PORT: Final = 68  # in the machine's
_SOCKET: Final = 184
_CONNECT: Final = 3  # BPF_SOCK_OPS_TCP_CONNECT_CB
_ACCEPTED: Final = 5  # BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB

# struct bpf_sockopt
_ITS_SOCKET: Final = 0
_VALUE_BEGINS: Final = 8
_VALUE_ENDS: Final = 16
_LEVEL: Final = 24
_NAME: Final = 28
_LENGTH: Final = 32

# struct bpf_sock
_STATE: Final = 72
_CLOSED: Final = 7  # TCP_CLOSE: not connected yet
_LISTENING: Final = 10  # TCP_LISTEN

_SETSOCKOPT: Final = 49, "setsockopt"
_GETSOCKOPT: Final = 57, "getsockopt"
_TCP_SOCK: Final = 137, "skc_to_tcp_sock"

_TCP: Final = 6
_USER_TIMEOUT: Final = 18
_VALUE: Final = -4  # a place on the stack

FIELDS: Final = {
    "tcp_sock": ("keepalive_time", "keepalive_intvl", "keepalive_probes"),
    "inet_connection_sock": ("icsk_user_timeout",),  # the beginning of a tcp_sock
}
"""The fields of the kernel's structures that the giver reads; `keepalive_probes` has a byte, the others four."""

_MOST_RANGES: Final = 64


class Counters(NamedTuple):
    """How many sockets the programs have met, by what became of them."""

    connected: int = 0
    """Connections made, which got the policy."""
    accepted: int = 0
    """Connections accepted, which got the policy."""
    own: int = 0
    """Left alone, because the application had chosen."""
    later: int = 0
    """Of those that got the policy: it made way for what the application set afterwards."""
    excepted: int = 0
    """Left alone because of their port."""
    failed: int = 0
    """The kernel refused to set an option."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Counters:
        """Decode the map's value."""
        return cls(*struct.unpack_from(f"={len(cls._fields)}Q", data))


class Ports(NamedTuple):
    """A range of ports, both ends included."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def parse_ports(text: str) -> list[Ports]:
    """Parse ports and ranges of ports, separated by commas: 22,8000-8010. Raises `PolicyError`."""
    found = []
    for part in text.split(","):
        first, dash, last = (each.strip() for each in part.partition("-"))
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) <= 5 and 1 <= int(end) <= 65535 for end in ends):
            raise PolicyError("except", text, "must be ports from 1 to 65535, such as 22,8000-8010")
        if int(ends[0]) > int(ends[1]):
            raise PolicyError("except", text, f"the range {part.strip()} ends before it begins")
        found.append(Ports(int(ends[0]), int(ends[1])))
    if len(found) > _MOST_RANGES:
        raise PolicyError("except", text, f"must be at most {_MOST_RANGES} ports and ranges")
    return found


class _Option(NamedTuple):
    name: str
    number: int
    value: int
    field: str


class _Values:
    """The values of a policy with all its times."""

    def __init__(self, policy: Keepalive) -> None:
        if policy.idle is None or policy.interval is None or policy.count is None:
            raise ValueError(f"{policy} leaves times to the system")
        idle, interval, probes = FIELDS["tcp_sock"]
        self.times: Final = (
            _Option("TCP_KEEPIDLE", 4, int(policy.idle), idle),
            _Option("TCP_KEEPINTVL", 5, int(policy.interval), interval),
            _Option("TCP_KEEPCNT", 6, policy.count, probes),
        )
        timeout = policy.effective_user_timeout
        self.timeout: Final = None if timeout is None else round(timeout * 1000)  # milliseconds
        # With a shorter user timeout, one lost probe ends the connection: the kernel looks at it when the second one
        # is due (net/ipv4/tcp_timer.c). With a single probe it is meant to.
        self.shortest: Final = 0 if policy.count == 1 else int(policy.idle + policy.interval) * 1000 + 1


def giver(policy: Keepalive, ports: Sequence[Ports], *, counters: int, offsets: Mapping[str, int]) -> Assembler:
    """Assemble the program that sets the options, for a policy with all its times.

    `counters` is the descriptor of the map, `offsets` are the places of `FIELDS` in the running kernel.
    """
    return _Giver(_Values(policy), ports, counters, offsets).assembled()


def guard(policy: Keepalive, *, counters: int) -> Assembler:
    """Assemble the program that lets what the application sets later win."""
    return _Guard(_Values(policy), counters).assembled()


class _Program:
    def __init__(self, values: _Values, counters: int) -> None:
        self._values = values
        self._counters = counters
        self._asm = Assembler()

    def _call(self, helper: tuple[int, str], level: int, number: int, comment: str) -> None:
        """Call getsockopt or setsockopt for R1's socket, with the value on the stack."""
        asm = self._asm
        asm.move(R2, level)
        asm.move(R3, number)
        asm.copy(R4, R10)
        asm.add(R4, _VALUE)
        asm.move(R5, 4)
        asm.call(*helper, comment)

    def _load_counter(self, name: str) -> None:
        self._asm.load_value(R1, self._counters, 8 * Counters._fields.index(name), f"counter {name}")

    def _count_and_return(self) -> None:
        asm = self._asm
        asm.mark("count")
        asm.move(R2, 1)
        asm.add_in_memory(R1, 0, R2)
        asm.mark("out")
        asm.move(R0, 1)
        asm.exit()


class _Giver(_Program):
    """The parts of the giver, in the order in which they run."""

    def __init__(self, values: _Values, ports: Sequence[Ports], counters: int, offsets: Mapping[str, int]) -> None:
        super().__init__(values, counters)
        self._ports = ports
        self._offsets = offsets

    def assembled(self) -> Assembler:
        self._which_event()
        self._exceptions()
        self._choices()
        self._set()
        self._count()
        return self._asm

    def _which_event(self) -> None:
        asm = self._asm
        asm.copy(R6, R1, "the event: struct bpf_sock_ops")
        asm.load_word(R1, R6, _OP, "which event")
        asm.jump(R1, "==", _CONNECT, "connecting", "BPF_SOCK_OPS_TCP_CONNECT_CB")
        asm.jump(R1, "!=", _ACCEPTED, "out", "BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB")
        if self._ports:
            asm.load_word(R7, R6, _LOCAL_PORT, "accepted: the port of the service is ours")
            asm.go("ports")
        asm.mark("connecting")
        if self._ports:
            asm.load_word(R7, R6, _REMOTE_PORT, "connecting: the port of the service is the peer's")
            asm.from_network(R7, 32)
            asm.mark("ports")

    def _exceptions(self) -> None:
        asm = self._asm
        for number, each in enumerate(self._ports):
            if each.first == each.last:
                asm.jump(R7, "==", each.first, "excepted", f"port {each} is excepted")
            else:
                asm.jump(R7, "<", each.first, f"after_{number}", f"ports {each} are excepted")
                asm.jump(R7, "<", each.last + 1, "excepted")
                asm.mark(f"after_{number}")

    def _choices(self) -> None:
        """Leave the socket alone if the application has chosen."""
        asm = self._asm
        asm.load_double(R1, R6, _SOCKET, "the socket")
        asm.jump(R1, "==", 0, "failed", "as the verifier wants it")
        asm.call(*_TCP_SOCK)
        asm.jump(R0, "==", 0, "failed")
        for option in self._values.times:
            load = asm.load_byte if option.field == "keepalive_probes" else asm.load_word
            load(R1, R0, self._offsets[option.field], f"{option.name}; 0: the sysctl decides")
            asm.jump(R1, "!=", 0, "own", "the application has chosen")
        asm.load_word(R7, R0, self._offsets["icsk_user_timeout"], "TCP_USER_TIMEOUT; 0: none")
        asm.jump(R7, "==", 0, "set")
        if self._values.timeout is not None:
            asm.jump(R7, "==", self._values.timeout, "set", "the policy's already")
        if self._values.shortest:
            asm.jump(R7, "<", self._values.shortest, "own", "with these times one lost probe would end the connection")

    def _set(self) -> None:
        asm = self._asm
        asm.mark("set")
        for option in self._values.times:
            self._write(_TCP, option.number, option.value, option.name)
        self._write(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1, "SO_KEEPALIVE")
        if self._values.timeout is not None:
            asm.jump(R7, "!=", 0, "done", "the application's user timeout stands")
            self._write(_TCP, _USER_TIMEOUT, self._values.timeout, "TCP_USER_TIMEOUT")
            asm.mark("done")

    def _write(self, level: int, number: int, value: int, name: str) -> None:
        self._asm.store_word(R10, _VALUE, value)
        self._asm.copy(R1, R6)
        self._call(_SETSOCKOPT, level, number, f"{name} = {value}")
        self._asm.jump(R0, "!=", 0, "failed")

    def _count(self) -> None:
        asm = self._asm
        asm.load_word(R1, R6, _OP)
        asm.jump(R1, "==", _ACCEPTED, "accepted")
        self._load_counter("connected")
        asm.go("count")
        # The verifier refuses what cannot be reached.
        for name in ("accepted", "own", *(("excepted",) if self._ports else ())):
            asm.mark(name)
            self._load_counter(name)
            asm.go("count")
        asm.mark("failed")
        self._load_counter("failed")
        self._count_and_return()


class _Guard(_Program):
    """The parts of the guard, in the order in which they run."""

    def assembled(self) -> Assembler:
        asm = self._asm
        asm.copy(R6, R1, "the call: struct bpf_sockopt")
        self._spare_long_values()
        asm.load_word(R1, R6, _LEVEL)
        asm.jump(R1, "!=", _TCP, "out", "IPPROTO_TCP")
        asm.load_word(R1, R6, _NAME, "which option")
        timeout = self._values.timeout
        for option in self._values.times if timeout is not None else ():
            asm.jump(R1, "==", option.number, "time", option.name)
        asm.jump(R1, "!=", _USER_TIMEOUT, "out", "TCP_USER_TIMEOUT")
        self._on_user_timeout()
        if timeout is not None:
            asm.mark("time")
            self._spare_others(self._values.times)
            self._replace(_TCP, _USER_TIMEOUT, timeout, "TCP_USER_TIMEOUT = 0: the policy's makes way")
        self._load_counter("later")
        self._count_and_return()
        return asm

    def _spare_long_values(self) -> None:
        """Have the kernel use the original of a value of which the program is shown the first page only."""
        asm = self._asm
        asm.load_word(R1, R6, _LENGTH)
        asm.jump(R1, "<", mmap.PAGESIZE + 1, "short")
        asm.store_word(R6, _LENGTH, 0, "the kernel takes the original")
        asm.mark("short")

    def _spare_others(self, times: Sequence[_Option]) -> None:
        """Leave a socket alone that does not have the policy: what it has is the application's own choice.

        The giver runs when a socket connects or is accepted, so nothing is the policy's before that. Afterwards the
        times tell: one alone that is as the policy's may be the application's, or the sysctl's.
        """
        asm = self._asm
        asm.load_double(R1, R6, _ITS_SOCKET)
        asm.load_word(R1, R1, _STATE, "its state")
        asm.jump(R1, "==", _CLOSED, "out", "TCP_CLOSE: it has no policy yet")
        asm.jump(R1, "==", _LISTENING, "out", "TCP_LISTEN: it never has one")
        for option in times:
            self._read(_TCP, option.number, option.name)
            asm.jump(R1, "!=", option.value, "out", "the times are the application's own")

    def _on_user_timeout(self) -> None:
        """Turn the policy's probes off if the application's user timeout is too short for them."""
        asm = self._asm
        asm.load_double(R1, R6, _VALUE_BEGINS)
        asm.load_double(R2, R6, _VALUE_ENDS)
        asm.copy(R3, R1)
        asm.add(R3, 4)
        asm.jump_above(R3, R2, "out", "no value, which the kernel refuses")
        asm.load_word(R1, R1, 0, "milliseconds")
        asm.jump(R1, "==", 0, "out", "none")
        asm.jump(R1, ">", max(self._values.shortest - 1, 0), "out", "long enough for the policy's probes")
        # Not the count, which says nothing about one lost probe: the application may have set it beside the others.
        self._spare_others(self._values.times[:2])
        asm.store_word(R10, _VALUE, 0)
        asm.load_double(R1, R6, _ITS_SOCKET)
        self._call(_SETSOCKOPT, socket.SOL_SOCKET, socket.SO_KEEPALIVE, "SO_KEEPALIVE = 0: the policy's makes way")
        if self._values.timeout is not None:
            self._load_counter("later")
            asm.go("count")

    def _replace(self, level: int, number: int, value: int, comment: str) -> None:
        """Set an option to 0 if it has the policy's value."""
        asm = self._asm
        self._read(level, number, "what it has")
        asm.jump(R1, "!=", value, "out", "not the policy's")
        asm.store_word(R10, _VALUE, 0)
        asm.load_double(R1, R6, _ITS_SOCKET)
        self._call(_SETSOCKOPT, level, number, comment)

    def _read(self, level: int, number: int, comment: str) -> None:
        """Load an option of the socket into R1."""
        asm = self._asm
        asm.load_double(R1, R6, _ITS_SOCKET)
        asm.store_word(R10, _VALUE, 0)
        self._call(_GETSOCKOPT, level, number, comment)
        asm.jump(R0, "!=", 0, "out")
        asm.load_word(R1, R10, _VALUE)
