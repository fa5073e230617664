"""Every figure of the evaluation beside an independent computation of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import log_loss, roc_auc_score

from components.common.artifacts import file_hash, write_json
from components.common.dataset import UNSEEN, Dataset
from components.release import evaluate, slices, statistics
from components.release.measures import EvaluateConfig
from components.release.policy import PolicyConfig
from components.release.slices import SlicesConfig
from models.checkpoint import Checkpoint, checkpoint_hash, save
from models.checkpoint import load as load_checkpoint
from models.families import build
from models.schema import PADDING, UNKNOWN, Batch, schema_hash

SLICES = SlicesConfig(history=[1, 5, 20], popularity=[0.5], columns=["hour"])
CONFIG = EvaluateConfig(
    seed=1, bootstrap=40, calibration_bins=7, slices=SLICES, policy=PolicyConfig(rows=200, candidates=3)
)
NO_CHAMPION = {"version": None}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def raw(raw_rows) -> Any:
    return raw_rows()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, raw, write_dataset) -> Path:
    return write_dataset(tmp_path_factory.mktemp("evaluate") / "dataset", raw)


@pytest.fixture(scope="module")
def data(dataset) -> Dataset:
    return Dataset.open(dataset)


@pytest.fixture(scope="module")
def unseen(dataset) -> pa.Table:
    return pq.read_table(dataset / UNSEEN)


@pytest.fixture(scope="module")
def save_model(networks) -> Callable[..., Path]:
    """A model with weights far from their start, over an encoder and catalog, as `train` would have saved it."""

    def make(folder: Path, encoder: Any, catalog: Any, data_sha256: str, model: str = "qin", seed: int = 0) -> Path:
        torch.manual_seed(seed)
        network = build(model, networks[model], encoder.schema)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
            for module in network.modules():
                if isinstance(module, torch.nn.Embedding):
                    module.weight[PADDING] = 0
        checkpoint = Checkpoint(
            family=model, network=networks[model], model=network.eval(), encoder=encoder, catalog=catalog,
            schema_hash=schema_hash(encoder.schema, encoder.integers, catalog),
            facts={"data_sha256": data_sha256, "configuration": model, "train_rows": 1000},
        )  # fmt: skip
        save(folder, checkpoint)
        return folder

    return make


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data, save_model) -> Path:
    return save_model(tmp_path_factory.mktemp("qin") / "qin", data.encoder, data.catalog, data.facts["data_sha256"])


@pytest.fixture
def champion(tmp_path) -> Path:
    write_json(tmp_path / "champion/champion.json", NO_CHAMPION)
    return tmp_path / "champion"


# ---- slices -----------------------------------------------------------------------------------------------------


def test_slices_are_those_of_a_look_at_every_row(data, raw) -> None:
    train = range(*raw.splits["train"])
    seen_users, seen_items = {raw.user[i] for i in train}, {raw.item[i] for i in train}
    expected: dict[str, list[bool]] = {}
    for i in range(*raw.splits["test"]):
        n = raw.length[i]
        for name, holds in {
            "new items": raw.item[i] not in seen_items,
            "new users": raw.user[i] not in seen_users,
            "history 0": n == 0,
            "history 1-4": 1 <= n <= 4,
            "history 5-19": 5 <= n <= 19,
            "history 20+": n >= 20,
            "no item vector": raw.item[i] % 5 == 0,
        }.items():
            expected.setdefault(name, []).append(bool(holds))
    found = slices.masks(replace(SLICES, popularity=[], columns=[]), data)
    assert {name: mask.tolist() for name, mask in found.items()} == expected
    assert all(mask.any() for name, mask in found.items() if name != "history 20+")


# ---- the program ------------------------------------------------------------------------------------------------


def test_writes_what_it_measured(dataset, data, raw, checkpoint, champion, tmp_path, monkeypatch) -> None:
    output = tmp_path / "qin"
    monkeypatch.setattr(evaluate, "SCORE_BATCH", 100)  # 520 test rows: six batches
    found = evaluate.run(CONFIG, "qin", checkpoint, dataset, champion, output)
    assert json.loads((output / "evaluation.json").read_text()) == found
    start, end = raw.splits["test"]
    label = raw.label[start:end]
    rows = pq.read_table(output / "predictions.parquet").to_pandas()
    assert rows["user_id"].tolist() == raw.user[start:end].tolist()
    assert rows["label"].tolist() == label.tolist()
    model = load_checkpoint(checkpoint).model
    logits = model(data.batch(slice(start, end)), data.catalog, data.click_log).logit_B.detach().numpy()
    np.testing.assert_allclose(rows["score"], 1 / (1 + np.exp(-logits)), atol=1e-6)

    test = found["test"]
    assert test["rows"] == 520
    assert test["auc"] == pytest.approx(roc_auc_score(label, rows["score"]), abs=1e-12)
    for name in ("auc", "logloss", "group_auc"):
        low, high = test["intervals"][name]
        assert low < test[name] < high, name
    assert test["oracle_auc"] == pytest.approx(roc_auc_score(label, raw.oracle[start:end]), abs=1e-12)
    assert test["oracle_logloss"] == pytest.approx(log_loss(label, raw.oracle[start:end].astype(float)), abs=1e-9)
    assert found["references"] == []
    assert found["cost"] > 0
    assert found["checkpoint_sha256"] == checkpoint_hash(checkpoint)
    assert (found["data_sha256"], found["schema_hash"]) == (data.facts["data_sha256"], data.facts["schema_hash"])
    for name, mask in slices.masks(SLICES, data).items():
        part = found["slices"][name]
        assert part["rows"] == mask.sum()
        if mask.any():
            assert part["auc"] == pytest.approx(roc_auc_score(label[mask], rows["score"][mask]), abs=1e-12)
    assert found["slices"]["history 20+"] == {"rows": 0, "auc": None}
    start, end = raw.splits["valid"]
    valid = pq.read_table(output / "valid.parquet").to_pandas()
    assert valid["label"].tolist() == raw.label[start:end].tolist()
    np.testing.assert_allclose(valid["score"], evaluate.predict(load_checkpoint(checkpoint), data, (start, end)))

    headline = json.loads((output / "metrics.json").read_text())
    assert headline == {name: test[name] for name in headline}
    assert set(headline) == {"auc", "group_auc", "logloss", "calibration_error", "oracle_auc"}
    roc = pd.read_csv(output / "roc.csv")
    area = np.trapezoid(roc["true_positive_rate"], roc["false_positive_rate"])
    assert area == pytest.approx(test["auc"], abs=0.01)
    curve = pd.read_csv(output / "calibration.csv")
    error = (curve["rows"] * (curve["predicted"] - curve["observed"]).abs()).sum() / 520
    assert error == pytest.approx(test["calibration_error"], abs=1e-9)


def test_the_champion_is_measured_on_the_same_rows(dataset, data, checkpoint, champion, save_model, tmp_path) -> None:
    theirs = save_model(champion / "checkpoint", data.encoder, data.catalog, "another day's", "sdcnv3", seed=5)
    pointer = {"version": "v0.0.7", "revision": "r", "model": "sdcnv3", "judged_sha256": checkpoint_hash(theirs)}
    write_json(champion / "champion.json", pointer)
    found = evaluate.run(CONFIG, "qin", checkpoint, dataset, champion, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pandas()
    expected = evaluate.predict(load_checkpoint(theirs), data, data.splits["test"])
    np.testing.assert_allclose(rows["champion_score"], expected, atol=1e-6)
    (other,) = found["references"]
    assert (other["version"], other["checkpoint_sha256"]) == ("v0.0.7", pointer["judged_sha256"])
    assert other["score_drift"] == pytest.approx(statistics.drift(expected, rows["score"].to_numpy()))
    assert other["test"]["auc"] == pytest.approx(roc_auc_score(rows["label"], expected), abs=1e-12)
    for figure in ("auc", "group_auc", "logloss", "average_precision"):
        measured = other["difference"][figure]
        assert measured["value"] == pytest.approx(found["test"][figure] - other["test"][figure], abs=1e-7)
        assert measured["low"] < measured["value"] < measured["high"] and measured["se"] > 0
    for name, mask in slices.masks(SLICES, data).items():
        label = rows["label"][mask]
        if not 0 < label.sum() < len(label):
            assert other["slices"][name] is None
            continue
        both = (roc_auc_score(label, scores[mask]) for scores in (rows["score"], expected))
        ours, their = both
        assert other["slices"][name]["value"] == pytest.approx(ours - their, abs=1e-9)
    newest = rows.iloc[data.facts["newest"] - data.splits["test"][0] :]
    gained = [roc_auc_score(newest["label"], newest[name]) for name in ("score", "champion_score")]
    assert other["newest"]["value"] == pytest.approx(gained[0] - gained[1], abs=1e-9)


def test_earlier_versions_are_measured_too(dataset, data, checkpoint, champion, save_model, tmp_path) -> None:
    pointers = []
    for at, folder in enumerate((champion / "checkpoint", champion / "earlier" / "v0.0.1")):
        save_model(folder, data.encoder, data.catalog, "another day's", "qin", seed=at + 5)
        pointers.append({"version": f"v0.0.{2 - at}", "model": "qin", "judged_sha256": checkpoint_hash(folder)})
    write_json(champion / "champion.json", pointers[0] | {"earlier": pointers[1:]})
    found = evaluate.run(CONFIG, "qin", checkpoint, dataset, champion, tmp_path / "out")
    assert [one["version"] for one in found["references"]] == ["v0.0.2", "v0.0.1"]
    assert found["references"][0]["test"]["auc"] != found["references"][1]["test"]["auc"]


def test_a_column_that_is_no_feature_is_named(data) -> None:
    with pytest.raises(ValueError, match=r"slices\.columns: no feature 'colour'.*known are .*hour"):
        slices.masks(replace(SLICES, columns=["colour"]), data)
    with pytest.raises(ValueError, match=r"popularity is \[0\.9, 0\.5\]; give numbers above 0 that rise"):
        replace(SLICES, popularity=[0.9, 0.5])


def test_slices_by_popularity_and_by_value(data, raw) -> None:
    found = slices.masks(SLICES, data)
    train, test = (slice(*raw.splits[name]) for name in ("train", "test"))
    items, views = np.unique(raw.item[train], return_counts=True)
    popular = found["popularity 0%-50%"]
    shown = dict(zip(items.tolist(), views.tolist(), strict=True))
    test_views = np.array([shown.get(int(item), 0) for item in raw.item[test]])
    assert test_views[popular].min() >= test_views[found["popularity 50%-100%"]].max()
    assert (popular | found["popularity 50%-100%"] | found["new items"]).all()
    hours = {name.removeprefix("hour "): mask for name, mask in found.items() if name.startswith("hour ")}
    for value, mask in hours.items():
        if value not in ("missing", "unknown"):
            assert mask.tolist() == (raw.hour[test] == int(value)).tolist()


def test_a_champion_that_has_seen_a_test_day_judges_nothing(dataset, checkpoint, champion, tmp_path) -> None:
    for seen, refused in ((None, False), ("2026-01-10", False), ("2026-01-11", True)):  # the test day is the 10th
        theirs = load_checkpoint(checkpoint)
        facts = dict(theirs.facts) | {"train_until": seen and f"{seen}T00:00:00+00:00"}
        save(champion / "checkpoint", replace(theirs, facts=facts))
        sha = checkpoint_hash(champion / "checkpoint")
        pointer = {"version": "v0.0.7", "revision": "r", "model": "qin", "judged_sha256": sha}
        write_json(champion / "champion.json", pointer)
        if refused:
            with pytest.raises(
                ValueError, match=r"v0\.0\.7 has seen the days until 2026-01-11T.*test days begin at 2026"
            ):
                evaluate.run(CONFIG, "qin", checkpoint, dataset, champion, tmp_path / "out")
        else:
            evaluate.run(CONFIG, "qin", checkpoint, dataset, champion, tmp_path / "out")


@pytest.mark.parametrize("model", ["qin", "sdcnv3"])
def test_a_champion_of_another_day_scores_by_its_own_vocabulary(
    data, unseen, raw, encoder_over, save_model, tmp_path, monkeypatch, model
) -> None:
    """Its encoder knows other users, hours, tastes (in another order) and items than today's."""
    users = sorted(set(raw.user.tolist()))
    tastes = ("rock", "polka", "jazz")
    encoder, catalog = encoder_over(
        [*users[::2], 5, 10**9], [3, 4, 5, 20, 99], tastes, [*range(40, 70), 10**12], name="last week"
    )
    theirs = load_checkpoint(save_model(tmp_path / "theirs", encoder, catalog, "x", model))
    monkeypatch.setattr(evaluate, "SCORE_BATCH", 77)
    start, end = raw.splits["test"]
    found = evaluate.predict_translated(theirs, data, unseen, (start, end))

    # by hand, out of the raw values
    user_index = {value: i + 2 for i, value in enumerate(sorted([*users[::2], 5, 10**9]))}
    hour_index = {value: i + 2 for i, value in enumerate([3, 4, 5, 20, 99])}
    taste_index = {value: i + 2 for i, value in enumerate(tastes)}
    item_row = {value: i + 2 for i, value in enumerate([*range(40, 70), 10**12])}
    rows = range(start, end)
    fields = [
        [
            user_index.get(int(raw.user[i]), UNKNOWN),
            PADDING if raw.taste[i] is None else taste_index.get(raw.taste[i], UNKNOWN),
            hour_index.get(int(raw.hour[i]), UNKNOWN),
        ]
        for i in rows
    ]
    batch = Batch(
        torch.tensor(fields),
        torch.tensor([item_row.get(int(raw.item[i]), UNKNOWN) for i in rows]),
        torch.tensor([int(raw.end[i] - raw.length[i]) for i in rows]),
        torch.tensor([int(raw.end[i]) for i in rows]),
    )
    log = torch.tensor([item_row.get(int(item), UNKNOWN) for item in raw.click_items])
    with torch.inference_mode():
        expected = torch.sigmoid(theirs.model(batch, theirs.catalog, log).logit_B)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert np.ptp(found) > 0.1
    assert {UNKNOWN, PADDING} < {row[1] for row in fields}
    new = set(raw.user[start:end].tolist()) - set(raw.user[slice(*raw.splits["train"])].tolist())
    assert new & set(users[::2])  # the champion knows some users that today's vocabulary does not


