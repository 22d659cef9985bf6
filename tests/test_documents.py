"""The Markdown pages: what they name is there."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])}
DECISIONS = ROOT / "docs" / "decisions"

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
TARGET = re.compile(r"^([\w-]+):", re.MULTILINE)
MAKE = re.compile(r"\bmake\s+([a-z][\w-]*)")
PATH = re.compile(r"(?<![\w./-])(?:kaio|docs|tests|benchmarks|examples|scripts)/[\w./-]*\w")
MODULE = re.compile(r"\bpython -m ((?:kaio|tests|benchmarks|scripts)(?:\.\w+)*)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def code(text: str) -> Iterator[str]:
    """What a page sets as code: blocks and spans."""
    yield from FENCE.findall(text)
    yield from SPAN.findall(FENCE.sub("", text))


def make_targets(text: str) -> set[str]:
    """The targets of the `make` commands in a page's code."""
    return {target for piece in code(text) for target in MAKE.findall(piece)}


def anchors(text: str) -> set[str]:
    """The fragments that GitHub gives a page's headings."""
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(FENCE.sub("", text)))
    return {heading.replace(" ", "-") for heading in kept}


def links(text: str) -> set[str]:
    """The targets of a page's links within the repository."""
    found = LINK.findall(FENCE.sub("", text))
    return {target for target in found if not re.match(r"[a-z]+:", target)}


def broken_links(page: pathlib.Path) -> list[str]:
    """Links to files that are not there, and to headings that are not in them."""
    broken = []
    for target in links(page.read_text("utf-8")):
        name, _, fragment = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (fragment and fragment not in anchors(file.read_text("utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_make_exist(page: str) -> None:
    """Each `make X` is a target of the Makefile."""
    targets = set(TARGET.findall((ROOT / "Makefile").read_text("utf-8")))
    assert make_targets(PAGES[page].read_text("utf-8")) - targets == set()


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    """Each path into the repository's folders leads to a file or a folder."""
    paths = set(PATH.findall(PAGES[page].read_text("utf-8")))
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_run_exist(page: str) -> None:
    """Each `python -m X` of the repository's own is a module."""
    modules = set(MODULE.findall(PAGES[page].read_text("utf-8")))
    assert [module for module in sorted(modules) if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_resolve(page: str) -> None:
    """The file is there, and so is the heading in it."""
    assert broken_links(PAGES[page]) == []


def test_the_index_of_decisions_names_every_page() -> None:
    """And README and CONTRIBUTING lead to it."""
    pages = {path.name for path in DECISIONS.glob("*.md")} - {"README.md"}
    assert links((DECISIONS / "README.md").read_text("utf-8")) == pages


PAGE = """# A `page`: of it
make believe that `make test` and `pytest
tests/test_policy.py` and kaio/net. See [there](there.md#two-words), [up](#a-page-of-it), [the web](https://x.test/y).
Nothing in net/ipv4/tcp_timer.c or /srv/kaio/x counts.

```
make check     # makes .venv
python -m tests.lives --lives 10
[no](link)
# no heading
```
"""


def test_what_the_tests_look_for_is_found() -> None:
    """The patterns find what they should, and prose is not taken for commands."""
    assert make_targets(PAGE) == {"test", "check"}
    assert PATH.findall(PAGE) == ["tests/test_policy.py", "kaio/net"]
    assert MODULE.findall(PAGE) == ["tests.lives"]
    assert links(PAGE) == {"there.md#two-words", "#a-page-of-it"}
    assert anchors(PAGE) == {"a-page-of-it"}


def test_broken_links_are_found(tmp_path: pathlib.Path) -> None:
    """A file that is not there, and a heading that is not in it."""
    page = tmp_path / "page.md"
    page.write_text(f"{PAGE}\n[down](#nowhere)\n", "utf-8")
    assert set(broken_links(page)) == {"there.md#two-words", "#nowhere"}
    (tmp_path / "there.md").write_text("## Two words\n", "utf-8")
    assert broken_links(page) == ["#nowhere"]
