"""What mypy takes for the bases of kaio's protocols, in place of asyncio's; other type checkers see asyncio's.

asyncio types the argument of connection_made as BaseTransport, and mypy compares an override with every class above it:
`connection_made(self, transport: KeepaliveTransport)` would be an error in each of a user's protocols. A base of type
Any makes them assignable to asyncio's protocols without inheriting from them; `__getattr__` makes what is not there an
object, which can be neither called nor asked for more, where it would be Any.
"""

from __future__ import annotations

from typing import Any

__all__ = ["BufferedProtocol", "Protocol"]


class Protocol(Any):  # type: ignore[misc] # see above
    """asyncio.Protocol, as far as a subclass is concerned."""

    def __getattr__(self, name: str) -> object: ...

    def connection_lost(self, exc: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def eof_received(self) -> bool | None: ...


class BufferedProtocol(Any):  # type: ignore[misc] # see above
    """asyncio.BufferedProtocol, as far as a subclass is concerned."""

    def __getattr__(self, name: str) -> object: ...

    def connection_lost(self, exc: Exception | None) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        raise NotImplementedError

    def buffer_updated(self, nbytes: int) -> None: ...

    def eof_received(self) -> bool | None: ...
