"""What is done to each socket that gets a policy from outside.

Rules kept here: what the program chose itself stands, before and after, as a whole and not option by option; each
socket is set once. From outside there is nothing but the kernel, so the user timeout is the kernel's own, which cannot
tell a stalled peer from a dead one: it is lifted from sockets that are seen to be stalled and to answer, as kaio's
monitor spares those of its own.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Sequence

from ...errors import KeepaliveError
from ...kernel.options import SocketLike, platform
from ...kernel.sockets import apply
from ...kernel.tcpinfo import TcpState
from ...liveness.health import window_is_shut
from ...liveness.limits import Limits
from ...liveness.watch import Watch
from ...monitor.deadline import cap_backoff
from ...policy import Keepalive, SocketState
from ..sysctls import Defaults
from ._access import Process
from ._sockets import ProcessSocket, read
from ._system import Systems

__all__ = ["Change", "Outcome", "Setter", "in_kernel"]


class Outcome(enum.StrEnum):
    """What became of a socket."""

    SET = "set"
    """It has the policy now; in a dry run, it would."""
    SAME = "same"
    """It had all of it before."""
    KEPT = "kept"
    """It was left alone."""
    LIFTED = "lifted"
    """Our user timeout was taken away from it."""
    RESTORED = "restored"
    """It was given our user timeout back."""
    FAILED = "failed"
    """The kernel refused. It has what it had before."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What was done to a socket, or would be in a dry run."""

    socket: ProcessSocket
    """As it was before."""
    outcome: Outcome
    after: SocketState
    """What the kernel has now; in a dry run, what it would have."""
    why: str = ""


@dataclasses.dataclass(slots=True)
class _Known:
    """A socket that was seen before."""

    given: SocketState | None = None  # what it has from us; None: nothing, or the program has changed it since
    watch: Watch | None = None  # of its peer, where a stalled one is spared
    lifted: bool = False  # its user timeout, for the time being


