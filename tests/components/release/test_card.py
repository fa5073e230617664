"""The model card has what a reader needs, and equal inputs give equal texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from components.common.artifacts import read_json
from components.common.dataset import Dataset
from components.release import card, package
from models.checkpoint import load
from tests.bento.world import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("card"))


def written(world: World, kind: str) -> str:
    decision = read_json(world.decision, "refit")
    decision["reasons"] = ["qin passes | all rules"]
    decision["shipped"]["kind"] = kind
    facts = {"train_until": "2026-01-11T00:00:00+00:00", "train_rows": 12345, "best_epoch": 3, "train": {"lr": 0.001}}
    shipped = replace(load(world.model), facts=facts)
    evaluation = package.evaluated(decision, world.evaluations)
    hashes = {"data_sha256": "abc", "packages": ["torch==2.0", "numpy==2.1"]}
    return card.write("ctr-ranker:qin-1", decision, evaluation, shipped, Dataset.open(world.dataset), hashes)


def test_the_card_says_what_ships_how_good_it_is_and_where_it_is_weak(world: World) -> None:
    text = written(world, "refit")
    for said in (
        "# ctr-ranker:qin-1\n", "| has seen the rows until | 2026-01-11 00:00 UTC |", "| rows fitted on | 12,345 |",
        "train 20, valid 10, test 10", "| ships | the judged model, fitted again on all days |", "| train.lr | 0.001 |",
        "| AUC | 0.7123 | 0.6923 to 0.7323 |", "| calibration error | 0.0321 |",
        "| clicks a row that it would earn, off-policy | 0.3123 | 0.3000 to 0.3200 |",
        "| v0.0.7 | 0.7000 | +0.0123 | 0.0084 to 0.0162 |", "| new items | 4 | 0.6012 | +0.0123 |",
        "| history 0 | 2 | none: one class |", "figures of the judged model", "- qin passes | all rules",
        "- it ships as judged", "weakest on new items: AUC 0.6012, and 0.7123 on all rows",
        "fewer than 1,000 rows: new items, history 0", "Not for decisions about people", "| data_sha256 | abc |",
        "torch==2.0, numpy==2.1", "sigmoid(1.0000",
    ):  # fmt: skip
        assert said in text, said
    assert "group AUC" not in text  # it could not be measured
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    assert written(world, "refit") == text
    assert "figures of the judged model" not in written(world, "judged")


def test_figures_of_other_bytes_are_refused(world: World, tmp_path: Path) -> None:
    decision = read_json(world.decision, "refit")
    found = package.evaluated(decision, world.evaluations) | {"checkpoint_sha256": "other"}
    (tmp_path / "qin").mkdir()
    (tmp_path / "qin/evaluation.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="is of checkpoint other, the gate judged"):
        package.evaluated(decision, tmp_path)
