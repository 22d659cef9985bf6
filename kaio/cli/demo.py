"""`kaio demo`: a server and its clients over loopback, two of which die.

Rules kept here: `perform` does not know how its progress is displayed, a display only reads the `Peer`s, and `problem`
judges the results without either. The library is used through its public interface. Detection times are measured by
the clock from the moment a client is cut off, and not taken from the library's reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import kaio

from ..testing import blackhole
from ._output import aligned, bordered_table
from ._own_network import gain_privilege

__all__ = ["demo"]

QUICK: Final = kaio.Keepalive(1, 1, 2)
PATIENT: Final = kaio.Keepalive(1, 1, 4, stalled="drop")
TOLERANCE: Final = 1.0  # seconds; kernel timers are up to 12.5 % late, this process more on a busy machine
EARLY: Final = 0.1  # seconds by which this clock may start after the kernel's
ALL_ALIVE: Final = 1.0  # seconds before two clients are cut off
AFTERWARDS: Final = 0.6  # seconds after the last death, in which no second report may come
TICK: Final = 0.1


# -- the clients


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What a client does, and what its server should report."""

    title: str
    policy: kaio.Keepalive
    sends: bool = False  # and waits for the echo, again and again
    receives: bool = False  # the server sends to it, again and again
    cause: kaio.Cause | None = None  # of its death; None: it stays alive

    @property
    def expected(self) -> float:
        """Seconds from the cut to the report; both policies have a detection time."""
        return self.policy.detection_time or 0.0


SCENARIOS: Final = (
    Scenario("alive, sending", QUICK, sends=True),
    Scenario("alive, idle", PATIENT),
    Scenario("dies while idle", QUICK, cause=kaio.Cause.KEEPALIVE),
    Scenario("dies while receiving", PATIENT, receives=True, cause=kaio.Cause.UNACKNOWLEDGED),
)


class Peer:
    """A client, and what its server observed."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario: Scenario = scenario
        self.transport: kaio.KeepaliveTransport | None = None  # the server's end
        self.silent_at: float | None = None  # when it was cut off
        self.reports: list[tuple[float, kaio.DeadPeerError]] = []  # calls of peer_dead, each with its time
        self.endings: list[Exception | None] = []  # arguments of connection_lost
        self.exchanges = 0  # echoes since the others were cut off
        self.leaving = False  # the demo is over: its connection is being closed

    @property
    def measured(self) -> float | None:
        """Seconds from the cut to the report."""
        return self.reports[0][0] - self.silent_at if self.reports and self.silent_at is not None else None

    def sample(self) -> Sample:
        """Its present state, as the server knows it."""
        if self.reports:
            error = self.reports[0][1]
            return _sample(kaio.State.DEAD, error.silence, error.info)
        if self.endings or self.transport is None:
            return Sample("closed", None, None, None)
        health = self.transport.health()
        return _sample(health.state, health.silence, health.info)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The variable columns of a row."""

    state: str
    silence: float | None
    probes: int | None
    retransmits: int | None


def _sample(state: kaio.State, silence: float | None, info: kaio.TcpInfo | None) -> Sample:
    return Sample(state.value, silence, info.probes if info else None, info.retransmits if info else None)


def problem(peer: Peer) -> str | None:
    """What differs from the scenario, in words; None if nothing does."""
    scenario, measured = peer.scenario, peer.measured
    if scenario.cause is None:
        if peer.reports:
            return f"alive, but reported dead ({peer.reports[0][1].cause.value})"
        if peer.endings:
            return f"alive, but its connection ended with {peer.endings[0]!r}"
        return "got no more echoes" if scenario.sends and not peer.exchanges else None
    if measured is None:
        return "dead, but not reported"
    error = peer.reports[0][1]
    if len(peer.reports) != 1 or peer.endings != [error]:
        return f"reported {len(peer.reports)} times, ended with {peer.endings!r}"
    if error.cause is not scenario.cause:
        return f"cause is {error.cause.value}"
    if not scenario.expected - EARLY <= measured <= scenario.expected + TOLERANCE:
        return "too early" if measured < scenario.expected else "too late"
    return None


# -- the server and its clients


