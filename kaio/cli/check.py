"""`kaio check`: see a socket's options off, set and on; or a real connection's."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from typing import Any, Final, NamedTuple

import click

from .. import (
    AddressError,
    DeadPeerError,
    Health,
    Keepalive,
    KeepaliveError,
    PolicyError,
    SocketState,
    TcpAddress,
    apply,
    connect,
    inspect,
)
from ..addresses import parse_address
from ..errors import format_address
from ..tools.plans import duration
from ._output import CANNOT, MISTAKE, NO, fail, json_option, print_json, print_table

__all__ = ["check"]

# field: the option as tcp(7) has it; other systems have other names
_OPTIONS: Final = {
    "enabled": "SO_KEEPALIVE",
    "idle": "TCP_KEEPIDLE",
    "interval": "TCP_KEEPINTVL",
    "count": "TCP_KEEPCNT",
    "user_timeout": "TCP_USER_TIMEOUT",
}


class _Seen(NamedTuple):
    """A connection, while it stood."""

    peer: str
    state: SocketState
    health: Health | None
    """None: this platform does not tell."""


@click.command()
@click.argument("address", metavar="[HOST:PORT]", required=False)
@click.option("--keepalive", metavar="SPEC", help="The policy, such as 20s:10s:4 or detect=30s; else the default.")
@json_option
def check(address: str | None, keepalive: str | None, as_json: bool) -> None:
    """See that a fresh socket's keepalive is off, gets the policy, and is on: each option as the kernel gives it back.

    With HOST:PORT, a connection is made too, and its options and its peer's health are shown. Exits with 1 when it
    cannot be made.
    """
    try:
        policy = Keepalive.from_env() if keepalive is None else Keepalive.parse(keepalive)
        where = None if address is None else parse_address(address)
    except (PolicyError, AddressError) as exc:
        fail(f"{exc}; such as `kaio check 127.0.0.1:9000 --keepalive 20s:10s:4`", MISTAKE)
    if where is not None and not isinstance(where, TcpAddress):
        fail(f"address {address!r}: keepalive is of TCP only; such as `kaio check 127.0.0.1:9000`", MISTAKE)
    try:
        with socket.socket() as fresh:
            before = inspect(fresh)
            after = apply(fresh, policy)
        seen = None if where is None else asyncio.run(_look(where, policy))
    except KeepaliveError as exc:
        fail(str(exc.strerror), CANNOT)
    except DeadPeerError as exc:
        fail(f"no connection to {where}: {exc}", NO)
    except OSError as exc:
        fail(f"no connection to {where}: {_reason(exc)}", NO)
    if as_json:
        print_json(_document(policy, before, after, seen))
    else:
        _show(policy, before, after, seen)


async def _look(address: TcpAddress, policy: Keepalive) -> _Seen:
    async with connect(address, keepalive=policy) as connection:
        try:
            health = connection.health()
        except KeepaliveError:
            health = None
        peer = format_address(connection.peername)
        return _Seen(peer, inspect(connection), health)


def _reason(exc: OSError) -> str:
    """The kernel's words: asyncio puts its own in their place, and the resolver has other numbers."""
    if exc.errno is None or isinstance(exc, socket.gaierror):
        return exc.strerror or str(exc)
    return os.strerror(exc.errno)


# -- in words


def _show(policy: Keepalive, before: SocketState, after: SocketState, seen: _Seen | None) -> None:
    click.echo(f"policy {policy}\n")
    columns = ["option", "fresh socket", "with the policy"]
    states = [before, after]
    if seen is not None:
        columns.append("connection")
        states.append(seen.state)
    rows = [(option, *(_value(state, field) for state in states)) for field, option in _OPTIONS.items()]
    print_table(columns, rows)
    if policy.enabled and policy.stalled == "keep" and (bound := _bound(policy, after)) is not None:
        click.echo(f"Sent data may stay unacknowledged for {duration(bound)}; kaio sees to it, not TCP_USER_TIMEOUT.")
    if seen is not None:
        click.echo(f"\n{_wellbeing(seen)}")


def _value(state: SocketState, field: str) -> str:
    value = getattr(state, field)
    if field == "enabled":
        return "ON" if value else "OFF"
    if value is None:
        return "none" if field == "user_timeout" else "not told"
    return f"{value:g}" if field == "count" else f"{value:g} s"


def _bound(policy: Keepalive, after: SocketState) -> float | None:
    """The user timeout, with the times that the system gave."""
    return policy.filled(idle=after.idle, interval=after.interval, count=after.count).effective_user_timeout


def _wellbeing(seen: _Seen) -> str:
    health = seen.health
    if health is None:
        return f"{seen.peer}: connected; this platform tells no more"
    times = (("round trip", health.rtt), ("last heard", health.silence))
    details = [f"{name} {1000 * seconds:.3g} ms" for name, seconds in times if seconds is not None]
    return ", ".join([f"{seen.peer} is {health.state}", *details])


# -- for programs


def _document(policy: Keepalive, before: SocketState, after: SocketState, seen: _Seen | None) -> dict[str, Any]:
    """Times in seconds; null: none, or this platform does not tell."""
    connection = None
    if seen is not None:
        health = None if seen.health is None else dataclasses.asdict(seen.health)
        if health is not None:
            del health["info"]
        connection = {"peer": seen.peer, "socket": dataclasses.asdict(seen.state), "health": health}
    return {
        "policy": str(policy),
        "fresh": dataclasses.asdict(before),
        "with_policy": dataclasses.asdict(after),
        "connection": connection,
    }
