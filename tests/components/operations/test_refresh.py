"""refresh in a tiny project: new clicks go live without training, and nothing is published where nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from components.operations.refresh import needed, the_hour

if TYPE_CHECKING:
    from tests.conftest import Project


@pytest.fixture(scope="module")
def project(new_project: Callable[[str], Project]) -> Project:
    return new_project("refresh")


def refresh(project: Project, until: str) -> tuple[dict[str, Any], str]:
    """The command's facts, and all that it said."""
    said = project.python("-m", "components", "refresh", "--until", until)
    facts = next(line for line in reversed(said.splitlines()) if line.startswith("{"))
    return json.loads(facts), said


def serving(project: Project) -> dict[str, Any]:
    return json.loads((project.root / ".live/current/online/receipt.json").read_text())


def test_the_stages_that_make_features_and_no_others() -> None:
    names = needed(Path(__file__).parents[3])
    assert names[-1] == "features"
    assert set(names) == {"arrivals", "ingest", "validate", "embed", "features"}


def test_the_last_full_hour() -> None:
    assert the_hour(datetime(2026, 1, 11, 7, 59, 59, tzinfo=UTC)) == datetime(2026, 1, 11, 7, tzinfo=UTC)


@pytest.mark.slow
def test_new_clicks_go_live_and_the_same_ones_do_not_go_twice(project: Project) -> None:
    facts, _ = refresh(project, "2026-01-07T00:00:00+00:00")
    assert facts["published"], facts
    first, store = serving(project), (project.root / ".live/current/online").resolve()
    assert first["until"] == "2026-01-07T00:00:00+00:00"

    facts, said = refresh(project, "2026-01-07T00:00:00+00:00")
    assert (facts["published"], facts["why"]) == (False, "nothing changed")
    assert "features: unchanged" in said
    assert (project.root / ".live/current/online").resolve() == store

    facts, said = refresh(project, "2026-01-07T06:00:00+00:00")
    assert facts["published"], facts
    assert serving(project)["clicks"] > 0
    assert serving(project)["log_until"] > first["log_until"]
    assert store.is_dir(), "a server may read it still"

    facts, _ = refresh(project, "2026-01-07T00:00:00+00:00")
    assert not facts["published"] and "has newer data" in facts["why"]
    assert "train@" not in said
