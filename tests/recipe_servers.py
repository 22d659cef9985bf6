"""What the clients of docs/recipes.md talk to: each gives a part of an answer, and then nothing.

PostgreSQL, redis-server, nats-server, gRPC and websockets are real; HTTP, AMQP and MongoDB's protocol are spoken here
as far as their clients need. Before each of them is a relay, whose end of a client's connection can play dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import bson
import grpc.aio  # type: ignore[import-untyped]
import pamqp.body
import pamqp.commands as amqp
import pamqp.frame
import pamqp.header
import websockets
from pamqp.base import Frame

import kaio

from . import servers

__all__ = ["Relay", "all_relays"]

Handler = Callable[[kaio.Connection], Awaitable[None]]


class Relay:
    """A server that passes everything on, and knows its clients' connections."""

    def __init__(self, backend_port: int) -> None:
        self.backend_port = backend_port
        self.port = 0
        self.clients: list[kaio.Connection] = []

    async def __call__(self, client: kaio.Connection) -> None:
        self.clients.append(client)
        async with kaio.connect(servers.LOOPBACK, self.backend_port) as backend, asyncio.TaskGroup() as group:
            group.create_task(_pump(client, backend))
            group.create_task(_pump(backend, client))


async def _pump(source: kaio.Connection, sink: kaio.Connection) -> None:
    async for data in source:
        await sink.send(data)
    await sink.send_eof()


# -- HTTP


OPENAI: Final = {
    "id": "1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hm"}, "finish_reason": None}],
}
ANTHROPIC: Final = {
    "type": "message_start",
    "message": {
        "id": "1",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "m",
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
}


async def http(client: kaio.Connection) -> None:
    """Answer with the first of many server-sent events."""
    head = await client.receive_until(b"\r\n\r\n", 65536)
    if b"/messages" in head:
        event = b"event: message_start\ndata: " + json.dumps(ANTHROPIC).encode()
    else:
        event = b"data: " + (json.dumps(OPENAI).encode() if b"/chat/completions" in head else b"1")
    event += b"\n\n"
    await client.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    await client.send(b"%x\r\n%s\r\n" % (len(event), event))
    async for _ in client:
        pass


# -- AMQP


async def rabbit(client: kaio.Connection) -> None:
    """Speak AMQP 0-9-1 up to the first message of a consumer."""
    buffer = b""
    await client.receive_exactly(8)
    start = amqp.Connection.Start(server_properties={"capabilities": {"publisher_confirms": True}})
    await client.send(pamqp.frame.marshal(start, 0))
    async for data in client:
        buffer += data
        while buffer:
            try:
                count, channel, frame = pamqp.frame.unmarshal(buffer)
            except Exception:  # a part of a frame
                break
            buffer = buffer[count:]
            for answer in _rabbits_answers(frame):
                await client.send(pamqp.frame.marshal(answer, channel))


def _rabbits_answers(frame: Any) -> list[Frame | pamqp.header.ContentHeader | pamqp.body.ContentBody]:
    match frame:
        case amqp.Connection.StartOk():
            return [amqp.Connection.Tune(channel_max=100, frame_max=131072, heartbeat=60)]
        case amqp.Connection.Open():
            return [amqp.Connection.OpenOk()]
        case amqp.Channel.Open():
            return [amqp.Channel.OpenOk()]
        case amqp.Confirm.Select():
            return [amqp.Confirm.SelectOk()]
        case amqp.Basic.Qos():
            return [amqp.Basic.QosOk()]
        case amqp.Basic.Consume():
            deliver = amqp.Basic.Deliver(frame.consumer_tag or "tag", 1, False, "", "work")
            header = pamqp.header.ContentHeader(body_size=1, properties=amqp.Basic.Properties())
            return [amqp.Basic.ConsumeOk(frame.consumer_tag or "tag"), deliver, header, pamqp.body.ContentBody(b"1")]
    return []


# -- MongoDB


async def mongo(client: kaio.Connection) -> None:
    """Answer hello and ping (OP_MSG, and the OP_QUERY of the first hello); nothing else."""
    hello = {"ok": 1.0, "isWritablePrimary": True, "helloOk": True, "maxWireVersion": 21, "minWireVersion": 0}
    while True:
        length, request, _, code = struct.unpack("<4i", await client.receive_exactly(16))
        body = await client.receive_exactly(length - 16)
        if code == 2004:  # OP_QUERY: flags, name, skip, count, document
            document = bson.encode({**hello, "maxBsonObjectSize": 1 << 24, "maxMessageSizeBytes": 1 << 25})
            answer, kind = struct.pack("<iqii", 8, 0, 0, 1) + document, 1
        else:
            command = bson.decode(body[5:])
            if not {"hello", "ping", "ismaster", "endSessions"} & command.keys():
                continue
            answer, kind = struct.pack("<iB", 0, 0) + bson.encode(hello), 2013
        await client.send(struct.pack("<4i", 16 + len(answer), 1, request, kind) + answer)


# -- all of them


@contextlib.asynccontextmanager
async def _grpc() -> AsyncIterator[int]:
    """A gRPC server whose one method gives one answer of many."""

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"1"
        await asyncio.sleep(3600)

    handler = grpc.unary_stream_rpc_method_handler(stream)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Test", {"Stream": handler})])
    port = server.add_insecure_port(f"{servers.LOOPBACK}:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def _first_words(connection: websockets.ServerConnection) -> None:
    await connection.send("1")
    await connection.wait_closed()


@contextlib.asynccontextmanager
async def all_relays(recipes: list[str]) -> AsyncIterator[dict[str, Relay]]:
    """Run all servers, and a relay for each recipe."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(handler: Handler) -> int:
            # Without a policy: a monitor would have what an end that plays dead has last said sent again and again.
            serving = kaio.serve(handler, servers.LOOPBACK, 0, keepalive="off", close_timeout=0)
            address: Any = (await stack.enter_async_context(serving)).listeners[0].address
            port: int = address.port
            return port

        real = {name: stack.enter_context(run()).port for name, run in _REAL.items()}
        chat = await stack.enter_async_context(websockets.serve(_first_words, servers.LOOPBACK, 0, ping_interval=None))
        web = await serve(http)
        backends = {
            **dict.fromkeys(["openai", "anthropic", "httpx2", "httpx", "requests", "aiohttp"], web),
            **dict.fromkeys(
                ["psycopg", "SQLAlchemy with psycopg", "SQLAlchemy with asyncpg"],
                real["postgres"],
            ),
            "redis": real["redis"],
            "nats-py": real["nats"],
            "websockets": next(iter(chat.sockets)).getsockname()[1],
            "aio-pika": await serve(rabbit),
            "pymongo": await serve(mongo),
            "gRPC": await stack.enter_async_context(_grpc()),
        }
        relays = {recipe: Relay(backends[recipe]) for recipe in recipes}
        for relay in relays.values():
            relay.port = await serve(relay)
        yield relays


_REAL: Final = {"postgres": servers.postgres, "redis": servers.redis, "nats": servers.nats}
