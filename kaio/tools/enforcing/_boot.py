"""The files with which systemd gives a target its policy again: at each start of a unit, and at each boot.

For a unit, a drop-in with BPFProgram= lets systemd attach the pinned program whenever it makes the unit's cgroup
(systemd.resource-control(5)); at boot, a service pins the programs before the unit starts. For the machine, and for
units that never start because they always run, that service is all there is.

Rules kept here: files are written whole or not at all, and removing takes away exactly what writing makes. Nothing
here needs a running systemd.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from ._enforcement import BPFFS, EnforceError, pinned_programs
from ._targets import Kind, Target

__all__ = [
    "boot_files",
    "kept_at_boot",
    "missing_unit",
    "reload_systemd",
    "remove_files",
    "runtime_files",
    "write_files",
]

_ETC: Final = "etc/systemd/system"
_RUN: Final = "run/systemd/system"
_DROP_IN: Final = "60-kaio.conf"
_PERMANENT: Final = frozenset({"system.slice", "init.scope"})
"""Units that begin with systemd itself, before any service that could be ordered before them."""
_SECTIONS: Final = {"service": "Service", "scope": "Scope", "slice": "Slice", "socket": "Socket"}


def runtime_files(target: Target, *, bpffs: str = BPFFS, root: str = "/") -> dict[str, str]:
    """The files that make a policy outlive a restart of its unit, by path relative to the root directory.

    None where no systemd runs, and where those for the next boot do the same.
    """
    runs = os.path.isdir(os.path.join(root, _RUN))
    if target.kind is not Kind.UNIT or not runs or kept_at_boot(target, root):
        return {}
    return {_drop_in(_RUN, target): _drop_in_text(target, bpffs)}


def boot_files(target: Target, arguments: Sequence[str], *, bpffs: str = BPFFS) -> dict[str, str]:
    """The files that make a policy outlive a reboot, by path; a value that begins with `->` is a symbolic link.

    `arguments` are those of the `kaio enforce` that is to run at boot.
    """
    service = _service(target)
    files = {f"{_ETC}/{service}": _service_text(target, arguments)}
    if _starts(target):
        files[_drop_in(_ETC, target)] = _drop_in_text(target, bpffs, service)
    else:
        files[f"{_ETC}/sysinit.target.wants/{service}"] = f"->../{service}"
    return files


def kept_at_boot(target: Target, root: str = "/") -> str | None:
    """The service that gives a target its policy at boot, if there is one."""
    path = os.path.join(root, _ETC, _service(target))
    return path if os.path.exists(path) else None


def missing_unit(target: Target) -> str | None:
    """Why a unit that does not run will never have a policy: no systemd runs, or it does not know the unit."""
    if target.kind is not Kind.UNIT:
        return None
    if not os.path.isdir(f"/{_RUN}") or shutil.which("systemctl") is None:
        return "it does not run, and no systemd runs here that could start it"
    show = ["systemctl", "show", "--property=LoadState", "--value", "--", target.name]
    done = subprocess.run(show, capture_output=True, text=True, check=False)  # noqa: S603 - a name that was checked
    return "systemd does not know it" if done.stdout.strip() == "not-found" else None


def write_files(files: Mapping[str, str], root: str = "/") -> None:
    """Write files, each whole or not at all. Raises `EnforceError`."""
    for path, content in files.items():
        full = os.path.join(root, path)
        temporary = f"{full}.new"
        try:
            os.makedirs(os.path.dirname(full), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            _write(temporary, content)
            os.replace(temporary, full)
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise EnforceError(exc.errno, f"/{path}: {exc.strerror}") from None


def _write(path: str, content: str) -> None:
    """Make a file or a symbolic link."""
    if content.startswith("->"):
        os.symlink(content[2:], path)
        return
    with open(path, "x", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())


def remove_files(target: Target, root: str = "/") -> list[str]:
    """Remove the files of a target, and the directories of drop-ins that are empty then; return what was removed."""
    service = _service(target)
    paths = [f"{_ETC}/{service}", f"{_ETC}/sysinit.target.wants/{service}"]
    if target.kind is Kind.UNIT:
        paths += [_drop_in(_RUN, target), _drop_in(_ETC, target)]
    removed = []
    for path in (os.path.join(root, each) for each in paths):
        if not os.path.lexists(path):  # unlink(2) of what does not exist fails otherwise on a read-only file system
            continue
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise EnforceError(exc.errno, f"{exc.filename}: {exc.strerror}") from None
        removed.append(path)
        if path.endswith(_DROP_IN):
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(path))
    return removed


def reload_systemd() -> str | None:
    """Let a running systemd read its files again; return what it complains about."""
    if not os.path.isdir("/run/systemd/system") or shutil.which("systemctl") is None:
        return None
    done = subprocess.run(["systemctl", "daemon-reload"], capture_output=True, text=True, check=False)  # noqa: S607
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"exit code {done.returncode}"


# -- texts


def _starts(target: Target) -> bool:
    """Whether it is started after a service that is ordered before it."""
    return target.kind is Kind.UNIT and target.name not in _PERMANENT


def _service(target: Target) -> str:
    return f"kaio-enforce-{target.key}.service"


def _drop_in(where: str, target: Target) -> str:
    return f"{where}/{target.name}.d/{_DROP_IN}"


def _head(target: Target) -> str:
    option = "--machine" if target.kind is Kind.MACHINE else f"--unit {target.name}"
    return f"# Written by `kaio enforce`; `kaio enforce {option} off` removes it.\n"


def _drop_in_text(target: Target, bpffs: str, service: str | None = None) -> str:
    section = _SECTIONS[target.name.rpartition(".")[2]]
    programs = pinned_programs(target, bpffs).items()
    lines = [f"BPFProgram={hook}:{path.replace('%', '%%')}\n" for hook, path in programs]
    after = f"[Unit]\nWants={service}\nAfter={service}\n\n" if service else ""
    return f"{_head(target)}{after}[{section}]\n{''.join(lines)}"


def _service_text(target: Target, arguments: Sequence[str]) -> str:
    command = [sys.executable, "-m", "kaio", "enforce", *arguments]
    starts = _starts(target)
    lines = [
        "[Unit]",
        f"Description=Keepalive policy for {target}",
        "DefaultDependencies=no",
        f"RequiresMountsFor={_quoted(os.path.dirname(sys.executable))} {BPFFS}",
        "After=local-fs.target systemd-sysctl.service",  # a policy may leave times to the sysctls
        f"Before={target.name}" if starts else "Wants=network-pre.target\nBefore=network-pre.target",
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        f"ExecStart={' '.join(map(_quoted, command))}",
        *(() if starts else ("", "[Install]", "WantedBy=sysinit.target")),
    ]
    return _head(target) + "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    """A word of a command line in a unit file (systemd.service(5), "Command lines")."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return plain if shlex.quote(word) == word else f'"{plain}"'
