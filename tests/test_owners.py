"""Which sockets a monitor of this process watches: what the process is told, and what can be read from outside."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

import kaio.monitor.owners
from kaio.monitor.owners import claim, is_owned, owned, release
from kaio.tools.processes import watched

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is a memfd on Linux only")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table without what other tests may have left in this process's own."""
    table = kaio.monitor.owners._table
    monkeypatch.setattr(sys.modules[__name__], "OTHERS", frozenset(memfds()))
    monkeypatch.setattr(kaio.monitor.owners, "_table", type(table)())
    yield
    kaio.monitor.owners._table.close()


OTHERS: frozenset[int] = frozenset()
"""Descriptors of the table that this process had before: other tests may have left connections open."""


@contextlib.contextmanager
def sockets(number: int) -> Iterator[list[socket.socket]]:
    """So many sockets."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.socket()) for _ in range(number)]


def memfds() -> list[int]:
    """The descriptors of this process that stand for a table."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/memfd:kaio (deleted)":
                found.append(int(name))
    return [fd for fd in found if fd not in OTHERS]


def inode(sock: socket.socket) -> int:
    """What tells it from others."""
    return os.fstat(sock.fileno()).st_ino


def in_child(function: Callable[[], object]) -> str:
    """What a function returns, or raises, in a forked process."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which one test has on purpose
        pid = os.fork()
    if pid == 0:
        try:
            os.write(write, repr(function()).encode())
        except BaseException as exc:
            os.write(write, repr(exc).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


# -- within the process


def test_a_socket_is_owned_from_its_claim_to_its_release() -> None:
    """With its bound, which another claim changes."""
    with sockets(2) as (one, two):
        first, second = claim(one.fileno(), 60), claim(two.fileno(), None)
        assert (first, second) == (inode(one), inode(two))
        assert owned() == {first: 60, second: None}
        assert claim(one.fileno(), 2.5) == first
        assert owned() == {first: 2.5, second: None}
        release(first)
        assert (is_owned(first), is_owned(second), owned()) == (False, True, {second: None})


def test_claims_and_releases_of_anything_else_do_nothing() -> None:
    """A descriptor that is closed, or none of a socket; an inode that nobody claimed."""
    with open(os.devnull, "rb") as file:
        assert claim(file.fileno(), 1) == 0
    assert claim(-1, 1) == 0
    with sockets(1) as (sock,):
        number = sock.fileno()
    assert claim(number, 1) == 0
    release(0)
    release(10**9)
    assert owned() == {}


@pytest.mark.parametrize(
    ("bound", "kept"), [(math.inf, None), (0, None), (-1, None), (1e-9, 0.001), (2.0001, 2.001), (1e9, 4294967.295)]
)
def test_bounds_are_kept_in_whole_milliseconds(bound: float, kept: float | None) -> None:
    """Rounded up, as the kernel's are, and as long as four bytes can say."""
    with sockets(1) as (sock,):
        number = claim(sock.fileno(), bound)
        assert owned() == watched(os.getpid()) == {number: kept}
        release(number)


# -- from outside


def test_other_processes_can_read_the_registry() -> None:
    """The same as the process itself does, in a file that is there only as long as something is claimed."""
    before = memfds()
    with sockets(3) as (one, two, three):
        inodes = [claim(one.fileno(), 60), claim(two.fileno(), None), claim(three.fileno(), 0.0001)]
        assert watched(os.getpid()) == dict(zip(inodes, [60, None, 0.001], strict=True))
        release(inodes[2])
        claim(two.fileno(), 1.5)
        assert watched(os.getpid()) == owned() == dict(zip(inodes, [60, 1.5], strict=False))
        (memfd,) = set(memfds()) - set(before)
        assert not os.get_inheritable(memfd)
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/self/fd/{memfd}", 0)  # would be our end by SIGBUS
        for each in inodes:
            release(each)
    assert watched(os.getpid()) == {}
    assert memfds() == before


