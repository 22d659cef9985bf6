"""Throw-away networks: hosts that are network namespaces, joined by veth pairs.

Rules kept here: a namespace has no name, only a descriptor of this process, and its interfaces are made inside it. So
two processes never meet, the host's own network is never touched, and whatever becomes of the test, nothing is left:
the kernel takes a namespace down, with its links, addresses, rules and settings, when the last descriptor and the last
socket of it are gone. A socket stays in the namespace that its maker was in: a thread enters one only while it makes
sockets, and the event loop uses them from where it is.

Needs root, iproute2, and nftables for `Routed.rules`. Addresses are those for documentation (RFC 5737).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Final

__all__ = ["Namespace", "Routed", "join", "lacking", "routed"]

_CLONE_NEWNET: Final = 0x40000000
_libc: Final = ctypes.CDLL(None, use_errno=True)  # os.unshare and os.setns are Python 3.12's


def lacking() -> str | None:
    """Why no networks can be made here, in one line; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [command for command in ("ip", "nft") if shutil.which(command) is None]
    if absent:
        return f"no {' and no '.join(absent)} here: run scripts/install-system-packages"
    try:
        with routed() as network:
            network.masquerade(forget_after=4)
    except (OSError, RuntimeError) as exc:
        return f"this system makes no networks: {exc}"
    return None


