"""A worker's process: `python -m kaio.tools.workers._worker APP DESCRIPTOR`, started by the supervisor.

The descriptor is the channel, from which settings and the descriptors of the listening sockets are read.

Rules kept here: SIGTERM and SIGINT drain, however often they come (a service manager may send them to all processes,
and the supervisor does, too); only an order on the channel aborts. The end of the channel drains, too. The process ends
also when tasks of the application refuse to be cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import Any, Final, NoReturn

import kaio

from .application import AppError, check, find, make
from .channel import Channel
from .logs import log_to_stderr
from .settings import Settings
from .tls import TlsError, make_tls

logger: Final = logging.getLogger("kaio")

_ENDING: Final = 1.0  # seconds for connections that were aborted, and for tasks that were cancelled


class _Orders:
    """What has been ordered, by the supervisor and by signals."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.drain: asyncio.Event = asyncio.Event()
        self.abort: asyncio.Event = asyncio.Event()

    def listen(self) -> None:
        """Take orders from now on, and signals."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel, self._read)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain.set)

    def _read(self) -> None:
        messages = self._channel.received()
        if messages is None:
            asyncio.get_running_loop().remove_reader(self._channel)
            self.drain.set()
        elif any(message["order"] == "abort" for message in messages):
            self.drain.set()
            self.abort.set()


async def _serve(settings: Settings, sockets: list[socket.socket], found: Any, channel: Channel) -> None:
    """Serve until the channel or a signal says to stop, and drain."""
    orders = _Orders(channel)
    async with contextlib.AsyncExitStack() as stack:
        what = settings.app
        if settings.factory:
            found = await make(settings.app, found, stack)
            what = f"what {settings.app} makes"
        listeners = _listeners(settings, sockets)
        server = kaio.serve(check(what, found), listeners=listeners, keepalive=settings.keepalive)
        orders.listen()
        try:
            serving = await server
        except ValueError as exc:  # options that do not go together, such as an idle timeout and a protocol on Unix
            raise AppError(str(exc)) from None
        try:
            channel.send({"event": "ready"})
            await orders.drain.wait()
            channel.send({"event": "draining"})
            if not await _unless(orders.abort, _drain(serving, settings)):
                await _abort(serving)
        finally:
            serving.close()
            serving.abort_clients()


def _listeners(settings: Settings, sockets: list[socket.socket]) -> list[kaio.Listener]:
    """A listener for each socket, all with the same options."""
    tls = make_tls(settings.cert, settings.key, settings.client_ca)
    # The arguments of kaio.Listener that limit connections: only those that were given.
    limits: dict[str, Any] = dict(settings.limits)
    if settings.proxies:
        limits["proxy_protocol"] = kaio.ProxyProtocol(settings.proxies)
    return [kaio.Listener(sock, ssl=tls, backlog=settings.backlog, **limits) for sock in sockets]


async def _drain(server: kaio.Server[Any], settings: Settings) -> None:
    await asyncio.sleep(settings.delay)
    await server.drain(settings.grace, spread=settings.spread)


async def _abort(server: kaio.Server[Any]) -> None:
    server.close()
    server.abort_clients()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ENDING):
            await server.wait_closed()


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do something until an event is set; return whether it was done before."""
    doing, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait((doing, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            return False
        await doing
        return True
    finally:
        doing.cancel()
        waiting.cancel()


async def _cancel_rest() -> list[str]:
    """Cancel all other tasks; return the names of those that have not ended soon after."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if not others:
        return []
    _, stubborn = await asyncio.wait(others, timeout=_ENDING)
    return [getattr(task.get_coro(), "__qualname__", task.get_name()) for task in stubborn]


def _run(settings: Settings, main: Coroutine[Any, Any, None], channel: Channel) -> int:
    """Run on kaio's loop; return the exit code. Does not return when tasks refuse to be cancelled."""
    runner = asyncio.Runner(loop_factory=kaio.loop_factory(settings.keepalive, base=_base(settings.loop)))
    code = 0
    try:
        runner.run(main)
    except (AppError, TlsError, kaio.KaioError) as exc:
        channel.send({"event": "failed", "message": str(exc), "trace": getattr(exc, "trace", "")})
        code = 1
    except SystemExit as exc:  # of a task of the application
        code = exc.code if isinstance(exc.code, int) else 1
    except Exception as exc:
        logger.exception("the worker failed")
        channel.send({"event": "failed", "message": f"{type(exc).__name__}: {exc}", "trace": ""})
        code = 1
    stubborn = runner.run(_cancel_rest())
    if stubborn:
        logger.error("tasks that were cancelled have not ended: %s", ", ".join(sorted(stubborn)))
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    runner.close()
    return code


def _base(name: str) -> Any:
    if name == "asyncio":
        return asyncio.SelectorEventLoop
    import uvloop  # noqa: PLC0415 - not everywhere

    return uvloop.new_event_loop


def _main() -> NoReturn:
    sock = socket.socket(fileno=int(sys.argv[-1]))
    sock.set_inheritable(False)
    channel = Channel(sock)
    try:
        settings = Settings.from_message(channel.receive())
        sockets = [socket.socket(fileno=descriptor) for descriptor in channel.receive()]
    except (EOFError, OSError):  # the supervisor has died
        sys.exit(1)
    for each in sockets:
        each.set_inheritable(False)
    del sys.argv[1:]
    log_to_stderr(settings.log_level)
    if sys.path[:1] != [settings.app_dir]:
        sys.path.insert(0, settings.app_dir)
    try:
        found = find(settings.app)
    except AppError as exc:
        channel.send({"event": "failed", "message": str(exc), "trace": exc.trace})
        sys.exit(1)
    sys.exit(_run(settings, _serve(settings, sockets, found, channel), channel))


if __name__ == "__main__":
    _main()
