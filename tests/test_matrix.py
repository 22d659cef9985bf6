"""A part of `make matrix` that stands for the whole: three places, of which each tells the kernel something else; every
state, loop, mode and kind; and live peers that look dead.
"""

from __future__ import annotations

import asyncio

import pytest

from .matrix import expect, report, run, states
from .matrix.cells import KINDS, Cell, Seen
from .matrix.live import TROUBLES, live_cells
from .matrix.places import PLACES, Answer

SILENT, ICMP, LOCAL = "the peer's power", "router, host unreachable", "our link"


@pytest.fixture
def networks(_networks: str | None) -> None:
    """The test makes networks."""
    if _networks is not None:
        pytest.skip(_networks)


@pytest.mark.slow
def test_every_death_is_found(networks: None) -> None:
    """In time, with its cause, once; in every state, on both loops, in both modes, for every kind of connection."""
    seen, _ = asyncio.run(run.run(run.all_cells([SILENT, ICMP, LOCAL]), at_once=6))
    assert not report.failures(seen), report.table(seen)


@pytest.mark.slow
def test_no_live_peer_is_reported_dead(networks: None) -> None:
    """None is reported, and all bytes arrive."""
    troubles = ["a path that drops large segments", "our loop is blocked"]
    _, results = asyncio.run(run.run([], live_cells(troubles)))
    assert not report.live_failures(results), report.live_table(results)


def found(state: str, kind: str = "own", mode: str = "keep", place: str = SILENT, **fields: object) -> Seen:
    """What would be right for an own connection that dies idle, and what is different."""
    seen = Seen(Cell(place, state, kind, "asyncio", mode), ["dead", "lost"], 2.9, 2.9, "DeadPeerError", 110, True)
    seen.cause, seen.logged, seen.counted = "KEEPALIVE", 1, 1
    for name, value in fields.items():
        setattr(seen, name, value)
    return seen


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        (found("idle"), None),
        (found("idle", told_at=None, ended_at=None, events=[]), "missed"),
        (found("idle", ended_at=4.1), "late"),
        (found("idle", told_at=1.2), "early"),
        (found("idle", cause="UNACKNOWLEDGED"), "cause"),
        (found("in flight"), "cause"),
        (found("in flight", cause="UNACKNOWLEDGED"), None),
        (found("in flight", cause="UNACKNOWLEDGED", place=ICMP, mode="drop"), "cause"),
        (found("in flight", cause="UNREACHABLE", place=ICMP, mode="drop", ended_at=6.9), None),
        (found("in flight", cause="UNREACHABLE", place=ICMP, ended_at=6.9), "late"),
        (found("in flight", cause="UNACKNOWLEDGED", place=ICMP, error_number=113), "cause"),
        (found("written at once", cause="UNACKNOWLEDGED", place=LOCAL), "cause"),
        (found("idle", events=["lost"]), "callbacks"),
        (found("idle", events=["dead", "lost", "lost"]), "callbacks"),
        (found("idle", same_error=False), "callbacks"),
        (found("idle", "others", events=["lost"], is_dead_peer=False), None),
        (found("idle", is_dead_peer=False), "error"),
        (found("idle", logged=2), "log"),
        (found("idle", counted=0), "count"),
        (found("paused, unread", lost_bytes=1), "bytes"),
        (found("sendfile", cause="UNACKNOWLEDGED", left=["sendfile still waits"]), "left"),
        (found("window shut", unready="the window is open"), "unready"),
        (found("idle", place="our queue, full", told_at=None), None),  # the kernel never asks, and nothing waits
    ],
)
def test_the_matrix_detects_wrong_verdicts(seen: Seen, problem: str | None) -> None:
    """Each of the things that a cell can fail in."""
    assert [each.partition(":")[0] for each in expect.problems(seen)] == ([problem] if problem else [])


def test_every_cell_has_its_causes() -> None:
    """Each place with each state; and each kind is somewhere."""
    cells = run.all_cells()
    assert all(expect.causes(cell) for cell in cells)
    assert {cell.kind for cell in cells} == set(KINDS)
    assert {PLACES[cell.place].answer for cell in cells} == set(Answer)
    assert {cell.state for cell in cells} == set(states.STATES)
    assert {cell.place for cell in live_cells()} == set(TROUBLES)
