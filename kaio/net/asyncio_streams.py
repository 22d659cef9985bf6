"""asyncio's stream reader and writer over a connection of kaio's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .protocols import KeepaliveProtocol

if TYPE_CHECKING:
    from .transports import WatchedTransport

__all__ = ["StreamsProtocol"]


class StreamsProtocol(asyncio.StreamReaderProtocol, KeepaliveProtocol):
    """The protocol of asyncio's streams. They get the loop's own transport, so that `StreamWriter.start_tls` works."""

    loop_transport: asyncio.Transport

    def connection_made(self, transport: WatchedTransport) -> None:  # type: ignore[override,unused-ignore]
        self.loop_transport = transport.loop_transport
        # The reader pauses the inner transport directly, and start_tls puts a TLS layer over it.
        transport.start_close_checks()
        super().connection_made(self.loop_transport)  # type: ignore[arg-type,unused-ignore]
