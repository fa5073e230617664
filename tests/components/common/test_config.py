"""params.yaml -> configs: every mistake is named with its key, its value and its remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest
import yaml

from components.common.config import load, section
from components.common.schedule import ScheduleConfig
from components.common.splits import SplitConfig
from components.data.ingest import IngestConfig
from components.data.validate import ValidateConfig
from components.features.dataset import DatasetConfig
from components.features.embed import EmbedConfig
from components.features.publish import PublishConfig
from components.features.views import FeaturesConfig
from components.operations.day import RunConfig
from components.release.evaluate import EvaluateConfig
from components.release.gate import GateConfig
from components.release.package import PackageConfig
from components.release.smoke import SmokeConfig
from components.training.config import TrainConfig
from components.training.refit import RefitConfig
from components.training.start import StartConfig
from tests.components.small_world import PROJECT

SECTIONS = {
    "ingest": IngestConfig,
    "validate": ValidateConfig,
    "split": SplitConfig,
    "embed": EmbedConfig,
    "features": FeaturesConfig,
    "dataset": DatasetConfig,
    "start": StartConfig,
    **{f"train.{model}": TrainConfig for model in ("qin", "sdcnv3")},
    "evaluate": EvaluateConfig,
    "gate": GateConfig,
    "refit": RefitConfig,
    "package": PackageConfig,
    "smoke": SmokeConfig,
    "publish": PublishConfig,
    "run": RunConfig,
    "schedule": ScheduleConfig,
}
Edit = Callable[[dict], object]


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Edit], Path]:
    """The committed params.yaml with an edit, as a file of its own."""

    def write(edit: Edit) -> Path:
        content = yaml.safe_load((PROJECT / "params.yaml").read_text())
        edit(content)
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "params.yaml"

    return write


def message(params: Path, name: str) -> str:
    with pytest.raises(ValueError, match=str(params)) as caught:
        load(params, name, SECTIONS[name])
    return str(caught.value)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_committed_section_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)  # ingest.raw is relative to the project's root
    config = load(PROJECT / "params.yaml", name, SECTIONS[name])
    raw = section(PROJECT / "params.yaml", name)
    for key in raw.keys() - {"simulator"}:
        found = getattr(config, key)
        plain = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
        assert (list(plain) if isinstance(plain, tuple) else plain) == raw[key]


def test_there_is_no_section_that_no_step_reads() -> None:
    content = yaml.safe_load((PROJECT / "params.yaml").read_text())
    train = {f"train.{model}" for model in content.pop("train")}
    assert content.keys() | train == SECTIONS.keys()


def test_unknown_key_is_named_with_the_known_ones(edited: Callable[[Edit], Path]) -> None:
    said = message(edited(lambda p: p["embed"].update(dimension=3)), "embed")
    assert "embed.dimension: unknown key" in said
    assert "dim, fit, image_encoder, seed, text_dim, text_encoder, text_features" in said


def test_unknown_nested_key_is_named_with_the_known_ones_there(edited: Callable[[Edit], Path]) -> None:
    said = message(edited(lambda p: p["ingest"]["simulator"].update(colour="red")), "ingest")
    assert "ingest.simulator.colour: unknown key" in said
    assert "impressions_per_day" in said
    assert "source" not in said  # that one is known a level above


@pytest.mark.parametrize(
    ("name", "edit", "told"),
    [
        ("dataset", lambda p: p["dataset"].pop("max_tags"), "dataset.max_tags: missing; add it"),
        ("ingest", lambda p: p["ingest"]["simulator"].pop("drift"), "ingest.simulator.drift: missing; add it"),
        ("embed", lambda p: p["embed"].update(dim="many"), "embed.dim is 'many': Input should be a valid integer"),
        ("embed", lambda p: p["embed"].update(dim=2.5), "embed.dim is 2.5: Input should be a valid integer"),
        ("embed", lambda p: p["embed"].update(dim=None), "embed.dim is None: Input should be a valid integer"),
        ("validate", lambda p: p["validate"].update(label_rate=[0.1]), "validate.label_rate.1: missing"),
        ("validate", lambda p: p["validate"].update(label_rate=[0.9, 0.1]), "label_rate is [0.9, 0.1]; it must be"),
        ("validate", lambda p: p["validate"].update(trailing_days=0), "trailing_days is 0; at least 1"),
        ("split", lambda p: p["split"].update(test_share=0.5), "test_share is 0.5; it is a share"),
        ("embed", lambda p: p["embed"].update(dim=0), "dim is 0; it must be at least 1"),
        ("features", lambda p: p["features"].update(availability_lag_seconds=-1), "availability_lag_seconds is -1"),
        ("features", lambda p: p["features"].update(popularity_days=0), "popularity_days is 0"),
        ("dataset", lambda p: p["dataset"].update(history_length=40_000), "history_length is 40000"),
        ("dataset", lambda p: p["dataset"].update(min_count=0), "min_count is 0"),
        ("ingest", lambda p: p["ingest"]["simulator"].update(users=0), "ingest.simulator: users is 0"),
        ("ingest", lambda p: p["ingest"]["simulator"].update(click_rate=1.0), "click_rate is 1.0; it is a share"),
        ("ingest", lambda p: p["ingest"]["simulator"].update(late_share=-0.1), "late_share is -0.1; it is a share"),
        ("ingest", lambda p: p["ingest"].update(source="kaggle"), "unknown source 'kaggle'; known are files"),
        ("ingest", lambda p: p["ingest"].update(raw="no/such"), "ingest.raw: 'no/such' is not there"),
    ],
)
def test_a_mistake_is_named(
    name: str, edit: Edit, told: str, edited: Callable[[Edit], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    said = message(edited(edit), name)
    assert told in said
    assert f"\n  {name}" in said  # the section too


@pytest.mark.parametrize("value", ["2026-10-05", "2026-10-05T00:00:00+00:00"])
def test_a_time_that_yaml_took_for_one_is_told_to_be_quoted(value: str, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(
        (PROJECT / "params.yaml").read_text().replace('until: "2026-01-11T00:00:00+00:00"', f"until: {value}")
    )
    said = message(params, "ingest")
    assert "ingest.until is 2026-10-05" in said
    assert "put it in quotes" in said


def test_several_mistakes_are_told_at_once(edited: Callable[[Edit], Path]) -> None:
    def edit(params: dict) -> None:
        params["ingest"]["simulator"].pop("items")
        params["ingest"]["simulator"].update(users="few", colour="red")
        params["ingest"].update(nature=1)
        params["ingest"].pop("source")

    said = message(edited(edit), "ingest")
    keys = ["simulator.items", "simulator.users", "simulator.colour", "nature", "source"]
    assert sorted(line.split()[0].rstrip(":") for line in said.splitlines()[1:]) == sorted(f"ingest.{k}" for k in keys)


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        ("train: {sdcnv3: {}}\n", "train.qin", "no section 'train.qin': 'qin' is not among ['sdcnv3']"),
        ("train: {sdcnv3: {}}\n", "ingest", "no section 'ingest'"),
        ("", "embed", "no section 'embed'"),
        ("embed: 5\n", "embed", "section 'embed' is 5; it must be a mapping"),
        ("embed: {dim: [1\n", "embed", "is no YAML"),
    ],
)
def test_a_file_without_the_section(content: str, name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"params\.yaml") as caught:
        section(tmp_path / "params.yaml", name)
    assert told in str(caught.value)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there; run from the project's root, or name it with --params"):
        section(tmp_path / "params.yaml", "embed")
