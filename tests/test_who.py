"""What a handler knows of its connection, and what its log records say; TLS contexts that are exchanged."""

from __future__ import annotations

import asyncio
import io
import logging
import ssl
from typing import Any

import pytest
import trustme

import kaio

from .conftest import echo, until


async def test_a_connection_knows_where_it_belongs() -> None:
    """Its server, its listener, and a number of its own; also after its end."""
    seen: list[kaio.Connection] = []

    async def handler(connection: kaio.Connection) -> None:
        seen.append(connection)
        assert connection.server is server
        assert connection.listener in server.listeners
        await echo(connection)

    listeners = [kaio.Listener("127.0.0.1:0"), kaio.Listener("[::1]:0")]
    async with kaio.serve(handler, listeners=listeners) as server:
        for listener in listeners:
            async with kaio.connect(listener.address) as client:
                await client.send(b"x")
                await client.receive()
                assert client.server is None
                assert client.listener is None
                assert client.id != seen[-1].id == seen[-1].id
    assert [each.listener for each in seen] == listeners
    assert seen[0].server is server
    assert len({each.id for each in seen}) == 2


async def test_the_connection_of_the_code_that_runs() -> None:
    """In the handler, in the tasks that it starts, and nowhere else."""
    seen: list[Any] = []

    async def handler(connection: kaio.Connection) -> None:
        seen.append((kaio.current_connection(), connection))
        async with asyncio.TaskGroup() as group:
            group.create_task(child(connection))
        await connection.receive()

    async def child(connection: kaio.Connection) -> None:
        await asyncio.sleep(0)
        seen.append((kaio.current_connection(), connection))

    assert kaio.current_connection() is None
    async with kaio.serve(handler, "127.0.0.1", 0) as server:
        clients = [await kaio.connect(server.listeners[0].address) for _ in range(3)]
        await until(lambda: len(seen) == 6)
        assert kaio.current_connection() is None
        for client in clients:
            await client.aclose()
    assert all(one is other for one, other in seen)


async def test_log_records_name_their_connection() -> None:
    """The handler's own, those of libraries that it calls, and kaio's."""
    text = io.StringIO()
    log = logging.StreamHandler(text)
    log.addFilter(kaio.ConnectionFilter())
    log.setFormatter(logging.Formatter("[%(connection)s] %(message)s"))
    logger = logging.getLogger("some.library")
    logger.addHandler(log)
    logging.getLogger("kaio").addHandler(log)
    numbers: list[int] = []

    async def handler(connection: kaio.Connection) -> None:
        numbers.append(connection.id)
        logger.warning("hello")
        raise ValueError("broken")

    try:
        async with kaio.serve(handler, "127.0.0.1", 0) as server:
            logger.warning("outside")
            client = await kaio.connect(server.listeners[0].address)
            _, port = client.transport.get_extra_info("sockname")
            await client.aclose()
            await until(lambda: "broken" in text.getvalue())
    finally:
        logger.removeHandler(log)
        logging.getLogger("kaio").removeHandler(log)
    lines = text.getvalue().splitlines()
    assert "[-] outside" in lines
    assert f"[#{numbers[0]} 127.0.0.1:{port}] hello" in lines
    assert any(line.startswith(f"[#{numbers[0]} 127.0.0.1:{port}] handler failed") for line in lines)


def serial(connection: kaio.Connection) -> int:
    """The number of the certificate that the server has shown."""
    tls = connection.transport.get_extra_info("ssl_object")
    return int(tls.getpeercert()["serialNumber"], 16)


async def test_a_listeners_certificate_is_exchanged_while_it_serves(
    authority: trustme.CA, client_tls: ssl.SSLContext
) -> None:
    """New connections see the new one at once; open ones go on, and nobody is refused."""

    def context() -> tuple[ssl.SSLContext, int]:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate = authority.issue_cert("localhost")
        certificate.configure_cert(made)
        from cryptography import x509

        return made, x509.load_pem_x509_certificate(certificate.cert_chain_pems[0].bytes()).serial_number

    first, number = context()
    listener = kaio.Listener("localhost:0", ssl=first)
    async with kaio.serve(echo, listeners=[listener]) as server:
        port = server.sockets[0].getsockname()[1]
        old = await kaio.connect("localhost", port, ssl=client_tls)
        assert serial(old) == number
        for _ in range(5):
            listener.ssl, number = context()
            clients = await asyncio.gather(*(kaio.connect("localhost", port, ssl=client_tls) for _ in range(10)))
            assert {serial(each) for each in clients} == {number}
            for each in clients:
                await each.aclose()
        await old.send(b"still")
        assert await old.receive() == b"still"
        await old.aclose()
        assert listener.ssl is not first
        with pytest.raises(TypeError, match="SSLContext"):
            listener.ssl = "cert.pem"  # type: ignore[assignment]
        with pytest.raises(ValueError, match="with TLS"):
            listener.ssl = None
    with pytest.raises(ValueError, match="without TLS"):
        kaio.Listener("127.0.0.1:0").ssl = first


async def test_a_certificate_that_is_loaded_into_the_context_in_use(
    authority: trustme.CA, client_tls: ssl.SSLContext
) -> None:
    """The other way to exchange it: new connections have it, without a word to the listener."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    async with kaio.serve(echo, "localhost", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        seen = []
        for _ in range(3):
            async with kaio.connect("localhost", port, ssl=client_tls) as connection:
                seen.append(serial(connection))
            authority.issue_cert("localhost").configure_cert(context)
        assert len(set(seen)) == 3


async def test_alpn_and_sni_are_those_of_the_context(authority: trustme.CA, client_tls: ssl.SSLContext) -> None:
    """As in asyncio: nothing to do for kaio but to let them through."""
    names: list[str] = []
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server_tls)
    other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("other.example").configure_cert(other)

    def choose(tls: ssl.SSLObject, name: str, _: ssl.SSLContext) -> None:
        names.append(name)
        if name == "other.example":
            tls.context = other

    server_tls.sni_callback = choose
    for each in (server_tls, other):
        each.set_alpn_protocols(["echo/2", "echo/1"])
    client = ssl.create_default_context()
    authority.configure_trust(client)
    client.set_alpn_protocols(["echo/1"])
    spoken: list[str | None] = []

    async def handler(connection: kaio.Connection) -> None:
        spoken.append(connection.transport.get_extra_info("ssl_object").selected_alpn_protocol())
        await echo(connection)

    async with kaio.serve(handler, "localhost", 0, ssl=server_tls) as server:
        port = server.sockets[0].getsockname()[1]
        for name in ("localhost", "other.example"):
            async with kaio.connect("localhost", port, ssl=client, server_hostname=name) as connection:
                await connection.send(b"x")
                assert await connection.receive() == b"x"
    assert names == ["localhost", "other.example"]
    assert spoken == ["echo/1", "echo/1"]
