"""A proxy before a streaming LLM API, which stops paying for tokens as soon as either side is gone.

    python examples/llm_proxy.py --upstream https://api.example.com --port 8080    (needs aiohttp)

A client that lost power looks connected, and the model writes on for nobody. An upstream that died looks busy, and the
client waits. On kaio's loop aiohttp hears of both: the handler is cancelled, which closes the upstream's connection, or
the client is told with an event of its own. An upstream that sends nothing but comments (": keep-alive") is alive and
does not answer: that has a time limit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

import kaio

HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}


class Proxy:
    """Forwards each request, and its answer line by line."""

    def __init__(self, session: aiohttp.ClientSession, upstream: str, content_timeout: float) -> None:
        self.session = session
        self.upstream = upstream.rstrip("/")
        self.content_timeout = content_timeout

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Serve one request. It is cancelled when its client is gone: handler_cancellation, below."""
        events = 0
        try:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
            url, body = self.upstream + request.path_qs, await request.read()
            async with self.session.request(request.method, url, headers=headers, data=body) as upstream:
                headers = {name: value for name, value in upstream.headers.items() if name.lower() not in HOP_BY_HOP}
                response = web.StreamResponse(status=upstream.status, headers=headers)
                await response.prepare(request)
                try:
                    async for line in self.lines(upstream.content):
                        await response.write(line)
                        events += line.startswith(b"data:")
                except (OSError, aiohttp.ClientError) as exc:  # TimeoutError is an OSError
                    if request.transport is None or request.transport.is_closing():
                        raise
                    print(f"upstream gone after {events} events: {exc!r}", flush=True)
                    message = json.dumps({"error": {"type": "upstream_gone", "message": str(exc)}})
                    await response.write(f"event: error\ndata: {message}\n\n".encode())
                await response.write_eof()
                return response
        except (asyncio.CancelledError, ConnectionResetError):
            print(f"client gone after {events} events: upstream closed", flush=True)
            raise
        except (OSError, aiohttp.ClientError) as exc:
            print(f"no answer from upstream: {exc!r}", flush=True)
            return web.json_response({"error": {"type": "upstream_gone", "message": str(exc)}}, status=502)

    async def lines(self, content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
        """Lines of the answer. Raises TimeoutError when none with content comes for too long."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            try:
                async with asyncio.timeout_at(last + self.content_timeout):
                    line = await content.readline()
            except TimeoutError:
                raise TimeoutError(f"no content for {self.content_timeout:g} s") from None
            if not line:
                return
            if line.strip() and not line.startswith(b":"):
                last = loop.time()
            written = loop.time()
            yield line
            last += loop.time() - written  # while the client does not read, nobody waits for the upstream


async def main(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    no_limit = aiohttp.ClientTimeout(total=None)  # an answer may take as long as it likes, if something comes
    async with aiohttp.ClientSession(timeout=no_limit, auto_decompress=False) as session:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", Proxy(session, options.upstream, options.content_timeout).forward)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "0.0.0.0", options.port)
            await site.start()
            print(f"listening on 0.0.0.0:{runner.addresses[0][1]}", flush=True)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--upstream", required=True, help="where requests go, such as https://api.example.com")
    parser.add_argument("--content-timeout", type=float, default=60.0, help="seconds without content")
    parser.add_argument("--keepalive", default="detect=10s", help="the policy of both sides")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        kaio.run(main(arguments), keepalive=arguments.keepalive)
