"""The privilege to cut peers off, which a process has in a network namespace of its own.

Rules kept here: an unprivileged demo is executed again by unshare(1) if that gives it the privilege; nothing outside
the new namespace is changed.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from typing import Final

from ..testing import lacking

__all__ = ["gain_privilege"]

_INSIDE: Final = "KAIO_DEMO_INSIDE"  # set in the process that runs in its own network namespace
# Root without CAP_SETFCAP cannot map itself to root in a new namespace (user_namespaces(7)), but can keep capabilities.
_WAYS: Final = (("unshare", "-Urn"), ("unshare", "-Un", "--keep-caps"))
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1


def _enter_own_network() -> str:
    """Run the demo again inside a network namespace of its own; return only if that fails, with the reason."""
    if not shutil.which("unshare"):
        return "`unshare` is not installed"
    reason = ""
    for way in _WAYS:
        trial = [*way, sys.executable, "-c", ""]
        tried = subprocess.run(trial, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
        if tried.returncode == 0:
            os.environ[_INSIDE] = "1"
            os.execvp(way[0], [*way, sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - itself
        reason = reason or " ".join(tried.stderr.split())
    return f"`{' '.join(_WAYS[0])}` fails: {reason}"


def _loopback_up() -> None:
    """Bring the loopback interface up, which is down in a new network namespace (netdevice(7))."""
    import fcntl  # noqa: PLC0415 - not on Windows

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        (flags,) = struct.unpack_from("h", request, 16)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def gain_privilege() -> str | None:
    """Make sure that peers can be cut off; return the reason if they cannot."""
    inside = bool(os.environ.get(_INSIDE))
    if inside:
        try:
            _loopback_up()
        except OSError as exc:
            return f"the loopback interface cannot be brought up: {exc.strerror}"
    reason = lacking()
    if reason is None or inside or not sys.platform.startswith("linux"):
        return reason
    return f"{reason}; {_enter_own_network()}"
