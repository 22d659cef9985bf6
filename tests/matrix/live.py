"""Live peers that look dead: none may be reported, and all bytes arrive.

A trouble is what befalls them all at once, for a while; a *life* is what one connection does meanwhile. Three kinds of
process: this one, which makes the network and the trouble; the peers' (`living`); and ours (`ours`), one for each loop
and mode.

Run as a program it takes its task as JSON in its only argument, and prints what it saw, a line for each connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Final

import kaio

from ..namespaces import Routed, routed
from .cells import BOUND, LOOPS, MODES, Cell, policy

__all__ = ["TROUBLES", "Life", "Result", "live_cells", "main"]

LIVE_KINDS: Final = ("own", "connection", "streams", "others", "descriptor")


@dataclasses.dataclass(frozen=True, slots=True)
class Life:
    """What a connection does in the time of trouble. What it does is in its name: see `ours`."""

    name: str
    reads: str = "all"
    """How its peer reads: see `living`."""
    modes: Sequence[str] = MODES
    """With stalled="drop", a peer that takes nothing is given up by contract."""
    dies: Sequence[str] = ()
    """Modes in which it is a death: data was not acknowledged for the bound."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trouble:
    """A fault that happens to all connections at once."""

    name: str
    lives: Sequence[Life]
    act: Callable[[World], None]
    keepalive: Callable[[str], kaio.Keepalive] = policy


