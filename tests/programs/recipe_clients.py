"""The clients of docs/recipes.md at their work: python recipe_clients.py CONFIGURATION.

The configuration is JSON: recipe -> host and port. The code that makes each client is the page's own block; what it is
asked for is here. Each runs in a thread and loop of its own, and says a line of JSON when it has received a part of its
answer, and one when it ends, with the library's own error.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import kaio

os.environ.update(OPENAI_API_KEY="none", ANTHROPIC_API_KEY="none", no_proxy="*")

PAGE: Final = Path(__file__).parent.parent.parent / "docs" / "recipes.md"
POLICY: Final = kaio.Keepalive(1, 1, 2)
_lock = threading.Lock()

Use = Callable[[dict[str, Any], str, int, Callable[[], None]], Any]


def block(recipe: str) -> dict[str, Any]:
    """Run the block of the page under a heading, and return its names."""
    found = re.search(rf"^## {re.escape(recipe)}\n.*?^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert found, recipe
    names: dict[str, Any] = {"kaio": kaio, "policy": POLICY}
    exec(compile(found[1], f"docs/recipes.md: {recipe}", "exec"), names)
    return names


def say(**fields: object) -> None:
    """Write a line."""
    with _lock:
        print(json.dumps(fields), flush=True)


# -- what each is asked for


async def use_openai(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    client = names["client"].with_options(base_url=f"http://{host}:{port}/", max_retries=0)
    question: Any = [{"role": "user", "content": "?"}]
    stream = await client.chat.completions.create(model="m", messages=question, stream=True)
    async for _ in stream:
        first()


async def use_anthropic(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    client = names["client"].with_options(base_url=f"http://{host}:{port}/", max_retries=0)
    question: Any = [{"role": "user", "content": "?"}]
    stream = await client.messages.create(model="m", max_tokens=9, messages=question, stream=True)
    async for _ in stream:
        first()


async def use_httpx(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    async with names["client"] as client:
        client.timeout = None
        async with client.stream("GET", f"http://{host}:{port}/") as response:
            async for _ in response.aiter_raw():
                first()


def use_requests(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    with names["client"].get(f"http://{host}:{port}/", stream=True) as response:
        for _ in response.iter_content(1):
            first()


async def use_aiohttp(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    import aiohttp

    async with names["make_client"]() as client:
        no_limit = aiohttp.ClientTimeout(total=None)
        async with client.get(f"http://{host}:{port}/", timeout=no_limit) as response:
            async for _ in response.content.iter_any():
                first()


async def use_websockets(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    async with await names["connect"](host, port) as connection:
        while True:
            await connection.recv()
            first()


async def use_psycopg(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    async with await names["connect"](f"host={host} port={port} user=kaio dbname=postgres") as connection:
        await connection.execute("select 1")
        first()
        await connection.execute("select pg_sleep(60)")


async def use_sqlalchemy(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    import sqlalchemy

    engine = names["make_engine"](host, port)
    try:
        async with engine.connect() as connection:
            await connection.execute(sqlalchemy.text("select 1"))
            first()
            await connection.execute(sqlalchemy.text("select pg_sleep(60)"))
    finally:
        await engine.dispose()


async def use_redis(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    async with names["make_client"](host, port) as client:
        no_retry = Retry(NoBackoff(), 0)  # else it connects again, and asks once more
        client.connection_pool.connection_kwargs.update(socket_timeout=None, retry=no_retry)
        await client.ping()
        first()
        await client.blpop(["nothing"], timeout=60)


async def use_pika(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    async with await names["connect"](host, port) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue("work", ensure=False)
        async with queue.iterator() as messages:
            async for _ in messages:
                first()


async def use_nats(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    over = asyncio.Event()

    async def on_close() -> None:
        over.set()

    client = await names["connect"](host, port, closed_cb=on_close, allow_reconnect=False)
    subscription = await client.subscribe("news")
    await client.publish("news", b"1")
    await subscription.next_msg(timeout=10)
    first()
    await over.wait()
    raise client.last_error


async def use_grpc(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    channel = await names["connect"](host, port)
    async for _ in channel.unary_stream("/test.Test/Stream")(b"?"):
        first()


def use_pymongo(names: dict[str, Any], host: str, port: int, first: Callable[[], None]) -> None:
    client = names["make_client"](host, port)
    client.admin.command("ping")
    first()
    client.admin.command("hang")


USES: Final[dict[str, Use]] = {
    "openai": use_openai,
    "anthropic": use_anthropic,
    "httpx2": use_httpx,
    "httpx": use_httpx,
    "requests": use_requests,
    "aiohttp": use_aiohttp,
    "websockets": use_websockets,
    "psycopg": use_psycopg,
    "SQLAlchemy with psycopg": use_sqlalchemy,
    "SQLAlchemy with asyncpg": use_sqlalchemy,
    "redis": use_redis,
    "pymongo": use_pymongo,
    "aio-pika": use_pika,
    "nats-py": use_nats,
    "gRPC": use_grpc,
}


def work(recipe: str, names: dict[str, Any], host: str, port: int) -> None:
    """Run a recipe until it ends."""
    seen: list[int] = []

    def first() -> None:
        if not seen:
            say(recipe=recipe, step="first")
        seen.append(1)

    error: BaseException | None = None
    try:
        use = USES[recipe]
        if asyncio.iscoroutinefunction(use):
            names.get("run", lambda main: asyncio.run(main()))(lambda: use(names, host, port, first))
        else:
            use(names, host, port, first)
    except BaseException as exc:
        error = exc
        if not seen:
            traceback.print_exc()
    package, name = type(error).__module__.split(".")[0], type(error).__name__
    told = f"`{name}`" if package == "builtins" else f"`{package}.{name}`"
    say(recipe=recipe, step="over", error="none: its iteration ends" if error is None else told)


def main() -> None:
    peers = json.loads(sys.argv[1])
    # All of them first: packages that are imported in several threads at the same time may see each other half made.
    blocks = {recipe: block(recipe) for recipe in peers}
    for recipe, peer in peers.items():
        threading.Thread(target=work, args=(recipe, blocks[recipe], *peer), daemon=True).start()
    sys.stdin.read()  # until it may go
    os._exit(0)


if __name__ == "__main__":
    main()
