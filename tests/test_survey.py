"""All TCP sockets of a process: what `kaio.report` says of them, and what `kaio.sweep` does to them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import kaio
from kaio.kernel.descriptors import Descriptor
from kaio.liveness.standing import Standing
from kaio.testing import blackhole

POLICY = kaio.Keepalive(7, 3, 5)
TEXT = "7s:3s:5"
TCP = socket.IPPROTO_TCP


@contextlib.contextmanager
def pair(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    """A listening socket, and both ends of a connection to it; nobody has set an option."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2]) as near,
        listener.accept()[0] as far,
    ):
        yield listener, near, far


def rows_of(report: kaio.Report, *socks: socket.socket) -> list[Any]:
    """What a report says of these sockets; a process has others, too."""
    by_number = {row.fd: row for row in report.rows}
    return [by_number.get(sock.fileno()) for sock in socks]


def choose(sock: socket.socket, idle: int) -> None:
    """What an application does that knows of keepalive."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(TCP, socket.TCP_KEEPIDLE, idle)


# -- a descriptor


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_descriptor_answers_as_its_socket_does(host: str) -> None:
    """Options, also those that are structures, addresses, kind; what is set by one is read by the other."""
    with pair(host) as (listener, near, _):
        choose(near, 40)
        near.sendall(b"x")
        for sock in (listener, near):
            found = Descriptor.of(sock.fileno())
            assert (found.fileno(), found.family, found.type) == (sock.fileno(), sock.family, sock.type)
            assert found.getsockname() == sock.getsockname()
            assert found.is_tcp
            assert found.is_listening is (sock is listener)
            assert kaio.inspect(found) == kaio.inspect(sock)
            assert found.getsockopt(TCP, socket.TCP_CONGESTION, 16) == sock.getsockopt(TCP, socket.TCP_CONGESTION, 16)
            assert kaio.health(found).info.state == kaio.health(sock).info.state
            assert len(found.getsockopt(TCP, socket.TCP_INFO, 104)) == 104
        found = Descriptor.of(near.fileno())
        assert found.getpeername() == near.getpeername()
        assert kaio.health(found).state is kaio.State.ALIVE
        assert kaio.health(found).rtt == kaio.health(near).rtt != 0
        found.setsockopt(TCP, socket.TCP_KEEPIDLE, 41)
        assert near.getsockopt(TCP, socket.TCP_KEEPIDLE) == 41
        with pytest.raises(OSError, match="Invalid argument") as caught:
            found.setsockopt(TCP, socket.TCP_KEEPIDLE, 0)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(OSError, match="not connected"):
            Descriptor.of(listener.fileno()).getpeername()


def test_a_descriptor_whose_number_was_reused_is_closed() -> None:
    """And what never was a socket's is none."""
    with pair() as (_, near, _):
        found = Descriptor.of(near.fileno())
        number = near.fileno()
        near.close()
        assert found.fileno() == -1
        with socket.socket() as another:
            assert another.fileno() == number
            assert found.fileno() == -1
            assert Descriptor.of(number).fileno() == number
    out, into = os.pipe()
    try:
        with pytest.raises(OSError, match="Socket operation on non-socket"):
            Descriptor.of(out)
    finally:
        os.close(out)
        os.close(into)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Descriptor.of(out)
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        assert not Descriptor.of(unix.fileno()).is_tcp
        assert not Descriptor.of(datagrams.fileno()).is_tcp


# -- the report


