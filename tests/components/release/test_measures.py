"""What the figures of an evaluation say, against their definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from components.release.measures import EvaluateConfig, calibration_curve, group_auc, intervals, measure

CONFIG = EvaluateConfig(seed=1, bootstrap=40, calibration_bins=7, min_slice_rows=60)


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


@pytest.mark.parametrize("key", ["bootstrap", "calibration_bins", "min_slice_rows"])
def test_a_bad_value_is_named(key) -> None:
    with pytest.raises(ValueError, match=f"{key} is 1; it must be at least 2"):
        replace(CONFIG, **{key: 1})
