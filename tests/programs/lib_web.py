"""Clients of web servers and of gRPC at their work: aiohttp, httpx, websockets, grpc.aio.

Each class has the methods that `lib_clients` calls in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aiohttp
import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]
import httpx
import websockets

__all__ = ["Aiohttp", "Grpc", "Httpx", "Websockets"]


class Aiohttp:
    """aiohttp's client: nginx for what is short, uvicorn for a stream."""

    name = "aiohttp"

    def __init__(self, peers: dict[str, Any]) -> None:
        self._nginx, self._uvicorn, self._aiohttp = (
            f"http://{peers['host']}:{peers[server]}" for server in ("nginx", "uvicorn", "aiohttp")
        )

    async def open(self) -> dict[str, list[int]]:
        self._session, self._sending = aiohttp.ClientSession(), aiohttp.ClientSession()
        await self._post(self._sending)
        urls = (self._nginx, self._uvicorn, self._aiohttp)
        return {"idle": [await self._get(url) for url in urls]}

    async def _get(self, url: str) -> int:
        async with self._session.get(url) as response:
            return int(await response.text())

    async def _post(self, session: aiohttp.ClientSession) -> None:
        """A request that is not sent a second time when the connection ends under it, as a GET is."""
        async with session.post(self._nginx, data=b"?") as response:
            await response.read()

    async def request(self, begun: Callable[[], None]) -> None:
        async with self._session.get(f"{self._uvicorn}/stream") as response:
            assert await response.content.readexactly(5) == b"begun"
            begun()
            await response.content.read()

    async def send(self) -> None:
        await self._post(self._sending)

    async def use(self) -> None:
        await self._get(self._nginx)

    async def again(self) -> None:
        await self._get(self._uvicorn)


class Httpx:
    """httpx: nginx for what is short, aiohttp's server for a stream."""

    name = "httpx"

    def __init__(self, peers: dict[str, Any]) -> None:
        self._nginx, self._uvicorn, self._aiohttp = (
            f"http://{peers['host']}:{peers[server]}" for server in ("nginx", "uvicorn", "aiohttp")
        )

    async def open(self) -> dict[str, list[int]]:
        limits = httpx.Limits(keepalive_expiry=60)
        self._client, self._sending = (httpx.AsyncClient(timeout=None, limits=limits) for _ in range(2))
        await self._sending.get(self._nginx)
        urls = (self._nginx, self._uvicorn, self._aiohttp)
        return {"idle": [await self._get(url) for url in urls]}

    async def _get(self, url: str) -> int:
        return int((await self._client.get(url)).text)

    async def request(self, begun: Callable[[], None]) -> None:
        async with self._client.stream("GET", f"{self._aiohttp}/stream") as response:
            async for data in response.aiter_bytes():
                assert data == b"begun"
                begun()

    async def send(self) -> None:
        await self._sending.get(self._nginx)

    async def use(self) -> None:
        await self._get(self._nginx)

    async def again(self) -> None:
        await self._get(self._aiohttp)


class Websockets:
    """websockets, without pings of its own."""

    name = "websockets"

    def __init__(self, peers: dict[str, Any]) -> None:
        self._url = f"ws://{peers['host']}:{peers['websockets']}"

    async def open(self) -> dict[str, list[int]]:
        self._idle, self._asking, self._sending = [await self._connect() for _ in range(3)]
        return {"idle": [await _ask(self._idle)]}

    async def _connect(self) -> websockets.ClientConnection:
        return await websockets.connect(self._url, ping_interval=None)

    async def request(self, begun: Callable[[], None]) -> None:
        await _ask(self._asking)
        begun()
        await self._asking.recv()

    async def send(self) -> None:
        await _ask(self._sending)

    async def use(self) -> None:
        await _ask(self._idle)

    async def again(self) -> None:
        await _ask(await self._connect())


async def _ask(connection: websockets.ClientConnection) -> int:
    await connection.send("?")
    return int(await connection.recv())


class Grpc:
    """grpc.aio: its sockets are made and read by the C core, and no loop ever sees them."""

    name = "grpc.aio"

    def __init__(self, peers: dict[str, Any]) -> None:
        self._at = f"{peers['host']}:{peers['grpc']}"

    async def open(self) -> dict[str, list[int]]:
        self._idle, self._asking, self._sending = (self._connect() for _ in range(3))
        await self._port(self._asking)
        await self._port(self._sending)
        return {"idle": [await self._port(self._idle)]}

    def _connect(self) -> Any:
        return grpc.aio.insecure_channel(self._at, [("grpc.use_local_subchannel_pool", 1)])

    async def _port(self, channel: Any) -> int:
        return int(await channel.unary_unary("/Test/Port")(b""))

    async def request(self, begun: Callable[[], None]) -> None:
        call = self._asking.unary_unary("/Test/Wait")(b"")
        await self._idle.unary_unary("/Test/Waiting")(b"")
        begun()
        await call

    async def send(self) -> None:
        await self._port(self._sending)

    async def use(self) -> None:
        await self._port(self._idle)

    async def again(self) -> None:
        await self._port(self._asking)