def test_a_report_lists_every_tcp_socket_with_the_reason() -> None:
    """As data and as a table; it changes nothing, and what is not TCP is not in it."""
    with (
        pair() as (listener, covered, own),
        pair("::1") as (_, bare, switched),
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
    ):
        own.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 9_000)
        choose(own, 40)
        switched.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        before = [kaio.inspect(sock) for sock in (listener, own, bare, switched)]

        async def main() -> kaio.Report:
            asyncio.get_running_loop().add_reader(covered, lambda: None)
            asyncio.get_running_loop().remove_reader(covered)
            return kaio.report()

        report = kaio.run(main(), keepalive=POLICY)
        assert [kaio.inspect(sock) for sock in (listener, own, bare, switched)] == before
        assert report.policy == POLICY
        assert rows_of(report, unix, datagrams) == [None, None]
        rows = rows_of(report, listener, covered, own, bare, switched)
        assert [(row.standing, row.listening, row.state.enabled, row.why) for row in rows] == [
            (Standing.UNCOVERED, True, False, "keepalive is off"),
            (Standing.POLICY, False, True, "it has the policy"),
            (Standing.OWN, False, True, "the application chose its times"),
            (Standing.UNCOVERED, False, False, "keepalive is off"),
            (Standing.UNCOVERED, False, True, "keepalive is on with the system's times"),
        ]
        assert {row.fd for row in report.uncovered} >= {listener.fileno(), bare.fileno(), switched.fileno()}
        assert not {row.fd for row in report.uncovered} & {covered.fileno(), own.fileno()}
        host, port = listener.getsockname()
        assert (rows[0].local, rows[0].peer) == (f"{host}:{port}", "")
        assert rows[1].peer == f"{host}:{port}"
        assert rows[3].peer == f"[::1]:{bare.getpeername()[1]}"
        assert str(rows[2].state) == "40s:75s:9,user_timeout=9s"

        head, columns, *lines = str(report).splitlines()
        assert head.startswith(f"kaio: {len(report.rows)} TCP sockets under the policy {TEXT}: ")
        for standing in Standing:
            assert f"{sum(row.standing is standing for row in report.rows)} {standing.value}" in head
        assert columns.split() == ["fd", "local", "peer", "keepalive", "standing", "why"]
        assert len(lines) == len(report.rows)
        (line,) = (line for line in lines if line.split()[0] == str(own.fileno()))
        assert line.split(maxsplit=5)[1:] == [
            rows[2].local,
            rows[2].peer,
            "40s:75s:9,user_timeout=9s",
            "own",
            "the application chose its times",
        ]
        assert all(line[columns.index("standing") :].startswith(tuple(Standing)) for line in lines)  # aligned
        assert not any(line != line.rstrip() for line in lines)


def test_a_report_needs_kaios_loop() -> None:
    """Elsewhere there is no policy to compare with: the error says what to use."""

    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"kaio\.run"):
            kaio.report()

    asyncio.run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        kaio.report()


def test_nothing_is_uncovered_with_keepalive_off() -> None:
    """What has no keepalive has what the policy says, and what the application chose is its own."""

    async def main() -> kaio.Report:
        return kaio.report()

    with pair() as (listener, bare, own):
        choose(own, 40)
        report = kaio.run(main(), keepalive="off")
        rows = rows_of(report, listener, bare, own)
        assert [row.standing for row in rows] == [Standing.POLICY, Standing.POLICY, Standing.OWN]
        assert rows[0].why == "the policy is off"
        assert report.uncovered == ()


# -- sweeps


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_sweep_covers_sockets_outside_any_loop(host: str) -> None:
    """Connected and listening ones, of this thread and of others; what they accept later has it from the start."""
    made: list[socket.socket] = []
    with pair(host) as (listener, near, far), contextlib.ExitStack() as stack:

        def elsewhere() -> None:
            made.append(stack.enter_context(socket.create_connection(listener.getsockname()[:2])))
            made.append(stack.enter_context(listener.accept()[0]))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        report = kaio.sweep(TEXT)
        for sock in (listener, near, far, *made):
            assert str(kaio.inspect(sock)) == TEXT
        rows = rows_of(report, listener, near, far, *made)
        assert [row.standing for row in rows] == [Standing.POLICY] * 5  # as they are now
        assert report.policy == POLICY
        with socket.create_connection(listener.getsockname()[:2]), listener.accept()[0] as accepted:
            assert str(kaio.inspect(accepted)) == TEXT
        assert rows_of(kaio.sweep("8s:3s:5"), near)[0].standing is Standing.OWN  # who chose the first is not known


