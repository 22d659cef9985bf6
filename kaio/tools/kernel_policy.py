"""A policy where the kernel alone enforces it, because no monitor runs in the process."""

from __future__ import annotations

import dataclasses

from ..policy import Keepalive
from .sysctls import Defaults

__all__ = ["in_kernel"]


def in_kernel(policy: Keepalive, system: Defaults | None = None) -> Keepalive:
    """Return the policy as the kernel alone enforces it: with all times, and with TCP_USER_TIMEOUT.

    Raises `PolicyError` if that is not possible.
    """
    if not policy.enabled:
        return policy
    system = system or Defaults()
    policy = policy.filled(idle=system.idle, interval=system.interval, count=system.count)
    return dataclasses.replace(policy, stalled="drop")
