"""The command line, one file a command."""

from __future__ import annotations

import click

from . import demo

__all__ = ["cli"]


@click.group()
def cli() -> None:
    """Keepalive for asyncio."""


cli.add_command(demo.demo)
