"""Behind a proxy that sends PROXY headers: the real client, real HAProxy and nginx, and everybody who should not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme

import kaio
from kaio.testing import blackhole

from . import servers
from .conftest import echo, until
from .test_proxy_protocol import tlv, v2

HEADER = b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 443\r\n"
TRUSTED = kaio.ProxyProtocol(["127.0.0.0/8", "::1"])


async def who(connection: kaio.Connection) -> None:
    """Say who the peer is, then echo."""
    assert connection.peername == connection.transport.get_extra_info("peername")
    remote = connection.extra(anyio.abc.SocketAttribute.remote_address)
    assert remote == connection.peername[:2]
    await connection.send(f"{remote[0]} {remote[1]}\n".encode())
    await echo(connection)


class Who(kaio.KeepaliveProtocol):
    """The same as a protocol."""

    transport: kaio.KeepaliveTransport

    def connection_made(self, transport: kaio.KeepaliveTransport) -> None:
        self.transport = transport
        host, port = transport.get_extra_info("peername")[:2]
        transport.write(f"{host} {port}\n".encode())

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


@contextlib.asynccontextmanager
async def serving(
    handler: Any = who, proxy: kaio.ProxyProtocol = TRUSTED, **options: Any
) -> AsyncIterator[kaio.Server]:
    """Serve behind a proxy."""
    listener = kaio.Listener("localhost:0" if "ssl" in options else "127.0.0.1:0", proxy_protocol=proxy, **options)
    async with kaio.serve(handler, listeners=[listener], close_timeout=1) as server:
        yield server


def port_of(server: kaio.Server) -> int:
    """The port of a server."""
    address = server.listeners[0].address
    assert isinstance(address, kaio.TcpAddress)
    return address.port


async def talk(port: int, tls: ssl.SSLContext | None = None, **options: Any) -> tuple[str, int]:
    """Connect, let oneself be told who one is, and compare; return host and port of this end."""
    reader, writer = await asyncio.open_connection("localhost" if tls else "127.0.0.1", port, ssl=tls, **options)
    try:
        host, number = (await reader.readuntil(b"\n")).decode().split()
        own = writer.get_extra_info("sockname")
        assert (host, int(number)) == own[:2]
        writer.write(b"echo")
        assert await reader.readexactly(4) == b"echo"
        return host, int(number)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize("kind", [who, Who])
@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c", "nginx"])
@pytest.mark.parametrize("place", ["plain", "tls through", "tls ended at the proxy"])
async def test_the_real_client_arrives(
    send: str, place: str, kind: Any, authority: trustme.CA, server_tls: Any, client_tls: Any, tmp_path: Path
) -> None:
    """Through HAProxy and nginx from Debian, TLS passed through or ended there."""
    options = {"ssl": server_tls} if place == "tls through" else {}
    bind = ""
    if place == "tls ended at the proxy":
        pem = tmp_path / "server.pem"
        certificate = authority.issue_cert("localhost")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(pem))
        nginx_tls = f"ssl; ssl_certificate {pem}; ssl_certificate_key {pem}"
        bind = nginx_tls if send == "nginx" else f"ssl crt {pem}"
    async with serving(kind, **options) as server:
        port = port_of(server)
        proxy = servers.nginx_stream(port, bind) if send == "nginx" else servers.haproxy(port, send, bind)
        manager = await asyncio.to_thread(proxy.__enter__)
        try:
            tls = None if place == "plain" else client_tls
            hosts = await asyncio.gather(*(talk(manager.port, tls) for _ in range(20)))
            assert len(set(hosts)) == 20
        finally:
            await asyncio.to_thread(proxy.__exit__, None, None, None)
        await until(lambda: not server.connections)


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
async def test_the_death_of_the_proxys_connection_is_still_detected() -> None:
    """And is reported for the client that it stood for."""
    errors: list[BaseException] = []

    async def handler(connection: kaio.Connection) -> None:
        try:
            await echo(connection)
        except BaseException as exc:
            errors.append(exc)
            raise

    async with serving(handler) as server:
        server.listeners[0].keepalive = "1s:1s:2"
        with contextlib.closing(socket.create_connection(("127.0.0.1", port_of(server)))) as proxy:
            proxy.sendall(HEADER)
            await until(lambda: server.connections)
            with blackhole(proxy):
                await until(lambda: errors, within=30)
    (error,) = errors
    assert isinstance(error, kaio.DeadPeerError)
    assert error.peername == ("192.0.2.1", 50000)


@pytest.mark.parametrize("mode", ["require", "accept"])
async def test_a_direct_client_is_refused_or_not_believed(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever is not trusted cannot say who it is."""
    async with serving(proxy=kaio.ProxyProtocol(["10.0.0.0/8"], mode=mode)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEADER)
        if mode == "require":
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            for _ in range(100):  # anybody may try, and none of them fills the log
                _, another = await asyncio.open_connection("127.0.0.1", port_of(server))
                another.close()
                with contextlib.suppress(OSError):
                    await another.wait_closed()
            assert 1 <= caplog.text.count("not trusted") < 20
            assert "127.0.0.1:" in caplog.text
        else:
            assert (await reader.readuntil(b"\n")).startswith(b"127.0.0.1 ")
            assert await reader.readexactly(len(HEADER)) == HEADER
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    "begin", [b"hello", b"PROXI", b"\r\n\r\nx", b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 443\r\nhello", b"h"]
)
@pytest.mark.parametrize("step", [1, 1000])
async def test_mode_accept_takes_those_without_a_header(begin: bytes, step: int) -> None:
    """From trusted addresses, too, and not a byte is lost."""
    async with serving(proxy=kaio.ProxyProtocol(["127.0.0.1"], mode="accept")) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        for at in range(0, len(begin), step):
            writer.write(begin[at : at + step])
            await asyncio.sleep(0.01)
        first = (await reader.readuntil(b"\n")).decode().split()
        rest = begin.partition(b"\r\n")[2] if b"TCP4" in begin else begin
        assert first[0] == ("192.0.2.1" if b"TCP4" in begin else "127.0.0.1")
        assert await reader.readexactly(len(rest)) == rest
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("header", [HEADER, v2(tlvs=tlv(5, b"unique")), v2(0, b"", command=0x20), b"PROXY UNKNOWN\r\n"])
async def test_headers_in_small_steps(header: bytes, step: int) -> None:
    """What follows in the same segment is the application's."""
    seen: list[Any] = []

    async def handler(connection: kaio.Connection) -> None:
        seen.append(connection.transport.get_extra_info("proxy_header"))
        await who(connection)

    async with serving(handler) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        data = header + b"and more"
        for at in range(0, len(data), step):
            writer.write(data[at : at + step])
            if step < 1000:
                await asyncio.sleep(0)
        host, _ = (await reader.readuntil(b"\n")).decode().split()
        assert host == ("192.0.2.1" if b"TCP4" in header or b"unique" in header else "127.0.0.1")
        assert await reader.readexactly(8) == b"and more"
        writer.close()
        await writer.wait_closed()
    assert isinstance(seen[0], kaio.ProxyHeader)
    assert seen[0].unique_id == (b"unique" if b"unique" in header else None)


