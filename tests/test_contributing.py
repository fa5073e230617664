"""The walk-throughs of CONTRIBUTING.md, taken from its code blocks and run in a copy of the project."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from components.common.artifacts import write_json
from components.common.contracts import Canonical
from tests.components.conftest import draw_rows, encoder_of, write

if TYPE_CHECKING:
    from tests.conftest import Project

pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(section: str) -> list[tuple[str, str, str]]:
    """(kind, file, text) of the section's code blocks that have a title."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return BLOCK.findall(text)


def edited(text: str, diff: str) -> str:
    """The text with a diff applied wherever its old lines stand. A comment at the end of a line does not matter."""
    lines = diff.splitlines()
    old, new = ([line[1:] for line in lines if line[:1] != other] for other in "+-")
    found = text.splitlines()
    plain = [line.partition(" #")[0].rstrip() for line in found]
    places = [i for i in range(len(found)) if plain[i : i + len(old)] == old]
    assert places, f"not in the file: {old}"
    for i in reversed(places):
        found[i : i + len(old)] = new
    return "\n".join(found) + "\n"


@pytest.fixture(scope="module")
def project(new_project: Callable[[str], Project]) -> Project:
    """A copy in which all three walk-throughs were followed."""
    copy = new_project("contributing")
    for section in ("Add a source", "Add a stage", "Add a model"):
        for kind, name, text in blocks(section):
            file = copy.root / name
            assert file.exists() == (kind == "diff"), f"{section}: {name}"
            file.write_text(edited(file.read_text(), text) if kind == "diff" else text)
    return copy


def test_the_new_source_and_the_new_stage_run(project: Project) -> None:
    project.python("-m", "components", "use", "clicklog", "--raw", "clicks.jsonl")
    project.python("-m", "dvc", "repro", "newcomers")
    events = Canonical(project.root / "data/canonical").events().to_pylist()
    assert [(row["user_id"], row["item_id"], row["label"], row["device"]) for row in events] == [
        (7, 21, 1, "phone"), (7, 22, 0, "phone"), (8, 21, 0, "tv"),
    ]  # fmt: skip
    assert json.loads((project.root / "artifacts/newcomers.json").read_text()) == {"2026-05-01": 1.0, "2026-05-02": 1.0}


def test_the_new_model_trains(project: Project) -> None:
    raw = draw_rows()
    write(project.root / "small", raw, *encoder_of(raw))
    write_json(project.root / "start/start.json", {"champion": None})
    project.python(
        "-m", "components", "train", "logistic", "--dataset", "small", "--weights", "start", "--output", "logistic",
        "--metrics", "logistic.json", "--history", "logistic.csv",
    )  # fmt: skip
    assert json.loads((project.root / "logistic/config.json").read_text())["family"] == "logistic"
    stages = project.python("-m", "dvc", "stage", "list", "--name-only").splitlines()
    assert {"newcomers", "train@logistic", "evaluate@logistic"} <= set(stages)


def test_what_was_added_fits_the_house(project: Project) -> None:
    """Style, layers, and what dvc.yaml and params.yaml must declare. Types take a minute: `make lint` checks them."""
    project.python("-m", "ruff", "check", ".")
    project.python("-m", "ruff", "format", "--check", ".")
    project.python("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()")
    checks = ["tests/test_structure.py", "-k", "not few_packages"]
    project.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *checks)
