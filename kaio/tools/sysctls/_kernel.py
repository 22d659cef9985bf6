"""The kernel's values: reading them, the times that follow from them, and setting all or none.

Rules kept here: a written value is read back; if one fails, the others get their previous values back.

/proc/sys/net shows the values of the calling thread's network namespace. It is the only interface to them: Linux 5.5
removed the system call sysctl(2), and the program sysctl(8) uses /proc/sys too.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Final

from ._boot import persisting
from ._settings import PROC, SETTINGS, Setting, SysctlError, check, require_linux

__all__ = ["Defaults", "change", "read"]

_RTO_MIN: Final = 0.2  # seconds; TCP_RTO_MIN in include/net/tcp.h
_RTO_INIT: Final = 1.0  # TCP_TIMEOUT_INIT, RFC 6298 section 2.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """The kernel's values. Without arguments, those of an unconfigured Linux."""

    idle: int = 7200
    """Seconds of silence before the first probe: tcp_keepalive_time."""
    interval: int = 75
    """Seconds between probes: tcp_keepalive_intvl."""
    count: int = 9
    """Unanswered probes after which the peer is dead: tcp_keepalive_probes."""
    retries2: int = 15
    """Retransmissions of unacknowledged data: tcp_retries2."""
    syn_retries: int = 6
    """Retransmissions of a SYN with exponential backoff: tcp_syn_retries."""
    syn_linear_timeouts: int = 4
    """Retransmissions of a SYN at one-second intervals before those: tcp_syn_linear_timeouts, since Linux 6.5."""
    rto_max: float = 120.0
    """Longest time between retransmissions, in seconds: tcp_rto_max_ms, since Linux 6.15; fixed before."""

    @property
    def detection_time(self) -> int:
        """Seconds until a dead idle peer is detected, on sockets with keepalive on."""
        return self.idle + self.interval * self.count

    @property
    def retry_waits(self) -> list[float]:
        """Seconds before each retransmission and after the last one, for a round-trip time below 200 ms."""
        return _doubling(_RTO_MIN, self.retries2, self.rto_max)

    @property
    def unacknowledged_time(self) -> float:
        """Seconds that sent data may stay unacknowledged; a lower bound, checked when a retransmission is due.

        Calculated as by the kernel, tcp_model_timeout() in net/ipv4/tcp_timer.c.
        """
        return sum(self.retry_waits)

    @property
    def syn_waits(self) -> list[float]:
        """Seconds before each retransmission of the SYN and after the last one.

        The kernel gives up at the first timeout at or after the sum of the exponential waits (tcp_write_timeout()).
        """
        growing = _doubling(_RTO_INIT, self.syn_retries, self.rto_max)
        waits: list[float] = []
        for wait in itertools.chain(itertools.repeat(_RTO_INIT, self.syn_linear_timeouts), growing):
            waits.append(wait)
            if sum(waits) >= sum(growing):
                break
        return waits

    @property
    def connecting_time(self) -> float:
        """Seconds until an unanswered connection attempt fails."""
        return sum(self.syn_waits)


def _doubling(first: float, retries: int, most: float) -> list[float]:
    return [min(first * 2**n, most) for n in range(retries + 1)]


def read(proc: str = PROC) -> Defaults:
    """Read the values of the calling thread's network namespace. Raises `SysctlError`."""
    require_linux()
    values = {field: _read(setting, proc) for field, setting in SETTINGS.items()}
    linear = _read_number(f"{proc}/net/ipv4/tcp_syn_linear_timeouts", otherwise=0)
    longest = _read_number(f"{proc}/net/ipv4/tcp_rto_max_ms", otherwise=120_000)
    return Defaults(**values, syn_linear_timeouts=linear, rto_max=longest / 1000)


def change(values: Mapping[str, object], *, proc: str = PROC, root: str | None = None) -> Defaults:
    """Set values, all or none, and return the kernel's values afterwards.

    With `root`, the root directory, they are persisted as well; if that fails, nothing is changed. Existing connections
    without times of their own use the new interval and count from their next probe on. A longer idle time delays a
    pending first probe; a shorter one does not bring it forward.

    Raises `PolicyError` before anything was changed. Raises `SysctlError` when the kernel rejects a value or reads back
    another: then all have their previous values, or the message names those that do not.
    """
    wanted = check(values)
    require_linux()
    if root is None:
        return _change(wanted, proc, None)
    with persisting(root) as persist:
        return _change(wanted, proc, persist)


def _change(wanted: Mapping[str, int], proc: str, persist: Callable[[Mapping[str, int]], str] | None) -> Defaults:
    before = {field: _read(SETTINGS[field], proc) for field in wanted}
    written: list[str] = []
    try:
        for field, value in wanted.items():
            _write(SETTINGS[field], value, proc)
            written.append(field)
            _compare(SETTINGS[field], value, proc)
        if persist is not None:
            persist(wanted)
    except BaseException as exc:
        lost = [field for field in reversed(written) if not _restore(SETTINGS[field], before[field], proc)]
        if lost and isinstance(exc, SysctlError):
            message = f"{exc.strerror}; {', '.join(lost)} could not be restored"
            raise SysctlError(exc.errno, message, exc.filename) from exc
        raise
    return read(proc)


def _read(setting: Setting, proc: str) -> int:
    return _read_number(f"{proc}/{setting.path}")


def _read_number(path: str, otherwise: int | None = None) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except FileNotFoundError as exc:
        if otherwise is not None:
            return otherwise
        raise SysctlError(exc.errno, "the kernel does not provide it, or procfs is not mounted", path) from exc
    except OSError as exc:
        raise SysctlError(exc.errno, str(exc.strerror), path) from exc
    except ValueError as exc:
        raise SysctlError(errno.EINVAL, "is not a number", path) from exc


def _write(setting: Setting, value: int, proc: str) -> None:
    path = f"{proc}/{setting.path}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d\n" % value)
        finally:
            os.close(fd)
    except OSError as exc:
        raise SysctlError(exc.errno, f"{setting.field}={value}: {exc.strerror}", path) from exc


def _compare(setting: Setting, value: int, proc: str) -> None:
    got = _read(setting, proc)
    if got != value:
        message = f"{setting.field}={value}: the kernel reads back {got}"
        raise SysctlError(errno.EINVAL, message, f"{proc}/{setting.path}")


def _restore(setting: Setting, value: int, proc: str) -> bool:
    try:
        _write(setting, value, proc)
        _compare(setting, value, proc)
    except SysctlError:
        return False
    return True
