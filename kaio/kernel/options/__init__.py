"""Policies and socket options: the only place that knows the platform.

One file a platform, each with the functions that `Platform` lists. What a platform lacks is in its `missing`, or an
error: never a silent success.
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
"""The file of the platform that this is."""