async def perform(peers: Sequence[Peer], tick: Callable[[], None]) -> None:
    """Start the server and all clients, cut some of them off, and wait until the server has reported them."""
    listeners = {policy: kaio.Listener("127.0.0.1:0", keepalive=policy) for policy in (QUICK, PATIENT)}
    async with contextlib.AsyncExitStack() as stack:
        protocol = _server_protocol(peers)
        await stack.enter_async_context(kaio.serve(protocol, listeners=listeners.values(), close_timeout=1))
        clients = []
        for number, peer in enumerate(peers):
            address = str(listeners[peer.scenario.policy].address)
            # The clients send no probes, so that all detection is the server's.
            clients.append(await stack.enter_async_context(kaio.connect(address, keepalive=False)))
            await _exchange(clients[-1], bytes([number]))
        running = [
            asyncio.ensure_future(_run_client(peer, client)) for peer, client in zip(peers, clients, strict=True)
        ]
        try:
            await _run_for(peers, tick, ALL_ALIVE)
            dying = [number for number, peer in enumerate(peers) if peer.scenario.cause is not None]
            for number in dying:
                if not peers[number].scenario.receives:
                    await _exchange(clients[number], b"last data")
                    peers[number].silent_at = asyncio.get_running_loop().time()
            with blackhole(*(clients[number] for number in dying)):
                await _run_until_reported(peers, tick)
        finally:
            for peer in peers:
                peer.leaving = True
            await _cancel(running)


def _server_protocol(peers: Sequence[Peer]) -> type[kaio.KeepaliveProtocol]:
    """The server's protocol: it echoes, and records in `peers` what is reported."""

    class Echo(kaio.KeepaliveProtocol):
        peer: Peer | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, kaio.KeepaliveTransport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            if self.peer is None:
                self.peer = peers[data[0]]
                self.peer.transport = self.transport
            self.transport.write(data)

        def peer_dead(self, error: kaio.DeadPeerError) -> None:
            if self.peer is not None:
                self.peer.reports.append((asyncio.get_running_loop().time(), error))

        def connection_lost(self, exc: Exception | None) -> None:
            if self.peer is not None and not self.peer.leaving:
                self.peer.endings.append(exc)

    return Echo


async def _run_client(peer: Peer, client: kaio.Connection) -> None:
    """Run a client. It never learns that it was cut off."""
    if peer.scenario.receives:
        async for _ in client:
            pass
    while peer.scenario.sends:
        await _exchange(client, b"hello")
        peer.exchanges += 1
        await asyncio.sleep(2 * TICK)


async def _exchange(client: kaio.Connection, data: bytes) -> None:
    await client.send(data)
    await client.receive_exactly(len(data))


async def _run_for(peers: Sequence[Peer], tick: Callable[[], None], seconds: float) -> None:
    """Send to the receiving clients and update the display, for some seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        for peer in peers:
            if peer.scenario.receives and peer.transport is not None and not peer.endings:
                peer.transport.write(b"data")
        tick()
        await asyncio.sleep(TICK)


async def _run_until_reported(peers: Sequence[Peer], tick: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for peer in peers:
        peer.exchanges = 0
        if peer.scenario.receives:
            peer.silent_at = loop.time()  # the server sends at once, and that is never acknowledged
    dying = [peer for peer in peers if peer.scenario.cause is not None]
    latest = loop.time() + max(peer.scenario.expected for peer in dying) + 2 * TOLERANCE
    while loop.time() < latest and not all(peer.endings for peer in dying):
        await _run_for(peers, tick, TICK)
    await _run_for(peers, tick, AFTERWARDS)


async def _cancel(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


# -- the displays


class Display(Protocol):
    """Shows the progress and the results."""

    def running(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Show the progress for the duration of a block, which calls the yielded function regularly."""
        ...

    def show_results(self) -> None:
        """Show a table of the results."""
        ...


# Column widths for a terminal of 80 columns; those of width 6 are numbers.
COLUMNS: Final = (("client", 20), ("listener", 12), ("state", 9), ("silent", 6), ("probes\nmissed", 6), ("resent", 6))
RESULTS: Final = ("client", "expected", "measured", "cause", "verdict")


def _policy(policy: kaio.Keepalive) -> str:
    """A policy in short form; str() names every field when `stalled` is not the default."""
    short = str(dataclasses.replace(policy, stalled="keep"))
    return short if policy.stalled == "keep" else f"{short} {policy.stalled}"


def _introduction(loop: str) -> str:
    return (
        f"Two listeners on {loop}: {_policy(QUICK)} detects a dead peer within {QUICK.detection_time:g} s,"
        f" {_policy(PATIENT)} within {PATIENT.detection_time:g} s."
    )


def _row(sample: Sample) -> tuple[str, ...]:
    silence = "" if sample.silence is None else f"{sample.silence:.1f} s"
    return sample.state, silence, str(sample.probes or ""), str(sample.retransmits or "")


def _result(peer: Peer) -> tuple[str, ...]:
    expected = "alive" if peer.scenario.cause is None else f"{peer.scenario.expected:.1f} s"
    measured = "alive" if peer.measured is None else f"{peer.measured:.2f} s"
    cause = peer.reports[0][1].cause.value if peer.reports else ""
    return peer.scenario.title, expected, measured, cause, problem(peer) or "as expected"


