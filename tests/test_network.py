"""Real networks: the two tasks of the TCP Keepalive HOWTO, through routers, NAT, loss, cut cables and reboots."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator

import pytest

import kaio

from .conftest import Recorder, reset, until
from .namespaces import Namespace, Routed

pytestmark = pytest.mark.slow

SERVER = Routed.SERVER
PORT = 9000
SILENCE = 12.0
LOSSY = 60.0  # seconds of a network that loses packets


class Heard(Recorder):
    """A recorder that keeps what it has received, and can ask for an echo."""

    @property
    def heard(self) -> bytes:
        """All data that was received."""
        return b"".join(data for name, data in self.events if name == "data")

    async def ask(self, message: bytes) -> None:
        """Send a message, and wait until it has come back."""
        wanted = self.heard + message
        self.transport.write(message)
        await until(lambda: self.heard == wanted)

    @property
    def info(self) -> kaio.TcpInfo:
        """TCP_INFO of an open connection."""
        assert not self.lost.done(), f"lost: {self.events[-1][1]!r}"
        return self.transport.health().info


class Echo(Heard):
    """The server's side: sends back what it receives."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)


@contextlib.asynccontextmanager
async def serving(network: Routed, keepalive: str | kaio.Keepalive) -> AsyncIterator[dict[bytes, Echo]]:
    """A kaio server on the server host; its protocols by the first data that they received."""
    made: dict[bytes, Echo] = {}

    class Named(Echo):
        def data_received(self, data: bytes) -> None:
            made.setdefault(self.heard or data, self)
            super().data_received(data)

    with network.server.entered():
        server = await kaio.create_server(Named, SERVER, PORT, keepalive=keepalive)
    async with server:
        yield made
        server.abort_clients()


async def connected(
    network: Routed, keepalive: str | kaio.Keepalive, host: str = SERVER, client: str = Routed.CLIENT
) -> Heard:
    """A kaio connection from the client host."""
    with network.client.entered():
        _, protocol = await kaio.create_connection(Heard, host, PORT, keepalive=keepalive, local_addr=(client, 0))
    return protocol


def listening(host: Namespace) -> socket.socket:
    """A listening socket of a host without kaio."""
    with host.entered():
        listener = socket.create_server(("", PORT))
    listener.setblocking(False)
    return listener


def check_death(recorder: Recorder, cause: kaio.Cause, number: int) -> kaio.DeadPeerError:
    """Check that the death was reported once, to each callback with the same error, and with its cause."""
    assert recorder.names[-2:] == ["dead", "lost"]
    assert recorder.names.count("dead") == recorder.names.count("lost") == 1
    error = recorder.events[-1][1]
    assert recorder.events[-2][1] is error
    assert isinstance(error, kaio.DeadPeerError)
    assert (error.cause, error.errno) == (cause, number)
    return error


def test_a_thread_leaves_a_namespace_when_the_block_raises(network: Routed) -> None:
    """Sockets that are made afterwards are in the host's own network."""

    def here() -> int:
        return os.stat("/proc/thread-self/ns/net").st_ino

    home = here()
    with contextlib.suppress(ZeroDivisionError), network.client.entered(), network.server.entered():
        assert here() != home
        raise ZeroDivisionError
    assert here() == home


# -- the HOWTO's second task: connections that a middlebox would forget


async def test_probes_keep_a_nat_entry_of_an_idle_connection(network: Routed) -> None:
    """Two connections are idle for three times the NAT's timeout; only the one with probes survives."""
    network.masquerade(forget_after=4)
    async with serving(network, "off") as served:
        kept = await connected(network, kaio.Keepalive.hold(against=4))
        lost = await connected(network, "off")
        await kept.ask(b"kept")
        await lost.ask(b"lost")
        for far in served.values():
            assert far.transport.get_extra_info("peername")[0] == Routed.OUTSIDE  # it is a NAT
        assert network.counted("nat", "lost_from_client") == network.counted("nat", "lost_from_server") == 0

        await asyncio.sleep(SILENCE)

        for far in served.values():
            far.transport.write(b" push")
        await until(lambda: kept.heard == b"kept push")
        lost.transport.write(b" data")
        await kept.ask(b" data")
        assert served[b"kept"].heard == b"kept data"
        assert kept.transport.health().state is kaio.State.ALIVE

        # The other one's kernels, at both ends, have tried again and again by then.
        ends = (lost, served[b"lost"])
        await until(lambda: all((end.info.retransmits or 0) >= 3 for end in ends), within=8)
        assert lost.heard == served[b"lost"].heard == b"lost"
        assert network.counted("nat", "lost_from_client") >= 4
        assert network.counted("nat", "lost_from_server") >= 4
        assert kept.names == ["made", "data", "data", "data"]
        for end in (kept, lost):
            end.transport.abort()


