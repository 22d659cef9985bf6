"""`kaio top`: a live list of TCP connections, those in trouble first.

Rules kept here: `View` holds what is shown, and knows nothing of terminals; `_page` formats only the rows that fit; the
terminal is restored however the command ends. A thread takes the samples, so that keys respond at once even if a sample
takes long; sampling takes a third of the time at most.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import click
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..errors import KaioError
from ..liveness.health import State
from ..policy import parse_time
from ..tools.procfs import user_name
from ..tools.sockdiag import Connections, TcpConnection, Timer
from ._output import MISTAKE, fail, json_option, on_terminal, print_json, print_table, printable
from ._processes import find_all, state_name

if TYPE_CHECKING:
    from _typeshed import SupportsRichComparison

__all__ = ["top"]

TerminalAttributes: TypeAlias = list[Any]  # of termios.tcgetattr

_STYLES: Final = {State.SUSPECT: "bold yellow", State.STALLED: "bold cyan", State.DEAD: "bold red", State.ALIVE: ""}
_LEAST_INTERVAL: Final = 0.1
_KEYS: Final = "s silence  p probes  t rtt  u unsent  n process  r reverse  f filter  q quit"


# -- a row


class _Column(NamedTuple):
    heading: str
    width: int
    keep: int
    """On a narrow terminal, columns with higher numbers are left out first."""
    right: bool
    cell: Callable[[TcpConnection], str]


def _process(connection: TcpConnection) -> str:
    if not connection.holders:
        return f"({user_name(connection.uid)})" if connection.inode else "(none)"
    first, *others = connection.holders
    return f"{first.pid} {printable(first.name)}" + (f" +{len(others)}" if others else "")


def _state(connection: TcpConnection) -> str:
    return state_name(connection.state)


_TIMERS: Final = {
    Timer.RETRANSMIT: "resend",
    Timer.KEEPALIVE: "keepalive",
    Timer.TIME_WAIT: "end",
    Timer.WINDOW_PROBE: "window",
}


def _timer(connection: TcpConnection) -> str:
    timer = connection.timer
    return "" if timer is None else f"{_TIMERS[timer]} {_seconds(connection.expires)}"


def _seconds(seconds: float | None) -> str:
    """A time in at most six characters, in a unit that fits."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 1000:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} m" if seconds < 60_000 else f"{seconds / 3600:.0f} h"


def _round_trip(seconds: float | None) -> str:
    if not seconds:
        return ""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _bytes(count: int) -> str:
    if count < 10_000:
        return str(count or "")
    for unit in ("k", "M"):
        count = round(count / 1000)
        if count < 10_000:
            return f"{count}{unit}"
    return f"{round(count / 1000)}G"


# Without the two last kept it is 80 columns wide, as the smallest terminals are.
_COLUMNS: Final = (
    _Column("process", 15, 0, False, _process),
    _Column("local", 21, 6, False, lambda connection: connection.local),
    _Column("peer", 21, 0, False, lambda connection: connection.peer),
    _Column("state", 11, 5, False, _state),
    _Column("health", 7, 0, False, lambda connection: connection.health.state.value),
    _Column("timer", 15, 0, False, _timer),
    _Column("probes", 6, 0, True, lambda connection: str(connection.health.probes or "")),
    _Column("resent", 6, 2, True, lambda connection: str(connection.health.retransmits or "")),
    _Column("silent", 6, 0, True, lambda connection: _seconds(connection.silence)),
    _Column("rtt", 8, 3, True, lambda connection: _round_trip(connection.health.rtt)),
    _Column("unacked", 7, 4, True, lambda connection: _bytes(connection.unacknowledged)),
    _Column("unsent", 6, 1, True, lambda connection: _bytes(connection.unsent)),
)
_ADDRESSES: Final = ("local", "peer")


def _cells(connection: TcpConnection) -> tuple[str, ...]:
    return tuple(column.cell(connection) for column in _COLUMNS)


# -- the view


class _Sort(NamedTuple):
    key: str
    """The key that selects it."""
    of: Callable[[TcpConnection], SupportsRichComparison]
    descending: bool = True


