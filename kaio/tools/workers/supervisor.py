"""`Supervisor`: starts workers, replaces those that die, reloads, stops.

    SIGHUP            reload: new workers in all slots, and when all are ready, the old ones drain
    SIGTERM, SIGINT   stop: all drain; a further one aborts their connections

Rules kept here: a slot has one current worker, and any number of old ones that drain. A current worker that ends, or
drains by itself, is replaced; at once the first time, then later and later. A reload changes nothing unless all its
workers are ready. The listening sockets are open from before the first worker until the server stops. Every worker's
end is bounded: it is killed when its time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
from collections.abc import Sequence
from typing import Final

from ...net.connection import CLOSE_TIMEOUT
from ...net.draining import handled
from ...net.notify import Notifier, notify
from .backoff import Backoff
from .child import KILL_AFTER, StartError, Worker, launch
from .settings import Settings
from .sockets import Sockets, describe

__all__ = ["Supervisor"]

logger: Final = logging.getLogger("kaio")

_LAST_HANDSHAKES: Final = 0.2  # seconds in which handshakes end that have begun when nobody else may connect
_ABORT: Final = 2.0  # seconds that a worker has to end after it was told to abort


class _Slot:
    """A place for a worker, with sockets of its own."""

    __slots__ = ("backoff", "current", "number", "replacing")

    def __init__(self, number: int) -> None:
        self.number = number
        self.current: Worker | None = None
        self.backoff = Backoff()
        self.replacing: asyncio.TimerHandle | None = None  # when there is no current worker

    def take(self, worker: Worker | None) -> Worker | None:
        """Have another current worker, or none; return the one before."""
        if self.replacing is not None:
            self.replacing.cancel()
            self.replacing = None
        before, self.current = self.current, worker
        return before


class Supervisor:
    """The workers of a server. `flags` are options of their interpreters."""

    def __init__(self, settings: Settings, sockets: Sockets, *, flags: Sequence[str] = ()) -> None:
        self._settings = settings
        self._sockets = sockets
        self._flags = flags
        self._slots = [_Slot(number) for number in range(settings.workers)]
        self._workers: set[Worker] = set()  # all that have not ended
        self._changed = asyncio.Event()  # a worker has ended
        self._reload = asyncio.Event()  # a reload was asked for; one is remembered while another one runs
        self._serving = False
        self._stop: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()
        self._had_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and _has_terminal()
        self._drain_time = settings.delay + settings.grace + CLOSE_TIMEOUT + 1.0
        self._notifier = Notifier()  # systemd's watchdog watches the supervisor, which watches the workers

    async def run(self) -> signal.Signals:
        """Serve until a signal says to stop; return it. Raises `StartError` when no worker ever became ready."""
        loop = asyncio.get_running_loop()
        with handled((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._on_signal), self._notifier:
            task = loop.create_task(self._serve())
            try:
                await asyncio.wait((task, self._stop), return_when=asyncio.FIRST_COMPLETED)
                if not self._stop.done():
                    await task
                task.cancel()
                return await self._end(self._stop.result())
            finally:
                task.cancel()
                for worker in self._workers:  # after a mistake only: they drain by themselves
                    worker.release()

    def _on_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP and not (self._had_terminal and not _has_terminal()):
            self._reload.set()
        elif not self._stop.done():
            self._stop.set_result(number)
        else:
            logger.warning("%s: aborting %d workers", number.name, len(self._workers))
            for worker in self._workers:
                worker.abort(_ABORT)

    # -- serving

    async def _serve(self) -> None:
        await self._begin()
        while True:
            await self._reload.wait()
            self._reload.clear()
            notify("RELOADING=1")
            await self._replace_all()
            self._notifier.ready()

    async def _begin(self) -> None:
        """Start all workers. Those that failed are replaced, unless all have."""
        workers = [self._launch(slot) for slot in self._slots]
        await self._until_ready(workers, asyncio.ALL_COMPLETED)
        failed = [worker for worker in workers if not worker.is_ready]
        if len(failed) == len(workers):
            await self._end_failed(failed)
        self._serving = True
        for slot, worker in zip(self._slots, workers, strict=True):
            if worker.is_ready and worker.alive:
                slot.take(worker)
            else:
                self._start_failed(slot, worker)
        where = ", ".join(dict.fromkeys(describe(sock) for sock in self._sockets.all))
        count = len(workers) - len(failed)
        logger.info("serving on %s with %s", where, "1 worker" if count == 1 else f"{count} workers")
        self._notifier.ready()

    async def _end_failed(self, failed: Sequence[Worker]) -> None:
        """End with the error of the first worker, after the others have ended."""
        for worker in failed:
            worker.kill()
        await self._all_end()
        error = failed[0].ready.exception()
        assert error is not None
        raise error

    def _launch(self, slot: _Slot) -> Worker:
        worker = launch(self._settings, self._sockets.of(slot.number), self._flags)
        self._workers.add(worker)
        worker.on_drain = functools.partial(self._drains, slot)
        worker.on_end = functools.partial(self._ended, slot)
        logger.debug("worker %d starts", worker.pid)
        return worker

    async def _until_ready(self, workers: Sequence[Worker], until: str) -> None:
        """Wait for workers that start, and no longer than they may take."""
        timeout = self._settings.start_timeout
        _, late = await asyncio.wait([worker.ready for worker in workers], timeout=timeout, return_when=until)
        for worker in workers:
            if worker.ready in late and until == asyncio.ALL_COMPLETED:
                worker.give_up(f"worker {worker.pid} was not ready within {timeout:g} s")

    def _start_failed(self, slot: _Slot, worker: Worker) -> None:
        """Replace a worker that did not become ready, or died soon after."""
        error = worker.ready.exception()
        if error is None:
            _log_death(worker)
        else:
            _log_failure(f"worker {worker.pid} did not start", error)
        worker.kill()
        self._replace(slot, worker)

    # -- replacing

    def _ended(self, slot: _Slot, worker: Worker) -> None:
        self._workers.discard(worker)
        self._changed.set()
        if worker.overdue:
            logger.error("worker %d did not end in time and was killed", worker.pid)
        if slot.current is worker and self._serving:
            if not worker.is_ready:
                self._start_failed(slot, worker)
                return
            _log_death(worker)
            self._replace(slot, worker)
        else:
            logger.debug("worker %d ended: %s", worker.pid, worker.exit)

    def _drains(self, slot: _Slot, worker: Worker) -> None:
        """A worker drains, whoever told it to: when nobody here did, it is replaced now, and not when it has ended."""
        if slot.current is worker and self._serving:
            logger.warning("worker %d drains by itself; it is replaced", worker.pid)
            worker.drain(self._drain_time)
            self._replace(slot, worker)

    def _replace(self, slot: _Slot, worker: Worker) -> None:
        delay = slot.backoff.delay(worker.lived)
        slot.take(None)
        if delay:
            logger.info("the next worker starts in %.1f s", delay)
        slot.replacing = asyncio.get_running_loop().call_later(delay, self._start, slot)

    def _start(self, slot: _Slot) -> None:
        try:
            worker = self._launch(slot)
        except OSError as exc:  # no memory, no process; slots that try again are bounded by the backoff
            logger.error("no worker could be started: %s", exc)
            delay = max(1.0, slot.backoff.delay(0.0))
            slot.replacing = asyncio.get_running_loop().call_later(delay, self._start, slot)
            return
        slot.take(worker)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._settings.start_timeout, self._late, worker)
        worker.ready.add_done_callback(lambda _: timer.cancel())
        worker.ready.add_done_callback(functools.partial(_log_ready, worker))

    def _late(self, worker: Worker) -> None:
        worker.give_up(f"worker {worker.pid} was not ready within {self._settings.start_timeout:g} s")
        worker.kill()

    # -- reloading

    async def _replace_all(self) -> None:
        """Start a worker in each slot, and once all are ready, drain those that were there before."""
        logger.info("reloading")
        workers: list[Worker] = []
        problem: BaseException | None = None
        try:
            workers += [self._launch(slot) for slot in self._slots]
        except OSError as exc:
            problem = exc
        if workers:
            await self._until_ready(workers, asyncio.FIRST_EXCEPTION)
        for worker in workers:
            if problem is None and worker.ready.done():
                problem = worker.ready.exception()
        if problem is None and not all(worker.is_ready for worker in workers):
            problem = StartError(f"a worker was not ready within {self._settings.start_timeout:g} s")
        if problem is not None:
            _log_failure("reload failed, kept the old workers", problem)
            for worker in workers:
                worker.drain(self._drain_time if worker.is_ready else 0.0)
            return
        for slot, worker in zip(self._slots, workers, strict=True):
            before = slot.take(worker)
            slot.backoff = Backoff()
            if before is not None:
                before.drain(self._drain_time)
            if not worker.alive:
                self._replace(slot, worker)
        logger.info("reloaded: workers %s", ", ".join(str(worker.pid) for worker in workers))

    # -- stopping

    async def _end(self, why: signal.Signals) -> signal.Signals:
        """Drain all workers, and wait for them."""
        self._serving = False
        delay = self._settings.delay
        self._notifier.stopping(self._drain_time + KILL_AFTER + _ABORT)
        logger.info("%s: stopping, %d workers drain", why.name, len(self._workers))
        for slot in self._slots:
            slot.take(None)
        if delay > _LAST_HANDSHAKES:  # in which the workers go on accepting
            self._drain_all()
            await self._all_end(delay - _LAST_HANDSHAKES)
        # First here: the last to close a socket resets what is in its queue, and workers empty the queue before.
        self._sockets.stop_listening()
        if delay <= _LAST_HANDSHAKES:
            await self._all_end(_LAST_HANDSHAKES)
            self._drain_all()
        await self._all_end()
        self._sockets.close()
        logger.info("stopped")
        return why

    def _drain_all(self) -> None:
        for worker in self._workers:
            worker.drain(self._drain_time)

    async def _all_end(self, timeout: float | None = None) -> None:
        """Wait until all workers have ended, but no longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._workers:
                    self._changed.clear()
                    await self._changed.wait()


def _log_ready(worker: Worker, ready: asyncio.Future[None]) -> None:
    if not ready.cancelled() and ready.exception() is None:
        logger.info("worker %d is ready", worker.pid)


def _log_death(worker: Worker) -> None:
    logger.error("worker %d died: %s, after %.1f s", worker.pid, worker.exit, worker.lived)


def _log_failure(what: str, error: BaseException) -> None:
    logger.error("%s: %s", what, error, extra={"trace": getattr(error, "trace", "")})


def _has_terminal() -> bool:
    """Whether there is a controlling terminal. It is gone when its window was closed, which sends SIGHUP, too."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True
