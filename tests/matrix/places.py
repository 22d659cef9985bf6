"""Where the path breaks: one act each, in a network of a client, a router and a server. The client is ours."""

from __future__ import annotations

import dataclasses
import enum
import socket
from collections.abc import Callable
from typing import Final

from ..namespaces import Routed

__all__ = ["PLACES", "Answer", "Place"]


class Answer(enum.Enum):
    """What this host's kernel is told about the break."""

    SILENT = "nothing at all"
    ICMP = "the router says so"
    LOCAL = "its own attempts to send fail, with an error number"
    QUEUE = "its own attempts to send fail, which it takes for congestion and not for a question that was asked"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A place where the path can break."""

    name: str
    answer: Answer
    act: Callable[[Routed], None]


def _router(*rules: str) -> Callable[[Routed], None]:
    lines = "\n".join(rules)

    def act(network: Routed) -> None:
        network.rules(f"""
            table ip broken {{
                chain forward {{
                    type filter hook forward priority filter; policy accept;
                    {lines}
                }}
            }}
        """)

    return act


def _answers(icmp: str) -> Callable[[Routed], None]:
    """The router answers what goes to the server, and of the server nothing is heard."""
    return _router(f"iifname client reject with icmp type {icmp}", "iifname server drop")


def _ours(*commands: str) -> Callable[[Routed], None]:
    return lambda network: network.client.ip(*commands)


def _filter(network: Routed) -> None:
    network.client.run(
        "nft",
        "-f",
        "-",
        stdin=f"""
            table ip broken {{
                chain output {{
                    type filter hook output priority filter; policy accept;
                    ip daddr {Routed.SERVER} drop
                }}
            }}
        """,
    )


def _queue(*discipline: str) -> Callable[[Routed], None]:
    """A queueing discipline on our interface; the first that it lets pass is not ours."""

    def act(network: Routed) -> None:
        with network.client.entered(), socket.socket(type=socket.SOCK_DGRAM) as sock:
            network.client.run("tc", "qdisc", "add", "dev", "router", "root", *discipline)
            for _ in range(3):
                sock.sendto(bytes(1400), (Routed.SERVER, 9))

    return act


PLACES: Final = {
    place.name: place
    for place in (
        Place("the peer's power", Answer.SILENT, lambda network: network.cut()),
        Place("router, silent", Answer.SILENT, _router("drop")),
        Place("router, only us to peer", Answer.SILENT, _router("iifname client drop")),
        Place("router, only peer to us", Answer.SILENT, _router("iifname server drop")),
        Place("router, host unreachable", Answer.ICMP, _answers("host-unreachable")),
        Place("router, net unreachable", Answer.ICMP, _answers("net-unreachable")),
        Place("router, prohibited", Answer.ICMP, _answers("admin-prohibited")),
        Place("our link", Answer.LOCAL, _ours("link set router down")),
        Place("our route", Answer.LOCAL, _ours("route delete default")),
        Place("our address", Answer.LOCAL, _ours(f"address delete {Routed.CLIENT}/24 dev router")),
        Place("our filter", Answer.LOCAL, _filter),
        Place("our blackhole route", Answer.LOCAL, _ours(f"route add blackhole {Routed.SERVER}/32")),
        Place("our prohibit route", Answer.LOCAL, _ours(f"route add prohibit {Routed.SERVER}/32")),
        Place("our queue, full", Answer.QUEUE, _queue("pfifo", "limit", "0")),
        # A byte a second: what is retransmitted is still in the queue, and to TCP all is well with that.
        Place("our queue, stuck", Answer.SILENT, _queue("tbf", "rate", "8bit", "burst", "1600", "limit", "1000000")),
    )
}
