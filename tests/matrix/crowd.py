"""One process: all connections of one place, loop and mode, broken by one act.

Run as a program it takes its task as JSON in its only argument, and prints what it saw, a line for each connection.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import io
import json
import logging
import os
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import trustme
import uvloop

import kaio

from ..namespaces import Routed, routed
from .cells import BOUND, Cell, Seen, policy
from .ends import ENDS
from .peers import Peer
from .places import PLACES
from .states import MEGABYTES, STATES, WAITING, Case, tcp_info

__all__ = ["BASES", "LONGEST", "Ledger", "Secrets", "watch"]

BASES: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
LONGEST: Final = 2 * BOUND + 1.0
"""Seconds after the break within which the last of them is to be told; it is waited for 2 s more."""
_SETTLE: Final = 1.0  # seconds for what may come twice
_STEADY: Final = 1.5  # seconds that they stand before the break, so that all are known to the monitor


class Secrets:
    """TLS contexts, by files that several processes share."""

    def __init__(self, folder: str) -> None:
        self.client = ssl.create_default_context(cafile=f"{folder}/authority.pem")
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(f"{folder}/server.pem")

    @staticmethod
    def make(folder: str) -> None:
        """Write the files."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(f"{folder}/authority.pem")
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(f"{folder}/server.pem")


class Ledger(logging.Handler):
    """What the log and the monitor say, by the peer's port."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.logged: collections.Counter[int] = collections.Counter()
        self.events: dict[int, list[kaio.Event]] = collections.defaultdict(list)
        self.complaints: list[str] = []
        self._monitor = kaio.get_monitor(loop)
        add_hook = getattr(self._monitor, "add_hook", None)
        if add_hook is not None:
            add_hook(self._note)
        else:
            self._monitor.hook = self._note
        loop.set_exception_handler(self._complain)
        logger = logging.getLogger("kaio")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", None) == "peer_dead":
            self.logged[int(str(record.__dict__["peer"]).rpartition(":")[2])] += 1
        else:
            self.complaints.append(f"the log was told: {record.getMessage()}")

    def _note(self, event: kaio.Event) -> None:
        if event.kind == "dead" and event.error is not None and event.error.peername:
            self.events[event.error.peername[1]].append(event)

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        exc = context.get("exception")
        self.complaints.append(f"the loop's exception handler was told: {context['message']} {exc!r}")

    @property
    def counted(self) -> int:
        """How many deaths the monitor's counters have."""
        return sum(self._monitor.counters.deaths.values())


async def watch(network: Routed, place: str, cells: Iterable[Cell], secrets: Secrets) -> list[Seen]:
    """Make all these connections, break the path, and see."""
    ledger = Ledger(asyncio.get_running_loop())
    with contextlib.ExitStack() as undo:
        files = undo.enter_context(tempfile.NamedTemporaryFile())
        files.write(MEGABYTES * 2)
        files.flush()
        cases = []
        for cell in cells:
            peer = Peer(network)
            undo.callback(peer.close)
            end = ENDS[cell.kind](cell, peer.address)
            cases.append(Case(end, peer, secrets.client, secrets.server, undo.enter_context(_opened(files.name))))
        await _each(cases, "make")
        await asyncio.sleep(_STEADY)
        early = {id(case): list(case.end.events) for case in cases}
        quiet_since = time.monotonic()
        await _each(cases, "last")
        before = {id(case): _sample(case) for case in cases}
        PLACES[place].act(network)
        broken_at = time.monotonic()
        await _each(cases, "after")
        while time.monotonic() < broken_at + LONGEST + 2 and not all(case.end.complete for case in cases):
            await asyncio.sleep(0.05)
        await asyncio.sleep(_SETTLE)
        seen = [_seen(case, ledger, broken_at, before[id(case)]) for case in cases]
        for what in seen:
            if STATES[what.cell.state].is_quiet_early:
                what.quiet_before = broken_at - quiet_since
        for case, what in zip(cases, seen, strict=True):
            if early[id(case)]:
                what.unready = what.unready or "it ended before the break"
        seen += _of_the_whole(place, cases, seen, ledger)
        await asyncio.gather(*(case.end.close() for case in cases))
    return seen


