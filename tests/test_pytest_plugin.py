"""`pytest --kaio-loop`: other people's suites on kaio's loop, in processes of their own, by what their kernel says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

DOCS = Path(__file__).parent.parent / "docs" / "testing.md"
KEEPALIVE = "--kaio-keepalive=7s:3s:2"
CHOSEN = "[(1, 7, 3, 2)] * 2"
"""What both ends of a connection have, by that policy."""
BARE = "[bare()] * 2"

PLUGINS = ("cacheprovider", "hypothesispytest", "xdist", "xdist.looponfail")
QUICK = [argument for plugin in PLUGINS for argument in ("-p", f"no:{plugin}")]
"""A second less for each run."""

# What the suites share: real ends of a real connection, and their options from the kernel.
PEERS = """
import asyncio, socket, uvloop

def read(sock):
    return (sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            *(sock.getsockopt(socket.IPPROTO_TCP, option)
              for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)))

def bare():
    with socket.socket() as sock:
        return read(sock)

async def options():
    async def echo(reader, writer):
        theirs.append(read(writer.get_extra_info("socket")))
        writer.write(await reader.readexactly(1))
        writer.close()
        await writer.wait_closed()

    theirs = []
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        ours = read(writer.get_extra_info("socket"))
        writer.close()
        await writer.wait_closed()
    return [ours, *theirs]

def base():
    return "uvloop" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "asyncio"
"""


def run(pytester: pytest.Pytester, suite: str, *arguments: str, ini: str = "", conftest: str = "") -> pytest.RunResult:
    """Run a suite in a process of its own, for which every warning is an error."""
    write_ini(pytester, ini, *arguments)
    pytester.makepyfile(peers=PEERS, conftest=conftest, test_suite="import peers\nfrom peers import bare\n" + suite)
    return pytester.runpytest_subprocess("-v", "-W", "error", *QUICK, *arguments)  # -v: it names each test


def write_ini(pytester: pytest.Pytester, ini: str, *arguments: str) -> None:
    """pytest-asyncio warns as long as this option of its own is unset."""
    scope = "" if "no:asyncio" in arguments else "asyncio_default_fixture_loop_scope = function\n"
    pytester.makefile(".ini", pytest=f"[pytest]\n{scope}{ini}")


def header(pytester: pytest.Pytester, *arguments: str, ini: str = "") -> str | None:
    """What the plugin would say above a run; None where it is not asked to do anything."""
    write_ini(pytester, ini, *arguments)
    loops = pytester.parseconfigure(*QUICK, *arguments).pluginmanager.get_plugin("kaio-loops")
    return None if loops is None else str(loops.pytest_report_header())


def asyncio_suite(expected: str, base: str, marker: str = "pytest.mark.asyncio") -> str:
    """One test, for pytest-asyncio or for anyio's plugin."""
    return f"""
import pytest
@{marker}
async def test_options():
    assert await peers.options() == {expected}
    assert peers.base() == {base!r}
"""


MARKERS = ["pytest.mark.asyncio", "pytest.mark.anyio"]
ONLY_ASYNCIO = "import pytest\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'\n"
"""For anyio's plugin, which runs each test on trio, too, where trio is installed."""

# -- the option


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("base", ["asyncio", "uvloop"])
def test_both_plugins_run_on_the_loop_that_is_asked_for(pytester: pytest.Pytester, base: str, marker: str) -> None:
    """Both ends of a connection have the policy, over the base that was named."""
    suite = asyncio_suite(CHOSEN, base, marker)
    done = run(pytester, suite, f"--kaio-loop={base}", KEEPALIVE, conftest=ONLY_ASYNCIO)
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines([f"kaio: loop={base}, keepalive=7s:3s:2*", "*::test_options PASSED*"])


@pytest.mark.parametrize("marker", MARKERS)
def test_without_the_option_nothing_changes(pytester: pytest.Pytester, marker: str) -> None:
    """The base's loop, the kernel's own values, no line in the header, and no module of kaio's loop imported."""
    suite = asyncio_suite(BARE, "asyncio", marker)
    suite += "    import sys\n    assert not {'kaio.policy', 'kaio.loop', 'kaio.kernel'} & sys.modules.keys()\n"
    done = run(pytester, suite, conftest=ONLY_ASYNCIO)
    done.assert_outcomes(passed=1)
    done.stdout.no_fnmatch_line("kaio:*")


