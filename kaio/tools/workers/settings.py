"""`Settings`: what `kaio serve` was told, as plain data.

Rules kept here: no I/O. What a worker needs goes to it as JSON, and comes out there as the same settings.
"""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to serve. Times are in seconds."""

    app: str
    """`module:name`."""
    factory: bool = False
    """Whether the name is called to make the application."""
    app_dir: str = "."
    """The folder that is first on `sys.path` in workers."""
    binds: tuple[str, ...] = ("127.0.0.1:9000",)
    """The addresses, as `kaio.Listener` takes them."""
    workers: int = 1
    loop: str = "asyncio"
    """The base loop: "uvloop" or "asyncio"."""
    keepalive: str | None = None
    """The policy; None: the protocol class's, else the environment's."""
    backlog: int = 4096
    cert: str | None = None
    """File of the certificate chain; None: no TLS."""
    key: str | None = None
    """File of the private key; None: it is in the certificate's."""
    client_ca: str | None = None
    """File of the authorities that clients need a certificate of; None: they need none."""
    delay: float = 0.0
    grace: float = 30.0
    spread: float = 0.0
    """As of `Server.serve_until`."""
    start_timeout: float = 30.0
    """How long a worker may take until it serves."""
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of `kaio.Listener` that were given."""
    proxies: tuple[str, ...] = ()
    """Networks whose PROXY protocol header is believed; empty: no such header is expected."""
    log_level: str = "info"

    @classmethod
    def from_message(cls, told: dict[str, Any]) -> Settings:
        """Return the settings of which JSON has made a dictionary, and lists of tuples."""
        values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in told.items()}
        return cls(**values)