class Setter:
    """Gives sockets a policy, and looks after those that it gave it to."""

    def __init__(self, policy: Keepalive, *, force: bool, dry_run: bool) -> None:
        in_kernel(policy)  # what the kernel does not take is found out before
        self._policy = policy
        self._force = force
        self._dry_run = dry_run
        self._known: dict[int, _Known] = {}  # by inode
        self._ports: set[int] = set()  # of listeners that have the policy from us

    def __len__(self) -> int:
        return len(self._known)

    def forget_others(self, seen: set[int]) -> None:
        """Only sockets of these inodes exist any longer."""
        self._known = {inode: known for inode, known in self._known.items() if inode in seen}

    def look_at(self, process: Process, seen: set[int]) -> list[Change]:
        """See to all sockets of a process, listeners first; their inodes are added to `seen`. Raises ProcessError."""
        changes: list[Change] = []
        while True:
            found = read(process, Systems())
            seen.update(one.inode for one in found)
            own = self._ports_with_own_times(found)
            wanted = {one.inode: self._wanted(one) for one in found if one.inode not in self._known}
            told = len(changes)
            for one in sorted(found, key=lambda one: not one.listening):
                policy = wanted.get(one.inode)
                change = (
                    self._look_again(process, one, own) if policy is None else self._meet(process, one, policy, own)
                )
                if change is not None:
                    changes.append(change)
            # While a listener was being set, it may have accepted others that had been waiting.
            if not any(change.socket.listening and change.outcome is Outcome.SET for change in changes[told:]):
                return changes

    # -- sockets that are new

    def _wanted(self, found: ProcessSocket) -> Keepalive:
        """The policy in terms of the kernel, for one socket."""
        policy = in_kernel(self._policy, found.system)
        if found.mptcp or self._is_spared(found):
            policy = dataclasses.replace(policy, user_timeout=None)
        return policy

    def _is_spared(self, found: ProcessSocket) -> bool:
        """Whether the user timeout, which counts from when the window shut, could end it at once."""
        return self._policy.stalled == "keep" and found.info is not None and window_is_shut(found.info)

    def _ports_with_own_times(self, found: Sequence[ProcessSocket]) -> set[int]:
        """The ports of listeners that had connections which the program then gave times of its own."""
        return {
            one.local[1]
            for one in found
            if one.peer is not None and one.chosen and _times(one.state) != _times(_state(self._wanted(one)))
        }

    def _meet(self, process: Process, found: ProcessSocket, policy: Keepalive, own: set[int]) -> Change | None:
        """A socket that was not seen before. None: it is gone."""
        wanted = _state(policy)
        known = self._known[found.inode] = _Known()
        if _equal(found.state, wanted):
            self._remember(known, found)
            return Change(socket=found, outcome=Outcome.SAME, after=found.state)
        inherited = found.peer is not None and found.local[1] in self._ports
        if not self._force and found.chosen and not (inherited and _times(found.state) == _times(wanted)):
            if inherited and found.state.user_timeout == wanted.user_timeout is not None:
                return self._lift(process, found, "the program's own times; the user timeout was ours")
            return Change(socket=found, outcome=Outcome.KEPT, after=found.state, why="it has times of its own")
        if not self._force and found.listening and found.local[1] in own:
            why = "what it accepts is given times by the program"
            return Change(socket=found, outcome=Outcome.KEPT, after=found.state, why=why)
        return self._set(process, found, policy, known)

    def _set(self, process: Process, found: ProcessSocket, policy: Keepalive, known: _Known) -> Change | None:
        after = _state(policy)
        if not self._dry_run:
            sock = process.borrow(found.fd, found.inode)
            if sock is None:
                return None
            with sock:
                try:
                    after = apply(sock, policy)
                except KeepaliveError as exc:
                    why = str(exc.strerror)
                    return Change(socket=found, outcome=Outcome.FAILED, after=found.state, why=why)
        self._remember(known, found)
        return Change(socket=found, outcome=Outcome.SET, after=after, why=self._but(found))

    def _but(self, found: ProcessSocket) -> str:
        """What the policy does not reach."""
        if found.listening and found.info is not None and found.info.unacked:
            # Of a listener, this is the length of its queue (net/ipv4/tcp.c, tcp_get_info).
            return f"{found.info.unacked} that wait to be accepted keep what they have"
        if found.mptcp and self._policy.effective_user_timeout:
            return "MPTCP has no user timeout"
        return "stalled now: no user timeout" if self._is_spared(found) else ""

    def _remember(self, known: _Known, found: ProcessSocket) -> None:
        policy = in_kernel(self._policy, found.system)
        if found.mptcp:
            policy = dataclasses.replace(policy, user_timeout=None)
        known.given = given = _state(policy)
        if found.listening:
            self._ports.add(found.local[1])
        elif self._policy.stalled == "keep" and given.idle and given.interval and given.count and given.user_timeout:
            limits = Limits(given.idle, given.interval, given.count, given.user_timeout)
            known.watch = Watch(limits, since=time.monotonic())
            known.lifted = self._is_spared(found)

    # -- sockets that were seen before

    def _look_again(self, process: Process, found: ProcessSocket, own: set[int]) -> Change | None:
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
            if ours is None or self._force or found.local[1] not in own:
                return None
            known.lifted = True
            return self._lift(process, found, "what it accepts is given times by the program")
        return self._spare(process, found, known)

    def _spare(self, process: Process, found: ProcessSocket, known: _Known) -> Change | None:
        """Lift the user timeout while the peer's window is shut; the verdict is the watch's, the end the kernel's."""
        if known.watch is None or found.info is None or found.tcp_state == TcpState.CLOSE:
            return None
        decision = known.watch.look(found.info, time.monotonic())
        if decision.spare and not known.lifted:
            known.lifted = True
            return self._lift(process, found, "stalled, and answers", known.watch, decision.cap)
        if known.lifted and not decision.spare:
            known.lifted = False
            return self._restore(process, found, known.watch, dead=decision.cause is not None)
        return None

    def _lift(
        self, process: Process, found: ProcessSocket, why: str, watch: Watch | None = None, cap: float | None = None
    ) -> Change | None:
        after = dataclasses.replace(found.state, user_timeout=None)
        if not self._dry_run:
            sock = process.borrow(found.fd, found.inode)
            if sock is None:
                return None
            with sock:
                _set_user_timeout(sock, None)
                if watch is not None:
                    cap_backoff(watch, sock, cap)
        return Change(socket=found, outcome=Outcome.LIFTED, after=after, why=why)

    def _restore(self, process: Process, found: ProcessSocket, watch: Watch, *, dead: bool) -> Change | None:
        bound = watch.limits.user_timeout
        sock = process.borrow(found.fd, found.inode)
        if sock is None:
            return None
        with sock:
            _set_user_timeout(sock, bound)
            if not dead:  # the kernel ends a dead one when it asks next: soon
                cap_backoff(watch, sock, None)
        after = dataclasses.replace(found.state, user_timeout=bound)
        why = "stalled, and no longer answers" if dead else "it takes data again"
        return Change(socket=found, outcome=Outcome.RESTORED, after=after, why=why)


def in_kernel(policy: Keepalive, system: Defaults | None = None) -> Keepalive:
    """The policy as the kernel alone can enforce it: nothing left to the system, and the user timeout its own.

    Raises `PolicyError` where it cannot.
    """
    if not policy.enabled:
        return policy
    system = system or Defaults()
    policy = policy.filled(idle=system.idle, interval=system.interval, count=system.count)
    return dataclasses.replace(policy, stalled="drop")


def _state(policy: Keepalive) -> SocketState:
    """What a socket has that was given such a policy."""
    if not policy.enabled:
        return SocketState(enabled=False)
    return SocketState(
        enabled=True,
        idle=policy.idle,
        interval=policy.interval,
        count=policy.count,
        user_timeout=policy.effective_user_timeout,
    )


def _equal(state: SocketState, wanted: SocketState) -> bool:
    return state.user_timeout == wanted.user_timeout and _times(state) == _times(wanted)


def _times(state: SocketState) -> tuple[float | None, float | None, int | None] | None:
    """What of a state counts while nothing is in flight; None: keepalive is off."""
    return state.times if state.enabled else None


def _set_user_timeout(sock: SocketLike, seconds: float | None) -> None:
    """Set that alone: the one option bounds the handshake and what is sent after it."""
    try:
        platform.set_user_timeout(sock, seconds)
    except KeepaliveError:  # the connection has ended
        pass
