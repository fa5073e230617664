"""Figures under weights against scikit-learn, standard errors against textbook forms, intervals against the truth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from components.release import statistics as s
from components.release.measures import calibration_curve, group_auc

Sample = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def sample(seed: int, rows: int = 4000, users: int = 300, *, spread: float = 0.8, ties: bool = False) -> Sample:
    """labels, two models' scores, users: rows of one user share an effect that both models know."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows)
    z = rng.normal(size=rows) + rng.normal(0, spread, users)[user] - 1
    labels = (rng.random(rows) < 1 / (1 + np.exp(-z))).astype(np.int8)
    ours, theirs = (1 / (1 + np.exp(-(z + rng.normal(0, noise, rows)))) for noise in (0.4, 0.6))
    return labels, np.round(ours, 2) if ties else ours, theirs, user * 7 + 100_003


@pytest.mark.parametrize("ties", [False, True])
def test_the_figures_on_all_rows_are_those_of_scikit_learn(ties: bool) -> None:
    labels, ours, _, users = sample(1, ties=ties)
    found = {
        name: values[0]
        for name, values in s.bootstrap(labels, {"ours": ours}, users, bins=20, resamples=1, seed=0)["ours"].items()
    }
    curve = calibration_curve(labels, ours, 20)
    rate = labels.mean()
    fit = LogisticRegression(C=np.inf).fit(np.log(ours / (1 - ours))[:, None], labels) if not ties else None
    expected = {
        "auc": roc_auc_score(labels, ours),
        "group_auc": group_auc(labels, ours, users),
        "average_precision": average_precision_score(labels, ours),
        "logloss": log_loss(labels, ours),
        "normalised_entropy": log_loss(labels, ours) / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    if fit is not None:
        weighted = (curve["rows"] * (curve["predicted"] - curve["observed"]).abs()).sum() / len(labels)
        assert found["calibration_error"] == pytest.approx(weighted, abs=1e-6)
        assert found["calibration_slope"] == pytest.approx(fit.coef_[0, 0], abs=1e-3)
        z = np.log(ours / (1 - ours)) + found["calibration_intercept"]
        assert (1 / (1 + np.exp(-z))).mean() == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_a_resample_is_the_figure_of_the_rows_drawn(ties: bool) -> None:
    """Weights are the numbers of times that a user was drawn: rows written out so often give the same figures."""
    labels, ours, _, users = sample(2, rows=900, users=60, ties=ties)
    units = s.units_of(users)
    weights = next(s.draws(60, 3, seed=5))
    found = s.Scored(labels, ours, units, bins=10).figures(weights)
    for at, drawn in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(len(labels)), drawn[units])
        again = np.concatenate([np.arange(drawn[unit]) for unit in units]) if len(rows) else rows
        own = users[rows] * 1000 + again  # a user who was drawn twice counts as two
        assert found["auc"][at] == pytest.approx(roc_auc_score(labels[rows], ours[rows]), abs=1e-9)
        assert found["average_precision"][at] == pytest.approx(average_precision_score(labels[rows], ours[rows]))
        assert found["group_auc"][at] == pytest.approx(group_auc(labels[rows], ours[rows], own))
        assert found["logloss"][at] == pytest.approx(log_loss(labels[rows], ours[rows]), abs=1e-6)


def test_without_users_the_standard_error_is_delongs() -> None:
    labels, ours, theirs, _ = sample(3, rows=600)
    units = np.arange(600)
    clicks, others = ours[labels == 1], ours[labels == 0]
    kernel = (clicks[:, None] > others).astype(float) + 0.5 * (clicks[:, None] == others)
    textbook = kernel.mean(1).var(ddof=1) / len(clicks) + kernel.mean(0).var(ddof=1) / len(others)
    found = s.auc(labels, ours, units)
    assert found.value == pytest.approx(kernel.mean())
    assert found.se == pytest.approx(np.sqrt(textbook), rel=0.01)
    difference = s.auc(labels, ours, units, minus=theirs)
    assert difference.value == pytest.approx(roc_auc_score(labels, ours) - roc_auc_score(labels, theirs))
    assert difference.se < found.se  # the same rows: most of the noise is shared


