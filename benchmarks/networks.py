"""A network for the measurement alone: a namespace with nothing but a loopback interface."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Final

from tests.namespaces import Namespace

__all__ = ["congestion_control", "own_network"]

# BBR, which many machines have as their default, paces what is sent to the rate that it believes in. That would be
# measured, not the server. Reno is what every namespace may have; it differs from CUBIC once packets are lost.
_WANTED: Final = "reno"
_SETTING: Final = pathlib.Path("/proc/sys/net/ipv4/tcp_congestion_control")


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Sockets and processes that are made in the block are in it, and stay there. Nothing changes without root."""
    with contextlib.ExitStack() as stack:
        try:
            network = Namespace("benchmark")
            stack.callback(network.close)
            stack.enter_context(network.entered())
            _SETTING.write_text(_WANTED)
        except (OSError, RuntimeError) as exc:
            print(f"in the machine's own network, with {congestion_control()}: {exc}", file=sys.stderr)
        yield


def congestion_control() -> str:
    """Return the congestion control algorithm of this machine."""
    return _SETTING.read_text().strip()
