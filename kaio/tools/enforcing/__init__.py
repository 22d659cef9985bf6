"""A policy for every TCP socket of a cgroup, set by the kernel as the socket comes into being.

    _program      the two programs, assembled for a policy, and their counters
    _targets      the machine, a systemd unit, a cgroup
    _enforcement  `enforce`, `lift`, `enforcements`: loading, attaching, pinning
    _cgroup       `EnforcedCgroup`: a new cgroup for a program that is started
    _boot         the files with which systemd does it again at each boot

Rules kept here: nothing runs between the moment a policy is set and the moment it is lifted but the kernel's program.

Linux with type information (CONFIG_DEBUG_INFO_BTF) and cgroups of version 2; CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON.
"""

from __future__ import annotations

from ._boot import boot_files, kept_at_boot, missing_unit, reload_systemd, remove_files, runtime_files, write_files
from ._cgroup import EnforcedCgroup
from ._enforcement import (
    BPFFS,
    EnforceError,
    Enforcement,
    enforce,
    enforce_for_good,
    enforced_on,
    enforcements,
    lift,
    linked,
    plan,
)
from ._program import Counters, Ports, parse_ports
from ._targets import Kind, Target

__all__ = [
    "BPFFS",
    "Counters",
    "EnforceError",
    "EnforcedCgroup",
    "Enforcement",
    "Kind",
    "Ports",
    "Target",
    "boot_files",
    "enforce",
    "enforce_for_good",
    "enforced_on",
    "enforcements",
    "kept_at_boot",
    "lift",
    "linked",
    "missing_unit",
    "parse_ports",
    "plan",
    "reload_systemd",
    "remove_files",
    "runtime_files",
    "write_files",
]
