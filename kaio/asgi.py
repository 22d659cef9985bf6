"""ASGI middleware that cancels an application's work when its client is gone or dead.

Servers tell an application of a lost client by one message, `http.disconnect` or `websocket.disconnect`, which it gets
when it next calls receive(). An application that is at work does not call it. `CancelOnDisconnect` reads the server's
messages in a task of its own, hands them to the application in order, and cancels the application when the client is
gone.

Rules kept here:

- The application runs in the server's task and sees its context variables; its exceptions pass unchanged. The
  cancellation is one request, as that of asyncio.timeout(), and is taken back at the end (Task.uncancel).
- What is read ahead of the application is bounded, so that the server still holds back a client that sends too fast.
- Nothing is cancelled once the response is complete or the application has closed the websocket: servers then send the
  same messages.
- No task is left when the application has ended.

Written for asyncio; under trio the call fails. Needs no framework.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Final, TypeAlias

from .errors import format_address

__all__ = ["CancelOnDisconnect"]

logger: Final = logging.getLogger("kaio")

# The types of frameworks: Starlette's, for one, are the same.
Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

# How far the messages are read ahead: until there are so many, or so many bytes, that the application has not taken.
# One message would not do: hypercorn ends a request's body with an empty message of its own, so that the disconnect of
# an application that ignores its body would never be seen. 64 KiB is what uvicorn gathers in one message.
_MESSAGES: Final = 16
_BYTES: Final = 64 * 1024


class CancelOnDisconnect:
    """Cancel an ASGI application's work when its client is gone: `app = CancelOnDisconnect(app)`.

    For each HTTP request and each websocket the application is cancelled, once, when the server reports that the client
    has disconnected. An HTTP request is cancelled at once. The exception is an application that is waiting in receive()
    at that moment: it gets the message, and `grace` seconds to end by itself. A websocket application, waiting or not,
    always has those seconds: closing is part of that protocol, and messages that the client sent before it closed are
    still to be read. With `grace=0` both are cancelled at once.

    Work that must be completed in any case is protected by asyncio.shield(), or put into a task of its own. Nothing is
    cancelled after the response is complete, so that background tasks run on. Each cancellation is logged, at INFO to
    the logger "kaio". Other scopes, such as lifespan, pass through.

    Raises TypeError for an app that cannot be called or a grace that is no number, ValueError for a grace that is
    negative or not finite.
    """

    def __init__(self, app: Application, *, grace: float = 5.0) -> None:
        if not callable(app):
            raise TypeError(f"app={app!r}: must be an ASGI application, which can be called")
        if isinstance(grace, bool) or not isinstance(grace, (int, float)):
            raise TypeError(f"grace={grace!r}: must be a number of seconds")
        if not (math.isfinite(grace) and grace >= 0):
            raise ValueError(f"grace={grace!r}: must be finite, and at least 0")
        self.app = app
        self.grace = grace

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.app!r}, grace={self.grace!r})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for a scope."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        async with _Run(scope, receive, send, self.grace) as run:
            await self.app(scope, run.receive, run.send)


class _Run:
    """One run of an application: the messages between it and the server, and its cancellation."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, grace: float) -> None:
        self._scope = scope
        self._server_receive = receive
        self._server_send = send
        self._grace = grace
        self._messages: deque[Message | Exception] = deque()
        """What the server's receive() returned or raised, and the application has not taken yet."""
        self._bytes = 0
        """The size of the bodies in `_messages`."""
        self._waiting = 0
        """How many calls of the application's receive() wait for a message."""
        self._may_read_ahead = not _must_be_asked_for(scope)
        """Whether the server's receive() may be called while the application does not call its own."""
        self._is_reading = True
        """Whether the listener calls the server's receive(): until the disconnect, or until it fails."""
        self._arrived = asyncio.Event()
        """Set when there is a message to take, or the listener does not read any more."""
        self._taken = asyncio.Event()
        """Set when the listener should see whether it may read on."""
        self._has_trailers = False
        """Whether the response ends with trailers, and not with its body."""
        self._is_complete = False
        """Whether the application has sent all that there is to send."""
        self._is_cancelled = False
        """Whether the cancellation was requested."""

    async def __aenter__(self) -> _Run:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._requests_before = task.cancelling()
        # Not create_task: an eager task factory (Python 3.12) would start the listener here, and it might cancel this
        # task while it runs, so that the request is left over when the application ends without awaiting anything.
        name = f"{task.get_name()}: listening for disconnect"
        self._listener = asyncio.Task(self._listen(), loop=task.get_loop(), name=name)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._listener.cancel()  # from here on it requests nothing, even if its time has just come
        was_ours = self._is_cancelled and self._task.uncancel() <= self._requests_before
        if not self._listener.done():
            await asyncio.wait([self._listener])
        return was_ours and isinstance(exc, asyncio.CancelledError)

    # -- what the application calls

    async def receive(self) -> Message:
        """Return the next message of the server."""
        if self._scope["type"] == "http":
            self._may_read_ahead = True  # 100 Continue is sent now
        while not self._messages:
            if not self._is_reading:  # after the disconnect, the server answers as it would without the middleware
                return await self._server_receive()
            self._waiting += 1
            self._taken.set()
            try:
                await self._arrived.wait()
            finally:
                self._waiting -= 1
        message = self._messages.popleft()
        self._bytes -= _size(message)
        self._taken.set()
        if not self._messages and self._is_reading:
            self._arrived.clear()
        if isinstance(message, Exception):
            raise message
        return message

    async def send(self, message: Message) -> None:
        """Pass a message on to the server."""
        # Before the server has it: hypercorn's send() lets the listener run, which then reads that the stream is over.
        self._is_complete = self._is_complete or self._completes(message)
        await self._server_send(message)
        if message["type"] == "websocket.accept":
            self._may_read_ahead = True
            self._taken.set()

    def _completes(self, message: Message) -> bool:
        """Whether this is the last message of a response or a websocket."""
        match message.get("type"):
            case "http.response.start":
                self._has_trailers = bool(message.get("trailers"))
                return False
            case "http.response.body" | "http.response.zerocopysend":
                return not self._has_trailers and not message.get("more_body")
            case "http.response.pathsend":
                return not self._has_trailers
            case "http.response.trailers":
                return not message.get("more_trailers")
            case "websocket.http.response.body":
                return not message.get("more_body")
            case kind:
                return kind == "websocket.close"

    # -- the listener

    async def _listen(self) -> None:
        """Read the server's messages until the client is gone, and then cancel the application."""
        try:
            grace = await self._read_until_disconnect()
        except Exception as exc:  # of the server's receive(): the application's next one raises it
            self._put(exc)
            return
        finally:
            self._is_reading = False
            self._arrived.set()
        if grace:
            await asyncio.sleep(grace)
        if not self._is_complete:
            logger.info("%s, its work is cancelled", _describe(self._scope))
            self._is_cancelled = True
            self._task.cancel()

    async def _read_until_disconnect(self) -> float:
        """Read the server's messages up to the disconnect; return how long the application has from then on."""
        while True:
            while not self._may_read():
                self._taken.clear()
                await self._taken.wait()
            message = await self._server_receive()
            is_waited_for = self._waiting > len(self._messages)
            self._put(message)
            match message["type"]:
                case "http.disconnect":
                    return self._grace if is_waited_for else 0
                case "websocket.disconnect":
                    return self._grace

    def _may_read(self) -> bool:
        if self._waiting > len(self._messages):
            return True
        return self._may_read_ahead and len(self._messages) < _MESSAGES and self._bytes < _BYTES

    def _put(self, message: Message | Exception) -> None:
        self._messages.append(message)
        self._bytes += _size(message)
        self._arrived.set()


