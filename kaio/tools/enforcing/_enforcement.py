"""Enforcing a policy on a target, and undoing it: the program, its link to the cgroup, and the pins that keep both.

A directory of the BPF file system for each target holds the pins: the programs `giver` and `guard`, their links
`giver-link` and `guard-link`, their `counters`, and `settings`, a text for `status`. They outlive the process that made
them, and end with the machine.

Rules kept here: what is wrong is found before anything is changed; a policy is replaced by another with nothing in
between; two commands on one target do not mix, since each locks the directory above.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from ...errors import KaioError, PolicyError
from ...policy import Keepalive, KeepaliveArg, as_policy
from ..bpf import SETSOCKOPT, SOCK_OPS, Assembler, Bpf, BpfError, Hook, attached, detach, field_offsets, is_bpffs, mount
from ..kernel_policy import in_kernel
from ..locks import lock
from ..sysctls import SysctlError
from ..sysctls import read as read_sysctls
from ._program import FIELDS, Counters, Ports, giver, guard
from ._targets import Kind, Target

__all__ = [
    "BPFFS",
    "EnforceError",
    "Enforcement",
    "enforce",
    "enforce_for_good",
    "enforced_on",
    "enforcements",
    "lift",
    "linked",
    "pinned_programs",
    "plan",
]

BPFFS: Final = "/sys/fs/bpf"
"""Where systemd mounts the BPF file system."""
_DIRECTORY: Final = "kaio"
_HOOKS: Final[Mapping[str, Hook]] = {"guard": SETSOCKOPT, "giver": SOCK_OPS}  # in the order of attaching
_LINK: Final = "-link"
_NEW: Final = "new-"
_SETTINGS_SIZE: Final = 4096
_PATIENCE: Final = 10.0  # seconds to wait for another command
_PATIENCE_WITH_OTHERS: Final = 2.0


class EnforceError(KaioError, OSError):
    """A policy that cannot be enforced; the message says why, `log` is the verifier's if it refused the program."""

    log: str

    def __init__(self, number: int | None, message: str, log: str = "") -> None:
        super().__init__(number, message)
        self.log = log

    def __reduce__(self) -> tuple[type[EnforceError], tuple[int | None, str, str]]:
        return EnforceError, (self.errno, str(self.strerror), self.log)

    def __str__(self) -> str:
        return str(self.strerror)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Enforcement:
    """A policy that is enforced on a target."""

    target: Target
    policy: str
    ports: tuple[Ports, ...]
    """The excepted ports."""
    since: float
    """When it was set, in seconds since the epoch."""
    counters: Counters
    """What became of the sockets since."""
    directory: str | None
    """The cgroup's directory; None if there is none at present."""
    attached: bool
    """Whether the program is attached to that cgroup."""
    pins: str
    """The directory of the pinned programs, for bpftool(8)."""


def plan(policy: Keepalive, ports: Sequence[Ports] = ()) -> dict[str, Assembler]:
    """Assemble the programs for a policy, without loading them. Raises `PolicyError`, `EnforceError`."""
    return _assembled(_complete(policy), ports, counters=0)


def enforce(
    target: Target, keepalive: KeepaliveArg = None, *, ports: Sequence[Ports] = (), bpffs: str = BPFFS
) -> Enforcement:
    """Give a policy to all TCP sockets of a target from now on, connected and accepted, until it is lifted.

    The kernel does it, before a socket's first byte, whatever the program; it costs no process. Times that a program
    has set before connect(2), or on its listening socket, stand, and those that it sets later win. Sockets that are
    connected already keep their options. It lasts until `lift` or the next boot.

    A unit that does not run has no cgroup: the program is pinned for it, and attached by systemd (BPFProgram=) or by
    calling this again. Raises `PolicyError` before anything was changed; `EnforceError` for a missing permission, a
    kernel without what is needed, a BPF file system that cannot be used.
    """
    given = as_policy(keepalive)
    policy = _complete(given)
    directory = _directory(target)
    with _locked(bpffs, make=True) as top:
        _refuse_two(target, directory, top)
        pins = os.path.join(top, target.key)
        fresh = not os.path.isdir(pins)
        try:
            os.makedirs(pins, exist_ok=True)
            _replace(pins, _Wanted(target, given, policy, tuple(ports)), directory)
        except OSError as exc:
            if fresh:
                _remove(pins)
            raise _error(exc) from None
        return _read(target, pins)


