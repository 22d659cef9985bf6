"""docs/recipes.md: each recipe gives a real library the policy, and it hears of a death in the middle of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from kaio import SocketState
from kaio.testing import blackhole
from kaio.tools.processes import lacking as no_looking
from kaio.tools.processes import sockets

from . import servers
from .conftest import LOOPS
from .programs.recipe_clients import PAGE, POLICY, USES

if TYPE_CHECKING:
    from .recipe_servers import Relay

PROGRAM: Final = Path(__file__).parent / "programs" / "recipe_clients.py"
BOUND: Final = 3.0  # the detection time
SLACK: Final = 15.0  # seconds for a busy machine, and for a server's own word that it sends again and again
OWN: Final = {"pymongo": (120, 10, 9)}
"""Libraries whose own times stand."""
ON_KAIOS_LOOP: Final = ("SQLAlchemy with asyncpg", "aio-pika", "nats-py")
"""There the monitor enforces the user timeout, and the kernel has none."""


class Clients:
    """A process in which some recipes run, each in a thread of its own."""

    def __init__(self, relays: dict[str, Relay]) -> None:
        self.relays = relays
        self.said: dict[tuple[str, str], dict[str, Any]] = {}
        self.at: dict[tuple[str, str], float] = {}
        self._more = asyncio.Event()

    async def __aenter__(self) -> Clients:
        peers = {recipe: (servers.LOOPBACK, relay.port) for recipe, relay in self.relays.items()}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(PROGRAM),
            json.dumps(peers),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=PROGRAM.parent.parent.parent,
        )
        self._reading = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._read_complaints())]
        self.complaints: list[str] = []
        return self

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            said = json.loads(line)
            self.said[said["recipe"], said["step"]] = said
            self.at[said["recipe"], said["step"]] = asyncio.get_running_loop().time()
            self._more.set()

    async def _read_complaints(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.complaints.append(line.decode())

    async def have_said(self, step: str, recipes: list[str], within: float) -> None:
        """Wait until all of them have said it."""
        wanted = {(recipe, step) for recipe in recipes}
        try:
            async with asyncio.timeout(within):
                while not self.said.keys() >= wanted:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            lines = "".join(self.complaints)
            pytest.fail(f"{step}: nothing from {wanted - self.said.keys()}; {self.said}\n{lines}")

    def states(self) -> dict[str, set[SocketState]]:
        """The options of each recipe's sockets, read from outside."""
        found = {each.local[1]: each.state for each in sockets(self.process.pid)}
        ports = {recipe: {client.peername[1] for client in relay.clients} for recipe, relay in self.relays.items()}
        return {recipe: {found[port] for port in theirs if port in found} for recipe, theirs in ports.items()}

    async def __aexit__(self, *exc: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()
        for reading in self._reading:
            await reading


async def lives(relays: dict[str, Relay], rows: dict[str, tuple[str, str, str]]) -> None:
    """Let some recipes run in one process, and their peers die."""
    recipes, loop = list(relays), asyncio.get_running_loop()
    async with Clients(relays) as clients:
        await clients.have_said("first", recipes, 70)
        states = clients.states()
        for recipe in recipes:
            (state,) = states[recipe]
            bound = None if recipe in ON_KAIOS_LOOP or recipe in OWN else BOUND
            assert state.enabled, recipe
            assert state.times == OWN.get(recipe, (POLICY.idle, POLICY.interval, POLICY.count)), recipe
            assert state.user_timeout == bound, recipe
            rows[recipe] = (str(state), f"{state.detection_time:g} s, not waited for", "")
        # What a server still has to send, it would send again and again, and be heard: nats-server pings after 2 s.
        await asyncio.sleep(4)
        with contextlib.ExitStack() as dead:
            for relay in relays.values():
                for client in relay.clients:
                    dead.enter_context(blackhole(client.transport))
            began = loop.time()
            bounded = [recipe for recipe in recipes if recipe not in OWN]
            await clients.have_said("over", bounded, BOUND + SLACK)
            for recipe in bounded:
                over, took = clients.said[recipe, "over"], clients.at[recipe, "over"] - began
                assert took >= BOUND / 3, recipe
                rows[recipe] = (rows[recipe][0], f"{took:.1f} s", over["error"])
            for recipe in OWN:
                assert (recipe, "over") not in clients.said


@pytest.mark.slow
@pytest.mark.loops({"asyncio": LOOPS["asyncio"]})
@pytest.mark.skipif(no_looking() is not None, reason=str(no_looking()))
@pytest.mark.skipif(servers.lacking() is not None, reason=str(servers.lacking()))
async def test_each_recipe(dead_peers: None) -> None:
    """All at once; but what sweeps its process has one for itself. The page's table is printed."""
    from .recipe_servers import all_relays  # gRPC and others, which no other test should wait for

    rows: dict[str, tuple[str, str, str]] = {}
    async with all_relays(list(USES)) as relays, asyncio.TaskGroup() as group:
        group.create_task(lives({recipe: relay for recipe, relay in relays.items() if recipe != "gRPC"}, rows))
        group.create_task(lives({"gRPC": relays["gRPC"]}, rows))
    table = ["| library | options of its socket | death heard after | error |", "|---|---|---|---|"]
    table += [f"| {recipe} | `{rows[recipe][0]}` | {rows[recipe][1]} | {rows[recipe][2]} |" for recipe in USES]
    print("\n".join(table))
    expected = dict(re.findall(r"^\| ([^|]+) \| `[^|]*` \| [^|]* \| ([^|]*) \|$", PAGE.read_text("utf-8"), re.M))
    assert {recipe: row[2] for recipe, row in rows.items()} == {name: error.strip() for name, error in expected.items()}


def test_each_recipe_of_the_page_is_run() -> None:
    """A new one needs a use."""
    headings = re.findall(r"^## (.*)$", PAGE.read_text("utf-8"), re.M)
    assert headings == [*USES, "What they do"]
