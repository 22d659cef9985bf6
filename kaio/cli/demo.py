"""`kaio demo`: a server and its clients over loopback, two of which die.

Rules kept here: the play (`perform`) knows nothing of screens, a screen knows only the `Peer`s and draws what they are
now, and `problem` judges without either. The library is used as any user would. What is measured is measured by the
wall, from the moment that the play knows of, not by what the library says of itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import click
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import kaio
from kaio.testing import blackhole, lacking

__all__ = ["demo"]

QUICK: Final = kaio.Keepalive(1, 1, 2)
PATIENT: Final = kaio.Keepalive(1, 1, 4, stalled="drop")
TOLERANCE: Final = 1.0  # seconds; the kernel's timers are late by an eighth at most, our own by a busy machine
EARLY: Final = 0.1  # seconds by which the play's clock may start after the kernel's
PROLOGUE: Final = 1.0  # seconds in which all are alive
EPILOGUE: Final = 0.6  # seconds after the last death, for a second report that must not come
TICK: Final = 0.1


# -- the cast


@dataclasses.dataclass(frozen=True)
class Role:
    """What a client does, and what its server is to find out."""

    title: str
    policy: kaio.Keepalive
    talks: bool = False  # sends something now and then, and waits for the echo
    fed: bool = False  # the server sends to it now and then
    fate: kaio.Cause | None = None  # of what it dies

    @property
    def expected(self) -> float:
        """Seconds from its silence to the report; its policies name their times, so there is a number."""
        return self.policy.detection_time or 0.0


ROLES: Final = (
    Role("keeps talking", QUICK, talks=True),
    Role("alive, says nothing", PATIENT),
    Role("dies while idle", QUICK, fate=kaio.Cause.KEEPALIVE),
    Role("dies while sent data", PATIENT, fed=True, fate=kaio.Cause.UNACKNOWLEDGED),
)


class Peer:
    """A client in its role, and what its server has seen of it."""

    def __init__(self, role: Role) -> None:
        self.role: Role = role
        self.transport: kaio.KeepaliveTransport | None = None  # the server's end
        self.silent_at: float | None = None  # from when on nothing can be heard of it
        self.reports: list[tuple[float, kaio.DeadPeerError]] = []  # peer_dead, and when
        self.endings: list[Exception | None] = []  # connection_lost
        self.exchanges = 0  # echoes since the others fell silent
        self.leaving = False  # the play is over: that it ends now is no news

    @property
    def measured(self) -> float | None:
        """Seconds from its silence to the report."""
        return self.reports[0][0] - self.silent_at if self.reports and self.silent_at is not None else None

    def look(self) -> Sight:
        """How it is now, as its server knows."""
        if self.reports:
            error = self.reports[0][1]
            return _sight(kaio.State.DEAD, error.silence, error.info)
        if self.endings or self.transport is None:
            return Sight("closed", None, None, None)
        health = self.transport.health()
        return _sight(health.state, health.silence, health.info)


@dataclasses.dataclass(frozen=True)
class Sight:
    """A line of the table."""

    state: str
    silence: float | None
    probes: int | None
    retransmits: int | None


def _sight(state: kaio.State, silence: float | None, info: kaio.TcpInfo | None) -> Sight:
    return Sight(state.value, silence, info.probes if info else None, info.retransmits if info else None)


def problem(peer: Peer) -> str | None:
    """What was not as promised; None when all was."""
    role, measured = peer.role, peer.measured
    if role.fate is None:
        if peer.reports:
            return f"alive, and reported dead ({peer.reports[0][1].cause.value})"
        if peer.endings:
            return f"alive, and its connection ended with {peer.endings[0]!r}"
        return "was not answered any more" if role.talks and not peer.exchanges else None
    if measured is None:
        return "dead, and not reported"
    error = peer.reports[0][1]
    if len(peer.reports) != 1 or peer.endings != [error]:
        return f"reported {len(peer.reports)} times, ended with {peer.endings!r}"
    if error.cause is not role.fate:
        return f"cause is {error.cause.value}"
    if not role.expected - EARLY <= measured <= role.expected + TOLERANCE:
        return "too early" if measured < role.expected else "too late"
    return None


# -- the play


async def perform(peers: Sequence[Peer], tick: Callable[[], None]) -> None:
    """Let everybody live for a moment, two fall silent, and wait for the server to be told."""
    listeners = {policy: kaio.Listener("127.0.0.1:0", keepalive=policy) for policy in (QUICK, PATIENT)}
    async with contextlib.AsyncExitStack() as stack:
        protocol = _watcher(peers)
        await stack.enter_async_context(kaio.serve(protocol, listeners=listeners.values(), close_timeout=1))
        clients = []
        for number, peer in enumerate(peers):
            address = str(listeners[peer.role.policy].address)
            # Their own kernels send no probes: whatever is found out, the server finds out.
            clients.append(await stack.enter_async_context(kaio.connect(address, keepalive=False)))
            await _exchange(clients[-1], bytes([number]))
        living = [asyncio.ensure_future(_live(peer, client)) for peer, client in zip(peers, clients, strict=True)]
        try:
            await _watch(peers, tick, PROLOGUE)
            doomed = [number for number, peer in enumerate(peers) if peer.role.fate is not None]
            for number in doomed:
                if not peers[number].role.fed:
                    await _exchange(clients[number], b"last words")
                    peers[number].silent_at = asyncio.get_running_loop().time()
            with blackhole(*(clients[number] for number in doomed)):
                await _watch_until_told(peers, tick)
        finally:
            for peer in peers:
                peer.leaving = True
            await _cancel(living)


def _watcher(peers: Sequence[Peer]) -> type[kaio.KeepaliveProtocol]:
    """The server: an echo that writes down what it is told of its peers."""

    class Watcher(kaio.KeepaliveProtocol):
        peer: Peer | None = None

        def connection_made(self, transport: Any) -> None:
            self.transport: kaio.KeepaliveTransport = transport

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

    return Watcher


async def _live(peer: Peer, client: kaio.Connection) -> None:
    """A client's life, in which it never knows that its line is cut."""
    if peer.role.fed:
        async for _ in client:
            pass
    while peer.role.talks:
        await _exchange(client, b"still here")
        peer.exchanges += 1
        await asyncio.sleep(2 * TICK)


