"""Logging of `kaio serve`: the records of the logger "kaio" on standard error, each with time and process.

Rules kept here: a record's message is one line, whatever is in it; its traceback follows. The root logger is the
application's.
"""

from __future__ import annotations

import logging
import time
from typing import Final

__all__ = ["LEVELS", "LineFormatter", "log_to_stderr"]

LEVELS: Final = ("debug", "info", "warning", "error")


class LineFormatter(logging.Formatter):
    """One line a record: time, process, level, message. What would break the line is escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record. Text in its attribute `trace` follows the line, as its traceback does."""
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        message = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in record.getMessage())
        line = f"{moment}.{int(record.msecs):03d} [{record.process}] {record.levelname.lower()}: {message}"
        traces = [str(getattr(record, "trace", "")), self.formatException(record.exc_info) if record.exc_info else ""]
        return "\n".join([line, *(trace.rstrip() for trace in traces if trace)])


def log_to_stderr(level: str) -> None:
    """Let the logger "kaio" write to standard error from this level on."""
    logger = logging.getLogger("kaio")
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter())
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False  # an application that sets up the root logger would have each record twice
