"""`Worker`: a worker as the supervisor sees it, a process and a channel.

Over the channel the supervisor sends the settings, and `abort`; the worker says that it is ready, that it failed, that
it drains. The worker drains when the channel ends, because then the supervisor has died.

Rules kept here: the worker inherits nothing but the channel and its sockets. It has a process group of its own, so that
Ctrl-C in a terminal reaches the supervisor only. A process that has ended is reaped at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final

from .channel import Channel
from .settings import Settings

__all__ = ["KILL_AFTER", "StartError", "Worker", "launch"]

KILL_AFTER: Final = 5.0
"""Seconds after the end of its time that a worker is killed."""
_POLL: Final = 0.05  # seconds, where there is no pidfd_open(2)


class StartError(Exception):
    """A worker that did not become ready."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace
        """The traceback of the application's own error; empty when there is none."""


class Worker:
    """A process that serves. `on_drain` and `on_end` are called with it."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._process = process
        self._channel = channel
        self._failure: StartError | None = None  # as the worker told it
        self._kill: asyncio.TimerHandle | None = None
        self._began = loop.time()
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done when it serves; `StartError` when it did not come to that."""
        self.overdue: bool = False
        """Whether it was killed because it did not end in time."""
        self.on_drain: Callable[[Worker], None] | None = None
        self.on_end: Callable[[Worker], None] | None = None
        self.ready.add_done_callback(_retrieve)
        loop.add_reader(channel, self._read)
        self._watching = loop.create_task(self._watch())

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.returncode is None

    @property
    def is_ready(self) -> bool:
        """Whether it has begun to serve."""
        return self.ready.done() and self.ready.exception() is None

    @property
    def lived(self) -> float:
        """Seconds since it was started."""
        return self._loop.time() - self._began

    @property
    def exit(self) -> str:
        """How the process ended: `exit code 1`, `SIGKILL`."""
        code = self._process.returncode
        if code is None or code >= 0:
            return f"exit code {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    def __repr__(self) -> str:
        state = self.exit if not self.alive else "ready" if self.is_ready else "starting"
        return f"<Worker {self.pid} {state}>"

    # -- orders

    def drain(self, within: float) -> None:
        """Let it drain and end; kill it when it has not ended a few seconds after so much time."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            self._kill_after(within + KILL_AFTER)

    def abort(self, within: float) -> None:
        """Let it end at once; kill it when it has not ended a few seconds after so much time."""
        if self.alive:
            self.drain(within)  # a worker that is not ready has no ear for the channel yet
            self._channel.send({"order": "abort"})

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        if self.alive:
            self._process.kill()

    def _kill_overdue(self) -> None:
        self.overdue = self.alive
        self.kill()

    def give_up(self, why: str) -> None:
        """Let it not become ready."""
        if not self.ready.done():
            self.ready.set_exception(StartError(why))

    def release(self) -> None:
        """Close the channel, upon which it drains by itself, and look at it no longer."""
        self._watching.cancel()
        self._loop.remove_reader(self._channel)
        self._channel.close()

    def _kill_after(self, seconds: float) -> None:
        when = self._loop.time() + seconds
        if self._kill is None or when < self._kill.when():
            if self._kill is not None:
                self._kill.cancel()
            self._kill = self._loop.call_at(when, self._kill_overdue)

    # -- what it says

    def _read(self) -> None:
        messages = self._channel.received()
        if messages is None:
            self._loop.remove_reader(self._channel)
        for message in messages or ():
            self._told(message)

    def _told(self, message: dict[str, str]) -> None:
        match message["event"]:
            case "ready":
                if not self.ready.done():
                    self.ready.set_result(None)
            case "failed":
                self._failure = StartError(message["message"], message["trace"])
            case "draining":
                if self.on_drain is not None:
                    self.on_drain(self)

    async def _watch(self) -> None:
        """Wait until the process ends, and read what it had still to say."""
        await _ended(self._process)
        if self._kill is not None:
            self._kill.cancel()
        self._read()
        self._loop.remove_reader(self._channel)
        self._channel.close()
        if not self.ready.done():
            self.ready.set_exception(self._failure or StartError(f"worker {self.pid} ended with {self.exit}"))
        if self.on_end is not None:
            self.on_end(self)


def launch(settings: Settings, sockets: Sequence[socket.socket], flags: Sequence[str]) -> Worker:
    """Start a worker with these sockets, and `flags` for its interpreter. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        descriptors = [sock.fileno() for sock in sockets]
        module = f"{__package__}._worker"
        try:
            process = subprocess.Popen(  # noqa: S603 - this Python, without a shell
                # The application is named for ps(1) only.
                [sys.executable, *flags, "-m", module, settings.app, str(theirs.fileno())],
                pass_fds=(theirs.fileno(), *descriptors),
                stdin=subprocess.DEVNULL,  # reading the terminal would stop a process that is in the background
                process_group=0,
            )
        except BaseException:
            ours.close()
            raise
    channel = Channel(ours)
    channel.send(dataclasses.asdict(settings))
    channel.send(descriptors)
    return Worker(process, channel)


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has ended, and reap it."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, or an old one
        while process.poll() is None:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(_POLL)
        return
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    process.wait()


def _retrieve(ready: asyncio.Future[None]) -> None:
    """Read the exception, which nobody else may want, or asyncio would log it."""
    if not ready.cancelled():
        ready.exception()
