"""`kaio run`: a program that knows nothing of kaio is covered, and is otherwise what Python makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kaio.testing import blackhole
from kaio.tools.processes import sockets

PROGRAMS = Path(__file__).parent / "programs"
SPEC = "7s:3s:5"
COVERED = [1, 7, 3, 5]
SYSTEM = [0, 7200, 75, 9]
BARE = [sys.executable]
RUN = [sys.executable, "-m", "kaio", "run"]
HAS = """
import socket
def has(sock):
    times = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    return [sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *(sock.getsockopt(6, each) for each in times)]
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("PYTHON")]:
        monkeypatch.delenv(variable)


def write(name: str, text: str) -> str:
    """A program in the current folder."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return name


def call(
    *command: str, said: str = "", timeout: float = 40, environment: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """A command's return code, standard output and standard error."""
    done = subprocess.run(
        command, input=said, capture_output=True, text=True, timeout=timeout, env=os.environ | (environment or {})
    )
    return done.returncode, done.stdout, done.stderr


def output_of(*command: str, timeout: float = 40, environment: dict[str, str] | None = None) -> str:
    """What a command says that must do well and complain of nothing."""
    code, out, err = call(*command, timeout=timeout, environment=environment)
    assert (code, err) == (0, "")
    return out


@contextlib.contextmanager
def started(*command: str, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end at the latest."""
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


# -- Python's own way with a program

SHOW = """
import json, os, sys, threading
print(json.dumps({
    "argv": sys.argv,
    "name": __name__,
    "file": globals().get("__file__"),
    "package": __package__,
    "spec": None if __spec__ is None else __spec__.name,
    "globals": sorted(globals()),
    "main": sys.modules["__main__"].__dict__ is globals(),
    "path": sys.path,
    "flags": str(sys.flags),
    "xoptions": sorted(sys._xoptions.items()),
    "warnings": sys.warnoptions,
    "executable": sys.executable,
    "prefix": sys.prefix,
    "unbuffered": sys.stdout.write_through,
    "bytecode": sys.pycache_prefix,
    "threads": threading.active_count(),
    "folder": os.getcwd(),
    "said": sys.stdin.read() if sys.argv[0] != "-" else "",
    "profiled": [sys.gettrace(), sys.getprofile()],
    "signals": [str(__import__("signal").getsignal(number)) for number in (2, 10, 13, 15)],
}, indent=1))
"""


@pytest.mark.parametrize("kind", ["file", "file elsewhere", "module", "package", "folder", "archive", "standard input"])
def test_a_program_sees_what_python_shows_it(kind: str) -> None:
    """Its arguments, whatever they look like; __main__, __file__, sys.path, threads, handlers, standard input."""
    write("app.py", SHOW)
    write("elsewhere/app.py", SHOW)
    write("package/__init__.py", "")
    write("package/__main__.py", SHOW)
    with zipfile.ZipFile("app.zip", "w") as archive:
        archive.writestr("__main__.py", SHOW)
    how = {
        "file": ["app.py"],
        "file elsewhere": [os.path.abspath("elsewhere/app.py")],
        "module": ["-m", "app"],
        "package": ["-m", "package"],
        "folder": ["package"],
        "archive": ["app.zip"],
        "standard input": ["-"],
    }[kind]
    arguments = [*how, "--keepalive", "x", "-m", "y", "--help", "", "a b", "--", "-"]
    said = SHOW if kind == "standard input" else "some input"
    plain = call(*BARE, *arguments, said=said)
    assert plain[0] == 0, plain
    for options in ([], ["--keepalive", SPEC, "--sweep=1s", "--loop", "asyncio"]):
        assert call(*RUN, *options, *arguments, said=said) == plain


@pytest.mark.parametrize(
    "flags",
    [
        "-X dev",
        "-W error -W default::UserWarning",
        "-O -B -s",
        "-OO -bb -q",
        "-P",
        "-u",
        "-X utf8 -X faulthandler -X tracemalloc=3",
        "-X pycache_prefix=there -X int_max_str_digits=5000 -X no_debug_ranges -X warn_default_encoding",
    ],
)
def test_the_flags_of_python_are_the_programs(flags: str) -> None:
    """As if Python itself had been asked to run it."""
    write("app.py", SHOW)
    assert call(sys.executable, *flags.split(), "-m", "kaio", "run", "app.py") == call(
        sys.executable, *flags.split(), "app.py"
    )


ENDS = {
    "done": "print('done')",
    "sys.exit": "import sys; sys.exit(3)",
    "text": "import sys; sys.exit('some text')",
    "os._exit": "import os; os._exit(7)",
    "error": "def f():\n    raise ValueError('x')\nf()",
    "chained": "try:\n    1 / 0\nexcept ZeroDivisionError as exc:\n    raise RuntimeError from exc",
    "syntax": "print('a'\n",
    "asyncio": """
        import asyncio
        async def main():
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(0))
                raise ValueError("x")
        asyncio.run(main())
    """,
    "uvloop": "import uvloop\nasync def main():\n    raise ValueError('x')\nuvloop.run(main())",
    "never retrieved": """
        import asyncio
        async def fail():
            raise ValueError("x")
        async def main():
            task = asyncio.create_task(fail(), name="fail")
            await asyncio.sleep(0)
        asyncio.run(main())
    """,
    "interrupted": "raise KeyboardInterrupt",
    "at exit": "import atexit; atexit.register(print, 'bye')",
    "threads": "import threading; threading.Thread(target=lambda: 1 / 0, name='t').start()",
    "killed": "import os; os.kill(os.getpid(), 15)",
    "killed by USR1": "import os; os.kill(os.getpid(), 10)",
    "aborted": "import os; os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_under_python(end: str) -> None:
    """Return code, output and traceback are the same to the letter."""
    write("app.py", ENDS[end])
    assert call(*RUN, "app.py") == call(*BARE, "app.py")


def test_a_missing_program_is_reported_by_python() -> None:
    """A file, a module, a folder without __main__."""
    os.mkdir("folder")
    for how in (["absent.py"], ["-m", "absent"], ["folder"], ["-m", "os.absent"]):
        assert call(*RUN, *how) == call(*BARE, *how)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "body",
    ["print('ready', flush=True); time.sleep(30)", "asyncio.run(main())", "uvloop.run(main())"],
    ids=["sleep", "asyncio", "uvloop"],
)
def test_signals_reach_the_program_itself(number: signal.Signals, body: str) -> None:
    """It is this very process: it dies of SIGTERM, and SIGINT is its KeyboardInterrupt."""
    write(
        "app.py",
        f"""
        import asyncio, time, uvloop
        async def main():
            print("ready", flush=True)
            await asyncio.sleep(30)
        {body}
        """,
    )
    found = []
    for command in (BARE, RUN):
        with started(*command, "app.py") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.1)
            process.send_signal(number)
            found.append((process.wait(10), process.stdout.read(), process.stderr.read().splitlines()[-1:]))
    assert found[1] == found[0]
    assert found[0][0] == -number


# -- covering


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", None])
def test_every_loop_of_a_program_is_covered_however_it_is_made(loop: str | None) -> None:
    """By asyncio's and uvloop's functions and classes, by name, held early, subclassed, under policies of its own."""
    options = [] if loop is None else ["--loop", loop]
    found = json.loads(output_of(*RUN, "--keepalive", SPEC, *options, str(PROGRAMS / "loops_ways.py")))
    assert found == {way: [COVERED, COVERED] for way in found}
    assert len(found) == (15 if hasattr(asyncio, "set_event_loop_policy") else 12)


def test_loop_says_what_asyncio_run_makes() -> None:
    """Where the program does not say; kaio's own functions keep what they are told."""
    write(
        "app.py",
        """
        import asyncio, uvloop, kaio
        async def main():
            loop = asyncio.get_running_loop()
            print(isinstance(loop, uvloop.Loop), loop.keepalive)
        asyncio.run(main())
        uvloop.run(main())
        kaio.run(main(), keepalive="9s:3s:5", base=asyncio.SelectorEventLoop)
        kaio.run(main())
        print(kaio.Keepalive.from_env())
        """,
    )
    for options, first in (([], False), (["--loop", "uvloop"], True), (["--loop", "asyncio"], False)):
        assert output_of(*RUN, "--keepalive", SPEC, *options, "app.py").splitlines() == [
            f"{first} {SPEC}",
            f"True {SPEC}",
            "False 9s:3s:5",
            f"True {SPEC}",
            SPEC,
        ]
    assert output_of(*RUN, "app.py", environment={"KEEPIDLE": "8"}).splitlines()[-1] == "8s:10s:4"


