"""The Python of the commands that start another one: its options, and whether it has uvloop."""

from __future__ import annotations

import sys

import click

__all__ = ["interpreter_flags", "require_uvloop"]


def interpreter_flags() -> list[str]:
    """The interpreter options of this process: the arguments before `-m kaio`, or before the script."""
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    return before[:-2] if before[-2:-1] == ["-m"] else before[:-1]


def require_uvloop() -> None:
    """Raise a usage error where there is no uvloop."""
    try:
        import uvloop  # noqa: F401, PLC0415 - not installed everywhere
    except ImportError:
        raise click.UsageError("uvloop is not installed; use --loop asyncio") from None
