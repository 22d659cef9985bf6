"""`kaio check`: set keepalive on a test socket or a connection, and read it back from the kernel."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import socket
from typing import Final, NamedTuple

import click

from .. import (
    AddressError,
    Cause,
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

# field: the option's name in socket(7) and tcp(7); other systems have other names
_OPTIONS: Final = {
    "enabled": "SO_KEEPALIVE",
    "idle": "TCP_KEEPIDLE",
    "interval": "TCP_KEEPINTVL",
    "count": "TCP_KEEPCNT",
    "user_timeout": "TCP_USER_TIMEOUT",
}


class _Seen(NamedTuple):
    """An established connection, as it was before it was closed."""

    peer: str
    state: SocketState
    health: Health | None
    """None: not available on this platform."""


@click.command()
@click.argument("address", metavar="[HOST:PORT]", required=False)
@click.option(
    "--keepalive",
    metavar="SPEC",
    help="The policy, such as 20s:10s:4. Default: from the environment.",
)
@json_option
def check(address: str | None, keepalive: str | None, as_json: bool) -> None:
    """Show the keepalive options of a new socket, before and after a policy is set, as read back from the kernel.

    With HOST:PORT, also connect there, and show the options of the connection and the health of its peer. Exits with 1
    if the connection cannot be made.
    """
    try:
        policy = Keepalive.from_env() if keepalive is None else Keepalive.parse(keepalive)
        where = None if address is None else parse_address(address)
    except (PolicyError, AddressError) as exc:
        fail(f"{exc}; such as `kaio check 127.0.0.1:9000 --keepalive 20s:10s:4`", MISTAKE)
    if where is not None and not isinstance(where, TcpAddress):
        fail(f"address {address!r}: keepalive needs TCP; such as `kaio check 127.0.0.1:9000`", MISTAKE)
    try:
        with socket.socket() as fresh:
            before = inspect(fresh)
            after = apply(fresh, policy)
        seen = None if where is None else asyncio.run(_look(where, policy))
    except KeepaliveError as exc:
        fail(str(exc.strerror), CANNOT)
    except DeadPeerError as exc:
        # Where the network is at fault, nothing is known of the peer.
        fail(f"no connection to {where}: {_reason(exc) if exc.cause is Cause.UNREACHABLE else exc}", NO)
    except OSError as exc:
        fail(f"no connection to {where}: {_reason(exc)}", NO)
    if as_json:
        print_json(_document(policy, before, after, seen))
    else:
        _show(policy, before, after, seen)


async def _look(address: TcpAddress, policy: Keepalive) -> _Seen:
    logging.getLogger("kaio").addHandler(logging.NullHandler())  # deaths are told by this command itself
    async with connect(address, keepalive=policy) as connection:
        try:
            health = connection.health()
        except KeepaliveError:
            health = None
        peer = format_address(connection.peername)
        return _Seen(peer, inspect(connection), health)


def _reason(exc: OSError) -> str:
    """The kernel's text for an error: asyncio replaces it with its own. The resolver has its own error numbers."""
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
        click.echo(f"Sent data may stay unacknowledged for {duration(bound)}; kaio enforces it, not TCP_USER_TIMEOUT.")
    if seen is not None:
        click.echo(f"\n{_health(seen)}")


def _value(state: SocketState, field: str) -> str:
    value = getattr(state, field)
    if field == "enabled":
        return "ON" if value else "OFF"
    if value is None:
        return "none" if field == "user_timeout" else "unknown"
    return f"{value:g}" if field == "count" else f"{value:g} s"


def _bound(policy: Keepalive, after: SocketState) -> float | None:
    """The user timeout, computed with the system's values where the policy has none."""
    return policy.filled(idle=after.idle, interval=after.interval, count=after.count).effective_user_timeout


def _health(seen: _Seen) -> str:
    health = seen.health
    if health is None:
        return f"{seen.peer}: connected; this platform has no TCP_INFO"
    times = (("round trip", health.rtt), ("last heard", health.silence))
    details = [f"{name} {1000 * seconds:.3g} ms" for name, seconds in times if seconds is not None]
    return ", ".join([f"{seen.peer} is {health.state}", *details])


# -- for programs


def _document(policy: Keepalive, before: SocketState, after: SocketState, seen: _Seen | None) -> dict[str, object]:
    """The result for --json. Times are in seconds; null: none, or not available on this platform."""
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