@contextlib.contextmanager
def linked(cgroup: str, keepalive: KeepaliveArg = None) -> Iterator[None]:
    """Give a policy to all TCP sockets of a cgroup within a `with` block. Raises as `enforce`."""
    policy = _complete(as_policy(keepalive))
    with contextlib.ExitStack() as links:
        _attach_each(cgroup, policy, lambda *program: links.enter_context(Bpf.link(*program)))
        yield


def enforce_for_good(cgroup: str, keepalive: KeepaliveArg = None) -> None:
    """Give a policy to all TCP sockets of a cgroup, given by its directory, for as long as it exists.

    Raises as `enforce`. Nothing is pinned, and `enforcements` does not list it.
    """
    _attach_each(cgroup, _complete(as_policy(keepalive)), Bpf.attach)


def _attach_each(cgroup: str, policy: Keepalive, attach: Callable[[Bpf, Hook, int], object]) -> None:
    """Load the programs, which end with what `attach` makes of them."""
    with contextlib.ExitStack() as stack:
        try:
            counters = stack.enter_context(Bpf.array("kaio_counters", _size()))
            programs = _loaded(stack, policy, (), counters)
            descriptor = stack.enter_context(_opened(cgroup))
            for name, hook in _HOOKS.items():
                attach(programs[name], hook, descriptor)
        except OSError as exc:
            raise _error(exc) from None


def lift(target: Target, *, bpffs: str = BPFFS) -> bool:
    """Enforce nothing on a target any more; its sockets keep the options they have. Returns whether anything was.

    Raises `EnforceError`.
    """
    if not os.path.isdir(os.path.join(bpffs, _DIRECTORY)):
        return False
    with _locked(bpffs) as top:
        pins = os.path.join(top, target.key)
        if not os.path.isdir(pins):
            return False
        try:
            _detach_all(target, pins)
            _remove(pins)
        except OSError as exc:
            raise _error(exc) from None
        return True


def enforcements(*, bpffs: str = BPFFS) -> list[Enforcement]:
    """List what is enforced. Raises `EnforceError` if that cannot be read."""
    top = os.path.join(bpffs, _DIRECTORY)
    found = []
    try:
        with _lock(top, make=False):  # so that none is half made or half removed
            for key in sorted(os.listdir(top)):
                pins = os.path.join(top, key)
                if os.path.exists(os.path.join(pins, "settings")):  # not of a command that was killed
                    found.append(_read(_settings(pins)[0], pins))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise _error(exc) from None
    return found


def enforced_on(path: str, *, bpffs: str = BPFFS) -> Target | None:
    """The target that a cgroup's path was when a policy was enforced on it; the cgroup may be gone.

    Raises `EnforceError`.
    """
    if "\0" in path:
        return None
    real = os.path.realpath(path)
    named = {Target(Kind.CGROUP, real)}
    if not os.path.isdir(real):  # else it may be another's, of the same name
        named.add(Target(Kind.UNIT, os.path.basename(real)))
    return next((each.target for each in enforcements(bpffs=bpffs) if each.target in named), None)


def pinned_programs(target: Target, bpffs: str = BPFFS) -> dict[str, str]:
    """The paths at which a target's programs are pinned while a policy is enforced on it, by systemd's name of each."""
    directory = os.path.join(bpffs, _DIRECTORY, target.key)
    return {"sock_ops": f"{directory}/giver", "setsockopt": f"{directory}/guard"}


# -- the policy and the program


def _complete(policy: Keepalive) -> Keepalive:
    """The policy with all times, as the kernel alone enforces it."""
    if not policy.enabled:
        raise PolicyError("keepalive", str(policy), "cannot be enforced: there is nothing to set")
    if None not in (policy.idle, policy.interval, policy.count):
        return in_kernel(policy)
    try:
        return in_kernel(policy, read_sysctls())
    except SysctlError as exc:
        where = f"{exc.filename}: " if exc.filename else ""
        raise EnforceError(exc.errno, f"{where}{exc.strerror}") from None


def _assembled(policy: Keepalive, ports: Sequence[Ports], counters: int) -> dict[str, Assembler]:
    try:
        offsets = {field: at for name, fields in FIELDS.items() for field, at in field_offsets(name, fields).items()}
    except BpfError as exc:
        raise _error(exc) from None
    return {
        "guard": guard(policy, counters=counters),
        "giver": giver(policy, ports, counters=counters, offsets=offsets),
    }


