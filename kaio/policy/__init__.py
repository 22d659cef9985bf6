"""Keepalive policies as plain data: no I/O, no platform.

units       times and counts as text: `20s`, `1m30s`, `4`
fields      `AUTO` and the kernel's limits
state       `SocketState`: the options that a socket has
text        the text of a policy: `20s:10s:4`, `detect=30s`
libraries   a policy as the options that other libraries accept
keepalive   `Keepalive`, its checks and its arithmetic; `as_policy`, for arguments named `keepalive=`

Each module imports only from those above it. Import the public names from here; `kaio.kernel`, which needs nothing but
`SocketState`, imports that from `state`.
"""

from __future__ import annotations

from .fields import AUTO, MAX_COUNT, MAX_SECONDS, MAX_USER_TIMEOUT_MS, Auto, Stalled
from .keepalive import Keepalive, KeepaliveArg, Step, as_policy
from .state import SocketState
from .text import parse_time
from .units import check_timeout

__all__ = [
    "AUTO",
    "MAX_COUNT",
    "MAX_SECONDS",
    "MAX_USER_TIMEOUT_MS",
    "Auto",
    "Keepalive",
    "KeepaliveArg",
    "SocketState",
    "Stalled",
    "Step",
    "as_policy",
    "check_timeout",
    "parse_time",
]
