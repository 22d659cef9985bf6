"""The keepalive options of a socket: the only package that depends on the platform.

Each platform has a file with the functions that `Platform` lists. An option that the platform does not have is returned
by `missing`, or raises an error; it is never silently ignored.
"""

from __future__ import annotations

import sys

from .base import Platform, SocketLike

if sys.platform == "linux":
    from . import linux as here
elif sys.platform == "darwin":
    from . import darwin as here
elif sys.platform == "win32":
    from . import windows as here
else:
    from . import bsd as here

__all__ = ["Platform", "SocketLike", "platform"]

platform: Platform = here
"""The module of the platform that kaio runs on."""
