"""What the tests of kaio.asgi share: real servers in this process, clients with real sockets, and apps that work.

The servers are uvicorn (h11 and websockets) and hypercorn; each runs on the loop of the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeAlias

import hypercorn.asyncio
import uvicorn
from hypercorn.config import Config as HypercornConfig

from kaio.asgi import Application, Message, Receive, Scope, Send

Serve: TypeAlias = Callable[[Application, socket.socket], contextlib.AbstractAsyncContextManager[None]]

LONG: Final = 30.0  # seconds that an event may take on a busy machine


@contextlib.asynccontextmanager
async def serve_uvicorn(app: Application, sock: socket.socket) -> AsyncIterator[None]:
    """Serve at a listening socket. Not Server.serve(), which handles signals and ends up to 0.2 s later."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="websockets-sansio",
        ws_ping_interval=None,
        lifespan="on",
        log_config=None,
        timeout_keep_alive=600,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[sock])
    try:
        yield
    finally:
        await server.shutdown(sockets=[sock])


@contextlib.asynccontextmanager
async def serve_hypercorn(app: Application, sock: socket.socket) -> AsyncIterator[None]:
    """Serve at a listening socket, which becomes the server's."""
    config = HypercornConfig()
    config.bind = [f"fd://{sock.detach()}"]
    config.errorlog = logging.getLogger("hypercorn.error")
    config.keep_alive_timeout = 600
    config.graceful_timeout = 1.0
    end = asyncio.Event()
    serving = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=end.wait))  # type: ignore[arg-type]
    try:
        yield
    finally:
        end.set()
        await serving


SERVERS: Final[dict[str, Serve]] = {"uvicorn": serve_uvicorn, "hypercorn": serve_hypercorn}


class Work:
    """What an application has to do: it takes until it is told to finish, or is cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.may_finish = asyncio.Event()
        self.finished = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.cancellations = 0

    async def __call__(self) -> None:
        self.begun.set()
        try:
            await self.may_finish.wait()
        except asyncio.CancelledError:
            self.cancellations += 1
            self.cancelled.set()
            raise
        self.finished.set()


class Observed:
    """An application around another one, that writes down how each call for a request or websocket ended."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.ends: asyncio.Queue[BaseException | None] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        try:
            await self.app(scope, receive, send)
        except BaseException as exc:
            self.ends.put_nowait(exc)
            raise
        self.ends.put_nowait(None)

    async def end(self) -> BaseException | None:
        """How the next call ended: None when it returned."""
        async with asyncio.timeout(LONG):
            return await self.ends.get()


async def lifespan(receive: Receive, send: Send) -> None:
    """Take part in a server's start and end."""
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


@contextlib.asynccontextmanager
async def serving(server: str, app: Application) -> AsyncIterator[tuple[int, Observed]]:
    """Serve an application for the block; afterwards no task is left."""
    before = asyncio.all_tasks()
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    observed = Observed(app)
    async with SERVERS[server](observed, sock):
        yield port, observed
    async with asyncio.timeout(LONG):
        while left := asyncio.all_tasks() - before:
            await asyncio.wait(left)


class Client:
    """An HTTP client that writes and reads what the test says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def ask(self, path: str = "/", *, method: str = "GET", headers: str = "", body: bytes = b"") -> None:
        """Send a request."""
        length = f"content-length: {len(body)}\r\n" if body else ""
        self.writer.write(f"{method} {path} HTTP/1.1\r\nhost: test\r\n{length}{headers}\r\n".encode() + body)

    async def answer(self) -> tuple[int, bytes]:
        """Read a response; return its status and body."""
        async with asyncio.timeout(LONG):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lines = head.decode().lower().splitlines()
            headers = dict(line.split(": ", 1) for line in lines[1:-1])
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                assert headers["transfer-encoding"] == "chunked"
                body = b"".join([chunk async for chunk in self._chunks()])
        return int(lines[0].split()[1]), body

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    def close(self) -> None:
        """Send FIN."""
        self.writer.close()

    def reset(self) -> None:
        """Send RST."""
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close_half(self) -> None:
        """Send FIN, and still read."""
        self.writer.write_eof()


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    """A client for the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def happens(event: asyncio.Event) -> None:
    """Wait for an event."""
    async with asyncio.timeout(LONG):
        await event.wait()


async def answer(send: Send, body: bytes = b"done", *, more: bool = False) -> None:
    """Send a response, or its beginning."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def read_body(receive: Receive) -> bytes:
    """Read a request's body."""
    body: bytes = b""
    while True:
        message = await receive()
        assert message["type"] == "http.request"
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body


class FakeServer:
    """The server's side of a call, without a network: what receive() returns, and what was sent."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message | Exception] = asyncio.Queue()
        self.sent: list[Message] = []
        self.received = 0
        """How many messages were taken."""

    def put(self, *messages: Message | str | Exception) -> None:
        """Let receive() return messages; a text is one with that type only."""
        for message in messages:
            self.messages.put_nowait({"type": message} if isinstance(message, str) else message)

    async def receive(self) -> Message:
        message = await self.messages.get()
        self.received += 1
        if isinstance(message, Exception):
            raise message
        return message

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def start(self, app: Application, kind: str = "http", **scope: Any) -> asyncio.Task[None]:
        """Call an application in a task."""
        whole = {"type": kind, "method": "GET", "path": "/", "headers": [], "client": ("192.0.2.1", 1234), **scope}

        async def call() -> None:
            await app(whole, self.receive, self.send)

        return asyncio.create_task(call())
