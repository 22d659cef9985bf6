"""apply, inspect and health on real sockets, compared with getsockopt."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import anyio
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSStream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kaio
from kaio import Keepalive, KeepaliveError, PolicyError, SocketState, State
from kaio.kernel.descriptors import Descriptor
from kaio.kernel.queues import reset_on_close
from kaio.policy import MAX_COUNT, MAX_SECONDS, KeepaliveArg

TCP = socket.IPPROTO_TCP
OPTIONS = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)


def kernel(sock: socket.socket) -> tuple[int, ...]:
    """SO_KEEPALIVE, idle, interval, count, and user timeout in milliseconds, by getsockopt."""
    on = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return (on, *(sock.getsockopt(TCP, option) for option in OPTIONS))


def kernel_of(descriptor: int) -> tuple[int, ...]:
    """The same for a descriptor that belongs to an event loop."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        return kernel(sock)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    """A TCP socket that is not connected."""
    with socket.socket() as fresh:
        yield fresh


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a loopback connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        theirs = listener.accept()[0]
        with theirs:
            yield ours, theirs


# -- setting options


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        (Keepalive(), (1, 20, 10, 4, 0)),
        ("20s:10s:4", (1, 20, 10, 4, 0)),
        (True, (1, 20, 10, 4, 0)),
        (None, (1, 20, 10, 4, 0)),
        ("detect=30s", (1, 10, 5, 4, 0)),
        ("hold=350s", (1, 175, 87, 4, 0)),
        (Keepalive(19.5, 9.5, 4), (1, 20, 10, 4, 0)),
        (Keepalive(1, 1, 1), (1, 1, 1, 1, 0)),
        (Keepalive(MAX_SECONDS, MAX_SECONDS, MAX_COUNT), (1, 32767, 32767, 127, 0)),
        # with "keep" kaio enforces the user timeout
        (Keepalive(user_timeout=45), (1, 20, 10, 4, 0)),
        (Keepalive(user_timeout=None), (1, 20, 10, 4, 0)),
        # with "drop" the kernel does
        (Keepalive(stalled="drop"), (1, 20, 10, 4, 60_000)),
        (Keepalive(user_timeout=45, stalled="drop"), (1, 20, 10, 4, 45_000)),
        (Keepalive(8, 8, 1, user_timeout=8.41, stalled="drop"), (1, 8, 8, 1, 8410)),
        (Keepalive(user_timeout=2147483.647, stalled="drop"), (1, 20, 10, 4, 2**31 - 1)),
        (Keepalive(user_timeout=None, stalled="drop"), (1, 20, 10, 4, 0)),
    ],
    ids=str,
)
def test_a_policy_is_set_and_read_back(sock: socket.socket, policy: KeepaliveArg, values: tuple[int, ...]) -> None:
    """The kernel has the policy's values, and apply returns them."""
    state = kaio.apply(sock, policy)
    assert kernel(sock) == values
    assert state == kaio.inspect(sock)
    assert state == SocketState(
        enabled=True, idle=values[1], interval=values[2], count=values[3], user_timeout=values[4] / 1000 or None
    )


def test_a_policy_is_set_on_ipv6() -> None:
    """With the same options as on IPv4."""
    with socket.socket(socket.AF_INET6) as sock:
        kaio.apply(sock, Keepalive(stalled="drop"))
        assert kernel(sock) == (1, 20, 10, 4, 60_000)


def test_off_removes_keepalive_and_the_user_timeout(sock: socket.socket) -> None:
    """Those of the previous policy."""
    kaio.apply(sock, Keepalive(stalled="drop"))
    state = kaio.apply(sock, "off")
    on, *_, user_timeout = kernel(sock)
    assert (on, user_timeout) == (0, 0)
    assert (state.enabled, state.user_timeout) == (False, None)
    assert kaio.apply(sock, False) == state


