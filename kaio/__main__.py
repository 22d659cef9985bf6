"""`python -m kaio` and the console script `kaio`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or print how to install it if its libraries are missing."""
    try:
        from . import cli  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        sys.exit(f"kaio: the command line needs {exc.name}: pip install 'kaio-net[cli]'")
    cli.main()


if __name__ == "__main__":
    main()
