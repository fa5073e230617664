"""Error rates over nights, by simulation of the differences that a gate sees."""

from __future__ import annotations

import numpy as np
import pytest

from components.release import evidence as e

SE, SPREAD, GAIN, NIGHTS = 0.0003, 0.0005, 0.002, 30


def months(gain: float, count: int, seed: int = 1) -> np.ndarray:
    """Differences of a change to one champion, [months, nights]: the champion's luck is common to a month."""
    rng = np.random.default_rng(seed)
    champion = rng.normal(0, SPREAD, (count, 1))
    return gain - champion + rng.normal(0, np.hypot(SE, SPREAD), (count, NIGHTS))


def first_night(differences: np.ndarray, spread: float = SPREAD, limit: float | None = None) -> int:
    """The night on which the evidence suffices; NIGHTS where it never does."""
    limit = e.wanted(0.05, 1) if limit is None else limit
    for night in range(1, NIGHTS + 1):
        if e.log_evidence(differences[:night], [SE] * night, spread, GAIN) >= limit:
            return night - 1
    return NIGHTS


def test_a_change_without_gain_is_promoted_in_few_months_and_a_test_a_night_would_promote_many() -> None:
    nothing = months(0.0, 600)
    assert np.mean([first_night(month) < NIGHTS for month in nothing]) <= 0.05
    naive = (nothing > 1.645 * e.sd(SE, SPREAD)).any(axis=1).mean()
    assert naive > 0.2


def test_without_the_spread_of_seeds_luck_passes_for_gain() -> None:
    nothing = months(0.0, 600)
    assert np.mean([first_night(month, spread=0.0) < NIGHTS for month in nothing]) > 0.06


def test_a_gain_is_found_within_days() -> None:
    nights = np.array([first_night(month) for month in months(GAIN, 400)])
    assert np.mean(nights < 7) > 0.75


def test_the_evidence_is_the_likelihood_ratio() -> None:
    rng = np.random.default_rng(0)
    differences, ses = rng.normal(0.001, 0.001, 5), np.array([3, 2, 4, 3, 5]) * 1e-4
    covariance = np.diag(ses**2 + SPREAD**2) + SPREAD**2

    def log_density(mean: float) -> float:
        rest = differences - mean
        return float(-rest @ np.linalg.solve(covariance, rest) / 2)

    expected = log_density(GAIN) - log_density(0.0)
    assert e.log_evidence(differences, ses, SPREAD, GAIN) == pytest.approx(expected)


def test_what_all_changes_may_use_is_alpha() -> None:
    assert sum(np.exp(-e.wanted(0.05, j)) for j in range(1, 10_000)) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("references", [1, 3, 7])
def test_an_equal_refresh_passes_the_margin(references: int) -> None:
    rng = np.random.default_rng(2)
    margin = e.margin(SE, SPREAD, references)
    ours, theirs = rng.normal(0, SPREAD, (20_000, 1)), rng.normal(0, SPREAD, (20_000, references))
    seen = ours - theirs + rng.normal(0, SE, (20_000, references))
    passed = (seen - 1.6449 * e.sd(SE, SPREAD) >= -margin).all(axis=1).mean()
    assert 0.945 <= passed <= 0.985  # 95% within what 20,000 draws vary by


def test_the_spread_is_found_from_refreshes() -> None:
    rng = np.random.default_rng(3)
    luck = rng.normal(0, SPREAD, 401)
    differences = np.diff(luck) + rng.normal(0, SE, 400)
    assert e.measured_spread(differences, [SE] * 400, assumed=0.002) == pytest.approx(SPREAD, rel=0.3)
    assert e.measured_spread(differences[:1], [SE], assumed=0.002) == 0.002


def test_the_detectable_loss_is_found_with_the_power() -> None:
    loss = e.detectable(SE, 0.05)
    seen = -loss + np.random.default_rng(4).normal(0, SE, 20_000)
    assert (seen < -1.6449 * SE).mean() == pytest.approx(0.8, abs=0.02)