@pytest.mark.parametrize("policy", [Keepalive.SYSTEM, "on"])
def test_system_sets_the_systems_times(sock: socket.socket, policy: KeepaliveArg) -> None:
    """It replaces previous values by those of a new socket, and removes the user timeout."""
    with socket.socket() as fresh:
        system = kernel(fresh)
    kaio.apply(sock, Keepalive(5, 6, 7, user_timeout=90, stalled="drop"))
    assert kernel(sock) == (1, 5, 6, 7, 90_000)
    kaio.apply(sock, policy)
    assert kernel(sock) == (1, *system[1:4], 0)


def test_a_field_that_is_none_is_set_to_the_systems_value(sock: socket.socket) -> None:
    """The socket's previous value does not stay."""
    with socket.socket() as fresh:
        system = kernel(fresh)
    kaio.apply(sock, Keepalive(5, 6, 7))
    kaio.apply(sock, "30s::")
    assert kernel(sock) == (1, 30, *system[2:4], 0)


def test_the_environment_sets_the_default(sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """apply() without a policy uses that of the environment."""
    monkeypatch.setenv("KAIO_KEEPALIVE", "7s:8s:9")
    kaio.apply(sock)
    assert kernel(sock) == (1, 7, 8, 9, 0)


def test_the_policy_of_a_connection_can_be_changed_repeatedly(pair: tuple[socket.socket, socket.socket]) -> None:
    """Each policy replaces the previous one; the other end is not changed."""
    ours, theirs = pair
    before = kernel(theirs)
    for policy, values in [
        (Keepalive(stalled="drop"), (1, 20, 10, 4, 60_000)),
        (Keepalive(5, 6, 7), (1, 5, 6, 7, 0)),
        (Keepalive.OFF, (0, 5, 6, 7, 0)),
        (Keepalive(1, 1, 2, stalled="drop"), (1, 1, 1, 2, 3000)),
    ]:
        kaio.apply(ours, policy)
        assert kernel(ours) == values
    assert kernel(theirs) == before
    theirs.sendall(b"x")
    assert ours.recv(1) == b"x"


def test_inspect_changes_nothing(sock: socket.socket) -> None:
    """It reads options that were set by setsockopt."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(TCP, socket.TCP_KEEPIDLE, 33)
    sock.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 1500)
    before = kernel(sock)
    state = kaio.inspect(sock)
    assert (state.enabled, state.idle, state.user_timeout) == (True, 33, 1.5)
    assert kernel(sock) == before


times = st.none() | st.integers(1, MAX_SECONDS) | st.floats(0.001, MAX_SECONDS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    idle=times,
    interval=times,
    count=st.none() | st.integers(1, MAX_COUNT),
    user_timeout=st.sampled_from([kaio.AUTO, None]) | st.floats(0.001, 2147483.647) | st.floats(0.001, 100),
    stalled=st.sampled_from(["keep", "drop"]),
)
def test_every_valid_policy_can_be_set(sock: socket.socket, **arguments: Any) -> None:
    """The kernel accepts what the constructor accepts. A PolicyError leaves the socket as it was."""
    before = kernel(sock)
    try:
        policy = Keepalive(**arguments)
        state = kaio.apply(sock, policy)
    except PolicyError:
        assert kernel(sock) == before
        return
    for field in ("idle", "interval", "count"):
        assert getattr(policy, field) in (getattr(state, field), None)
    assert state.user_timeout is None or policy.stalled == "drop"
    if isinstance(policy.user_timeout, float) and policy.stalled == "drop":
        assert state.user_timeout == policy.user_timeout


def test_a_policy_with_too_long_a_user_timeout_changes_nothing(sock: socket.socket) -> None:
    """The detection time is above the kernel's limit of the user timeout."""
    before = kernel(sock)
    with pytest.raises(PolicyError):
        kaio.apply(sock, Keepalive(MAX_SECONDS, MAX_SECONDS, MAX_COUNT, stalled="drop"))
    assert kernel(sock) == before


@pytest.mark.parametrize(
    "policy",
    ["nonsense", "20s:10s:200", 20, Keepalive(None, None, None, user_timeout=30, stalled="drop")],
    ids=str,
)
def test_an_invalid_policy_changes_nothing(sock: socket.socket, policy: Any) -> None:
    """Even when it is invalid only together with the system's times."""
    before = kernel(sock)
    with pytest.raises(PolicyError):
        kaio.apply(sock, policy)
    assert kernel(sock) == before


# -- objects that are accepted


class Thing(NamedTuple):
    """An object that has a TCP socket, and the descriptor of that socket."""

    thing: Any
    descriptor: int


class Quiet(asyncio.Protocol):
    """The server's end, which sends nothing and closes when the client does."""

    def __init__(self, end: End) -> None:
        self.end = end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.end.made.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end.lost.set()


class End:
    """A server for one client."""

    def __init__(self) -> None:
        self.port = 0
        self.made = asyncio.Event()  # accepted; over TLS the client may be connected before
        self.lost = asyncio.Event()


@contextlib.asynccontextmanager
async def endpoint(tls: ssl.SSLContext | None = None) -> AsyncIterator[End]:
    """A server for one client; at the end it waits until the client has closed."""
    end = End()
    async with await asyncio.get_running_loop().create_server(lambda: Quiet(end), "127.0.0.1", 0, ssl=tls) as server:
        end.port = server.sockets[0].getsockname()[1]
        yield end
        await end.lost.wait()


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
Maker = Callable[[Contexts], "contextlib.AbstractAsyncContextManager[Thing]"]


@contextlib.asynccontextmanager
async def plain_socket(_: Contexts) -> AsyncIterator[Thing]:
    """A socket connected by the event loop."""
    async with endpoint() as end:
        with socket.socket() as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", end.port))
            await end.made.wait()
            yield Thing(sock, sock.fileno())


@contextlib.asynccontextmanager
async def transport(_: Contexts) -> AsyncIterator[Thing]:
    """An asyncio transport."""
    async with endpoint() as end:
        made, _protocol = await asyncio.get_running_loop().create_connection(asyncio.Protocol, "127.0.0.1", end.port)
        await end.made.wait()
        yield Thing(made, made.get_extra_info("socket").fileno())
        made.close()


@contextlib.asynccontextmanager
async def transport_socket(_: Contexts) -> AsyncIterator[Thing]:
    """asyncio's TransportSocket or uvloop's PseudoSocket."""
    async with transport(_) as (made, descriptor):
        yield Thing(made.get_extra_info("socket"), descriptor)


@contextlib.asynccontextmanager
async def tls_transport(contexts: Contexts) -> AsyncIterator[Thing]:
    """An asyncio TLS transport."""
    server, client = contexts
    async with endpoint(server) as end:
        made, _protocol = await asyncio.get_running_loop().create_connection(
            asyncio.Protocol, "127.0.0.1", end.port, ssl=client, server_hostname="localhost"
        )
        await end.made.wait()
        yield Thing(made, made.get_extra_info("socket").fileno())
        made.close()


@contextlib.asynccontextmanager
async def stream_writer(_: Contexts) -> AsyncIterator[Thing]:
    """An asyncio StreamWriter."""
    async with endpoint() as end:
        _reader, writer = await asyncio.open_connection("127.0.0.1", end.port)
        await end.made.wait()
        yield Thing(writer, writer.get_extra_info("socket").fileno())
        writer.close()
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def tls_stream_writer(contexts: Contexts) -> AsyncIterator[Thing]:
    """An asyncio StreamWriter over TLS."""
    server, client = contexts
    async with endpoint(server) as end:
        _reader, writer = await asyncio.open_connection("127.0.0.1", end.port, ssl=client, server_hostname="localhost")
        await end.made.wait()
        yield Thing(writer, writer.get_extra_info("socket").fileno())
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def anyio_stream(_: Contexts) -> AsyncIterator[Thing]:
    """anyio's own socket stream."""
    async with endpoint() as end, await anyio.connect_tcp("127.0.0.1", end.port) as stream:
        await end.made.wait()
        yield Thing(stream, stream.extra(SocketAttribute.raw_socket).fileno())


@contextlib.asynccontextmanager
async def anyio_tls_stream(contexts: Contexts) -> AsyncIterator[Thing]:
    """anyio's TLS stream, which wraps its socket stream."""
    server, client = contexts
    async with endpoint(server) as end:
        stream = await anyio.connect_tcp(
            "127.0.0.1", end.port, tls=True, ssl_context=client, tls_hostname="localhost", tls_standard_compatible=False
        )
        assert isinstance(stream, TLSStream)
        async with stream:
            await end.made.wait()
            yield Thing(stream, stream.extra(SocketAttribute.raw_socket).fileno())


@contextlib.asynccontextmanager
async def kaio_connection(_: Contexts) -> AsyncIterator[Thing]:
    """A kaio Connection."""
    async with endpoint() as end, kaio.connect("127.0.0.1", end.port, keepalive="off") as connection:
        await end.made.wait()
        yield Thing(connection, connection.extra(SocketAttribute.raw_socket).fileno())


@contextlib.asynccontextmanager
async def kaio_transport(_: Contexts) -> AsyncIterator[Thing]:
    """The transport of a KeepaliveProtocol."""
    async with endpoint() as end:
        made, _protocol = await kaio.create_connection(kaio.KeepaliveProtocol, "127.0.0.1", end.port, keepalive="off")
        await end.made.wait()
        yield Thing(made, made.get_extra_info("socket").fileno())
        made.close()


KINDS: list[Maker] = [
    plain_socket,
    transport,
    transport_socket,
    tls_transport,
    stream_writer,
    tls_stream_writer,
    anyio_stream,
    anyio_tls_stream,
    kaio_connection,
    kaio_transport,
]


@pytest.fixture
def contexts(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> Contexts:
    """The SSL contexts of a server and its client."""
    return server_tls, client_tls


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
async def test_every_object_with_a_tcp_socket_is_accepted(make: Maker, contexts: Contexts) -> None:
    """apply, inspect and health act on the socket underneath."""
    async with make(contexts) as (thing, descriptor):
        state = kaio.apply(thing, Keepalive(user_timeout=45, stalled="drop"))
        assert kernel_of(descriptor) == (1, 20, 10, 4, 45_000)
        assert state == SocketState(enabled=True, idle=20, interval=10, count=4, user_timeout=45)
        assert kaio.inspect(thing) == state
        kaio.apply(thing, "5s:6s:7")
        assert kernel_of(descriptor) == (1, 5, 6, 7, 0)
        health = kaio.health(thing)
        assert health.state is State.ALIVE
        assert health.info.state == kaio.TcpState.ESTABLISHED
        kaio.apply(thing, "off")
        assert kernel_of(descriptor)[0] == 0


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
async def test_a_failed_change_keeps_the_previous_options(make: Maker, contexts: Contexts) -> None:
    """On the socket underneath."""
    async with make(contexts) as (thing, descriptor):
        kaio.apply(thing, "5s:6s:7")
        with pytest.raises(PolicyError):
            kaio.apply(thing, "5s:6s:700")
        assert kernel_of(descriptor) == (1, 5, 6, 7, 0)


@pytest.mark.parametrize("make", [transport, tls_transport, stream_writer, kaio_transport], ids=lambda m: m.__name__)
async def test_a_closed_transport_is_an_error(make: Maker, contexts: Contexts) -> None:
    """Its descriptor may have been used again for another socket."""
    async with make(contexts) as (thing, _):
        lower = thing.transport if isinstance(thing, asyncio.StreamWriter) else thing
        lower.abort()
        for _turn in range(5):
            await asyncio.sleep(0)
        for act in (kaio.apply, kaio.inspect, kaio.health):
            with pytest.raises(KeepaliveError) as caught:
                act(thing)
            assert caught.value.errno in (errno.EBADF, errno.ENOTSOCK)


# -- health


def test_health_of_a_live_peer(pair: tuple[socket.socket, socket.socket]) -> None:
    """Alive, with a round trip time, nothing in flight, and a short silence."""
    health = kaio.health(pair[0])
    assert health.state is State.ALIVE
    assert (health.probes, health.unacked, health.unsent) == (0, 0, 0)
    assert health.rtt is not None
    assert 0 < health.rtt < 1
    assert health.silence is not None
    assert 0 <= health.silence < 5


def test_health_of_a_peer_that_does_not_read_is_stalled() -> None:
    """Its window is zero while data waits to be sent; alive again once it reads."""
    with socket.socket() as listener, socket.socket() as ours:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ours.connect(listener.getsockname())
        with listener.accept()[0] as theirs:
            ours.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    ours.send(bytes(65536))
            health = reached(ours, State.STALLED)  # once the peer's delayed acknowledgement has arrived
            assert health.unsent
            assert health.unacked == 0
            assert health.info.snd_wnd == 0
            theirs.recv(65536)
            assert reached(ours, State.ALIVE).info.snd_wnd


def reached(sock: socket.socket, state: State) -> kaio.Health:
    """Wait until the socket is in a state, and return its health."""
    deadline = time.monotonic() + 10
    while (health := kaio.health(sock)).state is not state:
        assert time.monotonic() < deadline, health
    return health


def test_a_descriptor_sets_structs_and_numbers(pair: tuple[socket.socket, socket.socket]) -> None:
    """As socket.socket does: reset_on_close sets a struct, whose effect the peer sees."""
    ours, theirs = pair
    with ours:
        descriptor = Descriptor.of(ours.fileno())
        descriptor.setsockopt(TCP, socket.TCP_KEEPIDLE, 33)
        reset_on_close(descriptor)
        assert descriptor.getsockopt(TCP, socket.TCP_KEEPIDLE) == ours.getsockopt(TCP, socket.TCP_KEEPIDLE) == 33
        assert descriptor.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 0)
    with pytest.raises(ConnectionResetError):
        theirs.recv(1)


# -- objects that are refused


def unix() -> tuple[socket.socket, ...]:
    """Two Unix sockets."""
    return socket.socketpair()


def udp() -> tuple[socket.socket, ...]:
    """A UDP socket."""
    return (socket.socket(socket.AF_INET, socket.SOCK_DGRAM),)


def udp6() -> tuple[socket.socket, ...]:
    """A UDP socket for IPv6."""
    return (socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),)