_SORTS: Final = {
    "silence": _Sort("s", lambda connection: connection.silence or -1),
    "probes": _Sort("p", lambda connection: (connection.unanswered, connection.silence or -1)),
    "rtt": _Sort("t", lambda connection: connection.health.rtt or -1),
    "unsent": _Sort("u", lambda connection: (connection.unsent, connection.unacknowledged)),
    "process": _Sort(
        "n",
        lambda connection: (connection.holders[0].name if connection.holders else "~", connection.holders),
        descending=False,
    ),
}


@dataclasses.dataclass
class View:
    """The connections to show, their order and filter."""

    sort: str = "probes"
    reverse: bool = False
    filter: str = ""
    typing: bool = False
    """Whether keys edit the filter."""
    connections: Sequence[TcpConnection] = ()
    ended: Sequence[int] = ()
    """Requested processes that have exited."""

    def chosen(self) -> list[TcpConnection]:
        """The connections that match the filter, in order."""
        words, by = self.filter.lower(), _SORTS[self.sort]
        left = [each for each in self.connections if not words or words in _searchable(each)]
        return sorted(left, key=by.of, reverse=by.descending ^ self.reverse)

    def press(self, key: str) -> bool:
        """Handle a key. Returns False to quit."""
        if self.typing:
            self._type(key)
        elif key == "q":
            return False
        elif key in ("f", "/"):
            self.typing = True
        elif key == "\x1b":
            self.filter = ""
        elif key == "r":
            self.reverse = not self.reverse
        else:
            self.sort = next((name for name, sort in _SORTS.items() if sort.key == key), self.sort)
        return True

    def _type(self, key: str) -> None:
        if key in ("\r", "\n", "\x1b"):
            self.typing = False
            self.filter = "" if key == "\x1b" else self.filter
        elif key in ("\x7f", "\b"):
            self.filter = self.filter[:-1]
        elif key == "\x15":  # ^U, as in a shell
            self.filter = ""
        elif key.isprintable():
            self.filter += key


def _searchable(connection: TcpConnection) -> str:
    """The text that the filter searches: all columns but timers and counters."""
    health = connection.health.state.value
    return " ".join((_process(connection), connection.local, connection.peer, _state(connection), health)).lower()


def _page(view: View, width: int, height: int) -> Group:
    """Format the view for a terminal of that size."""
    chosen = view.chosen()
    shown = chosen[: max(0, height - 3)]
    rows = [_cells(connection) for connection in shown]
    columns = _fitting(rows, width)
    head = _line([column.heading for column in _COLUMNS], columns)
    lines = [_title(view, len(chosen)), Text(head.ljust(width), style="reverse")]
    lines += [
        Text(_line(row, columns), style=_STYLES[connection.health.state])
        for row, connection in zip(rows, shown, strict=True)
    ]
    lines += [Text()] * (height - 1 - len(lines))
    lines.append(_foot(view, len(chosen) - len(shown)))
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
    return Group(*lines[-height:] if height < len(lines) else lines)


def _fitting(rows: Sequence[Sequence[str]], width: int) -> list[tuple[int, int]]:
    """The numbers and widths of the columns that fit. Addresses are never cut."""
    needed = {}
    for number, column in enumerate(_COLUMNS):
        longest = max((len(row[number]) for row in rows), default=0) if column.heading in _ADDRESSES else 0
        needed[number] = max(column.width, longest)
    kept = sorted(needed, key=lambda number: _COLUMNS[number].keep)
    while kept and _COLUMNS[kept[-1]].keep and sum(needed[number] + 2 for number in kept) - 2 > width:
        kept.pop()
    return [(number, needed[number]) for number in sorted(kept)]


def _line(cells: Sequence[str], columns: Sequence[tuple[int, int]]) -> str:
    parts = []
    for number, width in columns:
        cell = cells[number]
        if _COLUMNS[number].right and cell_len(cell) < width:
            cell = " " * (width - cell_len(cell)) + cell
        parts.append(set_cell_size(cell, width))
    return "  ".join(parts)


