"""Every fault of the corpus is caught by its rule and by no other; thirty clean days raise nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from components import ingest, validate
from tests.components.faults import CONFIG, DAYS, FAULTS, RULES, Corpus, Fault, right, table_of_faults
from tests.components.small_world import PROJECT, ingest_config


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
    monkeypatch.setattr("tests.components.faults.FAULTS", [nothing])
    assert table_of_faults(corpus) == [("nothing", "stop figures.volume", "", False)]


@pytest.mark.slow
def test_thirty_clean_days_raise_nothing(tmp_path: Path) -> None:
    """Judged on four days, so that every day from the second on is among the newest once."""
    world = replace(CONFIG, days=30, seed=11)
    for last in (8, 15, 22, 30):
        canonical = tmp_path / str(last)
        until = f"2024-03-{last + 1:02}T00:00:00+00:00"
        ingest.run(replace(ingest_config(), simulator=world, until=until), canonical)
        report = validate.run(RULES, canonical, tmp_path / f"{last}.json", tmp_path / f"{last}-docs")
        assert [validate.describe(rule) for rule in report["rules"] if not rule["passed"]] == []
        assert report["rows"]["events"] == last * world.impressions_per_day
        assert report["rows"]["figures"] > 0 or last < DAYS