@pytest.mark.parametrize("act", [kaio.apply, kaio.inspect, kaio.health], ids=lambda act: act.__name__)
@pytest.mark.parametrize("make", [unix, udp, udp6], ids=lambda make: make.__name__)
def test_a_socket_that_is_not_tcp_is_refused(
    make: Callable[[], tuple[socket.socket, ...]], act: Callable[[object], object]
) -> None:
    """SO_KEEPALIVE, which any socket accepts, is not set."""
    with contextlib.ExitStack() as stack:
        sock, *_ = [stack.enter_context(each) for each in make()]
        with pytest.raises(KeepaliveError, match="is not a TCP socket, which keepalive and TCP_INFO require") as caught:
            act(sock)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


async def test_a_unix_transport_is_refused() -> None:
    """Like its socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        made, _ = await asyncio.get_running_loop().create_unix_connection(asyncio.Protocol, sock=ours)
        for act in (kaio.apply, kaio.inspect, kaio.health):
            with pytest.raises(KeepaliveError, match="TCP"):
                act(made)
        made.close()


async def test_a_udp_transport_is_refused() -> None:
    """Like its socket."""
    made, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0)
    )
    for act in (kaio.apply, kaio.inspect, kaio.health):
        with pytest.raises(KeepaliveError, match="TCP"):
            act(made)
    made.close()


async def test_a_pipe_transport_is_refused() -> None:
    """A pipe has no socket."""
    reading, writing = os.pipe()
    made, _ = await asyncio.get_running_loop().connect_read_pipe(asyncio.Protocol, os.fdopen(reading, "rb", 0))
    for act in (kaio.apply, kaio.inspect, kaio.health):
        with pytest.raises(KeepaliveError, match="TCP"):
            act(made)
    made.close()
    os.close(writing)


@pytest.mark.parametrize("act", [kaio.apply, kaio.inspect, kaio.health], ids=lambda act: act.__name__)
@pytest.mark.parametrize(
    "thing",
    [7, None, True, "127.0.0.1:80", ("127.0.0.1", 80), b"", ..., socket],
    ids=lambda thing: type(thing).__name__,
)
def test_an_object_without_a_socket_is_refused(thing: object, act: Callable[[object], object]) -> None:
    """An int is not used as a descriptor."""
    with pytest.raises(TypeError, match=f"expected a socket, .* got {type(thing).__name__}"):
        act(thing)


@pytest.mark.parametrize("act", [kaio.apply, kaio.inspect, kaio.health], ids=lambda act: act.__name__)
def test_a_closed_socket_is_an_error(act: Callable[[object], object]) -> None:
    """EBADF, as from the kernel."""
    sock = socket.socket()
    sock.close()
    with pytest.raises(KeepaliveError, match="the socket is closed") as caught:
        act(sock)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("act", [kaio.apply, kaio.inspect, kaio.health], ids=lambda act: act.__name__)
def test_a_socket_whose_descriptor_was_closed_is_an_error(act: Callable[[object], object]) -> None:
    """Closed by its number, which the socket object does not notice."""
    sock = socket.socket()
    os.close(sock.fileno())
    try:
        with pytest.raises(KeepaliveError, match=os.strerror(errno.EBADF)) as caught:
            act(sock)
    finally:
        sock.detach()
    assert caught.value.errno == errno.EBADF


# -- MPTCP


@pytest.fixture
def mptcp() -> Iterator[socket.socket]:
    """A Multipath TCP socket."""
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    except OSError as exc:
        pytest.skip(f"no MPTCP here: {exc}")
    with sock:
        yield sock


def mptcp_kernel(sock: socket.socket) -> tuple[int, ...]:
    """The result of `kernel` without the user timeout, which MPTCP does not have."""
    on = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return (on, *(sock.getsockopt(TCP, option) for option in OPTIONS[:3]))


@pytest.mark.may_skip
def test_a_policy_is_set_on_mptcp(mptcp: socket.socket) -> None:
    """All options except the user timeout."""
    state = kaio.apply(mptcp, "20s:10s:4")
    assert mptcp_kernel(mptcp) == (1, 20, 10, 4)
    assert state == kaio.inspect(mptcp) == SocketState(enabled=True, idle=20, interval=10, count=4)
    assert not kaio.apply(mptcp, "off").enabled
    assert mptcp_kernel(mptcp)[0] == 0


@pytest.mark.may_skip
def test_mptcp_has_no_user_timeout_and_its_options_are_restored(
    mptcp: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """stalled="drop" is an error on MPTCP, which has no TCP_USER_TIMEOUT."""
    kaio.apply(mptcp, "5s:6s:7")
    with pytest.raises(KeepaliveError, match="user_timeout: the kernel refused 60000") as caught:
        kaio.apply(mptcp, Keepalive(stalled="drop"))
    assert caught.value.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)
    assert mptcp_kernel(mptcp) == (1, 5, 6, 7)
    assert caplog.records == []