def test_the_processes_that_a_program_starts_are_covered_too() -> None:
    """spawn, forkserver, fork, os.fork, pools, subprocesses: loops and what no loop sees; no warning of threads."""
    command = [sys.executable, "-W", "error", *RUN[1:], "--keepalive", SPEC, "--sweep", "100ms"]
    found = json.loads(output_of(*command, str(PROGRAMS / "loops_children.py"), "10"))
    assert found == {way: [COVERED, COVERED] for way in found}
    assert len(found) == 8


FORK = f"""{HAS}
import os, sys, threading, time
def fork(times):
    for _ in range(times):
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
def found():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        until = time.monotonic() + 5
        while not has(sock)[0] and time.monotonic() < until:
            time.sleep(0.02)
        return has(sock)
"""


@pytest.mark.parametrize("warnings", ["error", "always"])  # what fork warns of cannot raise, and is lost where it would
def test_forking_again_and_again_warns_of_no_thread(warnings: str) -> None:
    """Python 3.12 warns of a fork with threads: there is none, also none that is just ending; and one afterwards."""
    write(
        "app.py",
        FORK
        + """
import pty, subprocess
fork(200)
for _ in range(10):
    child, terminal = pty.fork()
    if child == 0:
        os._exit(0)
    os.close(terminal)
    os.waitpid(child, 0)
for _ in range(10):
    subprocess.run(["true"], preexec_fn=time.time, check=True)
print(found(), threading.active_count(), len(os.listdir("/proc/self/task")))
""",
    )
    command = [sys.executable, "-W", warnings, *RUN[1:], "--keepalive", SPEC, "--sweep", "100ms", "app.py"]
    assert output_of(*command, timeout=60) == f"{COVERED} 1 2\n"


