"""What training begins from changes with the champion where a warm start was asked for, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.common.artifacts import folder_hash, write_json
from components.training.start import StartConfig, run

FILES = {"config.json": "{}", "model.safetensors": "weights"}


@pytest.fixture
def champion(tmp_path) -> Path:
    """An output of the stage `champion`: version v1.0.0, a qin."""
    fetched(tmp_path / "champion", "v1.0.0", "qin")
    return tmp_path / "champion"


def fetched(folder: Path, version: str, model: str) -> None:
    write_json(folder / "champion.json", {"version": version, "model": model})
    (folder / "checkpoint").mkdir(exist_ok=True)
    for name, text in FILES.items():
        (folder / "checkpoint" / name).write_text(text + version)


def started(champion: Path, **warm: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """What the step says, and the hash of each model's folder."""
    output = champion.with_name("start")
    said = run(StartConfig(warm=warm), champion, output)
    return said, {model: folder_hash(output / model) for model in warm}


def test_a_warm_start_holds_the_champions_checkpoint(champion) -> None:
    said, _ = started(champion, qin=True, sdcnv3=True)
    assert said == {"qin": "v1.0.0", "sdcnv3": None}
    folder = champion.with_name("start")
    assert {f.name: f.read_text() for f in (folder / "qin/checkpoint").iterdir()} == {
        name: text + "v1.0.0" for name, text in FILES.items()
    }
    assert json.loads((folder / "qin/start.json").read_text()) == {"champion": "v1.0.0"}
    assert [f.name for f in (folder / "sdcnv3").iterdir()] == ["start.json"]


def test_a_promotion_changes_what_the_warm_model_of_its_family_starts_from_and_nothing_else(champion) -> None:
    _, cold = started(champion, qin=False, sdcnv3=False)
    _, first = started(champion, qin=True, sdcnv3=True)
    fetched(champion, "v1.1.0", "qin")
    assert started(champion, qin=False, sdcnv3=False)[1] == cold
    _, second = started(champion, qin=True, sdcnv3=True)
    assert second["sdcnv3"] == first["sdcnv3"] == cold["sdcnv3"]
    assert len({cold["qin"], first["qin"], second["qin"]}) == 3
    fetched(champion, "v2.0.0", "sdcnv3")
    said, third = started(champion, qin=True, sdcnv3=False)
    assert said == {"qin": None, "sdcnv3": None}
    assert third == cold


def test_before_the_first_promotion_every_start_is_cold(tmp_path) -> None:
    write_json(tmp_path / "champion/champion.json", {"version": None})
    assert started(tmp_path / "champion", qin=True, sdcnv3=True)[0] == {"qin": None, "sdcnv3": None}


def test_a_champion_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"champion\.json.*git checkout champion\.json"):
        started(tmp_path / "champion", qin=True)
