"""What a connection was doing when its path broke, and what is done with it just afterwards.

A state has up to four hooks. `make` has all the time that it needs. `last` is done a moment before the break, at most
a few tenths of a second: with stalled="drop" a peer that takes nothing is given up soon, dead or not. `after` is done
at once after the break, or `delay` seconds later.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import io
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final

import kaio

from .cells import KINDS, LOOPS
from .ends import End
from .peers import Peer

__all__ = ["MEGABYTES", "SHRUNK", "STATES", "Case", "State", "Waits", "tcp_info"]

MEGABYTES: Final = bytes(4_000_000)
SHRUNK: Final = bytes(20_000)  # more than a peer has room for that has just shrunk; less than it had promised
WAITING: Final = 100_000  # bytes that the peer has sent, and nobody has read
_ON_LOOPS: Final = frozenset({"own", "connection", "streams", "others", "descriptor"})
_TRANSPORTS: Final = frozenset({"own", "others"})
_UPGRADED: Final = frozenset({"own", "streams", "others"})


class Waits(enum.Enum):
    """What waits for the peer when all is over but the verdict: the cause depends on it."""

    NOTHING = "nothing: the kernel's keepalive asks"
    IN_FLIGHT = "data that had been sent before the break, and was not acknowledged"
    WRITTEN = "data, or a FIN, that was written after the break"
    SHUT = "data, for the window"
    SHRUNK = "data in flight, for a window that shrank under it"
    HANDSHAKE = "a TLS handshake, for an answer to what was acknowledged"
    CONNECTING = "a SYN"


@dataclasses.dataclass(slots=True)
class Case:
    """A connection of the crowd, and what its state needs."""

    end: End
    peer: Peer
    client_tls: ssl.SSLContext
    server_tls: ssl.SSLContext
    file: io.BufferedReader
    unready: str = ""


Hook = Callable[[Case], Awaitable[None]]


async def _nothing(case: Case) -> None:
    return


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What a connection was doing."""

    name: str
    waits: Waits
    make: Hook
    last: Hook = _nothing
    after: Hook = _nothing
    delay: float = 0.0
    kinds: frozenset[str] = _ON_LOOPS
    loops: frozenset[str] = frozenset(LOOPS)


def tcp_info(case: Case) -> kaio.TcpInfo:
    """What the kernel says of our end."""
    return kaio.health(case.end.socket).info


async def _until(case: Case, condition: Callable[[kaio.TcpInfo], Any], why: str) -> None:
    """Wait until the kernel says so; else the state could not be had."""
    for _ in range(100):
        if condition(tcp_info(case)):
            return
        await asyncio.sleep(0.005)
    case.unready = f"{why}: {tcp_info(case)}"


# -- how connections are made


async def connect(case: Case) -> None:
    await case.end.connect()
    assert case.peer.sock


async def connect_tls(case: Case) -> None:
    thread = case.peer.shake_hands(case.server_tls)
    await case.end.connect(case.client_tls)
    await asyncio.to_thread(thread.join)


async def upgrade(case: Case) -> None:
    await connect(case)
    thread = case.peer.shake_hands(case.server_tls)
    case.end.transport = await case.end.start_tls(case.client_tls)
    await asyncio.to_thread(thread.join)
    del case.end.tasks["start_tls"]


async def finish(case: Case) -> None:
    await connect(case)
    case.end.write_eof()
    await _until(case, lambda info: info.state == kaio.TcpState.FIN_WAIT2, "the FIN was not acknowledged")


async def be_finished(case: Case) -> None:
    await connect(case)
    case.peer.sock.shutdown(socket.SHUT_WR)


async def pause(case: Case) -> None:
    await connect(case)
    case.end.pause()


async def pause_tls(case: Case) -> None:
    await connect_tls(case)
    case.end.pause()


async def make_none(case: Case) -> None:
    return


# -- what is done with them


async def write(case: Case) -> None:
    case.end.write(b"x" * 1000)


async def write_unheard(case: Case) -> None:
    case.peer.deafen()
    case.end.write(b"x" * 1000)
    await _until(case, lambda info: info.unacked, "nothing is in flight")


async def write_eof(case: Case) -> None:
    case.end.write_eof()


async def shut_window(case: Case) -> None:
    case.end.write(MEGABYTES)
    await _until(case, lambda info: info.notsent_bytes and not info.snd_wnd and not info.unacked, "the window is open")