async def _exchange(client: kaio.Connection, words: bytes) -> None:
    await client.send(words)
    await client.receive_exactly(len(words))


async def _watch(peers: Sequence[Peer], tick: Callable[[], None], seconds: float) -> None:
    """Feed the fed and show all, for a while."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        for peer in peers:
            if peer.role.fed and peer.transport is not None and not peer.endings:
                peer.transport.write(b"news")
        tick()
        await asyncio.sleep(TICK)


async def _watch_until_told(peers: Sequence[Peer], tick: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for peer in peers:
        peer.exchanges = 0
        if peer.role.fed:
            peer.silent_at = loop.time()  # it is sent to at once, and that is never acknowledged
    doomed = [peer for peer in peers if peer.role.fate is not None]
    latest = loop.time() + max(peer.role.expected for peer in doomed) + 2 * TOLERANCE
    while loop.time() < latest and not all(peer.endings for peer in doomed):
        await _watch(peers, tick, TICK)
    await _watch(peers, tick, EPILOGUE)


async def _cancel(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


# -- the screens


class Screen(Protocol):
    """Where the play is seen."""

    def playing(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Within the block the play goes on; what it yields is called now and then."""
        ...

    def outcome(self) -> None:
        """Show what came of it."""
        ...


# Widths for a terminal of 80 columns; the narrow ones are numbers.
COLUMNS: Final = (("client", 20), ("listener", 12), ("state", 9), ("silent", 6), ("probes\nmissed", 6), ("resent", 6))
OUTCOME: Final = ("client", "expected", "measured", "cause", "verdict")


