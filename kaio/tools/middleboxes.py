"""Middleboxes that drop idle connections, with their timeouts, and whether a policy outlasts them.

Rules kept here: each entry names its source, the vendor's documentation; the number is the default timeout. No I/O.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ..policy import Keepalive

__all__ = ["MIDDLEBOXES", "Middlebox", "outlasts", "second_probe"]

LATE: Final = 9 / 8
"""The kernel's timers may fire up to an eighth of their time late (kernel/time/timer.c)."""


class Middlebox(NamedTuple):
    """A kind of middlebox, and how long a connection through it may be idle."""

    name: str
    forgets_after: int
    """Seconds."""
    source: str
    """The vendor's documentation of it."""
    note: str = ""
    heeds_probes: bool = True
    """Whether a probe counts as traffic. False for proxies, which terminate TCP and count data only."""


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
"""Sorted by timeout."""


def second_probe(policy: Keepalive) -> float | None:
    """Return the longest idle time in seconds before the second probe is sent; None if there is only one probe.

    Usually that is idle + interval. But two probes are at least an interval apart, even if the first was answered: with
    an interval longer than the idle time, it may take twice the interval. Raises `PolicyError` for a policy that leaves
    times to the system.
    """
    probes = policy.timeline()[:-1]
    if len(probes) < 2:
        return None
    interval = probes[1].at - probes[0].at
    return (max(probes[0].at, interval) + interval) * LATE


def outlasts(policy: Keepalive, forgets_after: float) -> bool:
    """Whether a connection survives a middlebox with this timeout, if it counts probes as traffic.

    It does if one probe may be lost and the next is still in time, as with the policies of `Keepalive.hold`.
    Raises `PolicyError` for a policy that leaves times to the system.
    """
    latest = second_probe(policy)
    return latest is not None and latest < forgets_after