def test_forking_from_many_threads_at_once_does_not_hang() -> None:
    """What goes on before and after a fork may go on in another thread at the same time."""
    write(
        "app.py",
        FORK
        + """
threads = [threading.Thread(target=fork, args=(50,)) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(found(), len(os.listdir("/proc/self/task")))
""",
    )
    command = [sys.executable, "-W", "ignore", *RUN[1:], "--keepalive", SPEC, "--sweep", "100ms", "app.py"]
    assert output_of(*command, timeout=60) == f"{COVERED} 2\n"


def test_a_thread_may_fork_while_the_main_thread_waits_for_it() -> None:
    """What follows a fork in the main thread waits for that thread to run Python code again, which may take long."""
    write(
        "app.py",
        FORK
        + """
def work():
    fork(40)
    print(found())
thread = threading.Thread(target=work)
thread.start()
thread.join()
fork(1)
print(found(), len(os.listdir("/proc/self/task")))
""",
    )
    command = [sys.executable, "-W", "ignore", *RUN[1:], "--keepalive", SPEC, "--sweep", "100ms", "app.py"]
    assert output_of(*command, timeout=60) == f"{COVERED}\n{COVERED} 2\n"


def test_a_program_without_asyncio_runs_and_is_not_slowed_at_its_end() -> None:
    """The sweep sleeps for long, and nobody waits for that."""
    write("app.py", "import sys, time; print(sys.argv)")
    began = time.monotonic()
    assert output_of(*RUN, "--sweep", "1h", "app.py", "x") == "['app.py', 'x']\n"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (["--keepalive", "off"], {}),
        ([], {"KEEPALIVE": "off"}),
        ([], {"KAIO_KEEPALIVE": "off"}),
    ],
    ids=["--keepalive off", "KEEPALIVE=off", "KAIO_KEEPALIVE=off"],
)
def test_a_policy_that_is_off_sets_nothing(options: list[str], environment: dict[str, str]) -> None:
    """No loop is covered, and no socket is looked for."""
    found = json.loads(
        output_of(
            *RUN,
            *options,
            "--sweep",
            "100ms",
            str(PROGRAMS / "loops_children.py"),
            "0.5",
            "look",
            environment=environment,
        )
    )
    assert found == [SYSTEM, SYSTEM]


def test_without_a_sweep_only_loops_are_covered() -> None:
    """--sweep off; and the environment says the policy where the command line does not."""
    command = [*RUN, "--sweep", "off", str(PROGRAMS / "loops_children.py"), "0.5", "look"]
    assert json.loads(output_of(*command, environment={"KAIO_KEEPALIVE": SPEC})) == [COVERED, SYSTEM]


# -- what stands before and beside it


