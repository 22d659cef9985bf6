"""docs/architecture.md says what the code is: both diagrams, the stages, and every name in it."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest

from kaio.net.ending import ENDED, TABLE, Stage

from .import_graph import ROOT, mermaid

PAGE = pathlib.Path(ROOT.parent, "docs", "architecture.md").read_text("utf-8")
NAMES = sorted(set(re.findall(r"`(kaio(?:\.\w+)+)`", PAGE)))


def state_diagram() -> str:
    """The table of the end of a connection as a Mermaid diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {next(iter(Stage)).name}"]
    for stage in Stage:
        lines += [f"    {stage.name} --> {after.name}: {trigger.name}" for trigger, after in TABLE[stage].items()]
    lines += [f"    {stage.name} --> [*]" for stage in Stage if stage in ENDED]
    return "\n".join(lines)


@pytest.mark.parametrize("diagram", [mermaid(), state_diagram()], ids=["rooms", "stages"])
def test_diagrams_are_those_of_the_code(diagram: str) -> None:
    """A diagram that is out of date is printed as it should be."""
    print(diagram)
    assert f"```mermaid\n{diagram}\n```" in PAGE


def test_each_stage_is_explained() -> None:
    """Once, in the order of the code."""
    assert re.findall(r"^\| `([A-Z_]+)` \|", PAGE, re.MULTILINE) == [stage.name for stage in Stage]


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name: str) -> None:
    """A module, or what a module has."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return
    pytest.fail(f"there is no {name}")


def test_there_are_names() -> None:
    """The pattern finds them."""
    assert len(NAMES) > 20