def test_twenty_thousand_claims() -> None:
    """The table grows with them, uses its records again, and a claim costs little more than its fstat()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = min(20_000, hard - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with sockets(number) as them:
            numbers = [sock.fileno() for sock in them]
            began = time.process_time()
            for each in numbers:
                os.fstat(each)
            looked = time.process_time()
            inodes = [claim(each, each) for each in numbers]
            claimed = time.process_time()
            assert watched(os.getpid()) == owned() == dict(zip(inodes, numbers, strict=True))
            size = len(kaio.monitor.owners._table._memory)
            assert 16 * number < size < 64 * number
            for each in inodes[: number // 2]:
                release(each)
            for each in numbers[: number // 2]:
                claim(each, 1)
            assert len(kaio.monitor.owners._table._memory) == size
            assert len(watched(os.getpid())) == number
            for each in inodes:
                release(each)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert claimed - looked < 20 * (looked - began)


READER = """
import sys
from kaio.tools.processes import watched

seen, wrong = 0, []
while not sys.stdin.closed:
    for inode, bound in watched(int(sys.argv[1])).items():
        seen += 1
        if bound != (inode % 997 + 1) / 1000:
            wrong.append((inode, bound))
    if seen >= 20_000 or wrong:
        break
print(seen, wrong)
"""


def test_a_reader_is_never_misled() -> None:
    """Another process reads all the time while records change hands as fast as they can."""
    with (
        sockets(40) as them,
        subprocess.Popen(
            [sys.executable, "-c", READER, str(os.getpid())], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        ) as reader,
    ):
        try:
            until = time.monotonic() + 30
            while reader.poll() is None and time.monotonic() < until:
                for sock in them:
                    claim(sock.fileno(), (inode(sock) % 997 + 1) / 1000)
                for sock in reversed(them):
                    release(inode(sock))
        finally:
            reader.kill() if reader.poll() is None else None
        assert reader.stdout is not None
        seen, _, wrong = reader.stdout.read().partition(" ")
        assert int(seen) >= 20_000
        assert wrong == "[]\n"


def test_without_a_free_descriptor_only_other_processes_cannot_read_it() -> None:
    """The process goes on with plain memory; once there are descriptors again, all is shown with the next claim."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with sockets(400) as them:
        *some, last = them
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            for sock in some:
                assert claim(sock.fileno(), 5) == inode(sock)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert watched(os.getpid()) == {}
        assert owned() == {inode(sock): 5 for sock in some}
        release(inode(some.pop()))
        time.sleep(1.1)  # it does not ask again with each claim
        claim(last.fileno(), None)
        assert watched(os.getpid()) == owned() == {inode(sock): 5 for sock in some} | {inode(last): None}


def memfd_of(content: bytes, size: int = 0) -> int:
    """A file that looks like a table from afar."""
    fd = os.memfd_create("kaio")
    os.write(fd, content)
    if size:
        os.truncate(f"/proc/self/fd/{fd}", size)
    return fd


def test_invalid_content_is_rejected() -> None:
    """Whatever memfds of that name hold: nothing is raised, and no other process's is believed."""
    with sockets(1) as (sock,):
        number = claim(sock.fileno(), 9)
        (memfd,) = memfds()
        true = os.pread(memfd, 1 << 20, 0)
        release(number)
        later, other = ((number).to_bytes(4, sys.byteorder) for number in (2, 1))
        forged = true[:16] + b"\xff" * 16
        for content, size, expected in [
            (b"", 0, {}),
            (b"k", 0, {}),
            (b"kaio own", 0, {}),
            (os.urandom(100_003), 0, {}),
            (b"x" + true[1:], 0, {}),
            (true[:8] + later + true[12:], 0, {}),
            (true[:12] + other + true[16:], 0, {}),
            (true[:16], 0, {}),
            (true[:16], 1 << 40, {}),
            (forged + b"left over", 0, {2**64 - 1: 4294967.295}),
        ]:
            fd = memfd_of(content, size)
            try:
                assert watched(os.getpid()) == expected
                claim(sock.fileno(), 9)
                if not content.startswith(true[:16]):
                    assert watched(os.getpid()) == {number: 9}
                release(number)
            finally:
                os.close(fd)
    assert watched(2**22 + 1) == {}


# -- forks, threads, signals, garbage


