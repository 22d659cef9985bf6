"""kaio.asgi.CancelOnDisconnect: work is cancelled when its client is gone, and in no other case.

The matrix, each on asyncio's loop and on uvloop:

    server              uvicorn, hypercorn
    client ends by      FIN, RST, FIN of its half                                    websocket: close, abort
    kind of app         plain; body not read; Starlette's JSON, upload, middleware,  websocket at work, in receive()
                        stream; stream whose client was told nothing yet
    not cancelled       complete; complete with a background task; shielded; requests behind each other, pipelined
                        and beside each other; apps that raise

Messages and cancellation in detail are tested without a server, where the order of events can be chosen.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
import websockets
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

import kaio.asgi
from kaio.asgi import Application, CancelOnDisconnect, Message, Receive, Scope, Send
from kaio.testing import blackhole

from .asgi_servers import (
    LONG,
    SERVERS,
    Client,
    FakeServer,
    Work,
    answer,
    connected,
    happens,
    read_body,
    serving,
)
from .on_loops import on_kaio

servers = pytest.mark.parametrize("server", SERVERS)
# hypercorn complains by itself, with the middleware and without: a timeout of the connection is no error that it
# expects at the end (asyncio/tcp_server.py), and it cancels connections on which a body was not read.
hypercorn_complains = pytest.mark.parametrize(
    "server", [pytest.param(name, marks=[pytest.mark.complains] * (name == "hypercorn")) for name in SERVERS]
)


@pytest.fixture(autouse=True)
def records(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What kaio logs; nobody logs an error."""
    caplog.set_level(logging.INFO, "kaio")
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Handler()
    logging.getLogger("kaio").addHandler(handler)
    yield found
    logging.getLogger("kaio").removeHandler(handler)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a server complains of."""
    return [
        f"{each.name}: {each.getMessage()} {each.exc_text}" for each in caplog.records if each.levelno > logging.INFO
    ]


# -- kinds of applications


def plain(work: Work) -> Application:
    """Reads the body, and works."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await work()
        await answer(send)

    return app


def ignores_body(work: Work) -> Application:
    """Never calls receive()."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work()
        await answer(send)

    return app


def begun_stream(work: Work) -> Application:
    """Has sent a part of its response, and does not listen."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"part", more=True)
        await work()
        await send({"type": "http.response.body", "body": b"end"})

    return app


def child_tasks(work: Work) -> Application:
    """Works in a task of a group."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(work())
        await answer(send)

    return app


def starlette_json(work: Work) -> Starlette:
    async def handler(request: Request) -> Response:
        await work()
        return JSONResponse({})

    return Starlette(routes=[Route("/", handler, methods=["GET", "POST"])])


def starlette_upload(work: Work) -> Starlette:
    async def handler(request: Request) -> Response:
        await request.body()
        await work()
        return JSONResponse({})

    return Starlette(routes=[Route("/", handler, methods=["GET", "POST"])])


def starlette_middleware(work: Work) -> Starlette:
    async def passes(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    async def handler(request: Request) -> Response:
        await request.body()
        await work()
        return JSONResponse({})

    middleware = [Middleware(BaseHTTPMiddleware, dispatch=passes)]
    return Starlette(routes=[Route("/", handler, methods=["GET", "POST"])], middleware=middleware)


def starlette_stream(work: Work) -> Starlette:
    """Starlette listens for the disconnect itself, and is told."""

    async def stream() -> AsyncIterator[bytes]:
        yield b"part"
        await work()
        yield b"end"

    async def handler(request: Request) -> Response:
        return StreamingResponse(stream())

    return Starlette(routes=[Route("/", handler, methods=["GET", "POST"])])


KINDS: dict[str, Callable[[Work], Application]] = {
    "plain": plain,
    "body not read": ignores_body,
    "begun stream": begun_stream,
    "child tasks": child_tasks,
    "Starlette JSON": starlette_json,
    "Starlette upload": starlette_upload,
    "Starlette middleware": starlette_middleware,
    "Starlette stream": starlette_stream,
}
TOLD = {"Starlette stream"}
ENDS = {"FIN": Client.close, "RST": Client.reset, "FIN of its half": Client.close_half}

kinds = pytest.mark.parametrize("kind", KINDS)


# -- real servers: what is cancelled


@servers
@kinds
@pytest.mark.parametrize("end", ENDS)
async def test_work_is_cancelled_when_its_client_is_gone(
    server: str, kind: str, end: str, records: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Once, at once, and the server has nothing to complain of. The grace is not for applications at work."""
    work = Work()
    app = CancelOnDisconnect(KINDS[kind](work), grace=1000)
    async with serving(server, app) as (port, observed), connected(port) as client:
        _, client_port = client.writer.get_extra_info("sockname")
        client.ask(method="POST", body=b"a little")
        await happens(work.begun)
        ENDS[end](client)
        await happens(work.cancelled)
        assert await observed.end() is None
    assert work.cancellations == 1
    if kind in TOLD:
        assert records == []
    else:
        assert records == [f"POST /: the client 127.0.0.1:{client_port} is gone, its work is cancelled"]
    assert errors(caplog) == []