def test_a_sitecustomize_of_the_users_own_runs_too() -> None:
    """It finds sys.path and sys.modules as ever, and may fail as ever."""
    environment = {"PYTHONPATH": os.path.abspath("site")}
    write("app.py", "import sys; print(sys.modules['sitecustomize'].__file__, sys.path)")
    write("site/sitecustomize.py", "import sys; open('said', 'w').write(f'{__file__} {sys.path} {list(globals())}')")
    found = []
    for command in (BARE, RUN):
        found.append((call(*command, "app.py", environment=environment), Path("said").read_text()))
        os.remove("said")
    assert found[1] == found[0]
    for text in ("1 / 0", "raise ImportError('x')", "import absent"):
        write("site/sitecustomize.py", text)
        write("app.py", "print('goes on')")
        code, out, err = call(*BARE, "app.py", environment=environment)
        # The command itself is a Python program, too.
        assert call(*RUN, "app.py", environment=environment) == (code, out, 2 * err)


def test_it_may_be_nested_and_the_inner_one_counts() -> None:
    """A program under `kaio run` that runs another."""
    program = str(PROGRAMS / "loops_children.py")
    inner = ["-m", "kaio", "run", "--keepalive", SPEC, "--sweep", "off", program, "0", "look"]
    assert json.loads(output_of(*RUN, "--keepalive", "9s:3s:5", "--sweep", "100ms", *inner)) == [COVERED, SYSTEM]


@pytest.mark.may_skip
def test_another_environments_python_is_left_alone() -> None:
    """A child whose prefix is another may have no kaio, nor what it needs."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("this Python is not in a virtual environment")
    other = os.path.realpath(sys.executable)
    write("other.py", "import sys; print('kaio' in sys.modules, [each for each in sys.path if '_bootstrap' in each])")
    write("app.py", f"import subprocess; subprocess.run([{other!r}, 'other.py'], check=True)")
    assert output_of(*RUN, "app.py") == "False []\n"


# -- the sweep


class Threads:
    """tests/programs/loops_threads.py under `kaio run`, and the peers of its connections."""

    def __init__(self, listener: socket.socket, process: subprocess.Popen[str]) -> None:
        self._listener = listener
        self._process = process
        self.peers: dict[str, socket.socket] = {}
        self.ended: dict[str, tuple[str, float]] = {}

    def tell(self, *words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()

    def hear(self, timeout: float = 10.0) -> list[str]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return []
        words = self._process.stdout.readline().split()
        if words[:1] == ["ended"]:
            self.ended[words[1]] = (words[2], time.monotonic())
            return self.hear(timeout)
        return words

    def make(self, case: str) -> None:
        self.tell("make", case)
        self.peers[case], _ = self._listener.accept()
        assert self.hear()[:2] == ["made", case]

    def options(self, case: str) -> list[str]:
        self.tell("options", case)
        return self.hear()[2:]

    def have(self, case: str, wanted: list[str], within: float = 5.0) -> None:
        until = time.monotonic() + within
        while (found := self.options(case)) != wanted:
            assert time.monotonic() < until, f"{case}: {found}, not {wanted}"
            time.sleep(0.05)


@contextlib.contextmanager
def threads(*options: str) -> Iterator[Threads]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        contextlib.ExitStack() as stack,
        started(
            *RUN, "--keepalive", "1s:1s:2", *options, str(PROGRAMS / "loops_threads.py"), str(listener.getsockname()[1])
        ) as process,
    ):
        listener.settimeout(10)
        found = Threads(listener, process)
        yield found
        for peer in found.peers.values():
            stack.enter_context(peer)
        process.kill()


@pytest.mark.slow
@pytest.mark.usefixtures("dead_peers")
def test_sockets_outside_any_loop_are_covered_and_their_dead_peers_found() -> None:
    """Idle, data in flight, window shut: ended in time. Stalled and answering, chosen, alive: spared."""
    with threads("--sweep", "300ms") as program, contextlib.ExitStack() as stack:
        for case in ("idle", "flying", "shut", "stalled", "own", "lively"):
            program.make(case)
        for case in ("idle", "flying", "lively"):
            program.have(case, ["1:1:2:3000", "1"])  # the kernel bounds what nobody watches
        for case in ("shut", "stalled"):
            program.have(case, ["1:1:2:0", "1"])  # it answers: its time does not run
        program.have("own", ["40:75:9:0", "1"])
        for case in program.peers:
            program.tell("wait", case)
        began = time.monotonic()
        stack.enter_context(blackhole(*(program.peers[case] for case in ("idle", "flying", "shut", "own"))))
        program.tell("send", "flying")
        program.tell("send", "lively")
        while time.monotonic() < began + 7:
            program.hear(0.5)
        ends = {case: (how, round(at - began, 1)) for case, (how, at) in program.ended.items()}
        assert {case: how for case, (how, _) in ends.items()} == dict.fromkeys(
            ("idle", "flying", "shut"), "TimeoutError:110"
        )
        assert all(2.0 < took < 6.5 for _, took in ends.values()), ends
        program.have("stalled", ["1:1:2:0", "1"])
        program.have("own", ["40:75:9:0", "1"])


@pytest.mark.slow
def test_a_live_stalled_peer_is_spared_however_rare_the_sweeps() -> None:
    """Its window was shut before it was first seen, and the next sweep is as far off as the policy is long."""
    with threads("--sweep", "3s") as program:
        for case in ("stalled", "shut"):
            program.make(case)
            program.tell("wait", case)
        began = time.monotonic()
        while time.monotonic() < began + 7.5:
            program.hear(0.5)
        assert program.ended == {}
        for case in ("stalled", "shut"):
            assert program.options(case)[0].startswith("1:1:2:")


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_sweep_of_a_program_leaves_watched_connections_alone(loop: str) -> None:
    """A listener that drops stalled peers drops them, one that keeps them keeps them, and so does another library's."""
    write(
        "app.py",
        """
        import asyncio, kaio

        async def fill(connection):
            try:
                while True:
                    await connection.send(bytes(1 << 20))
            except kaio.DeadPeerError as error:
                print("dead", error.cause.name, flush=True)
                raise

        async def stream(reader, writer):
            while True:
                writer.write(bytes(1 << 20))
                await writer.drain()

        async def main():
            listeners = [kaio.Listener("127.0.0.1:0", keepalive=f"1s:1s:2,stalled={each}") for each in ("keep", "drop")]
            other = await asyncio.start_server(stream, "127.0.0.1", 0)
            async with kaio.serve(fill, listeners=listeners):
                servers = [listeners[0].sockets[0], listeners[1].sockets[0], other.sockets[0]]
                print(*(each.getsockname()[1] for each in servers), flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
        """,
    )
    command = [*RUN, "--keepalive", "1s:1s:2", "--sweep", "200ms", "--loop", loop, "app.py"]
    with started(*command) as process, contextlib.ExitStack() as stack:
        assert process.stdout is not None
        keep, drop, stream = map(int, process.stdout.readline().split())
        for port in (keep, drop, stream):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert select.select([process.stdout], [], [], 15)[0]
        assert process.stdout.readline() == "dead ZERO_WINDOW\n"
        time.sleep(10)  # a newcomer's time of grace, and then some
        assert select.select([process.stdout], [], [], 0)[0] == []
        left = {one.local[1]: one.state.user_timeout for one in sockets(process.pid) if one.peer is not None}
        assert left == {keep: None, stream: None}


