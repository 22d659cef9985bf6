"""Setting a policy on each socket of a process from outside.

Rules kept here: if the program has set times itself, before or after, all its options are kept; each socket is set
once. No monitor runs in the process, so the kernel's TCP_USER_TIMEOUT bounds data in flight. It cannot tell a stalled
peer from a dead one, so it is removed while a peer is stalled and answers window probes.
"""

from __future__ import annotations

import contextlib
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
from ..kernel_policy import in_kernel
from ._access import Process
from ._sockets import ProcessSocket, read
from ._system import Systems

__all__ = ["Change", "Outcome", "Setter"]


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
    FAILED = "failed"
    """The kernel rejected the policy. The socket has its previous options."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change to a socket, made or, in a dry run, planned."""

    socket: ProcessSocket
    """The socket before the change."""
    outcome: Outcome
    after: SocketState
    """The options after the change."""
    why: str = ""


@dataclasses.dataclass(slots=True)
class _Known:
    """What is remembered of a socket."""

    given: SocketState | None = None  # the options that kaio set; None: none, or changed by the program
    watch: Watch | None = None  # of its peer, with stalled="keep"
    lifted: bool = False  # its user timeout is removed for now


class Setter:
    """Sets the policy on new sockets, and checks those that it has set."""

    def __init__(self, policy: Keepalive, *, force: bool, dry_run: bool) -> None:
        in_kernel(policy)  # raises PolicyError before anything is changed
        self._policy = policy
        self._force = force
        self._dry_run = dry_run
        self._known: dict[int, _Known] = {}  # by inode
        self._ports: set[int] = set()  # of listening sockets on which the policy was set

    def __len__(self) -> int:
        return len(self._known)

    def forget_others(self, seen: set[int]) -> None:
        """Forget all sockets but those with these inodes."""
        self._known = {inode: known for inode, known in self._known.items() if inode in seen}

    def look_at(self, process: Process, seen: set[int]) -> list[Change]:
        """Set or check all sockets of a process, listening ones first, and add their inodes to `seen`.

        Raises `ProcessError`.
        """
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
                    self._look_again(process, one, own) if policy is None else self._set_new(process, one, policy, own)
                )
                if change is not None:
                    changes.append(change)
            # A listening socket may have accepted queued connections before it was set.
            if not any(change.socket.listening and change.outcome is Outcome.SET for change in changes[told:]):
                return changes

    # -- new sockets

    def _wanted(self, found: ProcessSocket) -> Keepalive:
        """The policy for one socket, as the kernel alone enforces it."""
        policy = in_kernel(self._policy, found.system)
        if found.mptcp or self._is_stalled(found):
            policy = dataclasses.replace(policy, user_timeout=None)
        return policy

    def _is_stalled(self, found: ProcessSocket) -> bool:
        """Whether the user timeout, which is measured from when the window shut, could end the connection at once."""
        return self._policy.stalled == "keep" and found.info is not None and window_is_shut(found.info)

    def _ports_with_own_times(self, found: Sequence[ProcessSocket]) -> set[int]:
        """The ports of listening sockets on whose accepted connections the program sets its own times."""
        return {
            one.local[1]
            for one in found
            if one.peer is not None and one.chosen and _times(one.state) != _times(_state(self._wanted(one)))
        }

    def _set_new(self, process: Process, found: ProcessSocket, policy: Keepalive, own: set[int]) -> Change | None:
        """Set the policy on a new socket unless its own options are kept; None if it was closed."""
        wanted = _state(policy)
        known = self._known[found.inode] = _Known()
        if _equal(found.state, wanted):
            self._remember(known, found)
            return Change(socket=found, outcome=Outcome.SAME, after=found.state)
        inherited = found.peer is not None and found.local[1] in self._ports
        if not self._force and found.chosen and not (inherited and _times(found.state) == _times(wanted)):
            if inherited and found.state.user_timeout == wanted.user_timeout is not None:
                return self._lift(process, found, "the program has set its own times; the user timeout was kaio's")
            return Change(
                socket=found, outcome=Outcome.KEPT, after=found.state, why="the program has set its own times"
            )
        if not self._force and found.listening and found.local[1] in own:
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
        self._remember(known, found)
        return Change(socket=found, outcome=Outcome.SET, after=after, why=self._exceptions(found))

    def _exceptions(self, found: ProcessSocket) -> str:
        """What the policy does not cover, in words; else ""."""
        if found.listening and found.info is not None and found.info.unacked:
            # Of a listening socket, this is the length of its accept queue (net/ipv4/tcp.c, tcp_get_info).
            return f"{found.info.unacked} connections in the accept queue keep their options"
        if found.mptcp and self._policy.effective_user_timeout:
            return "Multipath TCP has no user timeout"
        return "no user timeout while the peer is stalled" if self._is_stalled(found) else ""

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
            known.lifted = self._is_stalled(found)

    # -- known sockets

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
            return self._lift(process, found, "the program sets times on accepted connections")
        return self._check_stall(process, found, known)

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


def _equal(state: SocketState, wanted: SocketState) -> bool:
    return state.user_timeout == wanted.user_timeout and _times(state) == _times(wanted)


def _times(state: SocketState) -> tuple[float | None, float | None, int | None] | None:
    """The options that matter while nothing is in flight; None: keepalive is off."""
    return state.times if state.enabled else None


def _set_user_timeout(sock: SocketLike, seconds: float | None) -> None:
    """Set TCP_USER_TIMEOUT alone, unless the connection has ended."""
    with contextlib.suppress(KeepaliveError):
        platform.set_user_timeout(sock, seconds)