def _title(view: View, chosen: int) -> Text:
    counts = collections.Counter(connection.health.state for connection in view.connections)
    title = Text(f"connections: {len(view.connections)}")
    for state in (State.SUSPECT, State.STALLED, State.ALIVE):
        title.append(f"  {state.value}: {counts[state]}", style=_STYLES[state] if counts[state] else "dim")
    if view.ended:
        title.append(f"  ended: {', '.join(map(str, view.ended))}", style="bold red")
    if view.filter:
        title.append(f"  filter {view.filter!r}: {chosen}")
    order = "ascending" if _SORTS[view.sort].descending is view.reverse else "descending"
    title.append(f"  by {view.sort}, {order}", style="dim")
    return title


def _foot(view: View, hidden: int) -> Text:
    if view.typing:
        return Text(f"filter: {view.filter}_", style="bold")
    return Text((f"{hidden} more below  " if hidden else "") + _KEYS, style="dim")


# -- the terminal


class _Terminal:
    """Reads single keys and signals; restores the terminal and the signal handlers at the end."""

    def __init__(self) -> None:
        self._keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> _Terminal:
        with contextlib.ExitStack() as undo:
            self._reader, self._writer = os.pipe()
            undo.callback(os.close, self._reader)
            undo.callback(os.close, self._writer)
            os.set_blocking(self._writer, False)
            undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH):
                undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))
            if self._keys is not None:
                undo.callback(_restore, self._keys, _cbreak(self._keys))
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def wake(self) -> None:
        """End `wait` early, from any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so wait() returns anyway
            os.write(self._writer, b"\0")

    def wait(self, seconds: float | None) -> tuple[list[signal.Signals], str]:
        """Wait for signals, keys or `wake`. Returns the signals and the keys."""
        readers = [self._reader] if self._keys is None else [self._reader, self._keys]
        ready, _, _ = select.select(readers, [], [], seconds)
        signals = (
            [signal.Signals(byte) for byte in os.read(self._reader, 4096) if byte] if self._reader in ready else []
        )
        if self._keys not in ready:
            return signals, ""
        pressed = os.read(self._keys, 4096)
        if not pressed:  # the terminal has hung up
            return [*signals, signal.SIGHUP], ""
        text = pressed.decode(errors="ignore")
        return signals, "" if len(text) > 1 and text[0] == "\x1b" else text  # an escape sequence, as of an arrow key


def _cbreak(terminal: int) -> TerminalAttributes:
    """Switch the terminal to single keys without echo. Returns the previous attributes.

    ^Z is disabled, because it would leave the shell with this screen.
    """
    import termios  # noqa: PLC0415 - not on Windows

    before = termios.tcgetattr(terminal)
    now = termios.tcgetattr(terminal)
    now[3] &= ~(termios.ECHO | termios.ICANON)
    now[6][termios.VMIN], now[6][termios.VTIME] = 1, 0
    now[6][termios.VSUSP] = os.fpathconf(terminal, "PC_VDISABLE").to_bytes()
    termios.tcsetattr(terminal, termios.TCSANOW, now)
    return before


def _restore(terminal: int, before: TerminalAttributes) -> None:
    import termios  # noqa: PLC0415

    with contextlib.suppress(termios.error):  # the terminal has hung up
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def _watch(pids: Sequence[int], view: View, interval: float) -> int:
    """Show connections until a key or a signal ends the command. Returns the exit code."""
    gc.freeze()
    gc.set_threshold(100_000)  # a sample has no reference cycles, and garbage collection took a fifth of its time
    console = Console()
    with contextlib.ExitStack() as stack:
        # pyroute2's socket belongs to the thread that created it.
        thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        connections = thread.submit(Connections, pids).result()
        stack.callback(lambda: thread.submit(connections.close).result())
        view.connections = thread.submit(connections.sample).result()
        terminal = stack.enter_context(_Terminal())
        stack.callback(lambda: thread.submit(int).result())  # the last sample calls wake(), so wait for it
        live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
        due = time.monotonic() + interval
        asked: concurrent.futures.Future[list[TcpConnection]] | None = None
        began = 0.0
        while True:
            live.update(_page(view, *console.size), refresh=True)
            signals, keys = terminal.wait(None if asked else max(0.0, due - time.monotonic()))
            ends = [number for number in signals if number != signal.SIGWINCH]
            if ends:
                return 128 + ends[0]
            if not all(view.press(key) for key in keys):
                return 0
            now = time.monotonic()
            if asked is not None and asked.done():
                view.connections, view.ended = asked.result(), connections.ended()
                asked, due = None, began + max(interval, 3 * (now - began))
            if asked is None and now >= due:
                asked, began = thread.submit(connections.sample), now
                asked.add_done_callback(lambda _: terminal.wake())


# -- the command


@click.command()
@click.argument("subjects", nargs=-1, metavar="[PID | NAME | UNIT]...")
@click.option("--once", is_flag=True, help="Print the list once and exit; the default without a terminal.")
@click.option("--interval", default="1s", metavar="TIME", help="Time between samples, such as 1s or 500ms.")
@click.option("--sort", type=click.Choice(list(_SORTS)), default="probes", help="The sort key.")
@click.option("--reverse", is_flag=True, help="Reverse the order.")
@click.option("--filter", "words", default="", metavar="TEXT", help="Show only rows that contain this text.")
@json_option
def top(
    subjects: tuple[str, ...], once: bool, interval: str, sort: str, reverse: bool, words: str, as_json: bool
) -> None:
    """List the TCP connections of this network namespace, or of some processes, and update the list.

    Processes are given by number, by name as for `pgrep -x`, or by systemd unit.

    For each: the process, the peer's health, the kernel's active timer and the time left, unanswered probes and
    retransmissions, the time since anything was received, the round-trip time, bytes sent and not acknowledged, bytes
    not sent. Suspect: a probe or a segment is unanswered. Stalled: the peer is alive and accepts no data.
    """
    try:
        seconds = parse_time("interval", interval)
    except KaioError as exc:
        fail(str(exc), MISTAKE)
    if seconds < _LEAST_INTERVAL:
        fail(f"interval={interval!r}: must be at least {_LEAST_INTERVAL:g} s", MISTAKE)
    view = View(sort, reverse, words)
    try:
        pids = find_all(subjects)
        if not (once or as_json or not on_terminal() or os.environ.get("TERM") == "dumb"):
            sys.exit(_watch(pids, view, seconds))
        with Connections(pids) as connections:
            view.connections = connections.sample()
    except OSError as exc:
        fail(exc.strerror or str(exc))
    _print_once(view, as_json)


def _print_once(view: View, as_json: bool) -> None:
    chosen = view.chosen()
    if as_json:
        print_json({"connections": [_document(connection) for connection in chosen]})
        return
    rows = [_cells(connection) for connection in chosen]
    width = (
        shutil.get_terminal_size().columns - len(_COLUMNS) - 2 if on_terminal() else sys.maxsize
    )  # room for the borders
    numbers = [number for number, _ in _fitting(rows, width)]
    print_table(
        [_COLUMNS[number].heading for number in numbers],
        [[row[number] for number in numbers] for row in rows],
        right=[column.heading for column in _COLUMNS if column.right],
        styles=[_STYLES[connection.health.state] for connection in chosen],
    )


def _document(connection: TcpConnection) -> dict[str, object]:
    health = connection.health
    return {
        "processes": [holder._asdict() for holder in connection.holders],
        "inode": connection.inode,
        "uid": connection.uid,
        "local": connection.local,
        "peer": connection.peer,
        "state": _state(connection),
        "health": health.state.value,
        "timer": None if connection.timer is None else connection.timer.name.lower(),
        "expires": connection.expires,
        "probes": health.probes,
        "retransmits": health.retransmits,
        "silence": connection.silence,
        "rtt": health.rtt,
        "unacknowledged": connection.unacknowledged,
        "unsent": connection.unsent,
    }