class Namespace:
    """A host: a network namespace of its own, with nothing in it but a loopback interface."""

    def __init__(self, name: str) -> None:
        self.name = name  # what interfaces that lead here are called
        with _and_back():
            _call("unshare", _CLONE_NEWNET)
            self._fd = _current()
        try:
            self.ip("link set lo up")
            # A closed socket that still has something to say holds its namespace: let the kernel forget it soon.
            self.sysctl("net.ipv4.tcp_orphan_retries", 1)
            self.sysctl("net.ipv4.tcp_fin_timeout", 1)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """Where other programs find it, as long as it is open."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block, this thread is in the namespace: for sockets that it makes and programs that it runs.

        Other tasks of the thread's event loop are in it, too, while the block awaits something.
        """
        with _and_back():
            _call("setns", self._fd, _CLONE_NEWNET)
            yield

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a program inside, and return what it prints. RuntimeError with what it complains of when it fails."""
        with self.entered():
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} in {self.name}: {done.stderr.strip()}")
        return done.stdout

    def ip(self, *commands: str) -> None:
        """Run commands of ip(8), each given without its leading `ip`."""
        self.run("ip", "-batch", "-", stdin="\n".join(commands) + "\n")

    def sysctl(self, name: str, value: int) -> None:
        """Set one of the namespace's own kernel parameters. /proc/sys/net shows those of the thread that looks."""
        with self.entered(), open(f"/proc/sys/{name.replace('.', '/')}", "w") as file:
            file.write(str(value))

    def close(self) -> None:
        """Close the namespace's descriptor; closing twice does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"<Namespace {self.name} {'closed' if self._fd < 0 else self.path}>"


def join(one: Namespace, other: Namespace, subnet: int, net: str) -> None:
    """Join two hosts by a cable: `net`.1 and `net`.2, on interfaces that are named after the other host.

    Each knows the other's hardware address for good: what is sent into a cable that was cut vanishes without a word,
    where otherwise ARP would find out, and say so. The addresses are the same each time.
    """
    hardware = [f"02:00:00:00:{subnet:02x}:{last:02x}" for last in (1, 2)]
    one.ip(
        f"link add {other.name} address {hardware[0]} type veth"
        f" peer name {one.name} address {hardware[1]} netns {other.path}"
    )
    ends = (one, other)
    for index, last in ((0, 1), (1, 2)):
        here, there = ends[index], ends[1 - index]
        here.ip(
            f"address add {net}.{last}/24 dev {there.name}",
            f"link set {there.name} up",
            f"neighbour replace {net}.{3 - last} lladdr {hardware[1 - index]} nud permanent dev {there.name}",
        )


class Routed:
    """Three hosts: client and server, and a router between them. Made and closed by `routed`."""

    CLIENT: Final = "192.0.2.2"
    OUTSIDE: Final = "198.51.100.1"  # the router's, towards the server
    SERVER: Final = "198.51.100.2"

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:
            self.router = Namespace("router")
            undo.callback(self.router.close)
            self.client = Namespace("client")
            undo.callback(self.client.close)
            self.server = Namespace("server")
            undo.callback(self.server.close)
            self.router.sysctl("net.ipv4.ip_forward", 1)
            join(self.router, self.client, 1, "192.0.2")
            self.client.ip("route add default via 192.0.2.1")
            self._join_server()
            undo.pop_all()

    def _join_server(self) -> None:
        join(self.router, self.server, 2, "198.51.100")
        self.server.ip("route add default via 198.51.100.1")

    def close(self) -> None:
        """Close the three namespaces."""
        for host in (self.client, self.router, self.server):
            host.close()

    # -- what can befall it

    def rules(self, ruleset: str) -> None:
        """Give the router nftables rules, beside those that it has: see nft(8)."""
        self.router.run("nft", "-f", "-", stdin=ruleset)

    def masquerade(self, *, forget_after: int) -> None:
        """Make the router a NAT that forgets connections which are silent for that many seconds, and then is strict.

        A connection that it does not know can only begin with a SYN; anything else is dropped and counted, in either
        direction, as middleboxes do (Linux would take the connection up again: nf_conntrack_tcp_loose).
        """
        self.rules("""
            table ip nat {
                counter lost_from_client { }
                counter lost_from_server { }
                chain strict {
                    type filter hook prerouting priority mangle; policy accept;
                    ct state { invalid, untracked } iifname client counter name lost_from_client drop
                    ct state { invalid, untracked } iifname server counter name lost_from_server drop
                }
                chain outward {
                    type nat hook postrouting priority srcnat; policy accept;
                    oifname server masquerade
                }
            }
        """)
        self.router.sysctl("net.netfilter.nf_conntrack_tcp_timeout_established", forget_after)
        self.router.sysctl("net.netfilter.nf_conntrack_tcp_loose", 0)
        self.router.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", 0)

    def answer_everybody(self) -> None:
        """Let the router send an ICMP error to each packet that asks for one: Linux sends few, to one address."""
        self.router.sysctl("net.ipv4.icmp_ratelimit", 0)
        self.router.sysctl("net.ipv4.icmp_msgs_per_sec", 1_000_000)
        self.router.sysctl("net.ipv4.icmp_msgs_burst", 1_000_000)

    def counted(self, table: str, counter: str) -> int:
        """How many packets one of the router's named counters has seen."""
        words = self.router.run("nft", "list", "counter", "ip", table, counter).split()
        return int(words[words.index("packets") + 1])

    def cut(self) -> None:
        """Cut the cable at the server's end: the router does not notice, and no packet comes back."""
        self.server.ip("link set router down")

    def power_off(self) -> None:
        """Cut the server's power: no peer is told. Reset the sockets that it had, then call `power_on`."""
        self.router.ip("link delete server")

    def power_on(self) -> None:
        """Start the server again: the same addresses, and a kernel that knows no connection."""
        self.server.close()
        self.server = Namespace("server")
        self._join_server()


@contextlib.contextmanager
def routed() -> Iterator[Routed]:
    """A client, a router and a server, for the block."""
    network = Routed()
    try:
        yield network
    finally:
        network.close()


# -- entering and leaving


@contextlib.contextmanager
def _and_back() -> Iterator[None]:
    """After the block, this thread is in the namespace in which it was before."""
    back = _current()
    try:
        yield
    finally:
        try:
            _call("setns", back, _CLONE_NEWNET)
        finally:
            os.close(back)


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _call(function: str, *arguments: int) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