BAD = {
    "no header": (b"GET / HTTP/1.1\r\n\r\n", "no PROXY header"),
    "malformed": (b"PROXY TCP4 1 2 3 4\r\n", "wrong address"),
    "escapes": (b"PROXY \x1b[31m\nTCP4 1 2 3\r\n", "not a PROXY header"),
    "too long": (v2(tlvs=tlv(4, bytes(5000))), "at most 4096"),
    "nothing": (b"", "within 1 s"),
    "half": (HEADER[:20], "within 1 s"),
    "half of 2": (v2()[:20], "within 1 s"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_or_late_header_costs_that_connection_and_a_log_line(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing else."""
    data, text = BAD[name]
    async with serving(handshake_timeout=1) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(data)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        await until(lambda: text in caplog.text)
        (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert message.isprintable()
        assert "127.0.0.1:" in message
        assert not server.connections
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        writer.write(HEADER)
        assert await reader.readuntil(b"\n") == b"192.0.2.1 50000\n"
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("how", ["close", "reset", "half"])
async def test_a_health_check_that_says_nothing_is_no_warning(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Load balancers connect and go."""
    async with serving() as server:
        sock = socket.create_connection(("127.0.0.1", port_of(server)))
        if how == "half":
            sock.sendall(HEADER[:10])
            await asyncio.sleep(0.05)
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        endpoint: Any = server.listeners[0]._endpoint
        await asyncio.sleep(0.1)
        await until(lambda: not endpoint.setup_tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and how != "reset"]


async def test_the_limit_for_each_peer_counts_real_clients() -> None:
    """Not the proxy, from which all of them come."""
    async with serving(max_connections_per_peer=2) as server:
        kept = []
        for number in range(3):
            for _ in range(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
                writer.write(b"PROXY TCP4 192.0.2.%d 192.0.2.2 50000 443\r\n" % number)
                assert (await reader.readuntil(b"\n")).startswith(b"192.0.2.%d " % number)
                kept.append(writer)
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
        kept.append(writer)
        writer.write(b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 443\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        for writer in kept:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await until(lambda: not server.connections)
        gate: Any = server.listeners[0]._endpoint.gate
        assert gate._peers == {}


async def test_over_a_unix_socket(tmp_path: Path) -> None:
    """A proxy on this host; the header comes in small steps, too."""
    listener = kaio.Listener(f"unix:{tmp_path}/s", proxy_protocol=kaio.ProxyProtocol(["unix"]))

    async def handler(connection: kaio.Connection) -> None:
        await connection.send(repr(connection.peername).encode() + b"\n")
        await echo(connection)

    async with kaio.serve(handler, listeners=[listener], close_timeout=1):
        reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/s")
        for at in range(len(HEADER)):
            writer.write(HEADER[at : at + 1])
            await asyncio.sleep(0.001)
        assert await reader.readuntil(b"\n") == b"('192.0.2.1', 50000)\n"
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        writer.close()
        await writer.wait_closed()


async def test_the_end_of_the_server_ends_those_whose_header_has_not_come() -> None:
    """Within the close timeout, and their sockets are closed."""
    with contextlib.ExitStack() as stack:
        async with serving() as server:
            sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server)))) for _ in range(50)]
            endpoint: Any = server.listeners[0]._endpoint
            await until(lambda: len(endpoint.setup_tasks) == 50)
        for sock in sockets:
            sock.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""


def test_it_takes_a_proxy_protocol() -> None:
    """Anything else is a TypeError that names it."""
    with pytest.raises(TypeError, match="proxy_protocol must be a ProxyProtocol"):
        kaio.Listener("127.0.0.1:0", proxy_protocol=["127.0.0.1"])  # type: ignore[arg-type]
