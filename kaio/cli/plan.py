"""`kaio plan`: explain a policy before it is used."""

from __future__ import annotations

import dataclasses
import math
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import click

from .. import Keepalive, PolicyError, inspect
from ..policy import parse_time
from ..tools.middleboxes import MIDDLEBOXES, Middlebox, outlasts, second_probe
from ..tools.plans import ACK_BYTES, Cost, Fate, cost, duration, fates
from ..tools.sysctls import Defaults, SysctlError, read
from ._output import MISTAKE, NO, YES, fail, json_option, print_json, print_table

__all__ = ["plan"]

_SHOWN: Final = 10  # times in a line
_ETHERNET: Final = 14  # bytes of a frame's header


@click.command()
@click.argument("spec", required=False)
@click.option("--connections", metavar="N", default="1", show_default=True, help="Number of connections for the cost.")
@click.option("--against", metavar="TIME", help="Exit with 1 unless it outlasts a middlebox with this timeout.")
@json_option
def plan(spec: str | None, connections: str, against: str | None, as_json: bool) -> None:
    """Explain the policy SPEC: when a death is detected in each state, what probing costs, what it outlasts.

    SPEC is written as for keepalive=: 20s:10s:4, detect=30s, hold=350s, on, off; without it, the default policy is
    explained. Times that it leaves to the system, and the bounds on retransmissions, are this system's.
    """
    number = _connections(connections)
    silence = None if against is None else _seconds(against)
    system = _system()
    try:
        policy = _filled(Keepalive.from_env() if spec is None else Keepalive.parse(spec))
    except PolicyError as exc:
        fail(f"{exc}; such as `kaio plan 20s:10s:4`", MISTAKE)
    states, price = fates(policy, system), cost(policy, number)
    if as_json:
        print_json(_document(policy, states, price, number, silence))
    else:
        _show(policy, states, price, number)
    kept = silence is None or outlasts(policy, silence)
    if silence is not None and not as_json:
        line = f"{policy} outlasts a middlebox with a timeout of {duration(silence)}."
        click.echo(f"\n{line if kept else _remedy(policy, silence)}")
    sys.exit(YES if kept else NO)


