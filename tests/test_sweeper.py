"""The sweep that `kaio run` repeats: which sockets are its business, and what it leaves to those that watch them."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

import kaio
from kaio.monitor.owners import claim, release
from kaio.monitor.sweeper import Sweeper

POLICY = kaio.Keepalive(7, 3, 5)
BOUND = 22.0
GRACE = 0.3
TCP = socket.IPPROTO_TCP


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops are quick here."""
    monkeypatch.setattr("kaio.monitor.sweeper.GRACE", GRACE)


class Ends:
    """Both ends of a connection, and the listening socket."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.near = stack.enter_context(socket.create_connection(self.listener.getsockname()))
        self.far = stack.enter_context(self.listener.accept()[0])
        self._stack = stack

    def accept(self) -> socket.socket:
        """Another connection's accepted end."""
        self._stack.enter_context(socket.create_connection(self.listener.getsockname()))
        return self._stack.enter_context(self.listener.accept()[0])

    def stall(self) -> None:
        """Fill the connection from `near`, until `far` takes no more."""
        self.near.setblocking(False)
        quiet = time.monotonic()
        while time.monotonic() < quiet + 0.3:
            with contextlib.suppress(BlockingIOError):
                while self.near.send(bytes(1 << 16)):
                    quiet = time.monotonic()
            time.sleep(0.01)


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A connection whose options nobody has touched."""
    with contextlib.ExitStack() as stack:
        yield Ends(stack)


def user_timeout(sock: socket.socket) -> float | None:
    """In seconds."""
    return sock.getsockopt(TCP, socket.TCP_USER_TIMEOUT) / 1000 or None


def give_times(*socks: socket.socket, user_timeout: float = 0) -> None:
    """What a loop with the same policy does; with a user timeout, one with stalled="drop"."""
    for sock in socks:
        kaio.apply(sock, POLICY)
        sock.setsockopt(TCP, socket.TCP_USER_TIMEOUT, int(user_timeout * 1000))


def set_user_timeout(sock: socket.socket, seconds: float) -> None:
    sock.setsockopt(TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def in_child(function: Callable[[], object]) -> str:
    """What a function returns in a forked process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.write(write, repr(function()).encode())
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def test_the_sweep_leaves_watched_sockets_alone(ends: Ends) -> None:
    """However long: also where it leaves data in flight unbounded."""
    give_times(ends.near, ends.far)
    inodes = [claim(ends.near.fileno(), BOUND), claim(ends.far.fileno(), None)]
    sweeper = Sweeper(POLICY, 5)
    sweeper.sweep()
    time.sleep(GRACE)
    sweeper.sweep()
    assert (user_timeout(ends.near), user_timeout(ends.far)) == (None, None)
    for each in inodes:
        release(each)


def test_a_new_socket_gets_a_user_timeout_only_after_the_grace_time(ends: Ends) -> None:
    """What has the policy's times, and no monitor takes up; one that nobody has covered is bounded at once."""
    give_times(ends.near)
    sweeper = Sweeper(POLICY, 5)
    sweeper.sweep()
    assert (user_timeout(ends.near), user_timeout(ends.far)) == (None, BOUND)
    assert kaio.inspect(ends.far).times == (7, 3, 5)
    time.sleep(GRACE)
    sweeper.sweep()
    assert user_timeout(ends.near) == BOUND


def test_the_grace_time_starts_over_when_a_monitor_releases_a_socket(ends: Ends) -> None:
    """The connection is about to end, or about to be another loop's."""
    give_times(ends.near)
    sweeper = Sweeper(POLICY, 5)
    sweeper.sweep()
    number = claim(ends.near.fileno(), BOUND)
    time.sleep(GRACE)
    sweeper.sweep()
    release(number)
    sweeper.sweep()
    assert user_timeout(ends.near) is None
    time.sleep(GRACE)
    sweeper.sweep()
    assert user_timeout(ends.near) == BOUND


