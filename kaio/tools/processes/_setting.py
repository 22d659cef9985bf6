"""Setting a policy on each socket of a process from outside.

Rules kept here: if the program has set times itself, before or after, all its options are kept; each socket is set
once. No monitor runs in the process, so the kernel's TCP_USER_TIMEOUT bounds data in flight. It cannot tell a stalled
peer from a dead one, so it is removed while a peer is stalled and answers window probes. A listening socket gets none
until it is seen that the program sets no times on what it accepts: beside its own times, an inherited user timeout
could let one lost probe end the connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple, TypeAlias

from ...errors import KeepaliveError, PolicyError
from ...kernel.options import SocketLike, platform
from ...kernel.sockets import apply
from ...kernel.tcpinfo import TcpState
from ...liveness.health import window_is_shut
from ...liveness.limits import Limits
from ...liveness.watch import Watch
from ...monitor.deadline import cap_backoff
from ...policy import Keepalive, SocketState
from ...policy.fields import MAX_COUNT, MAX_SECONDS
from ..kernel_policy import in_kernel
from ._access import Process
from ._records import Record, Records, start_of
from ._sockets import ProcessSocket, read
from ._system import Systems

__all__ = ["Change", "Memory", "Outcome", "Setter"]

_Place: TypeAlias = tuple[int, int]


class Outcome(enum.StrEnum):
    """The result for a socket."""

    SET = "set"
    """The policy was set, or would be in a dry run."""
    SAME = "same"
    """The socket already had the policy."""
    KEPT = "kept"
    """The socket's own options were kept."""
    LIFTED = "lifted"
    """The user timeout that kaio had set was removed."""
    RESTORED = "restored"
    """The user timeout was set again."""
    UNDONE = "undone"
    """The socket has the options again that it had before kaio set any."""
    FAILED = "failed"
    """The kernel rejected the policy, or it is invalid there. The socket has its previous options."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change to a socket, made or, in a dry run, planned."""

    socket: ProcessSocket
    """The socket before the change."""
    outcome: Outcome
    after: SocketState
    """The options after the change."""
    why: str = ""

    def because(self, reason: str) -> Change:
        """The same, with another reason before its own."""
        return dataclasses.replace(self, why=f"{reason}; {self.why}" if self.why else reason)


@dataclasses.dataclass(slots=True)
class _Known:
    """What is remembered of a socket."""

    given: SocketState | None = None  # the options that kaio set; None: none, or changed by the program
    watch: Watch | None = None  # of its peer, with stalled="keep"
    undone: bool = False  # it has its earlier options again, by way of another process that shares it
    lifted: bool = False  # its user timeout is removed for now


class Memory:
    """What is remembered of the sockets from look to look, whichever policy they have."""

    def __init__(self) -> None:
        self.known: Final[dict[int, _Known]] = {}
        """By inode."""
        self.places: Final[set[_Place]] = set()
        """Of listening sockets on which a policy was set."""

    def __len__(self) -> int:
        return len(self.known)

    def add_unwanted(self, inode: int) -> bool:
        """Remember a socket that is left alone. Returns whether it is new."""
        fresh = inode not in self.known
        self.known.setdefault(inode, _Known())
        return fresh

    def forget_others(self, seen: Collection[int]) -> None:
        """Forget all sockets but those with these inodes."""
        for inode in self.known.keys() - seen:
            del self.known[inode]