def _loaded(stack: contextlib.ExitStack, policy: Keepalive, ports: Sequence[Ports], counters: Bpf) -> dict[str, Bpf]:
    assembled = _assembled(policy, ports, counters.fileno())
    return {
        name: stack.enter_context(Bpf.program(hook, _name(name), assembled[name].assemble()))
        for name, hook in _HOOKS.items()
    }


def _name(program: str) -> str:
    """The name by which the kernel, bpftool(8) and kaio know a program."""
    return f"kaio_{program}"


def _size() -> int:
    return 8 * len(Counters._fields)


# -- pins


class _Wanted(NamedTuple):
    target: Target
    given: Keepalive
    policy: Keepalive
    """The same with all times."""
    ports: tuple[Ports, ...]

    def encoded(self) -> bytes:
        """The text of the pin `settings`."""
        text = json.dumps(
            {
                "kind": self.target.kind,
                "name": self.target.name,
                "policy": str(self.given),
                "except": self.ports,
                "since": time.time(),
            }
        ).encode()
        if len(text) > _SETTINGS_SIZE:
            raise EnforceError(errno.ENAMETOOLONG, f"{self.target}: the name is too long")
        return text.ljust(_SETTINGS_SIZE, b"\0")


class _Settings(NamedTuple):
    """What the pin `settings` says, but for the target."""

    policy: str
    ports: tuple[Ports, ...]
    since: float


def _replace(pins: str, wanted: _Wanted, directory: str | None) -> None:
    """Load and attach the programs, then give the new pins the old ones' names."""
    text = wanted.encoded()
    for name in os.listdir(pins):  # of a command that was killed
        if name.startswith(_NEW):
            os.unlink(os.path.join(pins, name))
    with contextlib.ExitStack() as stack:
        counters = stack.enter_context(Bpf.array("kaio_counters", _size()))
        settings = stack.enter_context(Bpf.array("kaio_settings", _SETTINGS_SIZE))
        settings.write(text)
        programs = _loaded(stack, wanted.policy, wanted.ports, counters)
        with contextlib.ExitStack() as undo:
            made = {**programs, "counters": counters, "settings": settings}
            if directory is not None:
                descriptor = stack.enter_context(_opened(directory))
                for name in _HOOKS:
                    link = _attach(stack, undo, pins, name, programs[name], descriptor)
                    if link is not None:
                        made[name + _LINK] = link
            for name, each in made.items():
                path = os.path.join(pins, _NEW + name)
                each.pin(path)
                undo.callback(os.unlink, path)
            undo.pop_all()
        for name in made:
            os.rename(os.path.join(pins, _NEW + name), os.path.join(pins, name))
        if directory is not None:
            _detach_others_in(directory, {name: program.program_id for name, program in programs.items()})


def _attach(
    stack: contextlib.ExitStack, undo: contextlib.ExitStack, pins: str, name: str, program: Bpf, cgroup: int
) -> Bpf | None:
    """Attach a program: give it to the existing link, or return a new one."""
    hook = _HOOKS[name]
    try:
        existing = stack.enter_context(Bpf.pinned(os.path.join(pins, name + _LINK)))
        if existing.cgroup_id == os.fstat(cgroup).st_ino:
            before = stack.enter_context(Bpf.pinned(os.path.join(pins, name)))
            existing.replace(program)
            undo.callback(existing.replace, before)
            return None
    except BpfError as exc:
        if exc.errno != errno.ENOENT:
            raise
    return stack.enter_context(program.link(hook, cgroup))


def _detach_others_in(directory: str, numbers: Mapping[str, int]) -> None:
    with contextlib.suppress(FileNotFoundError), _opened(directory) as descriptor:  # else it is gone
        _detach_others(descriptor, numbers)


def _detach_others(cgroup: int, numbers: Mapping[str, int]) -> None:
    """Detach what systemd attached earlier, which may be another policy's programs; the links have the new ones."""
    for name, hook in _HOOKS.items():
        for other in attached(hook, cgroup, _name(name)):
            if other != numbers.get(name):
                detach(hook, cgroup, other)


def _detach_all(target: Target, pins: str) -> None:
    for name in reversed(tuple(_HOOKS)):
        with contextlib.suppress(BpfError), Bpf.pinned(os.path.join(pins, name + _LINK)) as link:
            link.detach()
    for directory in target.directories():
        _detach_others_in(directory, {})


def _refuse_two(target: Target, directory: str | None, top: str) -> None:
    """Refuse a cgroup on which a policy is enforced under another name."""
    for key in os.listdir(top):
        if key == target.key or directory is None:
            continue
        try:
            other = _settings(os.path.join(top, key))[0]
            same = other.directory() == directory
        except OSError:  # half made, by a command that was killed
            continue
        if same:
            raise EnforceError(errno.EEXIST, f"{directory} has a policy already, as {other}: lift that first")