def test_the_bare_option_takes_the_best_base_and_the_default_policy(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--kaio-loop` alone is auto: asyncio's loops where uvloop is not installed. The policy is as in kaio.run."""
    assert header(pytester, "--kaio-loop") == "kaio: loop=auto (uvloop), keepalive=20s:10s:4"
    monkeypatch.setenv("KAIO_KEEPALIVE", "5s:2s:3")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert header(pytester, "--kaio-loop") == "kaio: loop=auto (asyncio), keepalive=5s:2s:3"


def test_the_ini_file_takes_the_same_and_the_command_line_goes_first(pytester: pytest.Pytester) -> None:
    """`kaio_loop` and `kaio_keepalive`; each is overridden alone."""
    ini = "kaio_loop = asyncio\nkaio_keepalive = 7s:3s:2\n"
    assert header(pytester, ini=ini) == "kaio: loop=asyncio, keepalive=7s:3s:2"
    assert header(pytester, "--kaio-loop=uvloop", ini=ini) == "kaio: loop=uvloop, keepalive=7s:3s:2"
    assert header(pytester, "--kaio-keepalive=9s:3s:2", ini=ini) == "kaio: loop=asyncio, keepalive=9s:3s:2"
    assert header(pytester, "--kaio-loop=off", ini=ini) is None
    assert header(pytester, ini="kaio_keepalive = 7s:3s:2") is None


@pytest.mark.parametrize(
    ("arguments", "ini", "message"),
    [
        (["--kaio-loop=trio"], "", "--kaio-loop: 'trio' is none of auto, asyncio, uvloop, off"),
        (["--kaio-loop", "tests"], "", "; write --kaio-loop=auto tests to run what is in tests"),
        ([], "kaio_loop = trio", "kaio_loop: 'trio' is none of auto, asyncio, uvloop, off"),
        (["--kaio-loop=auto", "--kaio-keepalive=20x"], "", "--kaio-keepalive: "),
        (["--kaio-loop=auto"], "kaio_keepalive = 20x", "kaio_keepalive: "),
        ([KEEPALIVE], "", "--kaio-keepalive has no effect without --kaio-loop"),
        ([KEEPALIVE, "--kaio-loop=off"], "kaio_loop = auto", "--kaio-keepalive has no effect without --kaio-loop"),
    ],
)
def test_bad_values_are_usage_errors(pytester: pytest.Pytester, arguments: list[str], ini: str, message: str) -> None:
    """Before any test runs; the message names the option."""
    with pytest.raises(pytest.UsageError, match=re.escape(message)):
        header(pytester, *arguments, ini=ini)


def test_what_cannot_be_had_is_a_usage_error(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad policy in the environment, which is the default; uvloop, asked for by its name, where there is none."""
    monkeypatch.setenv("KAIO_KEEPALIVE", "20x")
    with pytest.raises(pytest.UsageError, match="KAIO_KEEPALIVE"):
        header(pytester, "--kaio-loop")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with pytest.raises(pytest.UsageError, match="kaio's loop over uvloop: "):
        header(pytester, "--kaio-loop=uvloop")


def test_a_usage_error_is_one_line(pytester: pytest.Pytester) -> None:
    """No traceback, and pytest's own exit code for it."""
    done = run(pytester, "def test_nothing(): pass", "--kaio-loop=trio")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: --kaio-loop: 'trio' is none of *"])
    done.stderr.no_fnmatch_line("*Traceback*")


# -- pytest-asyncio

FACTORIES = """
import asyncio, kaio, uvloop
covered = kaio.loop_factory("9s:3s:2", base=asyncio.SelectorEventLoop)
def pytest_asyncio_loop_factories(config, item):
    return {"plain": asyncio.SelectorEventLoop, "fast": uvloop.new_event_loop, "own": covered}
"""


def test_a_suite_keeps_its_own_factories_and_they_are_covered(pytester: pytest.Pytester) -> None:
    """Names and bases stay, also where a marker picks one; a factory of kaio's keeps its own policy."""
    suite = """
import pytest
EXPECTED = {"plain": ("asyncio", 7), "fast": ("uvloop", 7), "own": ("asyncio", 9)}
@pytest.mark.asyncio
async def test_each(request):
    base, idle = EXPECTED[request.node.callspec.id]
    assert (peers.base(), await peers.options()) == (base, [(1, idle, 3, 2)] * 2)
@pytest.mark.asyncio(loop_factories=["fast"])
async def test_one():
    assert (peers.base(), await peers.options()) == ("uvloop", [(1, 7, 3, 2)] * 2)
"""
    done = run(pytester, suite, "--kaio-loop", KEEPALIVE, conftest=FACTORIES)
    done.assert_outcomes(passed=4)
    done.stdout.fnmatch_lines_random([f"*::test_each?{name}? PASSED*" for name in ("plain", "fast", "own")])


@pytest.mark.heavy
def test_factories_for_some_tests_leave_the_others_the_options(pytester: pytest.Pytester) -> None:
    """A hook that answers None for a test; what is no mapping is still pytest-asyncio's to refuse."""
    some = "def pytest_asyncio_loop_factories(config, item): return None\n"
    run(pytester, asyncio_suite(CHOSEN, "uvloop"), "--kaio-loop", KEEPALIVE, conftest=some).assert_outcomes(passed=1)
    for wrong in ("[1]", "{'a': 1}"):
        done = run(pytester, asyncio_suite(CHOSEN, "uvloop"), "--kaio-loop", conftest=some.replace("None", wrong))
        assert done.ret != pytest.ExitCode.OK
        assert "must return a non-empty mapping" in done.stdout.str() + done.stderr.str()


def test_a_loop_lasts_as_long_as_its_scope(pytester: pytest.Pytester) -> None:
    """The tests of a module share one loop, where pytest-asyncio is told so; also over the suite's own factory."""
    suite = """
import asyncio, pytest, pytest_asyncio
pytestmark = pytest.mark.asyncio(loop_scope="module")
seen = []
@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def loop():
    return asyncio.get_running_loop()
async def test_one(loop):
    assert loop is asyncio.get_running_loop()
    assert type(loop).__name__.startswith("Kaio")
    seen.append(loop)
async def test_another(loop):
    await test_one(loop)
    assert seen == [loop, loop]
"""
    run(pytester, suite, "--kaio-loop").assert_outcomes(passed=2)
    own = "import asyncio\ndef pytest_asyncio_loop_factories(config, item): return {'a': asyncio.SelectorEventLoop}\n"
    run(pytester, suite, "--kaio-loop", conftest=own).assert_outcomes(passed=2)


# -- anyio's plugin


def test_a_suite_keeps_its_own_backends_and_they_are_covered(pytester: pytest.Pytester) -> None:
    """The suite chooses the base by its options, the fixture keeps parameters and scope; names of tests stay."""
    suite = """
import asyncio, kaio, pytest
covered = kaio.loop_factory("9s:3s:2", base=asyncio.SelectorEventLoop)
BACKENDS = {
    "name": ("asyncio", "asyncio", 7),
    "options": (("asyncio", {"debug": True}), "asyncio", 7),
    "uvloop": (("asyncio", {"use_uvloop": True}), "uvloop", 7),
    "no uvloop": (("asyncio", {"use_uvloop": False}), "asyncio", 7),
    "factory": (("asyncio", {"loop_factory": asyncio.SelectorEventLoop}), "asyncio", 7),
    "kaio": (("asyncio", {"loop_factory": covered}), "asyncio", 9),
}
@pytest.fixture(scope="module", params=BACKENDS)
def anyio_backend(request):
    yield BACKENDS[request.param][0]
@pytest.fixture(scope="module")
async def loop(anyio_backend):
    return asyncio.get_running_loop()
@pytest.mark.anyio
@pytest.mark.parametrize("number", range(2))
async def test_each(loop, request, anyio_backend_name, anyio_backend_options, number):
    assert loop is asyncio.get_running_loop()
    given, base, idle = BACKENDS[request.node.callspec.params["anyio_backend"]]
    assert (peers.base(), await peers.options()) == (base, [(1, idle, 3, 2)] * 2)
    assert anyio_backend_name == "asyncio"
    if given != "asyncio":
        assert given[1].keys() <= anyio_backend_options.keys()
    assert loop.get_debug() == ("debug" in anyio_backend_options)
"""
    done = run(pytester, suite, "--kaio-loop=asyncio", KEEPALIVE)
    done.assert_outcomes(passed=12)
    names = ("name", "options", "uvloop", "no uvloop", "factory", "kaio")
    done.stdout.fnmatch_lines_random([f"*::test_each?{name}-1? PASSED*" for name in names])


if importlib.util.find_spec("trio"):

    def test_trio_is_left_alone(pytester: pytest.Pytester) -> None:
        """Of anyio's own two backends one is asyncio's."""
        suite = """
import pytest, sniffio
@pytest.mark.anyio
async def test_each(anyio_backend):
    assert (anyio_backend == "trio") == (sniffio.current_async_library() == "trio")
    if anyio_backend != "trio":
        assert await peers.options() == [(1, 7, 3, 2)] * 2
"""
        done = run(pytester, suite, "--kaio-loop", KEEPALIVE)
        done.assert_outcomes(passed=2)
        done.stdout.fnmatch_lines_random(["*::test_each?trio? PASSED*", "*::test_each?asyncio? PASSED*"])


# -- what may be missing


@pytest.mark.heavy
def test_either_plugin_is_enough(pytester: pytest.Pytester) -> None:
    """pytest-asyncio absent, or anyio's plugin."""
    suite = asyncio_suite(CHOSEN, "uvloop", "pytest.mark.anyio")
    without = ("--kaio-loop", KEEPALIVE, "-p", "no:asyncio")
    run(pytester, suite, *without, conftest=ONLY_ASYNCIO).assert_outcomes(passed=1)
    run(pytester, asyncio_suite(CHOSEN, "uvloop"), "--kaio-loop", KEEPALIVE, "-p", "no:anyio").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("plugin", "why"),
    [
        ("pass", "--kaio-loop has no effect: there is neither pytest-asyncio nor anyio's plugin"),
        (
            "pluginmanager.register(types.ModuleType('old'), 'asyncio')",
            "--kaio-loop does not reach the tests of this pytest-asyncio, which takes loops from 1.4 on",
        ),
    ],
    ids=["none", "old"],
)
def test_tests_that_no_plugin_puts_on_the_loop_are_a_warning(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, plugin: str, why: str
) -> None:
    """Neither plugin is there, or a pytest-asyncio from before its hook."""
    pytester.makepyfile(
        test_suite="def test_it(): pass",
        old=f"import types\ndef pytest_addoption(pluginmanager): {plugin}",
    )
    pytester.syspathinsert()
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    done = pytester.runpytest_subprocess("-p", "old", "-p", "kaio.testing.pytest_plugin", "--kaio-loop")
    done.assert_outcomes(passed=1, warnings=1)
    done.stdout.fnmatch_lines([f"*PytestConfigWarning: {why}*"])


def test_the_plugin_can_be_turned_off(pytester: pytest.Pytester) -> None:
    """`-p no:kaio`: no option and no fixture."""
    write_ini(pytester, "")
    assert not pytester.parseconfigure(*QUICK, "-p", "no:kaio").pluginmanager.has_plugin("kaio")
    with pytest.raises(pytest.UsageError, match="unrecognized arguments: --kaio-loop"):
        pytester.parseconfigure(*QUICK, "-p", "no:kaio", "--kaio-loop")


def test_importing_the_plugin_costs_next_to_nothing() -> None:
    """pytest imports it in every run of everybody who has kaio."""
    look = """
import sys, pytest
before = set(sys.modules)
import kaio.testing.pytest_plugin
print(*sorted(sys.modules.keys() - before))
"""
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["kaio", "kaio.testing", "kaio.testing.pytest_plugin"]


# -- the page of docs


def test_what_the_page_shows_runs(pytester: pytest.Pytester, dead_peers: None) -> None:
    """Its files and its ini file, all in one suite, over both plugins."""
    page = DOCS.read_text("utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for language, block in blocks:
        name = "pyproject.toml" if language == "toml" else block.partition("\n")[0].removeprefix("# ")
        (pytester.path / name).write_text(block)
    names = {path.name for path in pytester.path.glob("*.*")}
    assert len(names) == len(blocks) == page.count("```") // 2 - 1  # one is a command
    done = pytester.runpytest_subprocess("-v", "-W", "error", *QUICK)
    done.stdout.fnmatch_lines(["kaio: loop=auto (uvloop), keepalive=10s:5s:4"])
    done.assert_outcomes(passed=5)


if sys.version_info >= (3, 13):

    def test_unittest_takes_a_loop(pytester: pytest.Pytester) -> None:
        """`loop_factory` of a class, as the page shows it."""
        suite = """
import kaio, unittest
class TestIt(unittest.IsolatedAsyncioTestCase):
    loop_factory = staticmethod(kaio.loop_factory("7s:3s:2"))
    async def test_options(self):
        self.assertEqual(await peers.options(), [(1, 7, 3, 2)] * 2)
"""
        run(pytester, suite).assert_outcomes(passed=1)
