"""The programs in native/: compiled at need, run, and their answers read."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
from typing import Any, Final

__all__ = ["hold", "load", "program"]

_HERE: Final = pathlib.Path(__file__).parent
_SOURCES: Final = _HERE / "native"
_CACHE: Final = _HERE / ".cache"
_FLAGS: Final = ("-O2", "-Wall", "-Wextra")


@functools.cache
def program(name: str) -> str:
    """The path of a compiled program; its name says which source it was made from."""
    source = _SOURCES / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes() + (_SOURCES / "common.h").read_bytes()).hexdigest()[:12]
    compiled = _CACHE / f"{name}-{digest}"
    if not compiled.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise SystemExit("benchmarks: no C compiler here: install gcc")
        _CACHE.mkdir(exist_ok=True)
        partial = compiled.with_suffix(f".{os.getpid()}")  # another run may be compiling, too
        subprocess.run([compiler, *_FLAGS, "-o", partial, source], check=True)
        partial.replace(compiled)
    return str(compiled)


def load(*arguments: object) -> dict[str, Any]:
    """Run the load generator, and return what it measured."""
    done = subprocess.run([program("load"), *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"benchmarks: load {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def hold(port: int, connections: int, spread: float = 0.0) -> subprocess.Popen[bytes]:
    """Open connections over so many seconds. It prints a line when all stand; closing its input ends it."""
    command = [program("load"), "hold", str(port), str(connections), str(int(spread * 1000))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