class Setter:
    """Sets the policy on new sockets, and checks those that it has set."""

    def __init__(
        self,
        policy: Keepalive,
        memory: Memory,
        records: Records,
        *,
        force: bool,
        dry_run: bool,
        by_kernel: Keepalive | None = None,
        excepted: Callable[[ProcessSocket], bool] | None = None,
    ) -> None:
        self._policy = policy
        self._force = force
        self._dry_run = dry_run
        self._known = memory.known
        self._places = memory.places
        self._records = records
        self._excepted = excepted
        self._by_kernel = by_kernel  # the policy that the kernel gives to connections by itself

    def look_at(self, process: Process, seen: dict[int, int]) -> list[Change]:
        """Set or check all sockets of a process, listening ones first, and add their inodes and cookies to `seen`.

        Raises `ProcessError`.
        """
        changes: list[Change] = []
        while True:
            found = read(process, Systems())
            seen.update((one.inode, one.cookie) for one in found)
            found = [one for one in found if self._can_have(one, changes)]
            accepted = self._accepted(found)
            wanted = {one.inode: self._wanted(one, accepted) for one in found if one.inode not in self._known}
            told = len(changes)
            for one in sorted(found, key=lambda one: not one.listening):
                policy = wanted.get(one.inode)
                change = (
                    self._look_again(process, one, accepted)
                    if policy is None
                    else self._set_new(process, one, policy, accepted)
                )
                if change is not None:
                    changes.append(change)
            # A listening socket may have accepted queued connections before it was set.
            if not any(change.socket.listening and change.outcome is Outcome.SET for change in changes[told:]):
                return changes

    # -- new sockets

    def _can_have(self, found: ProcessSocket, changes: list[Change]) -> bool:
        """Whether the policy is valid with the defaults of a socket's network namespace, which others may choose."""
        try:
            in_kernel(self._policy, found.system)
        except PolicyError as exc:
            if found.inode not in self._known:
                self._known[found.inode] = _Known()
                changes.append(Change(socket=found, outcome=Outcome.FAILED, after=found.state, why=str(exc)))
            return False
        return True

    def _wanted(self, found: ProcessSocket, accepted: _Accepted) -> Keepalive:
        """The policy for one socket, as the kernel alone enforces it."""
        policy = in_kernel(self._policy, found.system)
        waits = found.listening and _place(found) not in accepted.plain
        if not policy.enabled:
            return policy
        if found.mptcp or waits or self._is_stalled(found):
            policy = dataclasses.replace(policy, user_timeout=None)
        return policy

    def _is_stalled(self, found: ProcessSocket) -> bool:
        """Whether the user timeout, which is measured from when the window shut, could end the connection at once."""
        return self._policy.stalled == "keep" and found.info is not None and window_is_shut(found.info)

    def _accepted(self, found: Sequence[ProcessSocket]) -> _Accepted:
        """What the program does with the connections that it accepts, by where its listening sockets are."""
        connections = [one for one in found if one.peer is not None]
        own = {_place(one) for one in connections if one.chosen and not self._is_kaio_s(one)}
        return _Accepted(own, {_place(one) for one in connections} - own)

    def _is_kaio_s(self, found: ProcessSocket) -> bool:
        """Whether a socket's times are the policy's, or kaio's from an earlier command."""
        times = _times(found.state)
        if times == _times(_state(in_kernel(self._policy, found.system))):
            return True
        return self._earlier(found) is not None

    def _earlier(self, found: ProcessSocket) -> Record | None:
        """What kaio has set on a socket, or on the one that accepted it, if it still has it."""
        if self._has_kernel_s(found):
            system = found.system
            before = SocketState(enabled=False, idle=system.idle, interval=system.interval, count=system.count)
            return Record(found.pid, 0, 0, before, found.state)
        record = self._records.find(found.cookie)
        if record is not None:
            return record if _still_has(found.state, record.given) else None
        if found.peer is None or not found.state.enabled:
            return None
        return self._records.of_listener(found.network, found.local[1], found.state.times)

    def _has_kernel_s(self, found: ProcessSocket) -> bool:
        """Whether a connection has the policy that the kernel gives to all by itself."""
        if self._by_kernel is None or found.peer is None:
            return False
        try:
            return found.state == _state(in_kernel(self._by_kernel, found.system))
        except PolicyError:
            return False

    def _set_new(self, process: Process, found: ProcessSocket, policy: Keepalive, accepted: _Accepted) -> Change | None:
        """Set the policy on a new socket unless its own options are kept; None if it was closed."""
        wanted = _state(policy)
        known = self._known[found.inode] = _Known()
        if self._excepted is not None and self._excepted(found):
            return Change(socket=found, outcome=Outcome.KEPT, after=found.state, why="it is excepted")
        if _equal(found.state, wanted):
            self._remember(known, found, lifted=found.listening and wanted.user_timeout is None)
            return Change(socket=found, outcome=Outcome.SAME, after=found.state, why=self._exceptions(found, policy))
        earlier = self._earlier(found)
        inherited = found.peer is not None and _place(found) in self._places
        if not self._force and found.chosen and earlier is None:
            if inherited and _times(found.state) == _times(wanted):
                return self._set(process, found, policy, known)
            if inherited and found.state.user_timeout == wanted.user_timeout is not None:
                return self._lift(process, found, "the program has set its own times; the user timeout was kaio's")
            return Change(
                socket=found, outcome=Outcome.KEPT, after=found.state, why="the program has set its own times"
            )
        if not self._force and found.listening and _place(found) in accepted.own:
            why = "the program sets times on accepted connections"
            return Change(socket=found, outcome=Outcome.KEPT, after=found.state, why=why)
        return self._set(process, found, policy, known)

    def _set(self, process: Process, found: ProcessSocket, policy: Keepalive, known: _Known) -> Change | None:
        after = _state(policy)
        if not self._dry_run:
            sock = process.duplicate(found.fd, found.inode)
            if sock is None:
                return None
            with sock:
                try:
                    after = apply(sock, policy)
                except KeepaliveError as exc:
                    why = str(exc.strerror)
                    return Change(socket=found, outcome=Outcome.FAILED, after=found.state, why=why)
            self._record(found, after)
        self._remember(known, found, lifted=found.listening and policy.user_timeout is None)
        return Change(socket=found, outcome=Outcome.SET, after=after, why=self._exceptions(found, policy))

    def _record(self, found: ProcessSocket, after: SocketState) -> None:
        """Remember for the next command what was set."""
        earlier = self._earlier(found)
        before = found.state if earlier is None else earlier.before
        port = found.local[1] if found.listening else 0
        self._records.put(found.cookie, Record(found.pid, start_of(found.pid), port, before, after, found.network))

    def _exceptions(self, found: ProcessSocket, policy: Keepalive) -> str:
        """What the policy does not cover, in words; else ""."""
        if found.listening:
            # Of a listening socket, this is the length of its accept queue (net/ipv4/tcp.c, tcp_get_info).
            queued = 0 if found.info is None else found.info.unacked
            waits = policy.user_timeout is None and self._bound(found) is not None and not found.mptcp
            reasons = [f"{queued} connections in the accept queue keep their options"] if queued else []
            reasons += ["no user timeout: the program may set times on accepted connections"] if waits else []
            return "; ".join(reasons)
        if found.mptcp and self._policy.effective_user_timeout:
            return "Multipath TCP has no user timeout"
        return "no user timeout while the peer is stalled" if self._is_stalled(found) else ""

    def _bound(self, found: ProcessSocket) -> float | None:
        return in_kernel(self._policy, found.system).effective_user_timeout

    def _remember(self, known: _Known, found: ProcessSocket, *, lifted: bool) -> None:
        policy = in_kernel(self._policy, found.system)
        if found.mptcp and policy.enabled:
            policy = dataclasses.replace(policy, user_timeout=None)
        known.given = given = _state(policy)
        if found.listening:
            self._places.add(_place(found))
            known.lifted = lifted and given.user_timeout is not None
        elif self._policy.stalled == "keep" and given.idle and given.interval and given.count and given.user_timeout:
            limits = Limits(given.idle, given.interval, given.count, given.user_timeout)
            known.watch = Watch(limits, since=time.monotonic())
            known.lifted = self._is_stalled(found)

    # -- undoing

    def undo(self, process: Process) -> list[Change]:
        """Give the sockets of a process back what they had before kaio set any options. Raises `ProcessError`."""
        # Connections before the listening socket from whose record it is known what theirs are.
        found = sorted(read(process, Systems()), key=lambda one: one.listening)
        fresh = [one for one in found if self._known.setdefault(one.inode, _Known()).undone is False]
        return [change for one in fresh if (change := self._undo_one(process, one)) is not None]

    def _undo_one(self, process: Process, found: ProcessSocket) -> Change | None:
        earlier = self._earlier(found)
        if earlier is None:
            changed = self._records.find(found.cookie) is not None
            why = "the program has changed its options since" if changed else "attach has set none here"
            return Change(socket=found, outcome=Outcome.KEPT, after=found.state, why=why)
        after = _settable(earlier.before)
        why = "" if after == earlier.before else "the nearest to the system's times that a socket can have"
        if not self._dry_run:
            sock = process.duplicate(found.fd, found.inode)
            if sock is None:
                return None
            with sock:
                try:
                    platform.write(sock, after)
                    after = platform.read(sock)
                except OSError as exc:
                    return Change(socket=found, outcome=Outcome.FAILED, after=found.state, why=str(exc.strerror))
            self._records.drop(found.cookie)
        self._known.setdefault(found.inode, _Known()).undone = True
        return Change(socket=found, outcome=Outcome.UNDONE, after=after, why=why)

    # -- known sockets

    def _look_again(self, process: Process, found: ProcessSocket, accepted: _Accepted) -> Change | None:
        known = self._known[found.inode]
        given = known.given
        if given is None or self._dry_run:
            return None
        ours = None if known.lifted else given.user_timeout
        its_own_times = _times(found.state) != _times(given)
        if its_own_times or found.state.user_timeout != ours:
            known.given = None
            if its_own_times and ours is not None and found.state.user_timeout == ours:
                return self._lift(process, found, "the program has set its own times")
            return None
        if found.listening:
            return self._look_again_at_listener(process, found, known, accepted)
        return self._check_stall(process, found, known)

    def _look_again_at_listener(
        self, process: Process, found: ProcessSocket, known: _Known, accepted: _Accepted
    ) -> Change | None:
        """Set or remove the user timeout, as accepted connections show that the program sets no times, or does."""
        bound = known.given.user_timeout if known.given is not None else None
        if bound is None or self._force:
            return None
        if not known.lifted and _place(found) in accepted.own:
            known.lifted = True
            return self._lift(process, found, "the program sets times on accepted connections")
        if known.lifted and _place(found) in accepted.plain:
            known.lifted = False
            after = self._change_user_timeout(process, found, bound)
            why = "the program sets no times on accepted connections"
            return None if after is None else Change(socket=found, outcome=Outcome.SET, after=after, why=why)
        return None

    def _change_user_timeout(self, process: Process, found: ProcessSocket, seconds: float | None) -> SocketState | None:
        """Set a socket's user timeout alone. Returns its options; None if it was closed."""
        sock = process.duplicate(found.fd, found.inode)
        if sock is None:
            return None
        with sock:
            _set_user_timeout(sock, seconds)
        after = dataclasses.replace(found.state, user_timeout=seconds)
        self._record(found, after)
        return after

    def _check_stall(self, process: Process, found: ProcessSocket, known: _Known) -> Change | None:
        """Remove or restore the user timeout, as the watch decides. The kernel ends the connection."""
        if known.watch is None or found.info is None or found.tcp_state == TcpState.CLOSE:
            return None
        decision = known.watch.look(found.info, time.monotonic())
        if decision.spare and not known.lifted:
            known.lifted = True
            return self._lift(process, found, "the peer is stalled, and answers", known.watch, decision.cap)
        if known.lifted and not decision.spare:
            known.lifted = False
            return self._restore(process, found, known.watch, dead=decision.cause is not None)
        return None

    def _lift(
        self, process: Process, found: ProcessSocket, why: str, watch: Watch | None = None, cap: float | None = None
    ) -> Change | None:
        after = dataclasses.replace(found.state, user_timeout=None)
        if not self._dry_run:
            sock = process.duplicate(found.fd, found.inode)
            if sock is None:
                return None
            with sock:
                _set_user_timeout(sock, None)
                if watch is not None:
                    cap_backoff(watch, sock, cap)
        return Change(socket=found, outcome=Outcome.LIFTED, after=after, why=why)

    def _restore(self, process: Process, found: ProcessSocket, watch: Watch, *, dead: bool) -> Change | None:
        bound = watch.limits.user_timeout
        sock = process.duplicate(found.fd, found.inode)
        if sock is None:
            return None
        with sock:
            _set_user_timeout(sock, bound)
            if not dead:  # the kernel ends the connection when it sends the next window probe, soon
                cap_backoff(watch, sock, None)
        after = dataclasses.replace(found.state, user_timeout=bound)
        why = "the peer is stalled, and stopped answering" if dead else "the peer accepts data again"
        return Change(socket=found, outcome=Outcome.RESTORED, after=after, why=why)


