"""What kaio relies on inside the loops: a loop that has lost it is logged once, and its sockets keep their options."""

from __future__ import annotations

import asyncio
import gc
import logging
import ssl
from typing import Any

import pytest
import uvloop

import kaio
from kaio.net import internals

from .conftest import LOOPS, until

POLICY = kaio.Keepalive(7, 3, 5)


class WithoutTable(asyncio.SelectorEventLoop):
    """A loop whose table of transports has another type."""

    def __init__(self) -> None:
        super().__init__()
        self._transports: dict[int, Any] = {}


class UvloopWithoutTable(uvloop.Loop):
    """A loop of which the garbage collector tells nothing that is known."""


@pytest.fixture(autouse=True)
def nothing_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with nothing logged."""
    monkeypatch.setattr(internals, "_missed", set())


@pytest.mark.parametrize("base", [WithoutTable, UvloopWithoutTable])
def test_a_loop_without_a_table_of_transports_covers_its_sockets(
    base: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Accepted and connected sockets have the policy; one warning for the class, however many loops there are."""
    if base is UvloopWithoutTable:
        monkeypatch.setattr(gc, "get_referents", lambda _: [])
    policy = kaio.Keepalive(1, 1, 3, user_timeout=3)  # the monitor is told of connections after 0.75 s

    async def main() -> list[str]:
        accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        found = [str(kaio.inspect(each)) for each in (writer, await accepted)]
        await until(lambda: caplog.records)
        for each in (writer, accepted.result()):
            each.close()
            await each.wait_closed()
        server.close()
        await server.wait_closed()
        return found

    with caplog.at_level(logging.WARNING, "kaio"):
        for _ in range(2):
            found = kaio.run(main(), keepalive=policy, base=base)
            assert found == ["1s:1s:3", "1s:1s:3"]
    (record,) = caplog.records
    assert base.__name__ in record.getMessage()
    assert "table of its transports: its sockets have the policy, and no monitor" in record.getMessage()


class Transport(asyncio.Transport):
    """A transport of a loop that nobody knows."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True


def test_a_transport_that_cannot_be_closed_with_an_error_is_aborted(caplog: pytest.LogCaptureFixture) -> None:
    """Each time; the log says it once."""
    for _ in range(2):
        transport = Transport()
        internals.force_close(transport, TimeoutError())
        assert transport.aborted
    (record,) = caplog.records
    assert record.getMessage().endswith("Transport has no _force_close: connection_lost is called without the error")


def of_asyncio(module: str) -> type:
    """A class of an asyncio module that has lost what kaio relies on."""
    return type("Renewed", (asyncio.Transport,), {"__module__": f"asyncio.{module}", "is_reading": lambda _: True})


def test_a_selector_transport_without_its_waiter_is_taken_to_send_no_file(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio's; of other loops nothing is said, for they have no sendfile."""
    renewed = of_asyncio("selector_events")
    assert not any(internals.is_sending_file(each) for each in (renewed(), renewed(), Transport()))
    (record,) = caplog.records
    assert "_empty_waiter" in record.getMessage()


def test_a_tls_layer_that_does_not_say_whether_it_is_paused_holds_nothing_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """asyncio's; of uvloop's, which never did, nothing is said."""
    layer = of_asyncio("sslproto")()
    for protocol in (layer, layer, asyncio.Protocol()):
        transport: Any = of_asyncio("selector_events")()
        transport.get_protocol = lambda protocol=protocol: protocol
        assert not internals.is_held_back(transport)
    (record,) = caplog.records
    assert "_app_reading_paused" in record.getMessage()


def test_a_tls_layer_that_does_not_name_the_protocol_above_it(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio's `_app_protocol`: without it nothing is found; once TLS has ended it is None, and nothing is logged."""
    layer: Any = type("SSLProtocol", (asyncio.BaseProtocol,), {"__module__": "asyncio.sslproto"})()
    transport: Any = of_asyncio("selector_events")()
    transport.get_protocol = lambda: layer
    transport.is_closing = lambda: False
    layer._app_protocol = None
    assert not internals.protocols_above(transport)
    assert not caplog.records
    del layer._app_protocol
    for _ in range(2):
        assert not internals.protocols_above(transport)
    (record,) = caplog.records
    assert record.getMessage().endswith("has no _app_protocol: a kaio protocol over TLS may be watched twice")


Layer = tuple[asyncio.Server, asyncio.Transport, asyncio.Transport, Any]


async def tls_layer(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, factory: type[asyncio.Protocol] = asyncio.Protocol
) -> Layer:
    """A server, the TLS transport of a client, the transport below it, and the client's protocol."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=server_tls)
    host, port = server.sockets[0].getsockname()
    transport, protocol = await loop.create_connection(factory, host, port, ssl=client_tls, server_hostname="localhost")
    table = internals.transports_of(loop)
    (below,) = [
        each
        for reference in list(table.values())
        if (each := reference()) is not None and each.get_extra_info("sockname") == transport.get_extra_info("sockname")
    ]
    return server, transport, below, protocol


@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_above_and_below_a_real_tls_layer(
    loop: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Found while it is there, on uvloop also what is below; nothing, and nothing logged, once TLS has ended."""

    class Protocol(asyncio.Protocol):
        looked_up = 0

        @property
        def connection_lost(self) -> Any:  # as with kaio's protocols, where looking it up reads TCP_INFO
            type(self).looked_up += 1
            return super().connection_lost

    async def main() -> None:
        server, transport, below, protocol = await tls_layer(server_tls, client_tls, Protocol)
        assert protocol in internals.protocols_above(below)
        assert not Protocol.looked_up
        assert internals.below_tls(transport) is (below if loop == "uvloop" else None)
        internals.force_close(transport, TimeoutError())
        await until(lambda: internals.is_closed(below))
        assert internals.below_tls(transport) is None
        assert protocol not in internals.protocols_above(below)
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())
    assert not caplog.records


def test_uvloops_tls_of_which_the_garbage_collector_tells_nothing(
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each loss is logged once; after TLS has ended there is nothing to lose."""

    async def main() -> None:
        server, transport, below, _ = await tls_layer(server_tls, client_tls)
        monkeypatch.setattr(gc, "get_referents", lambda _: [])
        for _ in range(2):
            assert internals.below_tls(transport) is None
            assert not internals.protocols_above(below)
        assert len(caplog.records) == 2
        internals._missed.clear()
        internals.force_close(transport, TimeoutError())
        await until(lambda: internals.is_closed(below))
        assert internals.below_tls(transport) is None
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    assert [each.getMessage().partition(" has no ")[2] for each in caplog.records] == [
        "_ssl_protocol: data that TLS holds back may be lost at the end",
        "_app_protocol: a kaio protocol over TLS may be watched twice",
    ]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_loops_of_this_python_have_what_is_relied_on(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """The table of transports is found, and the protocol above a transport is its own."""

    async def main() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        transport, protocol = await asyncio.get_running_loop().create_connection(
            asyncio.Protocol, *server.sockets[0].getsockname()
        )
        table = internals.transports_of(asyncio.get_running_loop())
        assert transport in [reference() for reference in table.values()]
        assert internals.protocols_above(transport) == [protocol]
        assert not internals.is_sending_file(transport)
        assert not internals.is_held_back(transport)
        internals.force_close(transport, TimeoutError())
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())
    assert not caplog.records
