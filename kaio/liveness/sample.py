"""The health of any socket: takes the sample that the judgement is about."""

from __future__ import annotations

from typing import Any

from ..kernel.sockets import tcp_info
from .health import Health, judge

__all__ = ["health"]


def health(sock_or_transport: Any) -> Health:
    """How the peer is, by a sample of the kernel's TCP_INFO.

    Takes what `apply` takes. Raises `KeepaliveError` when it is not a TCP socket or is closed, and on platforms that
    tell nothing.
    """
    return judge(tcp_info(sock_or_transport))
