"""What Python imports at its start under `kaio run`, which puts this folder on PYTHONPATH.

Rules kept here: the program finds its path and its own sitecustomize as if this one were not there, and an interpreter
of another environment, started further down, is left alone.
"""

from __future__ import annotations

import importlib
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _begin() -> None:
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
    told = os.environ.get("KAIO_RUN", "")
    prefix, _, settings = told.partition("\n")
    if prefix == sys.prefix:
        root = os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))
        try:
            from kaio.tools.bootstrap import begin  # noqa: PLC0415 - only under kaio run
        except ImportError:  # it was run from its source, which the program's path does not have
            sys.path.append(root)
            from kaio.tools.bootstrap import begin  # noqa: PLC0415
        begin(settings)


def _next() -> None:
    """The sitecustomize that this one stands before."""
    ours = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as exc:
        if exc.name != "sitecustomize":
            raise
        if ours is not None:
            sys.modules["sitecustomize"] = ours


_begin()
_next()
