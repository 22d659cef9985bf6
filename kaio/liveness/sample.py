"""The health of any socket: takes a sample and judges it."""

from __future__ import annotations

from typing import Any

from ..kernel.sockets import tcp_info
from .health import Health, judge

__all__ = ["health"]


def health(sock_or_transport: Any) -> Health:
    """Return the health of a socket's peer, from a sample of the kernel's TCP_INFO.

    Accepts what `apply` accepts. Raises `KeepaliveError` when it is not a TCP socket or is closed, and on platforms
    without TCP_INFO.
    """
    return judge(tcp_info(sock_or_transport))
