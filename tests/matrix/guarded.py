"""One process: blocking sockets at one place, in programs that a sweep (`kaio run`) and `kaio attach` guard.

Run as a program it takes its task as JSON in its only argument, and prints what it saw, a line for each connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from ..namespaces import Routed, routed
from .cells import Cell, Seen, policy
from .crowd import LONGEST
from .peers import Peer
from .places import PLACES

__all__ = ["main"]

_STEADY: Final = 1.5  # seconds in which a sweep and an attachment find what is there
_SEEN_STALLED: Final = 0.3  # seconds before the break at which windows shut
_WITH_LAST: Final = ("in flight", "window shrunk")


class Program:
    """A process of `blocking`, and what guards it."""

    def __init__(self, network: Routed, cells: list[Cell]) -> None:
        self.cells = {cell.state: cell for cell in cells}
        self.peers = {cell.state: Peer(network) for cell in cells}
        first = cells[0]
        spec = str(policy(first.mode))
        connections = json.dumps([[state, *peer.address] for state, peer in self.peers.items()])
        program = ["-m", f"{__package__}.blocking", connections]
        kaio = [sys.executable, "-m", "kaio"]
        self._said: queue.Queue[list[Any]] = queue.Queue()
        self.ends: dict[str, tuple[str, float, int | None]] = {}
        self._guard: subprocess.Popen[Any] | None = None
        if first.kind == "sweep":
            self._process = _start([*kaio, "run", "--keepalive", spec, "--sweep", "500ms", *program])
        else:
            self._process = _start([sys.executable, *program])
        threading.Thread(target=self._listen, daemon=True).start()
        for state, peer in self.peers.items():
            if state != "connecting":
                assert peer.sock
        self.wait_for([state for state in self.peers if state != "connecting"])
        if first.kind == "attach":
            pid = str(self._process.pid)
            self._guard = _start([*kaio, "attach", pid, "--watch", "250ms", "--keepalive", spec])
            assert self._guard.stdout is not None
            self._guard.stdout.readline()  # the head of its table: it has found all that is there

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            self._said.put(json.loads(line))

    def wait_for(self, states: list[str], limit: float = 20.0) -> None:
        """Until all of these have said that they are done, or have ended."""
        waiting, until = set(states), time.monotonic() + limit
        while waiting and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                waiting.discard(self._take(0.05))

    def _take(self, limit: float) -> str:
        state, what, when, number = self._said.get(timeout=limit)
        if what != "done":
            self.ends[state] = (what, when, number)
        return str(state)

    def tell(self, moment: str) -> None:
        """It is there."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(moment + "\n")
            self._process.stdin.flush()

    @property
    def complete(self) -> bool:
        """Return whether all connections have ended."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._take(0)
        return len(self.ends) == len(self.cells)

    def last(self) -> None:
        """What is done a moment before the break."""
        if "in flight" in self.peers:
            self.peers["in flight"].deafen()
        if "window shrunk" in self.peers:
            self.peers["window shrunk"].shrink()
        self.tell("last")

    def seen(self, broken_at: float) -> Iterator[Seen]:
        """Return the outcome of each connection."""
        for state, cell in self.cells.items():
            seen = Seen(cell)
            if state in self.ends:
                what, when, number = self.ends[state]
                seen.told_at = seen.ended_at = when - broken_at
                seen.error, seen.error_number, seen.events = what, number, ["error"]
                if when < broken_at:
                    seen.unready = f"it ended before the break: {what}"
            elif self._process.poll() is not None:
                seen.unready = f"the program has ended with {self._process.returncode}: {self._complaint()}"
            yield seen

    def _complaint(self) -> str:
        return (self._process.stderr.read() if self._process.stderr else "").strip()[-500:]

    def close(self) -> None:
        """Close the sockets and end the programs."""
        for process in (self._guard, self._process):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        for peer in self.peers.values():
            peer.close()


def _start(command: list[str]) -> subprocess.Popen[Any]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1)


def _left(programs: list[Program]) -> bool:
    """Whether any thread of any of them still waits; all of them are listened to."""
    complete = [program.complete for program in programs]
    return not all(complete)


def _try(network: Routed, place: str, cells: list[Cell]) -> list[Seen]:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.kind, cell.mode), []).append(cell)
    with contextlib.ExitStack() as undo:
        programs = []
        for group in groups.values():
            programs.append(program := Program(network, group))
            undo.callback(program.close)
        time.sleep(_STEADY)
        for program in programs:
            program.last()
        for program in programs:
            program.wait_for([state for state in _WITH_LAST if state in program.peers], 1.0)
        time.sleep(_SEEN_STALLED)
        PLACES[place].act(network)
        broken_at = time.monotonic()
        for program in programs:
            program.tell("break")
        while time.monotonic() < broken_at + LONGEST + 2 and _left(programs):
            time.sleep(0.05)
        return [seen for program in programs for seen in program.seen(broken_at)]


def main(task: dict[str, Any]) -> None:
    """Do the task, and print what was seen."""
    cells = [Cell(**fields) for fields in task["cells"]]
    with routed() as network, network.client.entered():
        network.answer_everybody()
        for seen in _try(network, cells[0].place, cells):
            print(seen.to_json())
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
