"""A warm start scores as the champion did, whatever moved in the vocabularies, and says what it could not keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from components.common.artifacts import write_json
from components.common.dataset import UNSEEN, Dataset
from components.common.scoring import score
from components.release.evaluate import predict_translated
from components.training import train
from components.training.config import TrainConfig
from components.training.step import Step
from components.training.warm_start import Start, tables, take_weights
from models.checkpoint import UNCALIBRATED, Checkpoint, checkpoint_hash, load
from models.families import FAMILIES, build
from models.metrics import auc
from models.schema import SPECIAL, UNKNOWN, Catalog, Encoder, Feature

pytestmark = pytest.mark.usefixtures("one_thread")
TASTES = ("jazz", "folk", "rock", "pop")
TAGS = ("live", "mono", "slow", "solo", "vocal")  # the champion knows the last four
USERS, ITEMS = range(1000, 1240, 3), range(50, 100)


class World:
    """A champion of each family that knows 60 users, 20 hours, 40 items and four tags, and today's datasets."""

    def __init__(self, root: Path, raw_rows: Any, write_dataset: Any, encoder_over: Any) -> None:
        self.root, self.raw, self.write, self.encoder_over = root, raw_rows(), write_dataset, encoder_over
        known = encoder_over(USERS[:60], range(20), TASTES[:3], ITEMS[:40], known_tags=TAGS[1:])
        before = replace(self.raw, valid_from="2026-01-08", test_from="2026-01-09", ends="2026-01-10")
        self.yesterday = write_dataset(root / "yesterday", before, known)

    def dataset(self, name: str, encoder: tuple[Encoder, Catalog]) -> Path:
        return self.write(self.root / name, self.raw, encoder)

    def today(self, **changes: Any) -> tuple[Encoder, Catalog]:
        """More users, hours, items, and tastes and tags in another order; the vectors' fit is yesterday's."""
        given = {"users": USERS, "hours": range(24), "tastes": TASTES[::-1], "items": ITEMS, "known_tags": TAGS[::-1]}
        return self.encoder_over(**(given | changes))

    def run(self, config: TrainConfig, model: str, dataset: Path, name: str, start: Path) -> dict[str, Any]:
        out = self.root / name
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            return train.run(config, model, dataset, start, out / model, out / "metrics.json", out / "history.csv")

    def cold(self) -> Path:
        write_json(self.root / "cold/start.json", {"champion": None})
        return self.root / "cold"

    def warm(self, model: str) -> Path:
        """A start from the champion, as the stage writes it."""
        return self.root / "warm" / model


@pytest.fixture(scope="module")
def world(tmp_path_factory, raw_rows, write_dataset, encoder_over, networks) -> World:
    made = World(tmp_path_factory.mktemp("warm"), raw_rows, write_dataset, encoder_over)
    for model in FAMILIES:
        asked = TrainConfig(
            seed=3, batch_size=128, max_epochs=10, patience=10, lr=0.01, lr_factor=0.5, lr_patience=0, min_lr=1e-6,
            embedding_l2=1e-6, network_l2=0.0, ema=0.0, clip_norm=10.0, device="cpu", precision="fp32", compile=False,
            network=networks[model],
        )  # fmt: skip
        made.run(asked, model, made.yesterday, f"champion-{model}", made.cold())
        write_json(made.warm(model) / "start.json", {"champion": "v1.2.0"})
        (made.root / f"champion-{model}" / model).rename(made.warm(model) / "checkpoint")
    return made


def begun(world: World, model: str, network: dict[str, Any], data: Dataset) -> tuple[Any, Checkpoint, str | None]:
    """A fresh model with the champion's weights, the champion, and what was said."""
    start = Start.read(world.warm(model))
    assert start.champion == "v1.2.0" and start.checkpoint is not None
    torch.manual_seed(9)
    fresh = build(model, network, data.schema)
    return fresh, start.checkpoint, take_weights(fresh, network, data, start.checkpoint)


def scores(model: Any, data: Dataset, rows: tuple[int, int]) -> np.ndarray:
    return score(model, data, rows)[0].sigmoid().numpy()