@dataclasses.dataclass(slots=True)
class Result:
    """What became of one connection; or what the harness stumbled on."""

    cell: Cell
    problems: list[str]
    note: str = ""

    def to_json(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Result:
        """Make a result from a line of `to_json`."""
        fields: dict[str, Any] = json.loads(line)
        return cls(**{**fields, "cell": Cell(**fields["cell"])})


class World:
    """The network, the peers and us: what a trouble can befall."""

    def __init__(self, network: Routed, peers: Program, ours: list[Program]) -> None:
        self.network = network
        self.peers = peers
        self.ours = ours

    def begin(self) -> None:
        """Start what each connection does while the fault lasts."""
        for program in self.ours:
            program.tell("begin")
        time.sleep(0.2)

    def wait(self, bounds: float) -> None:
        """Wait for a multiple of the detection time."""
        time.sleep(bounds * BOUND)


# -- troubles


def _slow(world: World) -> None:
    world.begin()
    world.wait(7)


def _frozen(world: World) -> None:
    world.peers.process.send_signal(signal.SIGSTOP)
    world.begin()
    world.wait(5)
    world.peers.process.send_signal(signal.SIGCONT)


def _lossy_rules(ports: Sequence[int]) -> str:
    """A pattern for each connection, in which at most four packets in a row are lost; by chance it would be more."""
    chains = "\n".join(
        f"chain p{port} {{\nnumgen inc mod 20 {{ 0, 1, 2, 3, 9, 14 }} counter name lost drop\n}}" for port in ports
    )
    jumps = "\n".join(f"tcp sport {port} goto p{port}\ntcp dport {port} goto p{port}" for port in ports)
    return f"""
        table ip bad {{
            counter lost {{ }}
            {chains}
            chain loss {{
                type filter hook forward priority filter; policy accept;
                {jumps}
            }}
        }}
    """


def _lossy(world: World) -> None:
    world.network.rules(_lossy_rules(world.peers.ports))
    world.begin()
    world.wait(7)
    assert world.network.counted("bad", "lost") >= 8 * len(world.peers.ports)
    world.network.rules("delete table ip bad")


def _only_small(world: World) -> None:
    world.network.rules("""
        table ip bad {
            chain large {
                type filter hook forward priority filter; policy accept;
                meta length > 600 drop
            }
        }
    """)
    world.begin()
    world.wait(4)
    world.network.rules("delete table ip bad")


def _blocked(world: World) -> None:
    world.peers.tell("deaf 1")
    time.sleep(0.1)
    world.begin()
    for program in world.ours:
        program.tell(f"block {3 * BOUND}")
    world.wait(3.2)


def _stopped(world: World) -> None:
    world.peers.tell("deaf 1")
    time.sleep(0.1)
    world.begin()
    for program in world.ours:
        program.process.send_signal(signal.SIGSTOP)
    world.wait(3)
    for program in world.ours:
        program.process.send_signal(signal.SIGCONT)
    time.sleep(0.2)


def _patient(mode: str) -> kaio.Keepalive:
    return kaio.Keepalive(1, 1, 8, stalled="keep" if mode == "keep" else "drop")


_KEEP: Final = ("keep",)
_BUSY: Final = (
    Life("idle"),
    Life("in flight"),
    Life("window shut", "none", _KEEP),
    Life("window shrunk", "shrunk", _KEEP),
)

TROUBLES: Final = {
    trouble.name: trouble
    for trouble in (
        Trouble(
            "a peer that takes nothing",
            (
                Life("window shut", "none", _KEEP),
                Life("window shrunk", "shrunk", _KEEP),
                Life("a byte now and then", "drip", _KEEP),
            ),
            _slow,
        ),
        Trouble("a frozen process", (Life("idle"), Life("talks"), Life("window shut, frozen", "all", _KEEP)), _frozen),
        Trouble("30 % loss, both ways", (Life("idle"), Life("talks"), Life("in flight")), _lossy, _patient),
        Trouble(
            "a path that drops large segments",
            (
                Life("idle"),
                Life("talks"),
                Life("large", dies=MODES),
                # The kernel's user timeout counts from the first retransmission, whatever is heard meanwhile.
                Life("large, peer talks", "chatty", dies=("drop",)),
            ),
            _only_small,
        ),
        Trouble("our loop is blocked", _BUSY, _blocked),
        Trouble("our process is stopped", _BUSY, _stopped),
    )
}


# -- processes


class Program:
    """One of this package's modules, run as a program."""

    def __init__(self, *arguments: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        self.ports: list[int] = []

    def tell(self, line: str) -> None:
        """Write one line to its standard input."""
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    @property
    def out(self) -> IO[str]:
        """Its standard output."""
        assert self.process.stdout is not None
        return self.process.stdout

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def live_cells(
    troubles: Sequence[str] = (),
    lives: Sequence[str] = (),
    kinds: Sequence[str] = (),
    loops: Sequence[str] = (),
    modes: Sequence[str] = (),
) -> list[Cell]:
    """Every connection with a peer that lives, or those with these names."""
    return [
        Cell(trouble, life.name, kind, loop, mode)
        for trouble in troubles or TROUBLES
        for life in TROUBLES[trouble].lives
        for kind in kinds or LIVE_KINDS
        for loop in loops or LOOPS
        for mode in modes or MODES
        if mode in life.modes and kind in LIVE_KINDS and (not lives or life.name in lives)
    ]


def _life(cell: Cell) -> Life:
    return next(life for life in TROUBLES[cell.place].lives if life.name == cell.state)


def endure(network: Routed, cells: Sequence[Cell]) -> Iterator[Result]:
    """One trouble, and what became of all connections."""
    trouble = TROUBLES[cells[0].place]
    package = __package__ or ""
    with contextlib.ExitStack() as undo:
        with network.server.entered():
            peers = Program(f"{package}.living", Routed.SERVER, *(_life(cell).reads for cell in cells))
        undo.callback(peers.close)
        peers.ports = json.loads(peers.out.readline())
        groups: dict[tuple[str, str], list[tuple[Cell, int]]] = {}
        for cell, port in zip(cells, peers.ports, strict=True):
            groups.setdefault((cell.loop, cell.mode), []).append((cell, port))
        ours = []
        for (loop, mode), connections in groups.items():
            task = {
                "loop": loop,
                "keepalive": str(trouble.keepalive(mode)),
                "host": Routed.SERVER,
                "connections": [(dataclasses.asdict(cell), port) for cell, port in connections],
            }
            ours.append(program := Program(f"{package}.ours", json.dumps(task)))
            undo.callback(program.close)
        for program in ours:
            program.out.readline()
        time.sleep(1.5)
        trouble.act(World(network, peers, ours))
        peers.tell("go on")
        for program in ours:
            program.tell("end")
        said = [program.out.read().splitlines() for program in ours]
        for (loop, mode), lines in zip(groups, said, strict=True):
            yield from _results(lines, [cell for cell, _ in groups[loop, mode]])


def _results(lines: list[str], cells: list[Cell]) -> Iterator[Result]:
    told = set()
    for line in lines:
        if not line.startswith("{"):
            continue
        fields = json.loads(line)
        if "complaint" in fields:
            yield Result(dataclasses.replace(cells[0], state="(the whole)", kind="-"), [fields["complaint"]])
            continue
        cell = Cell(**fields.pop("cell"))
        told.add(cell)
        yield Result(cell, *_judge(_life(cell), cell, **fields))
    for cell in cells:
        if cell not in told:
            yield Result(cell, ["no result: " + " ".join(lines)[-800:]])


def _judge(
    life: Life,
    cell: Cell,
    alive: bool,
    all_arrived: bool,
    after: float | None,
    error: str,
    cause: str | None,
    logged: int,
    counted: int,
) -> tuple[list[str], str]:
    if cell.mode in life.dies:
        note = "lived" if after is None else f"dead after {after:.1f} s, {cause or 'with no cause'}"
        # The kernel's error number is theirs to read, and a peer that talks is not silent: it might be a reset.
        untold = "peer talks" in life.name and cell.kind in ("others", "descriptor") and cause is None
        right = after is not None and after <= BOUND + 1 and (cause == "UNACKNOWLEDGED" or untold)
        return ([] if right else [f"{note}: not as it should be"]), note
    found = []
    if not alive:
        found.append(f"FALSE DEATH after {after or 0:.1f} s: {error}")
    if logged or counted:
        found.append(f"FALSE DEATH in {logged} log records, {counted} counts")
    if not all_arrived:
        found.append("bytes are missing, or are others than were sent")
    return found, "alive" if alive else "dead"


def main(task: dict[str, Any]) -> None:
    """Do the task, and print what was seen."""
    cells = [Cell(**fields) for fields in task["cells"]]
    watchdog = threading.Timer(150, os._exit, (3,))
    watchdog.daemon = True
    watchdog.start()
    with routed() as network, network.client.entered():
        for result in endure(network, cells):
            print(result.to_json())
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