def _opened(name: str) -> io.BufferedReader:
    return open(name, "rb")


async def _each(cases: list[Case], hook: str) -> None:
    """Do with each of them what its state wants then."""

    async def one(case: Case) -> None:
        state = STATES[case.end.cell.state]
        if case.unready:
            return
        try:
            if hook == "after" and state.delay:
                await asyncio.sleep(state.delay)
            await getattr(state, hook)(case)
        except Exception as exc:
            case.unready = f"{hook}: {type(exc).__name__}: {exc}"

    immediate = [case for case in cases if hook == "after" and not STATES[case.end.cell.state].delay]
    for case in immediate:  # these have no business with the loop between the break and them
        await one(case)
    await asyncio.gather(*(one(case) for case in cases if case not in immediate))


def _sample(case: Case) -> str:
    with contextlib.suppress(Exception):
        info = tcp_info(case)
        names = ("state", "unacked", "notsent_bytes", "snd_wnd", "probes", "retransmits", "total_retrans")
        return " ".join(f"{name}={getattr(info, name, None)}" for name in names)
    return ""


def _seen(case: Case, ledger: Ledger, broken_at: float, before: str) -> Seen:
    end = case.end
    seen = Seen(end.cell, before=before, unready=case.unready)
    seen.events = [name for name, *_ in end.events]
    if end.events:
        seen.told_at = end.events[0][1] - broken_at
        seen.ended_at = end.events[-1][1] - broken_at
        exc = end.events[-1][2]
        seen.error = f"{type(exc).__name__}: {exc}"
        seen.error_number = getattr(exc, "errno", None)
        seen.is_dead_peer = isinstance(exc, kaio.DeadPeerError)
        seen.same_error = all(other is exc for *_, other in end.events)
        if isinstance(exc, kaio.DeadPeerError):
            seen.cause = exc.cause.name
    events = ledger.events[case.peer.port]
    if seen.cause is None and events and events[0].error is not None:
        seen.cause = events[0].error.cause.name
    seen.logged = ledger.logged[case.peer.port]
    seen.counted = len(events)
    seen.left = [_how_it_is(name, task) for name, task in end.tasks.items() if _is_left(name, task)]
    if end.paused_with_data:
        seen.lost_bytes = WAITING - end.received
    return seen


_MUST_FAIL: Final = ("sendfile", "start_tls")


def _is_left(name: str, task: asyncio.Task[Any]) -> bool:
    return not task.done() or (name in _MUST_FAIL and (task.cancelled() or task.exception() is None))


def _how_it_is(name: str, task: asyncio.Task[Any]) -> str:
    return f"{name} still waits" if not task.done() else f"{name} came to an end without an error"


def _of_the_whole(place: str, cases: list[Case], seen: list[Seen], ledger: Ledger) -> list[Seen]:
    """What no single connection tells: the counters' sum, and complaints to the loop and to the log."""
    if not cases:
        return []
    sum_of_events = sum(len(events) for events in ledger.events.values())
    complaints = list(dict.fromkeys(ledger.complaints))
    if ledger.counted != sum_of_events:
        complaints.append(f"the counters have {ledger.counted} deaths, the hook was told of {sum_of_events}")
    first = cases[0].end.cell
    return [
        Seen(dataclasses.replace(first, state="(the whole)", kind="-"), unready=complaint) for complaint in complaints
    ]


def main(task: dict[str, Any]) -> None:
    """Do the task, and print what was seen."""
    cells = [Cell(**fields) for fields in task["cells"]]
    first = cells[0]
    factory = kaio.loop_factory(keepalive=policy(first.mode), base=BASES[first.loop])
    with routed() as network, network.client.entered(), asyncio.Runner(loop_factory=factory) as runner:
        network.answer_everybody()
        for seen in runner.run(watch(network, first.place, cells, Secrets(task["secrets"]))):
            print(seen.to_json())
        sys.stdout.flush()
        os._exit(0)  # what hangs at the end of a loop is not to be waited for: it was seen


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
