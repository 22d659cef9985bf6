"""What is known of the boxes on the road that forget silent connections, and which of them a policy outlasts.

Rules kept here: each entry names its source, and what its maker says there; a number is the box's default. No I/O.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ..policy import Keepalive

__all__ = ["MIDDLEBOXES", "Middlebox", "outlasts", "second_probe"]

LATE: Final = 9 / 8
"""How much longer than asked the kernel's timers may take: an eighth of their time (kernel/time/timer.c)."""


class Middlebox(NamedTuple):
    """A kind of box, and how long a connection through it may be silent."""

    name: str
    forgets_after: int
    """Seconds."""
    source: str
    """Where its maker says so."""
    note: str = ""
    heeds_probes: bool = True
    """Whether a probe counts as traffic. Not where the box ends the TCP connection and wants data."""


_AWS: Final = "https://docs.aws.amazon.com"

MIDDLEBOXES: Final = (
    Middlebox(
        "AWS Application Load Balancer",
        60,
        f"{_AWS}/elasticloadbalancing/latest/application/edit-load-balancer-attributes.html",
        "1 to 4000 s; ends the TCP connection",
        heeds_probes=False,
    ),
    Middlebox(
        "AWS Classic Load Balancer",
        60,
        f"{_AWS}/elasticloadbalancing/latest/classic/config-idle-timeout.html",
        "says that probes do not count",
        heeds_probes=False,
    ),
    Middlebox(
        "Azure Load Balancer",
        240,
        "https://learn.microsoft.com/azure/load-balancer/load-balancer-tcp-reset",
        "4 to 100 min; silent unless TCP reset is enabled",
    ),
    Middlebox(
        "Azure NAT gateway",
        240,
        "https://learn.microsoft.com/azure/nat-gateway/nat-gateway-resource",
        "4 to 120 min",
    ),
    Middlebox(
        "AWS Network Load Balancer",
        350,
        f"{_AWS}/elasticloadbalancing/latest/network/update-idle-timeout.html",
        "60 to 6000 s; TLS listeners always 350 s",
    ),
    Middlebox(
        "AWS Gateway Load Balancer",
        350,
        f"{_AWS}/elasticloadbalancing/latest/gateway/update-idle-timeout.html",
        "60 to 6000 s",
    ),
    Middlebox(
        "AWS Network Firewall",
        350,
        f"{_AWS}/network-firewall/latest/APIReference/API_FlowTimeouts.html",
        "60 to 6000 s",
    ),
    Middlebox(
        "EC2 security group, Nitro v6",
        350,
        f"{_AWS}/AWSEC2/latest/APIReference/API_ConnectionTrackingSpecificationRequest.html",
        "60 to 432000 s",
    ),
    Middlebox(
        "Cloudflare, client side",
        400,
        "https://developers.cloudflare.com/fundamentals/reference/connection-limits/",
        "of HTTP connections, which it ends",
        heeds_probes=False,
    ),
    Middlebox(
        "Google VPC connection tracking",
        600,
        "https://cloud.google.com/compute/docs/troubleshooting",
        "advises 60s:60s:5",
    ),
    Middlebox(
        "Linux IPVS",
        900,
        "https://git.kernel.org/pub/scm/linux/kernel/git/torvalds/linux.git/tree/net/netfilter/ipvs/ip_vs_proto_tcp.c",
        "ipvsadm --set",
    ),
    Middlebox(
        "NAT that keeps to RFC 5382",
        7440,
        "https://www.rfc-editor.org/rfc/rfc5382#section-5",
        "REQ-5: not sooner than 2 h 4 min",
    ),
    Middlebox(
        "EC2 security group",
        432_000,
        f"{_AWS}/AWSEC2/latest/APIReference/API_ConnectionTrackingSpecificationRequest.html",
        "60 to 432000 s",
    ),
    Middlebox(
        "Linux conntrack",
        432_000,
        "https://docs.kernel.org/networking/nf_conntrack-sysctl.html",
        "nf_conntrack_tcp_timeout_established",
    ),
)
"""By the time after which they forget."""


def second_probe(policy: Keepalive) -> float | None:
    """After how many seconds of silence, at the latest, the second probe goes out; None when there is no second one.

    Usually that is idle + interval. But from one probe to the next it takes at least the interval, also after an
    answer: where that is the longer time, twice the interval may pass. Raises `PolicyError` for a policy that leaves
    times to the system.
    """
    probes = policy.timeline()[:-1]
    if len(probes) < 2:
        return None
    interval = probes[1].at - probes[0].at
    return (max(probes[0].at, interval) + interval) * LATE


def outlasts(policy: Keepalive, forgets_after: float) -> bool:
    """Whether a connection survives a box that forgets what was silent for so many seconds, and heeds probes.

    It does when one probe may be lost on its way and the next still comes in time, as `Keepalive.hold` makes it.
    Raises `PolicyError` for a policy that leaves times to the system.
    """
    latest = second_probe(policy)
    return latest is not None and latest < forgets_after
