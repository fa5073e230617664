"""Every fault of the corpus is caught by its rule and by no other. Thirty clean days break no rule, with weekends or
without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from components.common.contracts import Canonical
from components.data import ingest, validate
from components.data.frames.days import figure_frame, recent_days
from components.data.sources import simulator
from tests.components.data.faults import (
    CONFIG,
    DAYS,
    FAULTS,
    RULES,
    Corpus,
    Fault,
    day_of,
    right,
    table_of_faults,
    window,
)
from tests.components.small_world import PROJECT, ingest_config, ingest_tables


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    found = Corpus(tmp_path_factory.mktemp("corpus"))
    assert found.judge(found.clean) == set()
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_a_fault_is_caught_by_its_rule_and_no_other(fault: Fault, corpus: Corpus) -> None:
    broken = corpus.catch(fault)
    assert right(fault, broken), f"{sorted(broken)} are broken, not {[fault.rule, *fault.also]}"


def test_the_table_in_the_docs_is_that_of_the_corpus() -> None:
    _, _, shown = (PROJECT / "docs" / "faults.md").read_text().partition("## The corpus")
    for fault in FAULTS:
        assert f"| {fault.name} | `{fault.rule}` |" in shown
    assert shown.count("\n| ") == len(FAULTS) + 2  # with the heading and its line


def test_the_table_tells_a_fault_that_went_by(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Fault("nothing", "stop figures.volume", folder=lambda folder: None)
    monkeypatch.setattr("tests.components.data.faults.FAULTS", [nothing])
    assert table_of_faults(corpus) == [("nothing", "stop figures.volume", "", False)]


@pytest.mark.slow
def test_thirty_clean_days_raise_nothing(tmp_path: Path) -> None:
    """Judged on four days, so that every day from the second on is among the newest once."""
    world = replace(CONFIG, seed=11)
    for last in (8, 15, 22, 30):
        canonical = tmp_path / str(last)
        until = f"2024-03-{last + 1:02}T00:00:00+00:00"
        ingest.run(replace(ingest_config(), simulator=world, until=until, window_days=last), canonical)
        report = validate.run(RULES, canonical, tmp_path / f"{last}.json", tmp_path / f"{last}-docs")
        assert [validate.describe(rule) for rule in report["rules"] if not rule["passed"]] == []
        assert report["rows"]["events"] == last * world.impressions_per_day
        assert report["rows"]["figures"] > 0 or last < DAYS


def test_a_week_has_its_rhythm(tmp_path: Path) -> None:
    """Weekends with three tenths of the rows are usual once three are there, and a fall to a fifth of that is not."""
    raw = simulator.read("", replace(CONFIG, seed=11), window(30))
    day, chance = day_of(raw.events), np.random.default_rng(0).random(len(raw.events))
    kept = (chance < 0.3) | ~np.isin(day % 7, (1, 2))  # the first is a Friday

    def off(name: str, kept: np.ndarray) -> set[tuple[str, int]]:
        """Figures that are not usual, with the day of March."""
        ingest_tables(replace(raw, events=raw.events.filter(pa.array(kept))), tmp_path / name)
        data = Canonical(tmp_path / name)
        frame = figure_frame(recent_days(data, RULES, None), data, RULES)
        assert len(frame["day"].unique()) == 7
        frame = frame[frame["off"].abs() > 1]
        return {(figure, at.day) for figure, at in zip(frame["figure"], frame["day"], strict=True)}

    assert off("rhythm", kept) == set()
    assert ("volume", 27) in off("a Wednesday", kept & ((day != 26) | (chance < 0.2)))
    assert ("volume", 30) in off("a Saturday", kept & ((day != 29) | (chance < 0.06)))
    assert off("two weeks", kept & (day < 14)) == {("volume", 9), ("volume", 10)}  # as yet a fall like any other