def _must_be_asked_for(scope: Scope) -> bool:
    """Whether the server may take a call of receive() for more than a question.

    For a request with Expect: 100-continue it makes the server ask for the body, which the application may not want. A
    websocket has nothing to receive before it is accepted, and there are servers (granian) that return
    `websocket.connect` at each call until then.
    """
    if scope["type"] == "websocket":
        return True
    return any(name == b"expect" and value.lower() == b"100-continue" for name, value in scope.get("headers", ()))


def _size(message: Message | Exception) -> int:
    if isinstance(message, Exception):
        return 0
    return len(message.get("body") or message.get("bytes") or message.get("text") or b"")


def _describe(scope: Scope) -> str:
    """Say for the log whose client is gone."""
    method = scope["method"] if scope["type"] == "http" else "WebSocket"
    client = scope.get("client")
    who = "the client" if not client else f"the client {_printable(_format_client(client))}"
    return f"{_printable(method)} {_printable(scope['path'])}: {who} is gone"


def _format_client(client: Sequence[Any]) -> str:
    try:
        host, port = client
    except (TypeError, ValueError):  # not as the specification has it
        return str(client)
    return str(host) if port is None else format_address((host, port))


def _printable(text: str) -> str:
    """The text with its control characters as escapes: a path may have any, by %0A."""
    return repr(text)[1:-1]
