"""Write down what a real kernel says of real connections, for test_kernel_model: `python -m tests.record_lives`.

Every life of `LIVES` is a script for one end of a connection over loopback; all are lived at the same time, for about
twenty seconds, and TCP_INFO is read every 50 ms. A sample is kept when its counters have changed. Takes CAP_NET_ADMIN
(`kaio.testing.blackhole`) and /proc/timer_list, which says where the kernel's timer wheel stands. On a busy machine a
timer of seconds may be set a tick later than in the model and fire 256 ms later: record again.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import socket
import time
from typing import Any, Final, NamedTuple

from kaio.kernel.options import platform
from kaio.kernel.tcpinfo import TcpInfo
from kaio.testing import blackhole

from .kernel_model import JIFFY, SECOND

FILE: Final = pathlib.Path(__file__).parent / "data" / "lives.json"
EVERY: Final = 0.05
TCP_RTO_MAX_MS: Final = 44
TCP_USER_TIMEOUT: Final = 18


class Life(NamedTuple):
    """What befalls a connection: (seconds, what, how much), in order of time."""

    script: tuple[tuple[float, str, float], ...]
    keepalive: tuple[int, int, int] = (1, 1, 3)
    user_timeout: float = 0.0
    receive_buffer: int = 0
    """Of the peer; 0: the system's."""
    lasts: float = 10.0


FULL: Final = 300_000  # more than a small receive buffer takes

SHRINK: Final = ((0.3, "send", 6_000), (0.5, "shrink", 0), (0.6, "send", 2_000))

LIVES: Final = {
    "idle, then dead": Life(((0.5, "cut", 0),)),
    "idle, dead, and back before the last probe": Life(((0.5, "cut", 0), (2.7, "heal", 0)), lasts=6.0),
    "idle, alive": Life((), lasts=5.0),
    "idle, dead by user timeout": Life(((0.5, "cut", 0),), (1, 1, 9), user_timeout=3.5),
    "data that is answered": Life(((0.5, "send", 100), (1.2, "send", 5_000), (3.3, "send", 1)), lasts=6.0),
    "dead, then data": Life(((0.5, "cut", 0), (2.6, "send", 100)), lasts=18.0),
    "dead just before data": Life(((0.3, "send", 100), (0.5, "cut", 0), (0.6, "send", 100)), lasts=18.0),
    "dead by user timeout": Life(((0.5, "cut", 0), (0.6, "send", 100)), user_timeout=4.0),
    "back-off capped": Life(((0.5, "cut", 0), (0.6, "send", 100), (2.0, "cap", 1.0)), lasts=12.0),
    "healed outage": Life(((0.5, "cut", 0), (0.6, "send", 100), (3.0, "heal", 0), (6.0, "send", 100)), lasts=8.0),
    "half-closed, then dead": Life(((0.3, "send", 100), (0.5, "cut", 0), (0.7, "finish", 0)), lasts=8.0),
    "half-closed, alive, then dead": Life(((0.3, "finish", 0), (2.5, "cut", 0)), lasts=8.0),
    "peer's data": Life(((0.4, "peer sends", 0), (1.0, "peer sends", 0), (3.5, "peer sends", 0)), lasts=6.0),
    "window shut, alive": Life(((0.3, "send", FULL),), receive_buffer=16_384, lasts=18.0),
    "window shut, alive, then dead": Life(((0.3, "send", FULL), (4.0, "cut", 0)), receive_buffer=16_384, lasts=18.0),
    "window shut, capped, then dead": Life(
        ((0.3, "send", FULL), (2.0, "cap", 1.0), (4.0, "cut", 0)), receive_buffer=16_384, lasts=22.0
    ),
    "window shut, dead by user timeout": Life(
        ((0.3, "send", FULL), (2.0, "cut", 0)), receive_buffer=16_384, user_timeout=5.0
    ),
    "window shut, answering, dead by user timeout": Life(
        ((0.3, "send", FULL),), receive_buffer=16_384, user_timeout=5.0
    ),
    "window shut and open again": Life(((0.3, "send", 14_000), (3.0, "read", 0)), receive_buffer=16_384, lasts=8.0),
    "window shrunk, alive": Life(SHRINK, receive_buffer=65_536, lasts=14.0),
    "window shrunk, then dead": Life((*SHRINK, (3.0, "cut", 0)), receive_buffer=65_536, lasts=14.0),
    "window shrunk, capped, alive": Life((*SHRINK, (1.5, "cap", 1.0)), receive_buffer=65_536, lasts=8.0),
    "window shrunk, capped, then dead": Life(
        (*SHRINK, (1.5, "cap", 1.0), (3.2, "cut", 0)), receive_buffer=65_536, lasts=8.0
    ),
    "window shrunk, dead by user timeout": Life(
        (*SHRINK, (1.5, "cut", 0)), receive_buffer=65_536, user_timeout=4.0, lasts=8.0
    ),
}


