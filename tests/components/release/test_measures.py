"""What the figures of an evaluation say, against their definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from components.release.measures import EvaluateConfig, calibration_curve, group_auc, measure
from components.release.policy import PolicyConfig
from components.release.slices import SlicesConfig

CONFIG = EvaluateConfig(
    seed=1,
    bootstrap=40,
    calibration_bins=7,
    slices=SlicesConfig(history=[1], popularity=[], columns=[]),
    policy=PolicyConfig(rows=10, candidates=2),
)


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


def test_a_group_auc_without_users_is_the_auc() -> None:
    label, score, _ = scored(5, rows=900)
    nobody = np.zeros(900, np.int64)
    assert group_auc(label, score, nobody) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert group_auc(label, score, np.arange(900)) is None


@pytest.mark.parametrize("key", ["bootstrap", "calibration_bins"])
def test_a_bad_value_is_named(key) -> None:
    with pytest.raises(ValueError, match=f"{key} is 1; it must be at least 2"):
        replace(CONFIG, **{key: 1})