def _policy(policy: kaio.Keepalive) -> str:
    """A policy in little room; its text form proper names every field where `stalled` is not the default."""
    short = str(dataclasses.replace(policy, stalled="keep"))
    return short if policy.stalled == "keep" else f"{short} {policy.stalled}"


def _introduction(loop: str) -> str:
    return (
        f"Two listeners on {loop}: {_policy(QUICK)} gives a silent peer {QUICK.detection_time:g} s,"
        f" {_policy(PATIENT)} {PATIENT.detection_time:g} s."
    )


def _row(sight: Sight) -> tuple[str, ...]:
    silence = "" if sight.silence is None else f"{sight.silence:.1f} s"
    return sight.state, silence, str(sight.probes or ""), str(sight.retransmits or "")


def _result(peer: Peer) -> tuple[str, ...]:
    expected = "alive" if peer.role.fate is None else f"{peer.role.expected:.1f} s"
    measured = "alive" if peer.measured is None else f"{peer.measured:.2f} s"
    cause = peer.reports[0][1].cause.value if peer.reports else ""
    return peer.role.title, expected, measured, cause, problem(peer) or "as promised"


def _closing_line(peers: Sequence[Peer]) -> str:
    wrong = sum(problem(peer) is not None for peer in peers)
    if wrong:
        return f"{wrong} of {len(peers)} not as promised"
    return "As promised: the dead reported once, in time, with the cause; the live never."