class Real:
    """A life that runs on a real connection."""

    def __init__(self, life: Life) -> None:
        self.life = life
        with socket.create_server(("127.0.0.1", 0)) as listener:
            if life.receive_buffer:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, life.receive_buffer // 2)
            self.sock = socket.create_connection(listener.getsockname())
            self.peer, _ = listener.accept()
        self.sock.setblocking(False)
        self.peer.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * FULL)
        idle, interval, count = life.keepalive
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count)
        self.sock.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, round(life.user_timeout * 1000))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.cut = contextlib.ExitStack()
        self.reading = not life.receive_buffer
        self.done = 0
        self.samples: list[list[int]] = []

    def do(self, what: str, how_much: float) -> None:
        """Do one step of the script."""
        if what == "cut":
            self.cut.enter_context(blackhole(self.peer))
        elif what == "heal":
            self.cut.close()
        elif what == "send":
            self.sock.send(bytes(round(how_much)))
        elif what == "finish":
            self.sock.shutdown(socket.SHUT_WR)
        elif what == "peer sends":
            self.peer.send(b"x")
        elif what == "read":
            self.reading = True
        elif what == "shrink":  # no room for what the window has promised
            self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        elif what == "cap":
            self.sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, round(how_much * 1000))
        else:
            raise ValueError(what)

    def step(self, now: float) -> None:
        """Do the steps that are due, and take a sample."""
        script = self.life.script
        while self.done < len(script) and script[self.done][0] <= now:
            self.do(*script[self.done][1:])
            self.done += 1
        if self.reading:
            with contextlib.suppress(BlockingIOError):
                self.peer.recv(1 << 20)
        if now <= self.life.lasts:
            self.note(now, platform.tcp_info(self.sock))

    def note(self, now: float, info: TcpInfo) -> None:
        """Keep a sample that differs from the one before."""
        sample = [round(now * 1000), *counters(info)]
        if not self.samples or self.samples[-1][1:-3] != sample[1:-3] or sample[0] - self.samples[-1][0] > 2000:
            self.samples.append(sample)

    def close(self) -> None:
        """Close both ends."""
        self.cut.close()
        self.sock.close()
        self.peer.close()


def counters(info: TcpInfo) -> list[int]:
    """Return the counters of a sample that are compared; times are in milliseconds."""
    fields = (info.state, info.probes, info.retransmits, info.total_retrans, info.backoff)
    ages = (info.last_data_sent, info.last_ack_recv, info.last_data_recv)
    return [
        *[int(field or 0) for field in fields],
        round((info.rto or 0.0) * 1000),
        int(bool(info.unacked)),
        info.notsent_bytes or 0,
        int(info.snd_wnd == 0),
        *[round((age or 0.0) * 1000) for age in ages],
    ]


def jiffies() -> int:
    """The kernel's count of ticks; raises OSError where it does not tell."""
    with open("/proc/timer_list") as file:
        found = re.search(r"^jiffies: (\d+)", file.read(), re.MULTILINE)
    if found is None:
        raise OSError("/proc/timer_list tells no jiffies")
    return int(found[1])


def record() -> dict[str, Any]:
    """Run all lives and return their samples."""
    lives = {}
    for name, life in LIVES.items():
        began = time.monotonic()
        lives[name] = (Real(life), began, jiffies())
    until = time.monotonic() + max(life.lasts for life in LIVES.values())
    due = time.monotonic()
    while time.monotonic() < until:
        for real, began, _ in lives.values():
            real.step(time.monotonic() - began)
        due += EVERY
        time.sleep(max(0.0, due - time.monotonic()))
    for real, _, _ in lives.values():
        real.close()
    return {name: {"jiffies": boot, "samples": real.samples} for name, (real, _, boot) in lives.items()}


def main() -> None:
    """Record, and write the file."""
    assert JIFFY * 250 == SECOND
    text = json.dumps(record(), separators=(",", ":"))
    FILE.write_text(
        text.replace('"samples":', '"samples":\n ').replace("],[", "],\n  [").replace("]},", "]},\n") + "\n"
    )


if __name__ == "__main__":
    main()