async def shrink_window(case: Case) -> None:
    case.peer.shrink()
    case.end.write(SHRUNK)
    await _until(case, lambda info: info.unacked and not info.snd_wnd, "the window did not shrink")


async def be_sent(case: Case) -> None:
    case.end.paused_with_data = True
    await asyncio.to_thread(case.peer.sock.sendall, bytes(WAITING))


async def be_sent_and_write(case: Case) -> None:
    await be_sent(case)
    await write_unheard(case)


async def send_file_unheard(case: Case) -> None:
    case.peer.deafen()
    case.end.sendfile(case.file)
    await _until(case, lambda info: info.unacked, "nothing is in flight")


async def send_file_stalled(case: Case) -> None:
    case.end.sendfile(case.file)
    await _until(case, lambda info: info.notsent_bytes and not info.snd_wnd and not info.unacked, "the window is open")


async def dial(case: Case) -> None:
    case.end.dial()


async def begin_tls(case: Case) -> None:
    case.end.dial(case.client_tls)
    await asyncio.sleep(0.1)


async def begin_starttls(case: Case) -> None:
    case.end.begin_tls(case.client_tls)
    await asyncio.sleep(0.1)


_ALL: Final = frozenset(KINDS)
_HALVES: Final = frozenset({"own", "connection", "streams", "others"})
_PAUSED: Final = frozenset({"own", "connection", "others"})  # a stream's reader that does not read waits for nothing
_ASYNCIO: Final = frozenset({"asyncio"})

STATES: Final = {
    state.name: state
    for state in (
        State("idle", Waits.NOTHING, connect, kinds=_ALL),
        State("in flight", Waits.IN_FLIGHT, connect, write_unheard, kinds=_ALL),
        State("written at once", Waits.WRITTEN, connect, after=write, kinds=_ALL),
        State("written 0.5 s later", Waits.WRITTEN, connect, after=write, delay=0.5, kinds=_ALL),
        State("written 1.5 s later", Waits.WRITTEN, connect, after=write, delay=1.5, kinds=_ALL),
        State("window shut", Waits.SHUT, connect, shut_window, kinds=_ALL),
        State("window shrunk", Waits.SHRUNK, connect, shrink_window, kinds=_ALL),
        State("paused", Waits.NOTHING, pause, kinds=_PAUSED),
        State("paused, written", Waits.WRITTEN, pause, after=write, kinds=_PAUSED),
        State("paused, unread", Waits.NOTHING, pause, be_sent, kinds=_PAUSED),
        State("paused, unread, in flight", Waits.IN_FLIGHT, pause, be_sent_and_write, kinds=_PAUSED),
        State("our FIN", Waits.NOTHING, finish, kinds=_ALL),
        State("our FIN unacked", Waits.WRITTEN, connect, after=write_eof, kinds=_ALL),
        State("their FIN", Waits.NOTHING, be_finished, kinds=_HALVES),
        State("their FIN, written", Waits.WRITTEN, be_finished, after=write, kinds=_HALVES),
        State("TLS", Waits.NOTHING, connect_tls, kinds=_HALVES),
        State("TLS, in flight", Waits.IN_FLIGHT, connect_tls, write_unheard, kinds=_HALVES),
        State("TLS, written", Waits.WRITTEN, connect_tls, after=write, kinds=_HALVES),
        State("TLS, paused, unread", Waits.NOTHING, pause_tls, be_sent, kinds=_PAUSED),
        State("TLS handshake", Waits.HANDSHAKE, make_none, begin_tls, kinds=_HALVES),
        State("STARTTLS", Waits.NOTHING, upgrade, kinds=_UPGRADED),
        State("STARTTLS, written", Waits.WRITTEN, upgrade, after=write, kinds=_UPGRADED),
        State("STARTTLS handshake", Waits.HANDSHAKE, connect, begin_starttls, kinds=_UPGRADED),
        State("sendfile", Waits.IN_FLIGHT, connect, send_file_unheard, kinds=_TRANSPORTS, loops=_ASYNCIO),
        State("sendfile, window shut", Waits.SHUT, connect, send_file_stalled, kinds=_TRANSPORTS, loops=_ASYNCIO),
        State("connecting", Waits.CONNECTING, make_none, after=dial, kinds=_ALL),
    )
}
