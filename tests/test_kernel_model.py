"""The model of the kernel's timers says what a real kernel said of the same lives (`python -m tests.record_lives`)."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from .kernel_model import JIFFY, Connection, Path, microseconds
from .record_lives import FILE, LIVES, Life, counters

RECORDED: Final[dict[str, Any]] = json.loads(FILE.read_text())
STEP: Final = 5  # milliseconds between the model's samples
TOLERANCE: Final = 110  # milliseconds: a sample every 50, delayed ACKs of 40
RTT: Final = 60


def model(life: Life, recorded: dict[str, Any]) -> Connection:
    """A connection like the one that was recorded."""
    samples = recorded["samples"]
    began = life.script[0][0] * 1000 if life.script else 0.0
    shut = first_shut(life, recorded)
    rto = shut[6] if shut else min((sample[6] for sample in samples if sample[0] > began), default=200)
    idle, interval, count = life.keepalive
    connection = Connection(
        idle=idle,
        interval=interval,
        count=count,
        user_timeout=life.user_timeout,
        rto=rto / 1000,
        mss=65_483,
        boot=recorded["jiffies"],
        path=Path(rtt=RTT),
    )
    if shut is not None:
        room = round(life.script[0][2]) - shut[8]
        connection.peer_stops_reading(room)
        connection.snd_wnd = room
        connection.mss = room // 2
        connection.total_retrans = shut[4]
    return connection


def first_shut(life: Life, recorded: dict[str, Any]) -> list[int] | None:
    """The first sample with a shut window, of a peer with a small buffer; delayed ACKs spoil what was before."""
    if not 0 < life.receive_buffer < 65_536:
        return None
    samples: list[list[int]] = recorded["samples"]
    return next(sample for sample in samples if sample[9])


def do(connection: Connection, what: str, how_much: float) -> None:
    """Do one step of the script."""
    if what == "cut":
        connection.path.cut_out = True
    elif what == "heal":
        connection.path.cut_out = False
    elif what == "send":
        connection.send(round(how_much))
    elif what == "finish":
        connection.finish()
    elif what == "peer sends":
        connection.peer_sends()
    elif what == "read":
        connection.peer_reads()
    elif what == "shrink":
        connection.peer_stops_reading(0)
    elif what == "cap":
        connection.rto_max = microseconds(how_much)
    else:
        raise ValueError(what)


def relived(life: Life, recorded: dict[str, Any]) -> list[list[int]]:
    """The life in the model: what it says every few milliseconds."""
    connection = model(life, recorded)
    script = list(life.script)
    samples = []
    for ms in range(0, round(life.lasts * 1000) + 2 * TOLERANCE, STEP):
        while script and script[0][0] * 1000 <= ms:
            at, what, how_much = script.pop(0)
            connection.advance(microseconds(at))
            do(connection, what, how_much)
        connection.advance(ms * 1000)
        samples.append([ms, *counters(connection.info())])
    return samples


def alike(real: list[int], modelled: list[int]) -> bool:
    """Whether two samples say the same: each counter; what waits, and silence within the tolerance."""
    _, state, probes, retransmits, total, backoff, _, unacked, unsent, shut, sent, *heard = modelled
    return (
        [state, probes, retransmits, total, backoff, unacked, bool(unsent), shut]
        == [*real[1:6], real[7], bool(real[8]), real[9]]
        and abs(sent - real[10]) <= TOLERANCE
        and abs(min(heard) - min(real[11:])) <= TOLERANCE
    )


@pytest.mark.parametrize("name", LIVES)
def test_the_model_agrees_with_recorded_kernels(name: str) -> None:
    """Every sample that the kernel gave is one that the model gives within a tenth of a second of it."""
    assert JIFFY == 4_000, "recorded with CONFIG_HZ=250"
    modelled = relived(LIVES[name], RECORDED[name])
    shut = first_shut(LIVES[name], RECORDED[name])
    for real in RECORDED[name]["samples"]:
        if shut is not None and real[0] < shut[0]:
            continue
        lo = max(0, (real[0] - TOLERANCE) // STEP)
        near = modelled[lo : (real[0] + TOLERANCE) // STEP + 1]
        assert any(alike(real, sample) for sample in near), f"recorded: {real}; the model: {near[:: len(near) - 1]}"