def test_a_sweep_keeps_options_set_by_the_application_and_other_sockets() -> None:
    """As a whole: a single time of its own is a choice. A switch without times is none."""
    with (
        pair() as (listener, own, switched),
        pair() as (_, off_with_times, counted),
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
        socket.socket() as fresh,
    ):
        choose(own, 40)
        switched.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        off_with_times.setsockopt(TCP, socket.TCP_KEEPIDLE, 40)
        counted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        counted.setsockopt(TCP, socket.TCP_KEEPCNT, 3)
        kaio.sweep(POLICY)
        assert str(kaio.inspect(own)) == "40s:75s:9"
        assert str(kaio.inspect(counted)) == "7200s:75s:3"
        assert str(kaio.inspect(switched)) == str(kaio.inspect(off_with_times)) == str(kaio.inspect(listener)) == TEXT
        assert not kaio.inspect(fresh).enabled  # its owner has not done with it
        for sock in (unix, datagrams):
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_sweep_accepts_every_form_of_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, a policy, booleans, the environment; a bad one is an error before anything was changed."""
    with pair() as (_, near, far):
        with pytest.raises(kaio.PolicyError, match="count"):
            kaio.sweep("1s:1s:0")
        kaio.sweep("off")
        kaio.sweep(False)
        assert not kaio.inspect(near).enabled
        monkeypatch.setenv("KAIO_KEEPALIVE", "9s:3s:5,stalled=drop")
        kaio.sweep()
        assert str(kaio.inspect(near)) == str(kaio.inspect(far)) == "9s:3s:5,user_timeout=24s"


@pytest.mark.usefixtures("dead_peers")
def test_a_sweep_finds_a_socket_that_is_still_connecting() -> None:
    """Nobody has answered its SYN yet."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        blackhole(listener),
        socket.socket() as connecting,
        socket.socket() as refused,
        socket.socket() as closed,
    ):
        connecting.setblocking(False)
        assert connecting.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            refused.connect(closed.getsockname())
        kaio.sweep(POLICY)
        assert str(kaio.inspect(connecting)) == TEXT
        assert not kaio.inspect(refused).enabled  # it is nobody's connection


def test_a_sweep_changes_no_blocking_mode() -> None:
    """Not under socket.setdefaulttimeout either, which makes every new socket object's descriptor non-blocking."""
    with pair() as (_, near, far):
        near.setblocking(True)
        far.setblocking(False)
        socket.setdefaulttimeout(5)
        try:
            kaio.sweep(POLICY)
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(near.fileno())
        assert not os.get_blocking(far.fileno())
        assert str(kaio.inspect(near)) == str(kaio.inspect(far)) == TEXT


def test_sweeps_tolerate_sockets_that_are_opened_and_closed_meanwhile() -> None:
    """In a process that opens and closes all the time, of which a sweep sees numbers that are another's by then."""
    stop = threading.Event()
    errors: list[BaseException] = []
    with socket.create_server(("127.0.0.1", 0), backlog=1_000) as listener:

        def churn() -> None:
            try:
                while not stop.is_set():
                    with socket.create_connection(listener.getsockname()) as near, listener.accept()[0] as far:
                        out, into = os.pipe()
                        near.sendall(b"x")
                        assert far.recv(1) == b"x"
                        os.close(into)
                        os.close(out)
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=churn) for _ in range(3)]
        for thread in threads:
            thread.start()
        sweeps = 0
        until = time.monotonic() + 1.0
        try:
            while time.monotonic() < until:
                for row in kaio.sweep(POLICY).rows:
                    assert (row.fd >= 0, bool(row.local)) == (True, True)  # gone since, and still in the report
                sweeps += 1
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert errors == []
    assert sweeps > 1