def _remove(pins: str) -> None:
    """Remove a target's directory."""
    for name in os.listdir(pins):
        os.unlink(os.path.join(pins, name))
    os.rmdir(pins)


def _settings(pins: str) -> tuple[Target, _Settings]:
    with Bpf.pinned(os.path.join(pins, "settings")) as settings:
        text = settings.read(_SETTINGS_SIZE).rstrip(b"\0")
    try:
        found = json.loads(text)
        ports = tuple(Ports(int(first), int(last)) for first, last in found["except"])
        target = Target(Kind(found["kind"]), str(found["name"]))
        return target, _Settings(str(found["policy"]), ports, float(found["since"]))
    except (KeyError, TypeError, ValueError):
        message = f"{pins}: pins that kaio has not made, or another version of it"
        raise EnforceError(errno.EINVAL, message) from None


def _read(target: Target, pins: str) -> Enforcement:
    settings = _settings(pins)[1]
    numbers = {}
    for name in _HOOKS:
        with Bpf.pinned(os.path.join(pins, name)) as program:
            numbers[name] = program.program_id
    with Bpf.pinned(os.path.join(pins, "counters")) as counters:
        counted = Counters.from_bytes(counters.read(_size()))
    directories = target.directories()
    return Enforcement(
        target=target,
        policy=settings.policy,
        ports=settings.ports,
        since=settings.since,
        counters=counted,
        directory=directories[0] if len(directories) == 1 else None,
        attached=any(_are_attached(directory, numbers) for directory in directories),
        pins=pins,
    )


def _are_attached(directory: str, numbers: Mapping[str, int]) -> bool:
    with contextlib.suppress(FileNotFoundError), _opened(directory) as descriptor:  # else it is gone
        return all(numbers[name] in attached(hook, descriptor) for name, hook in _HOOKS.items())
    return False


# -- files


def _directory(target: Target) -> str | None:
    try:
        return target.directory()
    except OSError as exc:
        raise _error(exc) from None


@contextlib.contextmanager
def _opened(directory: str) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(bpffs: str, *, make: bool = False) -> Iterator[str]:
    """Lock kaio's directory in the BPF file system, and return its path; remove it afterwards if it is empty."""
    top = os.path.join(bpffs, _DIRECTORY)
    try:
        if make:
            _mounted(bpffs)
        with _lock(top, make) as descriptor:
            _require_own(descriptor, top)
            yield top
            with contextlib.suppress(OSError):
                os.rmdir(top)
    except EnforceError:
        raise
    except OSError as exc:
        raise _error(exc) from None


def _mounted(bpffs: str) -> None:
    """Mount a BPF file system unless one is: once, since a second one would hide the pins in the first."""
    if is_bpffs(bpffs):
        return
    os.makedirs(bpffs, exist_ok=True)
    with _opened(bpffs) as descriptor:
        # Other users can lock it too, which must not keep root from mounting.
        lock(descriptor, time.monotonic() + _PATIENCE_WITH_OTHERS)
        if not is_bpffs(bpffs):
            mount(bpffs)


@contextlib.contextmanager
def _lock(top: str, make: bool) -> Iterator[int]:
    """Lock the directory that has this path, which another command may remove while this one waits."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        if make:
            os.makedirs(top, mode=0o700, exist_ok=True)
        with _opened(top) as descriptor:
            if not lock(descriptor, deadline):
                raise EnforceError(errno.EAGAIN, f"{top} is locked by another process")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(top)):
                    yield descriptor
                    return


def _require_own(descriptor: int, top: str) -> None:
    """Refuse a directory that another user has made: BPF file systems may be writable by everyone."""
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise EnforceError(errno.EPERM, f"{top} belongs to another user, or others may write to it")


def _error(exc: OSError) -> EnforceError:
    if isinstance(exc, EnforceError):
        return exc
    if isinstance(exc, BpfError):
        return EnforceError(exc.errno, str(exc), exc.log)
    if isinstance(exc, KaioError):
        return EnforceError(exc.errno, str(exc))
    where = f"{exc.filename}: " if exc.filename else ""
    hint = ": run as root (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)" if exc.errno in (errno.EPERM, errno.EACCES) else ""
    return EnforceError(exc.errno, f"{where}{exc.strerror}{hint}")
