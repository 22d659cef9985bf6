"""What the contract says of each cell: by when its owner is told, why, and how often. Plain functions on plain data.

The clock starts at the break. Whoever watches has the detection time and one second more, from when the peer was heard
last or, for what is written so late that it would be unfair, from when it was written. With stalled="drop", and where
the kernel alone watches (under a sweep, and from outside), TCP_USER_TIMEOUT is the clock: where ICMP or a local error
lets the kernel begin anew (RFC 6069), it has twice the user timeout and one second more. So has everybody where the
kernel cannot even ask, because our own queue is full. Where the kernel delivers a verdict of kaio's (a window that is
shut, and a socket that only the kernel ends), it does so when it asks next.
"""

from __future__ import annotations

import errno
from typing import Final

from .cells import BOUND, Cell, Seen
from .places import PLACES, Answer
from .states import STATES, Waits

__all__ = ["EARLIEST", "causes", "expected", "latest", "problems"]

GRACE: Final = 1.0
"""Seconds that everybody has beyond the bound."""
EARLIEST: Final = 1.8
"""Seconds after the break, or after its peer was made to be silent: sooner is a peer given up that was heard less than
the bound ago."""
_PROBED: Final = 1.0  # seconds after the break: what is written later has its bound from when it is written
_LOOK: Final = 0.75  # seconds between two looks of a sweep: a socket that connects is not known sooner

# Seconds until the kernel delivers a verdict of kaio's: when it asks next. A shut window's back-off is capped; a
# segment under a shrunk one is sent again after twice the time before, so at the latest after as long as it was silent.
_ASKED_NEXT: Final = {Waits.SHUT: 1.0, Waits.SHRUNK: BOUND}

_OWN: Final = frozenset({"own", "connection", "streams"})
_KERNEL: Final = frozenset({"sweep", "attach"})
_UNREACHABLE: Final = frozenset(
    {
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
        errno.EINVAL,
        errno.EACCES,
        errno.EPERM,
    }
)

# Why, by what the kernel is told of the break and by what waits. More than one where the kernel may say either.
_KEEPALIVE: Final = frozenset({"KEEPALIVE"})
_UNACKNOWLEDGED: Final = frozenset({"UNACKNOWLEDGED"})
_ZERO_WINDOW: Final = frozenset({"ZERO_WINDOW"})
_NO_WAY: Final = frozenset({"UNREACHABLE"})
_CONNECTING: Final = frozenset({"CONNECTING"})
CAUSES: Final = {
    Answer.SILENT: {
        Waits.NOTHING: _KEEPALIVE,
        Waits.IN_FLIGHT: _UNACKNOWLEDGED,
        Waits.WRITTEN: _UNACKNOWLEDGED,
        Waits.SHUT: _ZERO_WINDOW,
        Waits.SHRUNK: _ZERO_WINDOW,
        Waits.HANDSHAKE: _CONNECTING | _KEEPALIVE,
        Waits.CONNECTING: _CONNECTING,
    },
    Answer.ICMP: {
        # The kernel takes an ICMP answer to a probe for a forgery: its sequence number is an old one.
        Waits.NOTHING: _KEEPALIVE,
        # A verdict of our own comes without the kernel's error; the kernel's with it (see `causes`).
        Waits.IN_FLIGHT: _UNACKNOWLEDGED | _NO_WAY,
        Waits.WRITTEN: _UNACKNOWLEDGED | _NO_WAY,
        Waits.SHUT: _ZERO_WINDOW,
        Waits.SHRUNK: _ZERO_WINDOW | _NO_WAY,
        Waits.HANDSHAKE: _CONNECTING | _KEEPALIVE,
        Waits.CONNECTING: _NO_WAY,
    },
    Answer.LOCAL: {
        # An attempt to send that failed leaves its error with some of the places, and none with others.
        Waits.NOTHING: _KEEPALIVE | _NO_WAY,
        Waits.IN_FLIGHT: _UNACKNOWLEDGED | _NO_WAY,
        Waits.WRITTEN: _NO_WAY,  # it never left this host
        Waits.SHUT: _ZERO_WINDOW | _NO_WAY,
        Waits.SHRUNK: _ZERO_WINDOW | _NO_WAY,
        Waits.HANDSHAKE: _CONNECTING | _KEEPALIVE | _NO_WAY,
        Waits.CONNECTING: _CONNECTING | _NO_WAY,
    },
}
CAUSES[Answer.QUEUE] = CAUSES[Answer.LOCAL]


