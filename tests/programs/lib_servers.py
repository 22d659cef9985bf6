"""Server libraries at their work: aiohttp, uvicorn, websockets and gRPC, in one process and on one loop.

Arguments: a base loop and the host to listen at. Prints what listens where, then how each handler heard that its client
was gone. Whoever asks any of them plainly is told the port that the question came from.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]
import uvicorn
import uvloop
import websockets
from aiohttp import web

LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def tell(server: str, error: BaseException | str) -> None:
    """A client is gone; CLOCK_MONOTONIC is every process's."""
    name = error if isinstance(error, str) else type(error).__name__
    print(json.dumps({"library": server, "step": "gone", "error": name, "at": time.monotonic()}), flush=True)


# -- aiohttp


async def port(request: web.Request) -> web.Response:
    assert request.transport is not None
    return web.Response(text=str(request.transport.get_extra_info("peername")[1]))


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"begun")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError as exc:
        tell("aiohttp", exc)
        raise
    return response


async def serve_aiohttp(host: str, stack: contextlib.AsyncExitStack) -> int:
    application = web.Application()
    application.add_routes([web.get("/", port), web.get("/stream", stream)])
    runner = web.AppRunner(application, handler_cancellation=True)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, host, 0).start()
    return int(runner.addresses[0][1])


# -- uvicorn


async def application(scope: Any, receive: Any, send: Any) -> None:
    stays = scope["path"] == "/stream"
    body = b"begun" if stays else str(scope["client"][1]).encode()
    await receive()
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": body, "more_body": stays})
    if stays:
        tell("uvicorn", (await receive())["type"])


async def serve_uvicorn(host: str, stack: contextlib.AsyncExitStack) -> int:
    sock = socket.create_server((host, 0))
    server = uvicorn.Server(uvicorn.Config(application, lifespan="off", log_level="error", timeout_keep_alive=60))
    serving = asyncio.create_task(server.serve(sockets=[sock]))

    async def end() -> None:
        server.should_exit = server.force_exit = True
        await serving

    stack.push_async_callback(end)
    while not server.started:
        await asyncio.sleep(0.01)
    return int(sock.getsockname()[1])


# -- websockets


async def converse(connection: websockets.ServerConnection) -> None:
    try:
        async for _ in connection:
            await connection.send(str(connection.remote_address[1]))
    except websockets.ConnectionClosed as exc:
        tell("websockets", exc)


async def serve_websockets(host: str, stack: contextlib.AsyncExitStack) -> int:
    server = await stack.enter_async_context(websockets.serve(converse, host, 0, ping_interval=None))
    return int(next(iter(server.sockets)).getsockname()[1])


# -- gRPC


async def grpc_port(_: bytes, context: Any) -> bytes:
    return str(context.peer().rpartition(":")[2]).encode()


async def grpc_wait(_: bytes, context: Any) -> bytes:
    waiting.set()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError as exc:
        tell("grpc.aio", exc)
        raise
    return b""


async def grpc_waiting(_: bytes, context: Any) -> bytes:
    await waiting.wait()
    return b""


waiting = asyncio.Event()


async def serve_grpc(host: str, stack: contextlib.AsyncExitStack) -> int:
    handlers = {"Port": grpc_port, "Wait": grpc_wait, "Waiting": grpc_waiting}
    methods = {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()}
    server = grpc.aio.server(handlers=[grpc.method_handlers_generic_handler("Test", methods)])
    chosen = server.add_insecure_port(f"{host}:0")
    await server.start()
    stack.push_async_callback(server.stop, None)
    return int(chosen)


async def main(host: str) -> None:
    serve = {"aiohttp": serve_aiohttp, "uvicorn": serve_uvicorn, "websockets": serve_websockets, "grpc": serve_grpc}
    async with contextlib.AsyncExitStack() as stack:
        print(json.dumps({name: await each(host, stack) for name, each in serve.items()}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


with asyncio.Runner(loop_factory=LOOPS[sys.argv[1]]) as runner:
    runner.run(main(sys.argv[2]))