def _closing_line(peers: Sequence[Peer]) -> str:
    wrong = sum(problem(peer) is not None for peer in peers)
    if wrong:
        return f"{wrong} of {len(peers)} not as expected"
    return "As expected: each death was reported once, in time, with its cause; no live peer was reported."


class PlainDisplay:
    """Prints a line for each change, without control codes."""

    def __init__(self, peers: Sequence[Peer], loop: str) -> None:
        self._peers = peers
        self._loop = loop

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[], None]]:
        """A line for each change of a peer's state."""
        click.echo(_introduction(self._loop))
        clock = asyncio.get_running_loop().time
        began = clock()
        known: dict[Peer, str] = {}

        def tick() -> None:
            for peer in self._peers:
                sample = peer.sample()
                if known.get(peer) != sample.state:
                    known[peer] = sample.state
                    details = [_policy(peer.scenario.policy), *_details(sample)]
                    line = f"{clock() - began:4.1f} s  {peer.scenario.title:20}  {sample.state:7}  {', '.join(details)}"
                    click.echo(line)

        yield tick

    def show_results(self) -> None:
        """The table of results as aligned lines."""
        click.echo()
        for line in aligned(RESULTS, [_result(peer) for peer in self._peers]):
            click.echo(line)
        click.echo(f"\n{_closing_line(self._peers)}")


def _details(sample: Sample) -> Iterator[str]:
    if sample.state in (kaio.State.SUSPECT, kaio.State.DEAD):
        if sample.silence is not None:
            yield f"silent for {sample.silence:.1f} s"
        if sample.probes:
            yield f"probes missed: {sample.probes}"
        if sample.retransmits:
            yield f"resent: {sample.retransmits}"


STYLES: Final = {"alive": "green", "suspect": "yellow", "stalled": "cyan", "dead": "bold red"}


class LiveDisplay:
    """Updates a table in place."""

    def __init__(self, peers: Sequence[Peer], loop: str, console: Console) -> None:
        self._peers = peers
        self._loop = loop
        self._console = console

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[], None]]:
        """The live table."""
        self._console.print(_introduction(self._loop), highlight=False)
        with Live(self._table(), console=self._console, auto_refresh=False) as live:
            yield lambda: live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = bordered_table()
        for heading, width in COLUMNS:
            table.add_column(heading, width=width, justify="right" if width == 6 else "left", vertical="bottom")
        for peer in self._peers:
            state, *rest = _row(peer.sample())
            style = STYLES.get(state, "")
            dim = "dim" if state == kaio.State.ALIVE else style
            table.add_row(
                peer.scenario.title,
                _policy(peer.scenario.policy),
                Text(f"● {state}", style),
                *(Text(cell, dim) for cell in rest),
            )
        return table

    def show_results(self) -> None:
        """The table of results."""
        table = bordered_table()
        for heading in RESULTS:
            table.add_column(heading)
        for peer in self._peers:
            *cells, verdict = _result(peer)
            table.add_row(*cells, Text(verdict, "green" if problem(peer) is None else "bold red"))
        wrong = any(map(problem, self._peers))
        self._console.print(table)
        self._console.print(_closing_line(self._peers), style="bold red" if wrong else "bold green", highlight=False)


# -- the command


def _plain_wanted() -> bool:
    return not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop  # noqa: PLC0415 - not installed everywhere

    return uvloop.new_event_loop


async def _show(peers: Sequence[Peer], display: Display) -> None:
    with display.running() as tick:
        await perform(peers, tick)
    display.show_results()


@click.command()
@click.option(
    "--loop",
    type=click.Choice(["uvloop", "asyncio"]),
    default=lambda: "uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
    help="The event loop to run on. Default: uvloop if it is installed.",
)
@click.option("--plain", is_flag=True, help="Print plain lines; the default without a terminal or with NO_COLOR.")
def demo(loop: str, plain: bool) -> None:
    """Run a server and four clients over loopback, two of which die. Takes about 8 seconds.

    Exits with 0 if all results are as expected, 1 if not, 2 if peers cannot be cut off here.
    """
    if loop == "uvloop" and not importlib.util.find_spec("uvloop"):
        raise click.UsageError("uvloop is not installed; use --loop asyncio")
    reason = gain_privilege()
    if reason is not None:
        click.echo(f"kaio demo: {reason}", err=True)
        sys.exit(2)
    logging.getLogger("kaio").setLevel(logging.ERROR)  # the display shows the deaths
    peers = [Peer(scenario) for scenario in SCENARIOS]
    display: Display = PlainDisplay(peers, loop) if plain or _plain_wanted() else LiveDisplay(peers, loop, Console())
    try:
        with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
            runner.run(_show(peers, display))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if any(map(problem, peers)) else 0)