# -- a live peer behind a bad network


async def test_packet_loss_and_a_short_outage_are_not_a_death(network: Routed) -> None:
    """Two connections, of which one is idle, lose 30 % of their packets in both directions for a minute; a third one
    loses all until its last probe but one.

    The loss follows a fixed pattern, in which at most five probes in a row are lost, or their answers: left to chance,
    it would be all eight in one run of a hundred. Each connection has a pattern of its own, or the packets of one could
    have all of the other's probes fall on the places that are lost.
    """
    policy = kaio.Keepalive(1, 1, 8)
    loop = asyncio.get_running_loop()
    async with serving(network, "off") as served:
        lossy = await connected(network, policy)
        talks = await connected(network, policy)
        outage = await connected(network, policy)
        await talks.ask(b"talks")
        await lossy.ask(b"lossy")
        await outage.ask(b"outage")
        ports = {name: far.transport.get_extra_info("peername")[1] for name, far in served.items()}
        network.rules(f"""
            table ip bad {{
                counter lost {{ }}
                chain loss {{
                    type filter hook forward priority filter; policy accept;
                    tcp sport {ports[b"lossy"]} goto lossy
                    tcp dport {ports[b"lossy"]} goto lossy
                    tcp sport {ports[b"talks"]} goto talks
                    tcp dport {ports[b"talks"]} goto talks
                }}
                chain lossy {{
                    numgen inc mod 20 {{ 0, 1, 2, 3, 5, 12 }} counter name lost drop
                }}
                chain talks {{
                    numgen inc mod 20 {{ 0, 1, 2, 3, 5, 12 }} counter name lost drop
                }}
                chain outage {{
                    type filter hook forward priority filter; policy accept;
                    tcp sport {ports[b"outage"]} drop
                    tcp dport {ports[b"outage"]} drop
                }}
            }}
        """)
        began = loop.time()
        suspected = False
        while (outage.info.probes or 0) < 7:
            suspected = suspected or lossy.transport.health().state is kaio.State.SUSPECT
            await asyncio.sleep(0.05)
        assert 6.5 < loop.time() - began < 8.5
        network.rules("flush chain ip bad outage")
        await until(lambda: outage.info.probes == 0, within=3)
        assert outage.transport.health().state is kaio.State.ALIVE
        said = 0
        while loop.time() < began + LOSSY:
            suspected = suspected or lossy.transport.health().state is kaio.State.SUSPECT
            if loop.time() > began + said / 4:
                talks.transport.write(b".")
                said += 1
            await asyncio.sleep(0.05)
        assert suspected
        assert network.counted("bad", "lost") >= 4
        network.rules("flush chain ip bad lossy; flush chain ip bad talks")
        await until(lambda: talks.heard.count(b".") == said, within=40)
        assert not {"dead", "lost"} & set(talks.names)
        talks.transport.abort()
        for end in (lossy, outage):
            await end.ask(b" and on")
            assert end.names == ["made", "data", "data"]
            end.transport.abort()


# -- the HOWTO's first task: peers that are gone


async def test_a_cut_cable_is_a_dead_peer_at_both_ends(network: Routed) -> None:
    """The client receives nothing; the server's own interface is down. Both connections are idle."""
    policy = kaio.Keepalive(1, 1, 2)
    loop = asyncio.get_running_loop()
    async with serving(network, policy) as served:
        ours = await connected(network, policy)
        with network.client.entered():
            stream = await kaio.connect(SERVER, PORT, keepalive=policy)
        await stream.send(b"stream")
        assert await stream.receive() == b"stream"
        await ours.ask(b"ours")

        network.cut()
        cut_at = loop.time()
        async with asyncio.timeout(5):
            with pytest.raises(kaio.DeadPeerError) as caught:
                await stream.receive()
            stream_lost_at = loop.time()
            for end in (ours, served[b"ours"]):
                await end.lost
        for lost_at in (stream_lost_at, ours.lost_at, served[b"ours"].lost_at):
            assert 2.8 < lost_at - cut_at < 4.0

        assert caught.value.cause is kaio.Cause.KEEPALIVE
        for end in (ours, served[b"ours"]):
            error = check_death(end, kaio.Cause.KEEPALIVE, errno.ETIMEDOUT)
            assert 2.8 < error.silence < 4.0
            assert error.policy == policy
            assert isinstance(error.__cause__, TimeoutError)
        assert ours.events[-1][1].peername == (SERVER, PORT)
        await stream.aclose()