@servers
@kinds
async def test_work_is_completed_when_its_client_stays(
    server: str, kind: str, records: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And the connection serves the next request."""
    work = Work()
    async with serving(server, CancelOnDisconnect(KINDS[kind](work))) as (port, observed), connected(port) as client:
        for _ in range(3):
            client.ask(method="POST", body=b"a little")
            work.may_finish.set()
            status, body = await client.answer()
            assert (status, body) in [(200, b"done"), (200, b"{}"), (200, b"partend")]
            assert await observed.end() is None
    assert (work.cancellations, records, errors(caplog)) == (0, [], [])


async def test_without_it_the_work_goes_on() -> None:
    """What the other tests see is the middleware's doing."""
    work = Work()
    sees = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await asyncio.shield(gone(receive))
        await work()

    async def gone(receive: Receive) -> None:
        assert (await receive())["type"] == "http.disconnect"
        sees.set()

    async with serving("uvicorn", app) as (port, observed), connected(port) as client:
        client.ask()
        client.close()
        await happens(sees)
        await happens(work.begun)
        work.may_finish.set()
        assert await observed.end() is None
    assert (work.finished.is_set(), work.cancellations) == (True, 0)


@pytest.mark.parametrize("server", ["uvicorn"])  # hypercorn waits for ever for room in its queue, and for its end
async def test_an_upload_that_nobody_reads_is_held_back(server: str) -> None:
    """The client cannot send more than the socket buffers and what is read ahead; then the app is answered."""
    work = Work()
    size = 64 * 1024 * 1024

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work()
        await answer(send)

    async with serving(server, CancelOnDisconnect(app)) as (port, _), connected(port) as client:
        client.writer.transport.set_write_buffer_limits(0)
        client.ask(method="POST", headers=f"content-length: {size}\r\n")
        await happens(work.begun)
        sent = 0
        while sent < size:
            client.writer.write(bytes(1024 * 1024))
            sent += 1024 * 1024
            try:
                async with asyncio.timeout(1):
                    await client.writer.drain()
            except TimeoutError:
                break
        assert sent < size
        work.may_finish.set()
        assert (await client.reader.readuntil(b"\r\n")).split()[1] == b"200"
        client.reset()


@servers
async def test_a_large_upload_arrives_whole(server: str) -> None:
    """In order, whatever was read ahead of the application."""
    body = bytes(range(256)) * 4096 * 4
    read = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await happens(read)
        await answer(send, str((await read_body(receive)) == body).encode())

    async with serving(server, CancelOnDisconnect(app)) as (port, _), connected(port) as client:
        client.ask(method="POST", body=body)
        asyncio.get_running_loop().call_later(0.2, read.set)
        assert await client.answer() == (200, b"True")


@servers
async def test_pipelined_requests_are_all_answered(server: str, records: list[str]) -> None:
    """One after the other; none takes the other's end for its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        await asyncio.sleep(0.01)
        await answer(send, scope["path"].encode() + body)

    async with serving(server, CancelOnDisconnect(app)) as (port, observed), connected(port) as client:
        for number in range(10):
            client.ask(f"/{number}", method="POST", body=b"x")
        for number in range(10):
            assert await client.answer() == (200, b"/%dx" % number)
            assert await observed.end() is None
    assert records == []


@servers
async def test_background_tasks_run_on(server: str, records: list[str]) -> None:
    """The server reports a disconnect when the response is complete; the work then is nobody's but the app's."""
    work = Work()

    async def handler(request: Request) -> Response:
        return JSONResponse({}, background=BackgroundTask(work))

    app = CancelOnDisconnect(Starlette(routes=[Route("/", handler)]))
    async with serving(server, app) as (port, observed):
        async with connected(port) as client:
            client.ask()
            assert await client.answer() == (200, b"{}")
            await happens(work.begun)
        async with connected(port) as client:  # the server has had its turns
            client.ask()
            assert await client.answer() == (200, b"{}")
        work.may_finish.set()
        assert [await observed.end(), await observed.end()] == [None, None]
    assert (work.finished.is_set(), work.cancellations, records) == (True, 0, [])


@servers
async def test_shielded_work_is_left_alone(server: str, records: list[str]) -> None:
    """By asyncio.shield(); the middleware waits for what the application waits for."""
    work = Work()
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.create_task(work())
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            ended.append("cancelled")
            work.may_finish.set()
            await task
            ended.append("finished")
            raise

    async with serving(server, CancelOnDisconnect(app)) as (port, observed), connected(port) as client:
        client.ask()
        await happens(work.begun)
        client.close()
        assert await observed.end() is None
    assert (ended, work.cancellations, len(records)) == (["cancelled", "finished"], 0, 1)


@servers
async def test_an_app_that_raises_is_the_servers_affair(
    server: str, records: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The exception passes as it is, and the server answers 500."""
    error = LookupError("of the app")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        raise error

    async with serving(server, CancelOnDisconnect(app)) as (port, observed), connected(port) as client:
        client.ask()
        assert (await client.answer())[0] == 500
        assert await observed.end() is error
    assert len(errors(caplog)) == 1
    assert records == []


@servers
async def test_two_hundred_at_once(server: str, records: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Half of the clients go, and only their work is cancelled."""
    works = {f"/{number}": Work() for number in range(200)}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await works[scope["path"]]()
        await answer(send, scope["path"].encode())

    async with serving(server, CancelOnDisconnect(app)) as (port, observed):
        clients = {}
        for path, work in works.items():
            clients[path] = Client(*await asyncio.open_connection("127.0.0.1", port))
            clients[path].ask(path)
            await happens(work.begun)
        for path in list(works)[::2]:
            clients[path].close()
        for path in list(works)[::2]:
            await happens(works[path].cancelled)
        for path in list(works)[1::2]:
            works[path].may_finish.set()
            assert await clients[path].answer() == (200, path.encode())
            clients[path].close()
        assert [await observed.end() for _ in works] == [None] * 200
    assert (sum(work.cancellations for work in works.values()), len(records), errors(caplog)) == (100, 100, [])


# -- websockets


def websocket_app(handler: Any) -> Starlette:
    return Starlette(routes=[WebSocketRoute("/", handler)])


def connect(port: int) -> Any:
    return websockets.connect(f"ws://127.0.0.1:{port}/", ping_interval=None, proxy=None)


@servers
@pytest.mark.parametrize("end", ["close", "abort"])
async def test_a_websocket_at_work_is_cancelled(
    server: str, end: str, records: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It has sent to its client, and does not receive."""
    work = Work()

    async def handler(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await work()

    app = CancelOnDisconnect(websocket_app(handler), grace=0.1)
    async with serving(server, app) as (port, observed), connect(port) as client:
        await client.send("hello")
        assert await client.recv() == "hello"
        await happens(work.begun)
        if end == "close":
            await client.close()
        else:
            client.transport.abort()
        await happens(work.cancelled)
        assert await observed.end() is None
    assert work.cancellations == 1
    assert len(records) == 1
    assert records[0].startswith("WebSocket /: the client 127.0.0.1:")
    assert errors(caplog) == []


@servers
@pytest.mark.parametrize("end", ["close", "abort"])
async def test_a_websocket_that_receives_is_told(server: str, end: str, records: list[str]) -> None:
    """And ends by itself: WebSocketDisconnect, and what it does then."""
    heard: list[str] = []
    ready = asyncio.Event()

    async def handler(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                heard.append(await websocket.receive_text())
                ready.set()
        except WebSocketDisconnect:
            await asyncio.sleep(0.01)
            heard.append("disconnect")

    async with serving(server, CancelOnDisconnect(websocket_app(handler))) as (port, observed), connect(port) as client:
        await client.send("hello")
        await happens(ready)
        if end == "close":
            await client.close()
        else:
            client.transport.abort()
        assert await observed.end() is None
    assert (heard, records) == (["hello", "disconnect"], [])


@servers
async def test_what_a_websocket_client_said_before_it_closed_is_heard(server: str, records: list[str]) -> None:
    """All of it, although the application is slower than its client."""
    heard: list[str] = []

    async def handler(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                heard.append(await websocket.receive_text())
                await asyncio.sleep(0.005)
        except WebSocketDisconnect:
            heard.append("disconnect")

    app = CancelOnDisconnect(websocket_app(handler), grace=LONG)
    async with serving(server, app) as (port, observed), connect(port) as client:
        for number in range(40):
            await client.send(str(number))
        await client.close()
        assert await observed.end() is None
    assert (heard, records) == ([*map(str, range(40)), "disconnect"], [])


@servers
async def test_a_websocket_that_the_app_has_closed_is_not_cancelled(server: str, records: list[str]) -> None:
    """Servers report a disconnect then, too."""
    work = Work()

    async def handler(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()
        await work()

    app = CancelOnDisconnect(websocket_app(handler), grace=0)
    async with serving(server, app) as (port, observed):
        async with connect(port) as client:
            await client.wait_closed()
            await happens(work.begun)
        async with connect(port) as client:
            await client.wait_closed()
        work.may_finish.set()
        assert [await observed.end(), await observed.end()] == [None, None]
    assert (work.cancellations, records) == (0, [])


# -- dead peers


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
@on_kaio(kaio.Keepalive(1, 1, 1))
@hypercorn_complains
async def test_work_for_a_dead_client_is_cancelled_on_kaios_loop(
    server: str, records: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The client loses power, so to speak: there is no FIN and no RST, and the kernel's probes go unanswered."""
    work = Work()
    loop = asyncio.get_running_loop()
    async with serving(server, CancelOnDisconnect(plain(work))) as (port, observed):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
            await happens(work.begun)
            with blackhole(client):
                began = loop.time()
                await happens(work.cancelled)
                assert await observed.end() is None
                took = loop.time() - began
    print(f"cancelled {took:.2f} s after the client's last sign of life")
    assert 1 < took < 2 + 4
    assert len([record for record in records if record.endswith("its work is cancelled")]) == 1
    assert [error for error in errors(caplog) if not error.startswith("kaio:")] == []


# -- without a server: messages


def request(body: bytes = b"", *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def settle(fake: FakeServer) -> None:
    """Let all that is ready run: the fake server's queue wakes whoever waits within a few turns of the loop."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("body", "most"), [(b"", 16), (b"x" * 1000, 16), (b"x" * 60_000, 2), (b"x" * 1_000_000, 1)])
async def test_reading_ahead_is_bounded(body: bytes, most: int) -> None:
    """16 messages, or 64 KiB and one message; and the application gets each, in order."""
    work = Work()
    read: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work()
        while (message := await receive())["type"] == "http.request":
            read.append(message["number"])
            assert fake.received - len(read) <= most
            if len(read) == 50:
                fake.put("http.disconnect")

    fake = FakeServer()
    fake.put(*({**request(body, more=True), "number": number} for number in range(50)))
    task = fake.start(CancelOnDisconnect(app))
    await happens(work.begun)
    await settle(fake)
    assert fake.received == most
    work.may_finish.set()
    await task
    assert read == list(range(50))


async def test_the_body_is_not_asked_for_before_the_app_asks() -> None:
    """With Expect: 100-continue, calling receive() makes a server ask the client for it."""
    work = Work()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await work()
        assert await read_body(receive) == b"all"
        await again()

    again = Work()
    fake = FakeServer()
    fake.put(request(b"all"))
    task = fake.start(CancelOnDisconnect(app), headers=[(b"expect", b"100-Continue")])
    await happens(work.begun)
    await settle(fake)
    assert fake.received == 0
    work.may_finish.set()
    await happens(again.begun)
    fake.put("http.disconnect")
    await happens(again.cancelled)
    await task


async def test_a_websocket_is_read_ahead_once_it_is_accepted() -> None:
    """Before, there is nothing to receive but `websocket.connect`, which some servers return at each call."""
    accepts = Work()
    works = Work()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await accepts()
        await send({"type": "websocket.accept"})
        await works()

    fake = FakeServer()
    fake.put("websocket.connect", "websocket.connect")
    task = fake.start(CancelOnDisconnect(app, grace=0), "websocket")
    await happens(accepts.begun)
    await settle(fake)
    assert fake.received == 1
    accepts.may_finish.set()
    await happens(works.begun)
    await settle(fake)
    assert fake.received == 2
    fake.put("websocket.disconnect")
    await happens(works.cancelled)
    await task


async def test_an_error_of_the_servers_receive_is_the_apps() -> None:
    """Raised where the application receives, once; and nothing is cancelled for it."""
    error = OSError("of the server")
    heard: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append(await receive())
        try:
            await receive()
        except OSError as exc:
            heard.append(exc)
        heard.append(await receive())

    fake = FakeServer()
    fake.put(request(), error, {"type": "http.disconnect"})
    await fake.start(CancelOnDisconnect(app))
    assert heard == [request(), error, {"type": "http.disconnect"}]


async def test_an_error_of_the_servers_receive_that_nobody_hears() -> None:
    """It is not the loop's affair either."""
    work = Work()
    fake = FakeServer()
    fake.put(OSError("of the server"))
    task = fake.start(CancelOnDisconnect(ignores_body(work)))
    await happens(work.begun)
    await settle(fake)
    work.may_finish.set()
    await task
    assert fake.received == 1
    assert work.cancellations == 0


async def test_a_cancelled_receive_loses_no_message() -> None:
    """The next call gets it."""
    heard: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await receive()
        fake.put(request(b"late"))
        heard.append(await receive())

    fake = FakeServer()
    await fake.start(CancelOnDisconnect(app))
    assert heard == [request(b"late")]


async def test_several_tasks_may_receive() -> None:
    """Each message goes to one of them."""
    heard: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def one() -> None:
            heard.append((await receive())["body"])

        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(one())
            await settle(fake)
            fake.put(*(request(b"%d" % number, more=True) for number in range(5)))

    fake = FakeServer()
    await fake.start(CancelOnDisconnect(app))
    assert sorted(heard) == [b"0", b"1", b"2", b"3", b"4"]


async def test_polling_for_the_disconnect_works() -> None:
    """Starlette's `request.is_disconnected()` takes a message only if one is there."""
    seen: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        current = Request(scope, receive)
        await current.body()
        seen.append(await current.is_disconnected())
        await answer(send)
        fake.put("http.disconnect")
        await settle(fake)
        seen.append(await current.is_disconnected())

    fake = FakeServer()
    fake.put(request())
    await fake.start(CancelOnDisconnect(app))
    assert seen == [False, True]


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "http.response.start", "status": 200}, {"type": "http.response.body"}],
        [{"type": "http.response.start", "status": 200}, {"type": "http.response.pathsend", "path": "/x"}],
        [{"type": "http.response.start", "status": 200}, {"type": "http.response.zerocopysend", "file": 3}],
        [
            {"type": "http.response.start", "status": 200, "trailers": True},
            {"type": "http.response.body"},
            {"type": "http.response.trailers", "headers": []},
        ],
        [{"type": "websocket.close"}],
        [{"type": "websocket.http.response.start", "status": 403}, {"type": "websocket.http.response.body"}],
    ],
    ids=lambda messages: messages[-1]["type"],
)
async def test_nothing_is_cancelled_after_the_last_message(messages: list[Message]) -> None:
    """And all is, before it."""
    kind = messages[0]["type"].split(".")[0]
    for count in range(len(messages) + 1):
        work = Work()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if kind == "websocket":
                await receive()
                await send({"type": "websocket.accept"})
            for message in messages[:count]:  # noqa: B023
                await send(message)
            await work()  # noqa: B023

        fake = FakeServer()
        fake.put(*(["websocket.connect"] if kind == "websocket" else []), f"{kind}.disconnect")
        task = fake.start(CancelOnDisconnect(app, grace=0), kind)
        await happens(work.begun)
        if count < len(messages):
            await happens(work.cancelled)
        else:
            await settle(fake)
            work.may_finish.set()
        await task
        assert work.cancellations == (count < len(messages))


@pytest.mark.parametrize("kind", ["lifespan", "something new"])
async def test_other_scopes_pass_through(kind: str) -> None:
    """With the server's own receive() and send()."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert receive == fake.receive
        assert send == fake.send
        assert len(asyncio.all_tasks()) == before + 1

    fake = FakeServer()
    before = len(asyncio.all_tasks())
    await fake.start(CancelOnDisconnect(app), kind)


# -- without a server: cancellation


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_an_app_that_is_told_has_its_grace(kind: str, records: list[str]) -> None:
    """It gets the message at once, goes on working, and is cancelled when its time is over."""
    work = Work()
    told: list[float] = []
    loop = asyncio.get_running_loop()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == f"{kind}.disconnect"
        told.append(loop.time())
        await work()

    fake = FakeServer()
    task = fake.start(CancelOnDisconnect(app, grace=0.3), kind)
    await settle(fake)
    fake.put(f"{kind}.disconnect")
    await task
    assert 0.25 < loop.time() - told[0] < 10
    assert (work.cancellations, len(records)) == (1, 1)


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_an_app_that_is_told_and_ends_is_not_cancelled(kind: str, records: list[str]) -> None:
    """Nor does anything wait for its grace."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.sleep(0.01)

    fake = FakeServer()
    task = fake.start(CancelOnDisconnect(app, grace=1000), kind)
    await settle(fake)
    fake.put(f"{kind}.disconnect")
    async with asyncio.timeout(LONG):
        await task
    assert records == []


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_without_grace_an_app_that_receives_is_cancelled_at_once(kind: str, records: list[str]) -> None:
    """And may still read the message."""
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
        except asyncio.CancelledError:
            heard.append((await receive())["type"])
            raise

    fake = FakeServer()
    task = fake.start(CancelOnDisconnect(app, grace=0), kind)
    await settle(fake)
    fake.put(f"{kind}.disconnect")
    await task
    assert heard == [f"{kind}.disconnect"]
    assert len(records) == 1


async def test_after_the_disconnect_the_server_answers() -> None:
    """receive() is the server's own then, also while the grace runs."""
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            heard.append((await receive())["type"])
            fake.put("http.disconnect")

    fake = FakeServer()
    task = fake.start(CancelOnDisconnect(app))
    await settle(fake)
    fake.put("http.disconnect")
    await task
    assert heard == ["http.disconnect"] * 3


async def test_an_app_that_swallows_its_cancellation_goes_on() -> None:
    """It is asked once; the request is taken back when it has ended."""
    work = Work()
    task_says: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(asyncio.CancelledError):
            await work()
        await asyncio.sleep(0.05)
        await answer(send)

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        await CancelOnDisconnect(app)(scope, receive, send)
        task = asyncio.current_task()
        assert task is not None
        task_says.append(task.cancelling())
        await asyncio.sleep(0)

    fake = FakeServer()
    fake.put("http.disconnect")
    await fake.start(around)
    assert (work.cancellations, task_says) == (1, [0])
    assert [message["type"] for message in fake.sent] == ["http.response.start", "http.response.body"]


async def test_a_cancellation_from_outside_is_the_apps_and_the_servers() -> None:
    """A server that shuts down cancels its task: the application is cancelled, and so is the task."""
    work = Work()
    fake = FakeServer()
    task = fake.start(CancelOnDisconnect(ignores_body(work)))
    await happens(work.begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.cancellations == 1
    assert {asyncio.current_task()} == asyncio.all_tasks()


async def test_a_cancellation_from_outside_beside_ours_wins() -> None:
    """Both requests in one turn of the loop."""
    begun = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            task.cancel()
            raise

    fake = FakeServer()
    task = fake.start(CancelOnDisconnect(app))
    await happens(begun)
    fake.put("http.disconnect")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1


async def test_a_timeout_around_it_still_works() -> None:
    """asyncio.timeout() counts requests, too."""
    fake = FakeServer()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await CancelOnDisconnect(ignores_body(Work()))(scope, receive, send)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.Event().wait()

    await fake.start(app)


async def test_an_error_while_it_is_cancelled_passes() -> None:
    """It is the application's."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise LookupError("in the clean-up")

    fake = FakeServer()
    fake.put("http.disconnect")
    with pytest.raises(LookupError, match="in the clean-up"):
        await fake.start(CancelOnDisconnect(app))


async def test_the_app_is_in_the_servers_task_and_context() -> None:
    """What the server has set is seen, and what the application sets stays."""
    variable = contextvars.ContextVar[str]("variable")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert variable.get() == "of the server"
        assert asyncio.current_task() is tasks[0]
        variable.set("of the app")

    tasks: list[Any] = []

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        variable.set("of the server")
        tasks.append(asyncio.current_task())
        await CancelOnDisconnect(app)(scope, receive, send)
        assert variable.get() == "of the app"

    await FakeServer().start(around)


async def test_anyios_groups_are_cancelled_and_their_shields_hold() -> None:
    """A task in a group is cancelled by its group, which heeds shields; the application's own task is asyncio's."""
    ended: list[str] = []
    begun = asyncio.Event()

    async def shielded() -> None:
        with anyio.CancelScope(shield=True):
            begun.set()
            await anyio.sleep(0.05)
            ended.append("shielded")
        await anyio.sleep_forever()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(shielded)
            await anyio.sleep_forever()

    fake = FakeServer()
    task = fake.start(CancelOnDisconnect(app))
    await happens(begun)
    fake.put("http.disconnect")
    await task
    assert ended == ["shielded"]


async def test_no_task_is_left() -> None:
    """However the application ends."""

    async def returns(scope: Scope, receive: Receive, send: Send) -> None: ...

    async def raises(scope: Scope, receive: Receive, send: Send) -> None:
        await settle(fake)
        raise LookupError

    async def is_cancelled(scope: Scope, receive: Receive, send: Send) -> None:
        fake.put("http.disconnect")
        await asyncio.Event().wait()

    for app in (returns, raises, is_cancelled):
        fake = FakeServer()
        task = fake.start(CancelOnDisconnect(app))
        await asyncio.wait([task])
        assert isinstance(task.exception(), LookupError | None)
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_httpx_drives_it_without_a_server() -> None:
    """A transport for tests, whose receive() returns a disconnect when the response is complete."""
    work = Work()
    work.may_finish.set()
    transport = httpx.ASGITransport(CancelOnDisconnect(starlette_upload(work)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.post("/", content=b"x" * 200_000)).json() == {}


async def test_starlette_takes_it_as_a_middleware() -> None:
    """Its options are keywords."""
    work = Work()
    inner = starlette_json(work)
    inner.add_middleware(CancelOnDisconnect, grace=1)
    fake = FakeServer()
    task = fake.start(inner, query_string=b"", root_path="")
    await happens(work.begun)
    fake.put("http.disconnect")
    await task
    assert work.cancellations == 1


# -- the log, the arguments


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ({"path": "/x"}, "GET /x: the client 192.0.2.1:1234 is gone"),
        ({"path": "/a\n2026 ERROR\x1b[0m\u2028\u202e"}, r"GET /a\n2026 ERROR\x1b[0m\u2028\u202e: the client"),
        ({"path": "/größe"}, "GET /größe: the client"),
        ({"method": "POST", "path": "/x", "client": None}, "POST /x: the client is gone"),
        ({"path": "/x", "client": ["2001:db8::1", 80]}, "GET /x: the client [2001:db8::1]:80 is gone"),
        ({"path": "/x", "client": ("unix\n", None)}, r"GET /x: the client unix\n is gone"),
    ],
)
async def test_the_log_says_whose_client_is_gone(scope: dict[str, Any], expected: str, records: list[str]) -> None:
    """In one line, whatever stands in the path."""
    work = Work()
    fake = FakeServer()
    fake.put("http.disconnect")
    await fake.start(CancelOnDisconnect(ignores_body(work)), **scope)
    assert len(records) == 1
    assert records[0].startswith(expected)
    assert records[0].endswith(" is gone, its work is cancelled")


@pytest.mark.parametrize(
    ("app", "grace", "error", "message"),
    [
        (None, 1, TypeError, "app=None: must be"),
        ("module:app", 1, TypeError, "app='module:app': must be"),
        (print, "1", TypeError, "grace='1': must be a number"),
        (print, True, TypeError, "grace=True: must be a number"),
        (print, -1, ValueError, "grace=-1: must be finite"),
        (print, math.inf, ValueError, "grace=inf: must be finite"),
        (print, math.nan, ValueError, "grace=nan: must be finite"),
    ],
)
def test_invalid_arguments_are_named(app: Any, grace: Any, error: type[Exception], message: str) -> None:
    """When the middleware is made, and not at the first request."""
    with pytest.raises(error, match=f"^{message}"):
        CancelOnDisconnect(app, grace=grace)


def test_it_says_what_it_is() -> None:
    """In tracebacks and logs."""
    assert repr(CancelOnDisconnect(kaio.serve, grace=2)) == f"CancelOnDisconnect({kaio.serve!r}, grace=2)"  # type: ignore[arg-type]
