"""The error of the calls of bpf(2)."""

from __future__ import annotations

from ...errors import KaioError

__all__ = ["BpfError"]


class BpfError(KaioError, OSError):
    """A call of bpf(2) that the kernel refused.

    `errno` is the reason; `log` is the verifier's, when it refused a program.
    """

    log: str

    def __init__(self, number: int | None, message: str, log: str = "") -> None:
        super().__init__(number, message)
        self.log = log

    def __reduce__(self) -> tuple[type[BpfError], tuple[int | None, str, str]]:
        return BpfError, (self.errno, str(self.strerror), self.log)

    def __str__(self) -> str:
        return str(self.strerror)