def of_weights(champion: Checkpoint) -> Checkpoint:
    """A start takes the champion's weights; what makes its logits probabilities is fitted again."""
    return replace(champion, calibration=UNCALIBRATED)


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_before_its_first_step_the_model_scores_as_the_champion(world, networks, model) -> None:
    """Users, hours, tastes and tags that it never saw too: they are UNKNOWN to it. Items are the same ones here."""
    folder = world.dataset("same-items", world.today(items=ITEMS[:40]))
    data = Dataset.open(folder)
    fresh, champion, said = begun(world, model, networks[model], data)
    assert said == (
        "20 of 80 values of user_id are new; 1 of 4 values of taste are new; 4 of 24 values of hour are new; "
        "0 of 40 values of item_id are new; 0 of 4 values of kind are new; 1 of 5 values of tags are new; "
        "the vectors are of the same fit"
    )
    rows = data.splits["test"]
    theirs = predict_translated(of_weights(champion), data, pq.read_table(folder / UNSEEN), rows)
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(scores(fresh, data, rows), theirs, atol=1e-6)


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_an_item_that_is_new_starts_as_an_unknown_one_and_a_value_that_went_is_dropped(world, networks, model) -> None:
    tags = ("duet", "vocal", "live", "mono")  # slow and solo are gone, the first is new to all
    encoder = world.today(items=ITEMS[5:], users=USERS[7:], known_tags=tags)
    data = Dataset.open(world.dataset("other-items", encoder))
    fresh, champion, _ = begun(world, model, networks[model], data)
    mine = tables(fresh, data.schema)
    theirs = tables(champion.model, champion.encoder.schema)
    values = {
        "item_id": (ITEMS[5:], ITEMS[:40]),
        "user_id": (USERS[7:], USERS[:60]),
        "tags": (tags, TAGS[1:]),
    }
    for name, (today, known) in values.items():
        feature, table = mine[name]
        assert feature.size == len(today) + SPECIAL == len(table)
        old = theirs[name][1]
        assert not table[0].any()
        assert torch.equal(table[1], old[UNKNOWN])
        for i, value in enumerate(today):
            there = known.index(value) + SPECIAL if value in known else UNKNOWN
            assert torch.equal(table[i + SPECIAL], old[there]), (name, value)


def turned(catalog: Catalog, width: int = 3) -> Catalog:
    """The same items under another fit: their vectors times a matrix."""
    assert catalog.vector_IE is not None
    matrix = torch.randn(3, width, generator=torch.Generator().manual_seed(4))
    return replace(catalog, vector_IE=catalog.vector_IE @ matrix)


@pytest.mark.parametrize("model", sorted(FAMILIES))
@pytest.mark.parametrize("width", [3, 5])
def test_vectors_of_another_fit_keep_their_projections(world, networks, model, width) -> None:
    encoder, catalog = world.today(items=ITEMS[:40], name="a new fit")
    schema = encoder.schema
    features = tuple(replace(f, size=width) if f.kind == "vector" else f for f in schema.features)
    encoder = Encoder(replace(schema, features=features), encoder.integers)
    folder = world.dataset(f"new-fit-{width}", (encoder, turned(catalog, width)))
    data = Dataset.open(folder)
    fresh, champion, said = begun(world, model, networks[model], data)
    assert said is not None and "the vectors are of another fit: 32 items keep 100.0% of their projections" in said
    rows = data.splits["test"]
    # by its own catalog, and its own vectors
    theirs = predict_translated(of_weights(champion), data, pq.read_table(folder / UNSEEN), rows)
    np.testing.assert_allclose(scores(fresh, data, rows), theirs, atol=1e-4)


def test_too_few_items_of_both_days_leave_the_projection_fresh(world, networks) -> None:
    encoder, catalog = world.today(items=[*ITEMS[:5], *range(200, 240)], name="a new fit")
    data = Dataset.open(world.dataset("few-items", (encoder, turned(catalog))))
    fresh, champion, said = begun(world, "qin", networks["qin"], data)
    assert said is not None and "4 items tell too little: their projection starts afresh" in said
    torch.manual_seed(9)
    untouched = build("qin", networks["qin"], data.schema)
    assert torch.equal(fresh.items.project.weight, untouched.items.project.weight)
    assert torch.equal(fresh.out.weight, champion.model.get_parameter("out.weight"))


def test_features_that_changed_leave_the_tables_alone(world, networks) -> None:
    """A feature more, and one whose values were integers and are strings now."""
    encoder, catalog = world.today()
    hour = next(f for f in encoder.schema.features if f.name == "hour")
    named = replace(hour, vocab=tuple(f"h{i}" for i in range(24)))
    more = Feature(name="device", owner="impression", kind="categorical", size=4, origin="context", vocab=("a", "b"))
    features = tuple(named if f.name == "hour" else f for f in encoder.schema.features)
    at = features.index(named) + 1
    schema = replace(encoder.schema, features=(*features[:at], more, *features[at:]))
    data = replace(Dataset.open(world.dataset("plain", (encoder, catalog))), encoder=Encoder(schema, encoder.integers))
    fresh, champion, said = begun(world, "qin", networks["qin"], data)
    assert said is not None
    assert "device is a new feature" in said and "hour is a new feature" in said
    assert said.endswith("the features changed: the layers that read them start afresh")
    torch.manual_seed(9)
    untouched = build("qin", networks["qin"], schema)
    assert torch.equal(fresh.out.weight, untouched.out.weight)
    mine, old = tables(fresh, schema), tables(champion.model, champion.encoder.schema)
    assert torch.equal(mine["kind"][1], old["kind"][1])
    assert torch.equal(mine["hour"][1], tables(untouched, schema)["hour"][1])