def expected(cell: Cell) -> bool:
    """Whether the contract promises a death there at all.

    A full queue is taken for congestion: a keepalive probe that does not enter it was never asked, so that the kernel
    waits on; only what waits to be sent tells, and the time that kaio gives to its own handshakes.
    """
    return _can_be_told(cell) or (cell.state == "TLS handshake" and cell.kind in _OWN)


def _can_be_told(cell: Cell) -> bool:
    """Whether the kernel asks, or something waits that tells."""
    return PLACES[cell.place].answer is not Answer.QUEUE or STATES[cell.state].waits not in (
        Waits.NOTHING,
        Waits.HANDSHAKE,
    )


def latest(cell: Cell) -> float:
    """Seconds after the break by which its owner is told."""
    state, answer = STATES[cell.state], PLACES[cell.place].answer
    bound = BOUND
    if answer is Answer.QUEUE:
        bound *= 2
    elif state.waits not in (Waits.NOTHING, Waits.HANDSHAKE, Waits.CONNECTING):
        kernels = cell.mode == "drop" or cell.kind in _KERNEL
        if kernels and answer is not Answer.SILENT:
            bound *= 2
    if state.waits is Waits.CONNECTING and cell.kind in _KERNEL:
        bound += _LOOK
    if cell.mode == "keep" and cell.kind in _KERNEL | {"descriptor"}:
        bound += _ASKED_NEXT.get(state.waits, 0.0)
    # TCP_USER_TIMEOUT knows nothing of the silence before anything was sent.
    late = state.delay > _PROBED or cell.mode == "drop" or cell.kind in _KERNEL | {"descriptor"}
    return bound + GRACE + (state.delay if late else 0.0)


def earliest(cell: Cell) -> float:
    """Seconds after the break before which it would be a false alarm."""
    if STATES[cell.state].waits is Waits.CONNECTING and PLACES[cell.place].answer is not Answer.SILENT:
        return 0.0  # whoever connects is told at once that there is no way
    return EARLIEST


def causes(cell: Cell) -> frozenset[str]:
    """Why: one of these."""
    waits, answer = STATES[cell.state].waits, PLACES[cell.place].answer
    if (
        answer is Answer.ICMP
        and waits in (Waits.IN_FLIGHT, Waits.WRITTEN)
        and cell.mode == "drop"
        and cell.kind in _OWN
    ):
        return _NO_WAY  # the kernel ends it, and has heard; the error of others' connections is theirs to read
    return CAUSES[answer][waits]


def problems(seen: Seen) -> list[str]:
    """What is not as the contract says; "missed", "late", "early", "cause", "callbacks", "log", "count" come first."""
    cell = seen.cell
    if cell.state not in STATES:  # something that concerns no single connection
        return [f"whole: {seen.unready}"]
    if seen.unready:
        return [f"unready: {seen.unready}"]
    if not expected(cell):
        return []
    if seen.told_at is None:
        return [f"missed: bound {latest(cell):.2f} s", *_left(seen)]
    return [*_times(seen), *_why(seen), *_how_often(seen), *_left(seen)]


def _times(seen: Seen) -> list[str]:
    assert seen.told_at is not None
    assert seen.ended_at is not None
    found, limit = [], latest(seen.cell)
    if seen.ended_at > limit:
        found.append(f"late: after {seen.ended_at:.2f} s, bound {limit:.2f} s")
    if seen.told_at < earliest(seen.cell) - seen.quiet_before:
        found.append(f"early: after {seen.told_at:.2f} s")
    return found