def _connections(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**9:
        fail(f"--connections={text!r}: must be a whole number from 1; such as `kaio plan --connections 1000`", MISTAKE)
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = parse_time("--against", text)
    except PolicyError:
        seconds = 0.0
    if not seconds > 0:
        fail(f"--against={text!r}: must be a time above 0; such as `kaio plan --against 350s`", MISTAKE)
    return seconds


def _system() -> Defaults:
    """The kernel's values; on systems without them, those of an unconfigured Linux."""
    try:
        return read()
    except SysctlError:
        return Defaults()


def _filled(policy: Keepalive) -> Keepalive:
    """Fill in this system's values for the times that the policy leaves to the system."""
    with socket.socket() as fresh:
        system = inspect(fresh)
    return policy.filled(idle=system.idle, interval=system.interval, count=system.count)


# -- text


def _show(policy: Keepalive, states: Sequence[Fate], price: Cost, number: int) -> None:
    found = states[0].found_after
    when = f"detected after {duration(found)}" if math.isfinite(found) else "never detected"
    click.echo(f"{policy}: a dead idle peer is {when}.\n")
    deaths = [(fate.state, duration(fate.found_after), duration(fate.found_alone)) for fate in states]
    print_table(("when the peer dies", "kaio detects it after", "options alone"), deaths)
    for note in _notes(policy):
        click.echo(note)
    click.echo("\nUntil then, from the last segment heard:")
    for fate in states:
        click.echo(f"  {fate.state}: {_story(fate)}")
    click.echo(f"\n{_price(price, number)}\n")
    rows = [(box.name, duration(box.forgets_after), _verdict(policy, box), box.note) for box in MIDDLEBOXES]
    print_table(("middlebox", "timeout", "outlasted", "note"), rows)
    click.echo("Outlasted: one probe may be lost, and the next is still in time. Sources: --json.")


def _notes(policy: Keepalive) -> Iterator[str]:
    yield "Options alone: other sockets with this policy's options, on asyncio or uvloop."
    if policy.idle is not None and policy.interval is not None and policy.interval > policy.idle:
        late = duration(policy.interval - policy.idle)
        yield f"The interval is longer than the idle time: after an answered probe, everything happens {late} later."
    if policy.stalled == "drop" and policy.effective_user_timeout is not None:
        bound = duration(policy.effective_user_timeout)
        yield f"stalled=drop: a live peer that accepts no data for {bound} is dropped too."
    if policy.stalled == "keep" and isinstance(policy.user_timeout, (int, float)):
        by_kernel = dataclasses.replace(policy, stalled="drop").detection_time
        if by_kernel is not None and by_kernel != policy.detection_time:
            yield (
                "Where the kernel bounds sent data (the sweep of kaio run, kaio attach, kaio exec), a user timeout also"
                f" replaces the count: dead idle peers are detected after {duration(by_kernel)}."
            )


def _story(fate: Fate) -> str:
    *steps, end = fate.steps or ((math.inf, ""),)
    times = [f"{step[0]:g}" for step in steps]
    if len(times) > _SHOWN:
        times = [*times[: _SHOWN - 3], "...", *times[-2:]]
    repeated = steps[-1][1].partition(",")[2] if steps else ""
    word = {"idle": "probes", "reading paused": "probes"}.get(fate.state, fate.steps[0].event if steps else "")
    asked = f"{word} at {', '.join(times)} s{repeated}, then " if times else ""
    return f"{asked}dead" if math.isfinite(end[0]) else "nothing"


def _price(price: Cost, number: int) -> str:
    if not price.probes:
        return "No probes, no cost."
    return (
        f"{number:,} idle connection{'s' * (number > 1)}: {_rate(price.probes)} probes and {_rate(price.bytes)} bytes a"
        f" second. A probe and its answer are {ACK_BYTES} bytes of IPv4 each, with timestamps; {_ETHERNET} more as"
        f" Ethernet frames, 20 more as IPv6. When none answers: {_rate(price.probes_in_vain)} probes a second."
    )


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _verdict(policy: Keepalive, box: Middlebox) -> str:
    if not box.heeds_probes:
        return "no: data only"
    return "yes" if outlasts(policy, box.forgets_after) else "no"


def _remedy(policy: Keepalive, silence: float) -> str:
    latest = second_probe(policy)
    why = (
        "it sends no second probe" if latest is None else f"the second probe may be sent as late as {duration(latest)}"
    )
    line = f"{policy} does not outlast a middlebox with a timeout of {duration(silence)}: {why}"
    try:
        better = Keepalive.hold(silence)
    except PolicyError:
        return f"{line}; no policy does, because the kernel's times are whole seconds."
    return f"{line}; `kaio plan hold={silence:g}s`, which is {better}, does."


# -- JSON


def _document(
    policy: Keepalive, states: Sequence[Fate], price: Cost, number: int, silence: float | None
) -> dict[str, object]:
    """The JSON document. Times are in seconds; null: never."""
    against = None if silence is None else {"forgets_after": silence, "outlasted": outlasts(policy, silence)}
    return {
        "policy": str(policy),
        "detection_time": _finite(states[0].found_after),
        "states": {
            fate.state: {
                "kaio": _finite(fate.found_after),
                "options_alone": _finite(fate.found_alone),
                "steps": [{"at": step.at, "event": step.event} for step in fate.steps],
            }
            for fate in states
        },
        "cost": {"connections": number, **price._asdict(), "bytes_of_a_probe": ACK_BYTES},
        "second_probe": second_probe(policy),
        "middleboxes": [
            {**box._asdict(), "outlasted": box.heeds_probes and outlasts(policy, box.forgets_after)}
            for box in MIDDLEBOXES
        ],
        "against": against,
    }


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