def test_rows_of_one_user_make_the_error_larger_and_both_ways_find_it() -> None:
    labels, ours, theirs, users = sample(4, rows=6000, users=100, spread=1.5)
    units = s.units_of(users)
    clustered, independent = s.auc(labels, ours, units), s.auc(labels, ours, np.arange(len(labels)))
    assert clustered.se > 1.5 * independent.se
    drawn = s.bootstrap(labels, {"a": ours, "b": theirs}, users, bins=10, resamples=400, seed=1)
    assert np.std(drawn["a"]["auc"][1:]) == pytest.approx(clustered.se, rel=0.15)
    paired = s.auc(labels, ours, units, minus=theirs)
    assert np.std((drawn["a"]["auc"] - drawn["b"]["auc"])[1:]) == pytest.approx(paired.se, rel=0.15)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 samples of a world whose true difference is known from a sample of two million rows."""
    labels, ours, theirs, _ = sample(5, rows=2_000_000, users=200_000)
    truth = roc_auc_score(labels, ours) - roc_auc_score(labels, theirs)
    held = 0
    for seed in range(400):
        labels, ours, theirs, users = sample(1000 + seed, rows=1500, users=150)
        low, high = s.auc(labels, ours, s.units_of(users), minus=theirs).interval()
        held += low <= truth <= high
    assert 0.925 <= held / 400 <= 0.975  # 95% within two standard errors of 400 trials


def test_equal_seeds_give_equal_bytes_on_any_number_of_threads() -> None:
    labels, ours, theirs, users = sample(6)
    one, two = (
        s.bootstrap(labels, {"a": ours, "b": theirs}, users, bins=10, resamples=120, seed=9, threads=threads)
        for threads in (1, 3)
    )
    for model in one:
        for figure in s.FIGURES:
            assert one[model][figure].tobytes() == two[model][figure].tobytes()


def test_one_user_is_data_without_users() -> None:
    users = sample(7)[3]
    assert len(np.unique(s.units_of(np.zeros_like(users)))) == len(users)


def test_a_figure_without_a_meaning_is_no_number() -> None:
    labels, ours, _, users = sample(8, rows=500, users=40)
    found = s.bootstrap(np.zeros_like(labels), {"a": ours}, users, bins=5, resamples=3, seed=0)["a"]
    for name in ("auc", "group_auc", "average_precision", "normalised_entropy", "calibration_slope"):
        assert not np.isfinite(found[name]).any(), name
        assert all(np.isnan(s.interval(found[name])))


def test_a_shift_of_the_odds_is_found_and_has_an_interval() -> None:
    labels, ours, _, users = sample(9, rows=20_000, users=2000)
    odds = 1.3 * ours / (1 - ours)
    drawn = s.bootstrap(labels, {"a": ours, "b": odds / (1 + odds)}, users, bins=10, resamples=200, seed=0)
    before, after = (drawn[name]["calibration_intercept"] for name in "ab")
    assert after[0] - before[0] == pytest.approx(-np.log(1.3), abs=1e-6)
    low, high = s.interval(after)
    assert low < after[0] < high and high - low < 0.2
    assert drawn["a"]["auc"][0] == pytest.approx(drawn["b"]["auc"][0])


def test_drift_is_nothing_for_the_same_scores_and_large_for_others() -> None:
    scores = np.random.default_rng(0).beta(2, 8, 20_000)
    assert s.drift(scores, scores) == 0
    assert s.drift(scores, np.random.default_rng(1).beta(2, 8, 20_000)) < 0.01
    assert s.drift(scores, np.random.default_rng(1).beta(4, 8, 20_000)) > 0.25
    assert s.drift(np.full(10, 0.3), np.full(10, 0.3)) == 0