def test_a_forked_process_has_a_table_of_its_own() -> None:
    """Empty at first, without a descriptor of its parent's, and its claims are not in the parent's."""
    with sockets(2) as (one, two):
        claim(one.fileno(), 9)
        assert in_child(lambda: (owned(), memfds(), watched(os.getpid()))) == "({}, [], {})"

        def claims() -> bool:
            number = claim(two.fileno(), 1)
            release(inode(one))
            return owned() == watched(os.getpid()) == {number: 1} and watched(os.getppid()) == {inode(one): 9}

        assert in_child(claims) == "True"
        assert owned() == watched(os.getpid()) == {inode(one): 9}


def test_a_process_with_its_parents_descriptor_is_not_mistaken_for_the_parent() -> None:
    """As one has that C forks, without Python's knowing."""
    with sockets(1) as (sock,):
        claim(sock.fileno(), 9)
        (memfd,) = memfds()
        copy = os.dup(memfd)
        read, write = os.pipe()
        with subprocess.Popen(["cat"], stdin=read, pass_fds=[copy], stdout=subprocess.DEVNULL) as child:
            assert select.select([], [write], [], 5)[1]
            assert os.readlink(f"/proc/{child.pid}/fd/{copy}") == "/memfd:kaio (deleted)"
            assert watched(child.pid) == {}
            child.kill()
        for fd in (copy, read, write):
            os.close(fd)
        assert len(watched(os.getpid())) == 1


CONTAINED = """
import os, socket, sys
from kaio.monitor.owners import claim
sock = socket.socket()
print(os.getpid(), claim(sock.fileno(), 9), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="making a namespace of processes needs root")
def test_a_process_in_a_container_is_read_from_outside() -> None:
    """There it goes by another number, which is the one that it writes."""
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", CONTAINED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            inside, number = map(int, process.stdout.readline().split())
            with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="utf-8") as file:
                outside = int(file.read())
            assert inside == 1 != outside
            assert watched(outside) == {number: 9}
        finally:
            process.kill()


def test_threads_claim_at_the_same_time() -> None:
    """And fork meanwhile. In the end the table is what was left."""
    with sockets(80) as them:
        done = threading.Event()

        def work(mine: list[socket.socket]) -> None:
            while not done.is_set():
                for sock in mine:
                    claim(sock.fileno(), 1)
                for sock in mine:
                    release(inode(sock))
            claim(mine[0].fileno(), 3)

        threads = [threading.Thread(target=work, args=(them[number::4],)) for number in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert in_child(owned) == "{}"
        done.set()
        for thread in threads:
            thread.join()
        assert owned() == watched(os.getpid()) == {inode(sock): 3 for sock in them[:4]}


def test_collections_and_signals_may_interrupt_a_call() -> None:
    """What is called out of a call neither waits for it nor spoils it."""

    class Ring:
        def __init__(self, sock: socket.socket) -> None:
            self.me, self.sock = self, sock

        def __del__(self) -> None:
            release(claim(self.sock.fileno(), 7))

    thresholds = gc.get_threshold()
    with sockets(302) as (collected, interrupting, *them):
        before = signal.signal(signal.SIGALRM, lambda *_: release(claim(interrupting.fileno(), 8)))
        gc.set_threshold(1)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0002)
        try:
            until = time.monotonic() + 1
            while time.monotonic() < until:
                for sock in them:
                    Ring(collected)
                    claim(sock.fileno(), 1)
                for sock in them[1:]:
                    release(inode(sock))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            gc.set_threshold(*thresholds)
            gc.collect()
        assert owned() == watched(os.getpid()) == {inode(them[0]): 1}


def test_an_interrupt_leaves_a_consistent_table() -> None:
    """Ctrl-C in the middle of a claim: it may have been made or not, and inside and outside agree about it."""
    with sockets(300) as them:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            until = time.monotonic() + 1
            while time.monotonic() < until:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 0.001)
                    while True:
                        for sock in them:
                            claim(sock.fileno(), 1)
                        for sock in them:
                            release(inode(sock))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        claim(them[0].fileno(), 1)
        assert watched(os.getpid()) == owned()