def test_a_feature_that_is_no_longer_collected_is_missing(data, unseen, encoder_over, save_model, tmp_path) -> None:
    """The champion has a field that today's schema lacks: it sees padding there."""
    encoder, catalog = encoder_over([1000], [3], ("rock",), range(40, 70))
    named = [replace(f, name="mood") if f.name == "taste" else f for f in encoder.schema.features]
    encoder = replace(encoder, schema=replace(encoder.schema, features=tuple(named)))
    theirs = load_checkpoint(save_model(tmp_path / "theirs", encoder, catalog, "x"))
    start, end = data.splits["test"]
    found = evaluate.predict_translated(theirs, data, unseen, (start, end))
    with torch.no_grad():
        theirs.model.fields.tables[1].weight[1:] = 99  # nothing but padding is looked up
    np.testing.assert_array_equal(evaluate.predict_translated(theirs, data, unseen, (start, end)), found)


def test_a_checkpoint_of_other_data_is_refused(
    dataset, data, checkpoint, champion, raw_rows, write_dataset, save_model, encoder_over, tmp_path
) -> None:
    other = write_dataset(tmp_path / "other", raw_rows(seed=1))
    with pytest.raises(
        ValueError, match=r"(schema_hash|data_sha256) is .*trained on other data. Run `dvc repro train@q"
    ):
        evaluate.run(CONFIG, "qin", checkpoint, other, champion, tmp_path / "out")
    stale = save_model(tmp_path / "stale", data.encoder, data.catalog, "0" * 64)
    with pytest.raises(ValueError, match=rf"data_sha256 is 0{{64}}, .* has {data.facts['data_sha256']}.*train@qin"):
        evaluate.run(CONFIG, "qin", stale, dataset, champion, tmp_path / "out")
    encoder, catalog = encoder_over([1], [2], ("jazz",), [3])
    foreign = save_model(tmp_path / "foreign", encoder, catalog, data.facts["data_sha256"])
    with pytest.raises(ValueError, match=rf"schema_hash is .*, .* has {data.facts['schema_hash']}"):
        evaluate.run(CONFIG, "qin", foreign, dataset, champion, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", [0, 1])
def test_test_days_of_one_class_are_refused(raw_rows, write_dataset, save_model, champion, tmp_path, label) -> None:
    raw = raw_rows()
    start, end = raw.splits["test"]
    raw.label[start:end] = label
    folder = write_dataset(tmp_path / "dataset", raw)
    data = Dataset.open(folder)
    trained = save_model(tmp_path / "qin", data.encoder, data.catalog, data.facts["data_sha256"])
    with pytest.raises(ValueError, match=rf"the test days hold {label * 520} clicks in 520 rows; .*split\.test_share"):
        evaluate.run(CONFIG, "qin", trained, folder, champion, tmp_path / "out")


def test_a_pointer_that_is_no_pointer_is_refused(dataset, checkpoint, champion, tmp_path) -> None:
    for content in (None, "{", "[]", "{}"):
        (champion / "champion.json").unlink() if content is None else (champion / "champion.json").write_text(content)
        with pytest.raises(ValueError, match=r"champion\.json: .*run `git checkout champion\.json`"):
            evaluate.run(CONFIG, "qin", checkpoint, dataset, champion, tmp_path / "out")


# ---- the off-policy view ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory, raw, write_dataset) -> Path:
    """The dataset of a log that tells its propensities: it shows half of the items more often."""
    propensity = np.where(raw.item % 2, 0.03, 0.01).astype(np.float32)
    return write_dataset(tmp_path_factory.mktemp("told") / "dataset", replace(raw, propensity=propensity))


def test_without_propensities_there_is_no_off_policy_view(dataset, checkpoint, champion, tmp_path) -> None:
    found = evaluate.run(CONFIG, "qin", checkpoint, dataset, champion, tmp_path / "qin")
    assert found["policy"] is None and "off-policy" not in evaluate.summary(found)


def test_the_off_policy_view_is_beside_the_champion_on_the_same_rows(told, save_model, tmp_path) -> None:
    data = Dataset.open(told)
    mine = save_model(tmp_path / "mine", data.encoder, data.catalog, data.facts["data_sha256"])
    folder = tmp_path / "champion"
    save_model(folder / "checkpoint", data.encoder, data.catalog, "another day's")
    write_json(folder / "champion.json", {"version": "v0.0.1", "judged_sha256": checkpoint_hash(folder / "checkpoint")})
    found = evaluate.run(CONFIG, "qin", mine, told, folder, tmp_path / "qin")
    earned = found["policy"]
    assert earned["rows"] == 200 and earned["candidates"] == 3 and earned["outcome_model"] == "v0.0.1"
    assert earned["low"] < earned["value"] < earned["high"]
    assert 10 < earned["effective_rows"] < 200
    for name in ("value", "low", "high", "effective_rows"):  # one model: the champion's ranking is this one's
        assert earned["champion"][name] == pytest.approx(earned[name], abs=0.02 * abs(earned[name]) + 0.02)
    difference = earned["difference"]
    assert difference["low"] <= 0 <= difference["high"] and abs(difference["value"]) < 0.02
    again = evaluate.run(CONFIG, "qin", mine, told, folder, tmp_path / "again")
    assert again == found
    assert f"{earned['value']:.4f} clicks a row" in evaluate.summary(found)["off-policy"]


def test_without_a_champion_the_outcome_model_is_its_own(told, save_model, champion, tmp_path) -> None:
    data = Dataset.open(told)
    mine = save_model(tmp_path / "mine", data.encoder, data.catalog, data.facts["data_sha256"])
    earned = evaluate.run(CONFIG, "qin", mine, told, champion, tmp_path / "qin")["policy"]
    assert earned["outcome_model"] == "its own" and earned["champion"] is None and earned["difference"] is None


def test_a_shown_item_brings_what_is_known_of_it(data, unseen, checkpoint) -> None:
    """The row's user, context and history; the other row's item and, with it, its features of the moment."""
    model = load_checkpoint(checkpoint)
    fields = [f if f.name != "hour" else replace(f, origin="item") for f in model.encoder.schema.features]
    schema = replace(model.encoder.schema, features=tuple(fields))
    model = replace(model, encoder=replace(model.encoder, schema=schema))
    start, end = data.splits["test"]
    own, shown = torch.arange(start, end), torch.arange(start, end).flip(0)
    mine, other = data.batch(own), data.batch(shown)
    names = [feature.name for feature in schema.impression_fields]
    fields_BF = mine.fields_BF.clone()
    fields_BF[:, names.index("hour")] = other.fields_BF[:, names.index("hour")]
    batch = Batch(fields_BF, other.item_B, mine.start_B, mine.end_B)
    with torch.inference_mode():
        expected = model.calibration(model.model(batch, data.catalog, data.click_log).logit_B)
    found = evaluate.predict_shown(model, data, unseen, own, shown)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert not np.allclose(found, evaluate.predict(model, data, (start, end)), atol=1e-3)


def test_slates_are_put_into_the_new_order(tmp_path, raw, write_dataset, save_model, champion) -> None:
    """Each two rows are a slate; the log put either of them first as often."""
    folder = write_dataset(tmp_path / "slates", replace(raw, propensity=np.full(len(raw.label), 0.5, np.float32)))
    columns = load_file(folder / "rows.safetensors")
    row = torch.arange(len(raw.label))
    save_file(columns | {"position": row % 2 + 1, "slate": row // 2 - 7}, folder / "rows.safetensors")
    facts = json.loads((folder / "dataset.json").read_text())
    write_json(folder / "dataset.json", facts | {"data_sha256": file_hash(folder / "rows.safetensors")})
    data = Dataset.open(folder)
    mine = save_model(tmp_path / "mine", data.encoder, data.catalog, data.facts["data_sha256"])
    earned = evaluate.run(CONFIG, "qin", mine, folder, champion, tmp_path / "qin")["policy"]
    start, end = data.splits["test"]
    first, second = evaluate.predict(load_checkpoint(mine), data, (start, end)).reshape(-1, 2).T
    kept = first >= second  # the slates whose order stays
    assert earned["candidates"] is None and earned["rows"] == end - start
    assert earned["effective_rows"] == pytest.approx(2 * kept.sum())
    assert earned["snips"]["value"] == pytest.approx(raw.label[start:end].reshape(-1, 2)[kept].mean())