# The kind of route that replaces the route to the server: cause, errno, and the latest time for data in flight.
ROUTES = {
    "blackhole": (kaio.Cause.UNACKNOWLEDGED, errno.ETIMEDOUT, 4.0),
    "prohibit": (kaio.Cause.UNREACHABLE, errno.EHOSTUNREACH, 4.0),
    # To these two answers Linux takes back a doubling of its timer (RFC 6069), and the user timeout then waits for the
    # whole of what is left, up to as long again: 3 s became 4.97 s.
    "unreachable": (kaio.Cause.UNREACHABLE, errno.EHOSTUNREACH, 6.0),
    "throw": (kaio.Cause.UNREACHABLE, errno.ENETUNREACH, 6.0),  # no route at all
}


async def test_the_routers_icmp_answer_determines_the_cause(network: Routed) -> None:
    """The router's route is replaced while data is in flight. It answers with ICMP, unless the route is a blackhole.

    Each connection has a client address of its own: Linux sends one address five such answers, then one a second (the
    sysctls net.ipv4.route.error_burst and error_cost), and the first is lost on a socket that is busy sending.
    """
    policy = kaio.Keepalive(1, 1, 2, stalled="drop")
    loop = asyncio.get_running_loop()
    hosts = {kind: f"198.51.100.{last}" for last, kind in enumerate(ROUTES, 10)}
    clients = {kind: f"192.0.2.{last}" for last, kind in enumerate(ROUTES, 10)}
    network.server.ip(*(f"address add {host}/24 dev router" for host in hosts.values()))
    network.client.ip(*(f"address add {client}/24 dev router" for client in clients.values()))
    network.router.ip(
        *(f"neighbour replace {host} lladdr 02:00:00:00:02:02 nud permanent dev server" for host in hosts.values()),
        *(
            f"neighbour replace {client} lladdr 02:00:00:00:01:02 nud permanent dev client"
            for client in clients.values()
        ),
    )
    with listening(network.server):
        ends = {kind: await connected(network, policy, host, clients[kind]) for kind, host in hosts.items()}
        network.router.ip(*(f"route add {kind} {host}/32" for kind, host in hosts.items()))
        sent_at = loop.time()
        for end in ends.values():
            end.transport.write(b"into the void")
        async with asyncio.timeout(8):
            for end in ends.values():
                await end.lost
    for kind, end in ends.items():
        cause, number, limit = ROUTES[kind]
        check_death(end, cause, number)
        assert 2.8 < end.lost_at - sent_at < limit


async def test_a_rebooted_peer_answers_the_first_probe_with_a_reset(network: Routed) -> None:
    """The host and its service are back before the first probe, without the connection: a reset, not a death."""
    policy = kaio.Keepalive(2, 1, 8)
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as sockets:
        sockets.enter_context(listener := listening(network.server))
        ours = await connected(network, policy)
        with network.client.entered():
            stream = await kaio.connect(SERVER, PORT, keepalive=policy)
        heard_at = loop.time()
        for _ in range(2):
            far, _ = await loop.sock_accept(listener)
            reset(sockets.enter_context(far))

        network.power_off()
        sockets.close()
        network.power_on()
        assert loop.time() - heard_at < 1.5  # before the first probe

        with listening(network.server):
            async with asyncio.timeout(5):
                with pytest.raises(kaio.ResetError):
                    await stream.receive()
                stream_lost_at = loop.time()
                exc = await ours.lost
    assert ours.names == ["made", "lost"]
    assert isinstance(exc, ConnectionResetError)
    for lost_at in (stream_lost_at, ours.lost_at):
        assert 1.8 < lost_at - heard_at < 2.8
    await stream.aclose()