def _why(seen: Seen) -> list[str]:
    cell = seen.cell
    found = []
    if cell.kind in _KERNEL:
        return [] if seen.error_number else [f"error: {seen.error}"]
    if seen.error_number is None and not _ran_out(seen):
        found.append(f"error: {seen.error} is no OSError of the kernel's")
    if cell.kind in _OWN and not seen.is_dead_peer and not (_is_upgrade(cell) or _was_refused(seen) or _ran_out(seen)):
        found.append(f"error: {seen.error} is no DeadPeerError")
    if seen.cause is not None:
        allowed = causes(cell)
        if seen.cause not in allowed:
            found.append(f"cause: {seen.cause}, not {' or '.join(sorted(allowed))}")
        elif seen.is_dead_peer and seen.error_number in _UNREACHABLE and seen.cause != "UNREACHABLE":
            found.append(f"cause: {seen.cause} with {errno.errorcode[seen.error_number]}")
    return found


def _how_often(seen: Seen) -> list[str]:
    cell = seen.cell
    if cell.kind in _KERNEL:
        return []
    found = []
    wanted = _wanted(cell)
    events = [name for name in seen.events if name != "lost" or "lost" in wanted or seen.events.count(name) > 1]
    if events != wanted:
        found.append(f"callbacks: {' '.join(seen.events)}, not {' '.join(wanted)}")
    elif not seen.same_error:
        found.append("callbacks: with different errors")
    connects = STATES[cell.state].waits is Waits.CONNECTING or cell.state == "TLS handshake"
    if connects:
        # Whoever connects is told by an exception, and may try again: kaio counts it, and need not log it. What
        # others connect is theirs.
        if seen.logged > 1:
            found.append(f"log: {seen.logged} records")
        if seen.counted > 1 or (seen.counted == 0 and cell.kind in _OWN and not (_was_refused(seen) or _ran_out(seen))):
            found.append(f"count: {seen.counted}")
        return found
    if seen.logged != 1:
        found.append(f"log: {seen.logged} records")
    if seen.counted != 1:
        found.append(f"count: {seen.counted}")
    return found


def _wanted(cell: Cell) -> list[str]:
    state = STATES[cell.state]
    if state.waits is Waits.CONNECTING or cell.state == "TLS handshake":
        return ["error"]
    if _is_upgrade(cell):
        return ["error"]
    return ["dead", "lost"] if cell.kind in ("own", "connection") else ["lost"]


def _is_upgrade(cell: Cell) -> bool:
    """Whether its owner is told by what `start_tls` raises, which is the loop's own error: it has nothing else then."""
    return cell.state == "STARTTLS handshake" and cell.kind in ("others", "streams")


def _was_refused(seen: Seen) -> bool:
    """Whether our own host would not even try to connect: EINVAL, EACCES and EPERM may be the caller's mistake, too."""
    return STATES[seen.cell.state].waits is Waits.CONNECTING and seen.error_number in (
        errno.EINVAL,
        errno.EACCES,
        errno.EPERM,
    )


def _ran_out(seen: Seen) -> bool:
    """Whether the time for a TLS handshake ended it, where the kernel gives no verdict: that is no death."""
    return not _can_be_told(seen.cell) and "SSL handshake is taking longer" in seen.error


def _keeps_bytes(cell: Cell) -> bool:
    """Whether what had arrived before the death is to be delivered.

    TLS reads on while its application does not, and what it holds goes when the loop hears of the kernel's verdict: so
    it is on the bare loops, for what is not kaio's own, and on uvloop for all that does not buffer by itself.
    """
    return not cell.state.startswith("TLS") or cell.kind == "connection" or (cell.kind, cell.loop) == ("own", "asyncio")


def _left(seen: Seen) -> list[str]:
    found = [f"left: {what}" for what in seen.left]
    if seen.lost_bytes and _keeps_bytes(seen.cell):
        found.append(f"bytes: {seen.lost_bytes} that had arrived were never delivered")
    return found
