"""Kernel programs: an assembler for BPF instructions, and the calls of bpf(2) that kaio needs.

    _assembler   instructions with labels and comments, as bytes and as text
    _calls       bpf(2): loading, maps, links, pins
    _error       `BpfError`
    _types       where the fields of the kernel's structures are

Rules kept here: neither a compiler nor kernel headers are needed; numbers are those of include/uapi/linux/bpf.h, which
the kernel never changes. Linux only.
"""

from __future__ import annotations

from ._assembler import Assembler, Register
from ._calls import SETSOCKOPT, SOCK_OPS, Bpf, Hook, attached, detach, is_bpffs, mount
from ._error import BpfError
from ._types import field_offsets

__all__ = [
    "SETSOCKOPT",
    "SOCK_OPS",
    "Assembler",
    "Bpf",
    "BpfError",
    "Hook",
    "Register",
    "attached",
    "detach",
    "field_offsets",
    "is_bpffs",
    "mount",
]
