"""`kaio serve`: serve an application with a supervisor and workers.

Rules kept here: what the command line alone shows to be wrong is a usage error, before anything is started. The work is
done by `kaio.tools.workers`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import Any, Final

import click

from ..errors import AddressError, PolicyError
from ..net.proxy_protocol import ProxyProtocol
from ..policy import as_policy, parse_time
from ..tools.workers.application import split
from ..tools.workers.child import StartError
from ..tools.workers.logs import LEVELS, log_to_stderr
from ..tools.workers.settings import Settings
from ..tools.workers.sockets import Sockets, check_address, complete
from ..tools.workers.supervisor import Supervisor
from ..tools.workers.tls import TlsError, make_tls
from ._exit import MISTAKE, NO, YES, fail
from ._interpreter import interpreter_flags, require_uvloop

__all__ = ["serve"]

INTERRUPTED: Final = 130  # as shells say it of a program that SIGINT has ended


def _app(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        split(value)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from None
    return value


def _addresses(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    try:
        addresses = tuple(complete(each) for each in value or ("9000",))
        for each in addresses:
            check_address(each)
    except (AddressError, OSError) as exc:
        raise click.UsageError(f"--bind: {exc}") from None
    return addresses


def _time(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return parse_time(param.opts[0], value)
    except PolicyError as exc:
        raise click.UsageError(str(exc)) from None


def _workers(ctx: click.Context, param: click.Parameter, value: str) -> int:
    if value == "auto":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not value.isdecimal() or not 1 <= int(value) <= 1000:
        raise click.UsageError(f"--workers={value!r}: must be a number from 1 to 1000, or auto")
    return int(value)


def _networks(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    try:
        if value:
            ProxyProtocol(value)
    except ValueError as exc:
        raise click.UsageError(f"--proxy-protocol: {exc}") from None
    return value


_AT_LEAST_ONE: Final = click.IntRange(min=1)


@click.command("serve", options_metavar="[OPTIONS]")
@click.argument("app", callback=_app)
@click.option(
    "--bind",
    multiple=True,
    metavar="ADDRESS",
    callback=_addresses,
    help="HOST:PORT, :PORT for all interfaces, PORT for 127.0.0.1, unix:PATH, systemd:NAME, or fd:N; may be repeated. "
    "Default: 9000.",
)
@click.option(
    "--workers", default="1", show_default=True, metavar="N", callback=_workers, help="Processes; auto: one per CPU."
)
@click.option("--keepalive", metavar="SPEC", help="The policy, such as 20s:10s:4. Default: the protocol class's.")
@click.option("--loop", type=click.Choice(["uvloop", "asyncio"]), help="The base loop. Default: uvloop, if installed.")
@click.option("--factory", is_flag=True, help="Call NAME in each worker; it returns what is served.")
@click.option("--app-dir", default=".", metavar="DIR", help="The first folder of sys.path. Default: the current one.")
@click.option("--cert", metavar="FILE", help="TLS: the certificate chain (PEM).")
@click.option("--key", metavar="FILE", help="TLS: the private key (PEM). Default: in the file of --cert.")
@click.option("--client-ca", metavar="FILE", help="TLS: clients need a certificate that one of these issued.")
@click.option(
    "--grace",
    default="30s",
    show_default=True,
    metavar="TIME",
    callback=_time,
    help="When it stops: how long handlers may take to finish.",
)
@click.option(
    "--delay",
    default="0s",
    metavar="TIME",
    callback=_time,
    help="When it stops: how long it still accepts. Default: 0s.",
)
@click.option(
    "--spread", default="0s", metavar="TIME", callback=_time, help="When it stops: tell connections one after another."
)
@click.option(
    "--start-timeout",
    default="30s",
    show_default=True,
    metavar="TIME",
    callback=_time,
    help="How long a worker may take until it serves.",
)
@click.option(
    "--backlog",
    metavar="N",
    type=click.IntRange(1, 65535),
    default=4096,
    help="Connections that may wait to be accepted. Default: 4096.",
)
@click.option("--max-connections", metavar="N", type=_AT_LEAST_ONE, help="The most open ones, per worker and address.")
@click.option("--max-connections-per-peer", metavar="N", type=_AT_LEAST_ONE, help="The same, of one host.")
@click.option("--idle-timeout", metavar="TIME", callback=_time, help="Close a connection that is silent for so long.")
@click.option("--send-timeout", metavar="TIME", callback=_time, help="Abort one whose peer takes no data for so long.")
@click.option("--handshake-timeout", metavar="TIME", callback=_time, help="How long TLS and a PROXY header may take.")
@click.option(
    "--proxy-protocol",
    "proxies",
    multiple=True,
    metavar="NETWORK",
    callback=_networks,
    help="Expect a PROXY protocol header, from these hosts only; unix for a Unix socket; may be repeated.",
)
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True, help="Of kaio's log.")
def serve(keepalive: str | None, loop: str | None, app_dir: str, **given: Any) -> None:
    """Serve APP, which is MODULE:NAME: an async function that takes a kaio.Connection, or a protocol class.

    SIGTERM and Ctrl-C: connections come to their end within --grace; a second one aborts them. SIGHUP: new workers,
    with new code and certificates, take over, and no connection is refused or reset.
    """
    if os.name != "posix":
        fail("kaio serve needs a POSIX system")
    settings = _settings(keepalive, loop, app_dir, given)
    # The caller may have set SIGCHLD to be ignored, and then the kernel would not report how workers end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log_to_stderr(settings.log_level)
    try:
        sys.exit(asyncio.run(_supervise(settings)))
    except StartError as exc:
        click.echo(f"kaio serve: cannot serve {settings.app}: {exc}", err=True)
        if exc.trace:
            click.echo(exc.trace, err=True, nl=False)
        sys.exit(NO)


def _settings(keepalive: str | None, loop: str | None, app_dir: str, given: dict[str, Any]) -> Settings:
    """Check what depends on more than one option, or on files."""
    if loop == "uvloop":
        require_uvloop()
    if given["spread"] > given["grace"]:
        raise click.UsageError("--spread must not be longer than --grace")
    if not os.path.isdir(app_dir):
        raise click.UsageError(f"--app-dir {app_dir}: is no folder")
    names = ("max_connections", "max_connections_per_peer", "idle_timeout", "send_timeout", "handshake_timeout")
    limits = {name: value for name in names if (value := given.pop(name)) is not None}
    for name, value in limits.items():
        if not value:
            raise click.UsageError(f"--{name.replace('_', '-')}: must be more than 0")
    if "max_connections_per_peer" in limits and not given["proxies"]:
        unix = [each for each in given["bind"] if each.startswith("unix:")]
        if unix:
            raise click.UsageError(f"--max-connections-per-peer: clients of {unix[0]} have no address")
    try:
        policy = None if keepalive is None else str(as_policy(keepalive))
        make_tls(given["cert"], given["key"], given["client_ca"])
    except PolicyError as exc:
        raise click.UsageError(str(exc)) from None
    except TlsError as exc:
        fail(str(exc), MISTAKE)
    return Settings(
        keepalive=policy,
        loop=loop or _best_loop(),
        # Not resolved: when it is a symbolic link to the newest version, a reload follows it.
        app_dir=os.path.abspath(app_dir),
        binds=given.pop("bind"),
        limits=limits,
        **given,
    )


def _best_loop() -> str:
    try:
        require_uvloop()
    except click.UsageError:
        return "asyncio"
    return "uvloop"


async def _supervise(settings: Settings) -> int:
    """Bind, and serve until a signal; return the exit code."""
    sockets = Sockets(settings.workers, settings.backlog)
    try:
        for address in settings.binds:
            try:
                await sockets.open(address)
            except AddressError as exc:
                fail(f"--bind: {exc}", NO)
            except OSError as exc:
                fail(f"--bind {address}: {exc.strerror or exc}", NO)
        why = await Supervisor(settings, sockets, flags=interpreter_flags()).run()
    finally:
        sockets.close()
    logging.shutdown()
    return INTERRUPTED if why == signal.SIGINT else YES