def test_a_socket_is_handed_over_without_our_user_timeout(ends: Ends) -> None:
    """The sweep was first; the monitor spares a stalled peer, and the kernel would not. What others set stands."""
    third = ends.accept()
    sweeper = Sweeper(POLICY, 5)
    sweeper.sweep()
    assert {user_timeout(sock) for sock in (ends.near, ends.far, third)} == {BOUND}
    set_user_timeout(ends.far, 50)
    inodes = [claim(ends.near.fileno(), BOUND), claim(ends.far.fileno(), BOUND), claim(third.fileno(), None)]
    sweeper.sweep()
    assert [user_timeout(sock) for sock in (ends.near, ends.far, third)] == [None, 50, BOUND]
    set_user_timeout(ends.near, BOUND)  # the owner's now, or the application's
    sweeper.sweep()
    assert user_timeout(ends.near) == BOUND
    for each in inodes:
        release(each)


def test_what_a_monitor_accepts_at_a_listener_of_the_sweeps_is_handed_over_too(ends: Ends) -> None:
    """A socket that listened before a loop had it: its connections come with our user timeout."""
    sweeper = Sweeper(POLICY, 5)
    sweeper.sweep()
    accepted, dropping = ends.accept(), ends.accept()
    assert user_timeout(accepted) == user_timeout(dropping) == BOUND
    inodes = [claim(accepted.fileno(), BOUND), claim(dropping.fileno(), None)]
    sweeper.sweep()
    assert [user_timeout(sock) for sock in (accepted, dropping)] == [None, BOUND]
    for each in inodes:
        release(each)


def test_an_equal_user_timeout_set_by_others_is_kept(ends: Ends) -> None:
    """A monitor's, on a connection that the sweep never had."""
    give_times(ends.near, user_timeout=BOUND)
    number = claim(ends.near.fileno(), BOUND)
    sweeper = Sweeper(POLICY, 5)
    sweeper.sweep()
    sweeper.sweep()
    assert user_timeout(ends.near) == BOUND
    release(number)


def test_a_loops_listener_keeps_its_options(ends: Ends) -> None:
    """What it accepts would begin with a user timeout."""
    give_times(ends.listener, ends.near)
    sweeper = Sweeper(POLICY, 5)
    sweeper.sweep()
    time.sleep(GRACE)
    sweeper.sweep()
    assert (user_timeout(ends.listener), user_timeout(ends.near)) == (None, BOUND)


def test_a_stalled_peer_of_a_dropping_loop_is_not_spared(ends: Ends) -> None:
    """Its options are those of a socket that the sweep bounds, until its monitor says whose it is."""
    give_times(ends.near, user_timeout=BOUND)
    ends.stall()
    sweeper = Sweeper(POLICY, 5)
    sweeper.sweep()
    assert user_timeout(ends.near) is None  # nobody's, as far as is known
    number = claim(ends.near.fileno(), None)
    sweeper.sweep()
    assert user_timeout(ends.near) == BOUND
    sweeper.sweep()
    assert user_timeout(ends.near) == BOUND
    release(number)


def test_a_forked_process_leaves_its_parents_connections_alone(ends: Ends) -> None:
    """Those that the parent's monitor watches, and those that it may yet take up; not those of its own."""
    third = ends.accept()
    give_times(ends.near, ends.far, third)
    number = claim(ends.near.fileno(), BOUND)
    sweeper = Sweeper(POLICY, 60)
    sweeper._run_thread()
    sweeper._newcomers[inode(ends.far)] = time.monotonic()

    def child() -> object:
        sweeper._in_child()
        sweeper.sweep()
        time.sleep(GRACE)
        sweeper.sweep()
        return [user_timeout(sock) for sock in (ends.near, ends.far, third)]

    sweeper._before_fork()
    try:
        assert in_child(child) == f"[None, None, {BOUND}]"
    finally:
        sweeper._after_fork()
        sweeper._before_fork()  # ends the thread
        sweeper._forking.release()
    release(number)