class Plain:
    """Lines as things happen; no control codes."""

    def __init__(self, peers: Sequence[Peer], loop: str) -> None:
        self._peers = peers
        self._loop = loop

    @contextlib.contextmanager
    def playing(self) -> Iterator[Callable[[], None]]:
        """A line for each change of a peer's state."""
        click.echo(_introduction(self._loop))
        clock = asyncio.get_running_loop().time
        began = clock()
        known: dict[Peer, str] = {}

        def tick() -> None:
            for peer in self._peers:
                sight = peer.look()
                if known.get(peer) != sight.state:
                    known[peer] = sight.state
                    details = [_policy(peer.role.policy), *_details(sight)]
                    line = f"{clock() - began:4.1f} s  {peer.role.title:20}  {sight.state:7}  {', '.join(details)}"
                    click.echo(line)

        yield tick

    def outcome(self) -> None:
        """The table of results, aligned by blanks."""
        rows = [OUTCOME, *map(_result, self._peers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        click.echo()
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            click.echo("  ".join(cells).rstrip())
        click.echo(f"\n{_closing_line(self._peers)}")


def _details(sight: Sight) -> Iterator[str]:
    if sight.state in (kaio.State.SUSPECT, kaio.State.DEAD):
        if sight.silence is not None:
            yield f"silent for {sight.silence:.1f} s"
        if sight.probes:
            yield f"probes missed: {sight.probes}"
        if sight.retransmits:
            yield f"resent: {sight.retransmits}"


STYLES: Final = {"alive": "green", "suspect": "yellow", "stalled": "cyan", "dead": "bold red"}


class Lively:
    """A table that changes as things happen."""

    def __init__(self, peers: Sequence[Peer], loop: str, console: Console) -> None:
        self._peers = peers
        self._loop = loop
        self._console = console

    @contextlib.contextmanager
    def playing(self) -> Iterator[Callable[[], None]]:
        """The live table."""
        self._console.print(_introduction(self._loop), highlight=False)
        with Live(self._table(), console=self._console, auto_refresh=False) as live:
            yield lambda: live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(box=box.ROUNDED, border_style="dim", header_style="bold")
        for heading, width in COLUMNS:
            table.add_column(heading, width=width, justify="right" if width == 6 else "left", vertical="bottom")
        for peer in self._peers:
            state, *rest = _row(peer.look())
            style = STYLES.get(state, "")
            dim = "dim" if state == kaio.State.ALIVE else style
            table.add_row(
                peer.role.title,
                _policy(peer.role.policy),
                Text(f"● {state}", style),
                *(Text(cell, dim) for cell in rest),
            )
        return table

    def outcome(self) -> None:
        """The table of results."""
        table = Table(box=box.ROUNDED, border_style="dim", header_style="bold")
        for heading in OUTCOME:
            table.add_column(heading)
        for peer in self._peers:
            *cells, verdict = _result(peer)
            table.add_row(*cells, Text(verdict, "green" if problem(peer) is None else "bold red"))
        wrong = any(map(problem, self._peers))
        self._console.print(table)
        self._console.print(_closing_line(self._peers), style="bold red" if wrong else "bold green", highlight=False)


# -- the privilege that it takes

_INSIDE: Final = "KAIO_DEMO_INSIDE"  # set where the demo has given itself a network of its own
# A root that lacks CAP_SETFCAP may not be root in a new namespace (user_namespaces(7)), but keeps what that gives.
_WAYS: Final = (("unshare", "-Urn"), ("unshare", "-Un", "--keep-caps"))
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1


def _enter_own_network() -> str:
    """Begin again inside a network namespace where the demo is privileged; comes back only to say why it cannot."""
    if not shutil.which("unshare"):
        return "there is no `unshare` here"
    said = ""
    for way in _WAYS:
        trial = [*way, sys.executable, "-c", ""]
        tried = subprocess.run(trial, capture_output=True, text=True, check=False)  # noqa: S603 - nothing from outside
        if tried.returncode == 0:
            os.environ[_INSIDE] = "1"
            os.execvp(way[0], [*way, sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - itself
        said = said or " ".join(tried.stderr.split())
    return f"`{' '.join(_WAYS[0])}` fails: {said}"


def _loopback_up() -> None:
    """A new network namespace has its loopback interface down (netdevice(7))."""
    import fcntl  # noqa: PLC0415 - not on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        (flags,) = struct.unpack_from("h", request, 16)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def _become_able() -> str | None:
    """See to it that peers can play dead here; else why they cannot."""
    inside = bool(os.environ.get(_INSIDE))
    if inside:
        try:
            _loopback_up()
        except OSError as exc:
            return f"the loopback interface cannot be brought up: {exc.strerror}"
    reason = lacking()
    if reason is None or inside or not sys.platform.startswith("linux"):
        return reason
    return f"{reason}; {_enter_own_network()}"


# -- the command


def _plain_wanted() -> bool:
    return not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop  # noqa: PLC0415 - not everywhere

    return uvloop.new_event_loop


async def _show(peers: Sequence[Peer], screen: Screen) -> None:
    with screen.playing() as tick:
        await perform(peers, tick)
    screen.outcome()


@click.command()
@click.option(
    "--loop",
    type=click.Choice(["uvloop", "asyncio"]),
    default=lambda: "uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
    help="The event loop to run on; uvloop where there is one.",
)
@click.option("--plain", is_flag=True, help="Plain lines, as when the output is not a terminal or NO_COLOR is set.")
def demo(loop: str, plain: bool) -> None:
    """See dead peers being found: a server and clients over loopback, two of which die. Takes about 8 seconds.

    Exits with 0 when all was found out as promised, 1 when not, 2 when peers cannot play dead here.
    """
    if loop == "uvloop" and not importlib.util.find_spec("uvloop"):
        raise click.UsageError("uvloop is not installed; use --loop asyncio")
    reason = _become_able()
    if reason is not None:
        click.echo(f"kaio demo: {reason}", err=True)
        sys.exit(2)
    logging.getLogger("kaio").setLevel(logging.ERROR)  # the screen tells of the deaths
    peers = [Peer(role) for role in ROLES]
    screen: Screen = Plain(peers, loop) if plain or _plain_wanted() else Lively(peers, loop, Console())
    try:
        with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
            runner.run(_show(peers, screen))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if any(map(problem, peers)) else 0)
