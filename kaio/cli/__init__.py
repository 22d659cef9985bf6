"""The command line, one file a command."""

from __future__ import annotations

import click

__all__ = ["cli"]


@click.group()
def cli() -> None:
    """Keepalive for asyncio."""