@pytest.mark.parametrize("model", sorted(FAMILIES))
def test_a_warm_run_learns_on_from_the_champion(world, config, model, capsys) -> None:
    dataset = world.dataset("today", world.today())
    champion, data = load(world.warm(model) / "checkpoint"), Dataset.open(dataset)
    start, end = data.splits["valid"]
    labels = torch.from_numpy(world.raw.label[start:end])
    theirs = predict_translated(of_weights(champion), data, pq.read_table(dataset / UNSEEN), (start, end))
    before = auc(labels, torch.from_numpy(theirs))
    asked = config(model, max_epochs=1, lr=1e-4)
    warm = world.run(asked, model, dataset, "warm-run", world.warm(model))
    cold = world.run(asked, model, dataset, "cold-run", world.cold())
    assert warm["valid_auc"] > before - 0.01 > cold["valid_auc"] + 0.05
    said = capsys.readouterr().out
    assert said.count(f"{model}: starts from the champion v1.2.0: 20 of 80 values of user_id are new; ") == 1
    facts = {name: load(world.root / name / model).facts["warm_start"] for name in ("warm-run", "cold-run")}
    assert facts == {"warm-run": "v1.2.0", "cold-run": None}


def test_another_network_is_a_cold_start(world, config, networks, capsys) -> None:
    dataset = world.dataset("today-again", world.today())
    other = config(network=networks["qin"] | {"dropout": 0.2}, max_epochs=1)
    world.run(other, "qin", dataset, "cold-one", world.cold())
    capsys.readouterr()
    world.run(other, "qin", dataset, "warm-one", world.warm("qin"))
    assert "qin: cold start: the champion v1.2.0 has another network: {" in capsys.readouterr().out
    cold, warm = (load(world.root / name / "qin") for name in ("cold-one", "warm-one"))
    assert warm.facts["warm_start"] is None
    for name, tensor in cold.model.state_dict().items():
        assert torch.equal(tensor, warm.model.state_dict()[name]), name
    assert begun(world, "qin", other.network, Dataset.open(dataset))[2] is None


def test_a_champion_that_has_seen_a_valid_day_starts_no_training(world, config, capsys) -> None:
    """Its epochs would be chosen by days that it knows."""
    same_day = replace(world.raw, valid_from="2026-01-08", test_from="2026-01-09", ends="2026-01-10")
    dataset = world.write(world.root / "same-day", same_day, world.today())
    world.run(config(max_epochs=1), "qin", dataset, "knows", world.warm("qin"))
    assert (
        "qin: cold start: the champion v1.2.0 has seen the days until 2026-01-09T00:00:00+00:00, and the valid days "
        "begin at 2026-01-08T00:00:00+00:00"
    ) in capsys.readouterr().out
    assert load(world.root / "knows/qin").facts["warm_start"] is None


def test_the_state_of_a_cold_run_is_no_state_of_a_warm_one(world, config, monkeypatch, capsys) -> None:
    dataset, real = world.dataset("today-third", world.today()), Step.take
    asked = config(max_epochs=2)

    def dead(step: Step, *arguments: Any) -> Any:
        if step.state.progress.epoch == 1:
            raise KeyboardInterrupt
        return real(step, *arguments)

    for start in (world.cold(), world.warm("qin")):
        with monkeypatch.context() as patched:
            patched.setattr(Step, "take", dead)
            with pytest.raises(KeyboardInterrupt):
                world.run(asked, "qin", dataset, "out", start)
        assert "continues" not in capsys.readouterr().out
    world.run(asked, "qin", dataset, "out", world.warm("qin"))
    assert "qin: continues after epoch 1, step 0" in capsys.readouterr().out


def test_a_start_that_is_not_whole_is_refused(world, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"start\.json is not there; run `dvc repro start`"):
        Start.read(tmp_path)
    write_json(tmp_path / "start.json", {"champion": "v1.2.0"})
    with pytest.raises(ValueError, match="no file"):
        Start.read(tmp_path)
    hashes = {Start.read(world.warm(model)).sha256 for model in FAMILIES}
    assert len(hashes) == 2
    assert json.loads((world.warm("qin") / "start.json").read_text()) == {"champion": "v1.2.0"}
    assert len(checkpoint_hash(world.warm("qin") / "checkpoint")) == 64