@pytest.mark.slow
def test_a_sweep_survives_a_lack_of_descriptors() -> None:
    """It cannot list what it cannot open a folder for; when there are some again, it goes on."""
    write(
        "app.py",
        HAS
        + """
import os, resource, time
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = []
try:
    while True:
        held.append(open(os.devnull))
except OSError:
    time.sleep(1)
for each in held:
    each.close()
with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
    until = time.monotonic() + 5
    while not has(sock)[0] and time.monotonic() < until:
        time.sleep(0.05)
    print(has(sock))
""",
    )
    assert output_of(*RUN, "--keepalive", SPEC, "--sweep", "100ms", "app.py") == f"{COVERED}\n"


# -- the report


def test_a_report_is_printed_at_the_end() -> None:
    """On standard error, after what the program itself does at exit; the return code is the program's."""
    write(
        "app.py",
        """
        import asyncio, socket, sys
        listener = socket.create_server(("127.0.0.1", 0))
        sock = socket.create_connection(listener.getsockname())
        async def main():
            asyncio.get_running_loop().add_reader(sock, print)
            asyncio.get_running_loop().remove_reader(sock)
        asyncio.run(main())
        print("done")
        sys.exit(4)
        """,
    )
    code, out, err = call(*RUN, "--keepalive", SPEC, "--sweep", "off", "--report", "app.py")
    assert (code, out) == (4, "done\n")
    lines = err.splitlines()
    assert lines[0] == f"kaio: 2 TCP sockets under the policy {SPEC}: 1 policy, 0 own, 1 uncovered"
    assert lines[1].split() == ["fd", "local", "peer", "keepalive", "standing", "why"]
    assert len(lines) == 5
    assert lines[-1].startswith("sockets judged since the start of process ")
    assert lines[-1].endswith(": 1 policy")
    for closing in ("sys.stderr.close()", "os.close(2)", "sys.stderr = None"):
        write("app.py", f"import os, sys\n{closing}")
        assert call(*RUN, "--report", "app.py")[:2] == (0, "")