class _Accepted(NamedTuple):
    """Where connections were accepted."""

    own: set[_Place]
    """Where the program sets times of its own, on one at least."""
    plain: set[_Place]
    """Where it sets none."""


def _place(found: ProcessSocket) -> _Place:
    """Where connections are accepted: by network namespace and port, which containers have each for themselves."""
    return found.network, found.local[1]


def _state(policy: Keepalive) -> SocketState:
    """The options of a socket with a policy that `in_kernel` has returned."""
    if not policy.enabled:
        return SocketState(enabled=False)
    return SocketState(
        enabled=True,
        idle=policy.idle,
        interval=policy.interval,
        count=policy.count,
        user_timeout=policy.effective_user_timeout,
    )


def _settable(state: SocketState) -> SocketState:
    """The options that a socket can have, nearest to some that it had from the system, whose limits are wider."""

    def near(value: float | None) -> float | None:
        return None if value is None else min(max(value, 1), MAX_SECONDS)

    count = None if state.count is None else min(max(state.count, 1), MAX_COUNT)
    return dataclasses.replace(state, idle=near(state.idle), interval=near(state.interval), count=count)


def _still_has(state: SocketState, given: SocketState) -> bool:
    """Whether a socket has the options that were set, or the same without the user timeout, which may be lifted."""
    return _times(state) == _times(given) and state.user_timeout in (None, given.user_timeout)


def _equal(state: SocketState, wanted: SocketState) -> bool:
    return state.user_timeout == wanted.user_timeout and _times(state) == _times(wanted)


def _times(state: SocketState) -> tuple[float | None, float | None, int | None] | None:
    """The options that matter while nothing is in flight; None: keepalive is off."""
    return state.times if state.enabled else None


def _set_user_timeout(sock: SocketLike, seconds: float | None) -> None:
    """Set TCP_USER_TIMEOUT alone, unless the connection has ended."""
    with contextlib.suppress(KeepaliveError):
        platform.set_user_timeout(sock, seconds)
