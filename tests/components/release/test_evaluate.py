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
from sklearn.metrics import log_loss, roc_auc_score

from components.common.artifacts import write_json
from components.common.dataset import UNSEEN, Dataset
from components.release import evaluate
from components.release.measures import EvaluateConfig, calibration_curve, group_auc, intervals, measure
from models.checkpoint import Checkpoint, checkpoint_hash, save
from models.checkpoint import load as load_checkpoint
from models.families import build
from models.schema import PADDING, UNKNOWN, Batch, schema_hash

CONFIG = EvaluateConfig(seed=1, bootstrap=40, calibration_bins=7, min_slice_rows=60)
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
            schema_hash=schema_hash(encoder.schema, encoder.integers, catalog), facts={"data_sha256": data_sha256},
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


def scored(seed: int, rows: int = 600, users: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """labels, scores with ties, users: what every figure is computed of."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows) * 10**12
    label = (rng.random(rows) < 0.3).astype(np.int8)
    score = np.round(1 / (1 + np.exp(-rng.normal(label - 1.0, 1.5))), 2).clip(0.01, 0.99).astype(np.float32)
    return label, score, user


# ---- figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_measure_is_what_its_words_say(seed) -> None:
    label, score, user = scored(seed)
    found = measure(CONFIG, label, score, user)
    clicks, others = score[label == 1].astype(float), score[label == 0].astype(float)
    pairs = (clicks[:, None] > others).mean() + (clicks[:, None] == others).mean() / 2
    assert found["auc"] == pytest.approx(pairs, abs=1e-12)
    p = score.astype(float)
    assert found["logloss"] == pytest.approx(-np.mean(np.where(label == 1, np.log(p), np.log(1 - p))), abs=1e-12)
    always = np.full(len(label), label.mean(dtype=float))
    assert found["base_logloss"] == pytest.approx(log_loss(label, always), abs=1e-12)
    assert (found["rows"], found["label_rate"]) == (600, label.mean(dtype=float))
    weighted, weight = 0.0, 0
    for own in set(user.tolist()):
        rows = user == own
        if len(set(label[rows].tolist())) == 2:
            weighted += roc_auc_score(label[rows], score[rows]) * rows.sum()
            weight += rows.sum()
    assert found["group_auc"] == pytest.approx(weighted / weight, abs=1e-12)


def test_users_of_one_class_have_no_auc_of_their_own() -> None:
    label = np.array([1, 1, 0, 0, 1, 0], dtype=np.int8)
    score = np.array([0.1, 0.2, 0.3, 0.9, 0.8, 0.8], dtype=np.float32)
    user = np.array([1, 1, 2, 2, 3, 3])
    assert group_auc(label, score, user) == 0.5  # user 3 alone, a tie
    assert group_auc(label[:4], score[:4], user[:4]) is None


def test_calibration_is_that_of_equally_filled_bins() -> None:
    label, score, user = scored(5, rows=601)
    order = sorted(range(601), key=lambda row: (score[row], row))
    sizes = [86] * 6 + [85]  # 601 rows in 7 bins
    curve, error, start = calibration_curve(label, score, 7), 0.0, 0
    for bin_, size in zip(curve.itertuples(), sizes, strict=True):
        rows = order[start : start + size]
        start += size
        assert bin_.rows == size
        assert bin_.predicted == pytest.approx(np.mean([float(score[row]) for row in rows]), abs=1e-9)
        assert bin_.observed == pytest.approx(np.mean([float(label[row]) for row in rows]), abs=1e-12)
        error += size * abs(bin_.predicted - bin_.observed)
    found = measure(CONFIG, label, score, user)["calibration_error"]
    assert found == pytest.approx(error / 601, abs=1e-12)
    assert found > 0.05  # these scores are not calibrated
    assert calibration_curve(label[:3], score[:3], 7)["rows"].tolist() == [1, 1, 1]


def test_a_calibrated_score_has_a_small_calibration_error() -> None:
    rng = np.random.default_rng(0)
    score = rng.beta(2, 5, 40_000).astype(np.float32)
    label = (rng.random(40_000) < score).astype(np.int8)
    right = measure(CONFIG, label, score, np.arange(40_000))["calibration_error"]
    wrong = measure(CONFIG, label, score / 2, np.arange(40_000))["calibration_error"]
    assert right < 0.01
    assert wrong == pytest.approx(score.mean() / 2, abs=0.01)


def test_one_class_alone_has_no_figures_of_ranking() -> None:
    found = measure(CONFIG, np.ones(9, np.int8), np.linspace(0.1, 0.9, 9, dtype=np.float32), np.arange(9))
    assert (found["auc"], found["group_auc"], found["base_logloss"], found["label_rate"]) == (None, None, 0.0, 1.0)
    assert found["logloss"] == pytest.approx(-np.mean(np.log(np.linspace(0.1, 0.9, 9))), abs=1e-6)


# ---- intervals --------------------------------------------------------------------------------------------------


def of_users(seed: int, users: int, rows: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A user's rows are alike: some users click much and score high for no reason of the rows."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows)
    label = (rng.random(len(user)) < np.repeat(rng.beta(1, 1, users), rows)).astype(np.int8)
    score = (np.repeat(rng.normal(size=users), rows) + 0.6 * label + 0.2 * rng.normal(size=len(user))).astype("f4")
    return label, score, user


def width(found: dict[str, float]) -> float:
    return found["auc_high"] - found["auc_low"]


def test_the_interval_holds_the_auc_and_shrinks_with_users() -> None:
    config = replace(CONFIG, bootstrap=150)
    widths = []
    for users in (50, 800):
        label, score, user = of_users(1, users)
        found = intervals(config, label, user, auc=score)
        assert found["auc_low"] < roc_auc_score(label, score) < found["auc_high"]
        widths.append(width(found))
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.5)  # sqrt(800 / 50)


def test_the_interval_is_that_of_users_and_not_of_rows() -> None:
    label, score, user = of_users(2, 60)
    found = intervals(replace(CONFIG, bootstrap=300), label, user, auc=score)
    rng = np.random.default_rng(9)
    rows_of = [np.flatnonzero(user == own) for own in range(60)]
    by_user, by_row = [], []
    for _ in range(300):
        drawn = np.concatenate([rows_of[own] for own in rng.integers(0, 60, 60)])
        by_user.append(roc_auc_score(label[drawn], score[drawn]))
        drawn = rng.integers(0, len(label), len(label))
        by_row.append(roc_auc_score(label[drawn], score[drawn]))
    expected = np.quantile(by_user, [0.025, 0.975])
    assert width(found) == pytest.approx(expected[1] - expected[0], rel=0.25)
    assert width(found) > 1.5 * np.diff(np.quantile(by_row, [0.025, 0.975]))[0]
    again = intervals(replace(CONFIG, bootstrap=300), label, user, auc=score)
    assert again == found  # the seed is the config's


def test_the_difference_of_two_scores_is_measured_on_the_same_users() -> None:
    label, score, user = of_users(3, 60)
    noise = np.random.default_rng(4).normal(size=len(label)).astype("f4")
    same = intervals(CONFIG, label, user, auc=score, minus=score)
    assert same == {"auc": 0.0, "auc_low": 0.0, "auc_high": 0.0}
    near = score + 0.02 * noise
    found = intervals(CONFIG, label, user, auc=score, minus=near)
    whole = roc_auc_score(label, score) - roc_auc_score(label, near)
    assert found["auc"] == pytest.approx(whole, abs=1e-12)
    assert found["auc_low"] <= whole <= found["auc_high"]
    assert width(found) < width(intervals(CONFIG, label, user, auc=score)) / 4  # the users' noise cancels


def test_without_users_rows_are_resampled() -> None:
    """All rows are of user 0: whole resamples of that user would all be alike, an interval of no width."""
    label, score, _ = scored(5, rows=900)
    config, nobody = replace(CONFIG, bootstrap=300), np.zeros(900, np.int64)
    found = intervals(config, label, nobody, auc=score)
    assert found == intervals(config, label, np.arange(900), auc=score)
    rng = np.random.default_rng(9)
    drawn = [rng.integers(0, 900, 900) for _ in range(300)]
    low, high = np.quantile([roc_auc_score(label[rows], score[rows]) for rows in drawn], [0.025, 0.975])
    assert width(found) == pytest.approx(high - low, rel=0.25)
    assert group_auc(label, score, nobody) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert group_auc(label, score, np.arange(900)) is None


def test_too_few_users_for_an_interval_are_told() -> None:
    """One user is drawn away in every third resample, and with it a class in most of the rest."""
    label = np.array([1, 0], dtype=np.int8)
    found = intervals(CONFIG, label, np.array([1, 2]), auc=np.array([0.8, 0.2], dtype="f4"))
    assert found == {"auc_low": 1.0, "auc_high": 1.0}
    one_class = np.array([1, 1], dtype=np.int8)
    with pytest.raises(ValueError, match=r"evaluate\.bootstrap is 40: no resample of 2 users held both classes"):
        intervals(CONFIG, one_class, np.array([1, 2]), auc=np.array([0.8, 0.2], dtype="f4"))


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
    found = evaluate.slice_masks(data)
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
    assert test["auc_low"] < test["auc"] < test["auc_high"]
    assert test["oracle_auc"] == pytest.approx(roc_auc_score(label, raw.oracle[start:end]), abs=1e-12)
    assert test["oracle_logloss"] == pytest.approx(log_loss(label, raw.oracle[start:end].astype(float)), abs=1e-9)
    assert found["champion"] is None
    assert found["checkpoint_sha256"] == checkpoint_hash(checkpoint)
    assert (found["data_sha256"], found["schema_hash"]) == (data.facts["data_sha256"], data.facts["schema_hash"])
    for name, mask in evaluate.slice_masks(data).items():
        part = found["slices"][name]
        assert part["rows"] == mask.sum()
        assert part["small"] == (mask.sum() < 60)
        if mask.any():
            assert part["auc"] == pytest.approx(roc_auc_score(label[mask], rows["score"][mask]), abs=1e-12)
    assert found["slices"]["history 20+"] == {"rows": 0, "small": True, "auc": None}

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
    pointer = {"version": "v0.0.7", "revision": "r", "model": "sdcnv3", "checkpoint_sha256": checkpoint_hash(theirs)}
    write_json(champion / "champion.json", pointer)
    found = evaluate.run(CONFIG, "qin", checkpoint, dataset, champion, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pandas()
    expected = evaluate.predict(load_checkpoint(theirs), data, data.splits["test"])
    np.testing.assert_allclose(rows["champion_score"], expected, atol=1e-6)
    other = found["champion"]
    assert (other["version"], other["checkpoint_sha256"]) == ("v0.0.7", pointer["checkpoint_sha256"])
    assert other["test"]["auc"] == pytest.approx(roc_auc_score(rows["label"], expected), abs=1e-12)
    assert other["difference"]["auc"] == pytest.approx(found["test"]["auc"] - other["test"]["auc"], abs=1e-12)
    for name, mask in evaluate.slice_masks(data).items():
        assert other["slices"][name]["rows"] == mask.sum()
        if mask.any():
            assert other["slices"][name]["auc"] == pytest.approx(roc_auc_score(rows["label"][mask], expected[mask]))


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


@pytest.mark.parametrize("key", ["bootstrap", "calibration_bins", "min_slice_rows"])
def test_a_bad_value_is_named(key) -> None:
    with pytest.raises(ValueError, match=f"{key} is 1; it must be at least 2"):
        replace(CONFIG, **{key: 1})
