"""Whose code runs: the connection of the handler, in it and in the tasks that it starts, and in their log records."""

from __future__ import annotations

import contextvars
import logging
from typing import TYPE_CHECKING, Final

from ..errors import format_address

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["ConnectionFilter", "current_connection", "handled_connection"]

handled_connection: Final[contextvars.ContextVar[Connection]] = contextvars.ContextVar("kaio.current_connection")


def current_connection() -> Connection | None:
    """Return the connection whose handler runs, also in the tasks that it has started; None outside of handlers."""
    return handled_connection.get(None)


class ConnectionFilter(logging.Filter):
    """A logging filter that adds to each record the connection of the handler that logs, as `record.connection`.

    Add it to a logging handler and use `%(connection)s` in its format: "#7 192.0.2.1:50000", or "-" outside of
    handlers. A record that has a `connection` already, such as kaio's own, gets the text of that.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        connection = getattr(record, "connection", None) or current_connection()
        number, peername = getattr(connection, "id", None), getattr(connection, "peername", None)
        if number is not None:
            record.connection = f"#{number} {format_address(peername)}"
        elif peername is not None:  # a transport
            record.connection = format_address(peername)
        elif not isinstance(connection, str):
            record.connection = "-"
        return True