@pytest.mark.parametrize(
    "wait", ["time.sleep(30)", "asyncio.run(asyncio.sleep(30))", "uvloop.run(asyncio.sleep(30))"], ids=str
)
def test_a_report_is_printed_on_sigusr1(wait: str) -> None:
    """As often as it is asked for, whatever the program does meanwhile; it goes on."""
    write("app.py", f"import asyncio, time, uvloop\nprint('ready', flush=True)\n{wait}")
    with started(*RUN, "--keepalive", SPEC, "--report", "app.py") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            assert select.select([process.stderr], [], [], 10)[0]
            heard = [process.stderr.readline() for _ in range(2)]
            if not heard[0].startswith("kaio: 0 TCP sockets under the policy"):
                process.kill()
                pytest.fail("".join([*heard, *process.stderr]))
            assert heard[1].startswith("sockets judged since the start of process")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


def test_a_report_may_be_asked_for_while_the_program_itself_writes() -> None:
    """Or while the report before is being written: a buffer that is in use cannot be written to from a handler."""
    write(
        "app.py",
        """
        import sys
        print("ready", flush=True)
        for _ in range(100_000):
            sys.stderr.write("word\\n")
        print("done")
        """,
    )
    with started(*RUN, "--report", "app.py") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(3):
            time.sleep(0.2)
            process.send_signal(signal.SIGUSR1)  # it waits, in the middle of a write, for us to read
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out) == (0, "done\n")
        assert err.count("word\n") == 100_000
        assert err.count("kaio: 0 TCP sockets") > 1  # at the end, too


# -- mistakes


@pytest.mark.parametrize(
    ("command", "environment", "word"),
    [
        ("", {}, "no program given"),
        ("-m", {}, "no program given"),
        ("--keepalive 1s:1s app.py", {}, "keepalive"),
        ("--keepalive 1s:1s:200 app.py", {}, "count"),
        ("--keepalive", {}, "keepalive"),
        ("--keepalive app.py", {}, "no program given"),
        ("--sweep soon app.py", {}, "sweep"),
        ("--sweep 0 app.py", {}, "sweep"),
        ("--sweep 2h app.py", {}, "sweep"),
        ("--loop trio app.py", {}, "loop"),
        ("--no-such-option app.py", {}, "no-such-option"),
        ("app.py", {"KAIO_KEEPALIVE": "soon"}, "KAIO_KEEPALIVE"),
        ("app.py", {"KEEPIDLE": "-1"}, "KEEPIDLE"),
        ("app.py", {"KEEPALIVE": "perhaps"}, "KEEPALIVE"),
    ],
    ids=lambda value: value or "nothing" if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line_and_the_program_is_not_run(command: str, environment: dict[str, str], word: str) -> None:
    """On standard error, with exit code 2, and it names what is wrong."""
    write("app.py", "print('it ran')")
    code, out, err = call(*RUN, *command.split(), environment=environment)
    assert (code, out) == (2, "")
    assert word.lower() in err.lower()
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err


@pytest.mark.parametrize("flag", ["-I", "-E"])
def test_a_python_that_ignores_pythonpath_is_refused(flag: str) -> None:
    """By those flags Python ignores the environment: nothing would be covered, and nobody would know."""
    write("app.py", "print('it ran')")
    code, out, err = call(sys.executable, flag, "-m", "kaio", "run", "app.py")
    assert (code, out) == (2, "")
    assert flag in err
    assert len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    ("words", "offer"),
    [
        (["uvicorn", "app:app"], "there is no file uvicorn, but a module: kaio run -m uvicorn app:app"),
        (["json.tool"], "there is no file json.tool, but a module: kaio run -m json.tool"),
        (["a-script", "x"], "there is no file a-script, but a program: kaio run {path}/a-script x"),
    ],
)
def test_a_module_or_a_script_in_place_of_a_file_is_offered(
    words: list[str], offer: str, tmp_path: pathlib.Path
) -> None:
    """With the command that runs it."""
    script = tmp_path / "bin" / "a-script"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\n")
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{script.parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "kaio", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"kaio run: {offer.format(path=script.parent)} (see kaio run --help)\n"


def test_a_mistyped_option_is_no_program() -> None:
    """The nearest one is named."""
    command = [sys.executable, "-m", "kaio", "run", "--keepalve", "20s", "app.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such option '--keepalve'. Did you mean '--keepalive'?" in done.stderr
