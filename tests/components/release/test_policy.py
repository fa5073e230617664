"""The off-policy estimates beside the truth of small worlds, in which every item's click probability is known."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from components.release import policy
from components.release.policy import PolicyConfig

ITEMS, CANDIDATES = 40, 4


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("bad", [{"rows": 1}, {"candidates": 1}])
def test_config_refuses(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(bad))} is 1; it must be at least 2"):
        replace(PolicyConfig(rows=10, candidates=3), **bad)


# ---- rows that are alone ----------------------------------------------------------------------------------------


def test_weights_are_the_policys_probability_over_the_propensity() -> None:
    """Counted: 200,000 times, three of seven items are drawn and the best is shown."""
    rng = np.random.default_rng(0)
    n, items = 200_000, 7
    score_I, propensity_I = rng.permutation(items) / 10, rng.dirichlet(np.ones(items))
    shown = rng.integers(0, items, (n, 3))
    best = shown[np.arange(n), score_I[shown].argmax(1)]
    counted_I = np.bincount(best, minlength=items) / n
    item_B = np.arange(items).repeat(20_000)
    drawn = rng.integers(0, items, (len(item_B), 6))
    weighed = policy.best_of(
        rng, 3, score_I[item_B], score_I[drawn], score_I[item_B], score_I[drawn], propensity_I[item_B]
    )
    weight_I = np.bincount(item_B, weighed.weight) / 20_000
    np.testing.assert_allclose(3 / items * weight_I * propensity_I, counted_I, atol=0.005)
    assert weighed.direct.mean() == pytest.approx(score_I @ counted_I, abs=0.002)


def test_items_are_drawn_as_likely_whatever_was_logged() -> None:
    rng = np.random.default_rng(0)
    propensity_I = rng.dirichlet(np.ones(8)) * 0.9 + 0.0125
    item_B = rng.choice(8, 2_000, p=propensity_I / propensity_I.sum())
    rows = policy.evenly_drawn(rng, item_B, (100_000,))
    drawn = item_B[rows]
    own, times = np.unique(rows[drawn == 0], return_counts=True)
    assert set(own) == set(np.flatnonzero(item_B == 0)) and times.max() < 2 * times.mean()
    np.testing.assert_allclose(np.bincount(drawn) / 100_000, 1 / 8, atol=0.01)


class Alone:
    """Users of two tastes. The log prefers what is popular and what they like; each row is a request of its own."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.z_IK, self.quality_I, self.popular_I = (
            rng.normal(size=(ITEMS, 2)),
            rng.normal(size=ITEMS),
            rng.random(ITEMS),
        )
        z_UK = np.random.default_rng(6).normal(size=(40_000, 2))
        self.truth = {name: self.earned(z_UK, of(z_UK)) for name, of in self.scores.items()}

    @property
    def scores(self):
        """The new model knows tastes alone, the old one something of all."""
        return {
            "new": lambda z_UK: sigmoid(1.5 * z_UK @ self.z_IK.T - 1),
            "old": lambda z_UK: sigmoid(z_UK @ self.z_IK.T + self.quality_I - 1),
        }

    def click(self, z_UK: np.ndarray) -> np.ndarray:
        return sigmoid(1.5 * z_UK @ self.z_IK.T + self.quality_I - 1)

    def earned(self, z_UK: np.ndarray, score_UI: np.ndarray) -> float:
        """Clicks of the best of CANDIDATES items, exactly."""
        order_UI = np.argsort(score_UI, axis=1)
        at_most = (np.arange(1, ITEMS + 1) / ITEMS) ** CANDIDATES
        best_I = np.diff(at_most, prepend=0)
        return float((np.take_along_axis(self.click(z_UK), order_UI, 1) @ best_I).mean())

    def log(self, seed: int, users: int = 350, each: int = 3):
        """(labels, policies, units, true probabilities) of a log."""
        rng = np.random.default_rng(seed)
        z_UK = rng.normal(size=(users, 2))
        logged_UI = np.exp(0.5 * z_UK @ self.z_IK.T + 1.5 * self.popular_I)
        logged_UI /= logged_UI.sum(1, keepdims=True)
        user_B = np.arange(users).repeat(each)
        item_B = (logged_UI.cumsum(1)[user_B] < rng.random((len(user_B), 1))).sum(1).clip(max=ITEMS - 1)
        propensity_B, true_B = logged_UI[user_B, item_B], self.click(z_UK)[user_B, item_B]
        label_B = (rng.random(len(user_B)) < true_B).astype(np.int8)
        drawn_BK = item_B[policy.evenly_drawn(rng, item_B, (len(user_B), policy.DRAWS * CANDIDATES))]
        found = {name: of(z_UK) for name, of in self.scores.items()}
        policies = {
            name: policy.best_of(
                rng, CANDIDATES, score_UI[user_B, item_B], score_UI[user_B[:, None], drawn_BK],
                found["old"][user_B, item_B], found["old"][user_B[:, None], drawn_BK], propensity_B,
            )
            for name, score_UI in found.items()
        }  # fmt: skip
        return label_B, policies, user_B, true_B


def test_rows_alone_intervals_hold_the_truth_and_doubly_robust_has_less_error() -> None:
    world, seeds = Alone(), 200
    held, errors = defaultdict(list), defaultdict(list)
    for seed in range(seeds):
        labels, policies, units, oracle = world.log(seed)
        found = policy.compared(labels, policies, units, oracle, resamples=200, seed=seed)
        assert found is not None
        for told, truth, name in (
            (found, world.truth["new"], "new"),
            (found["snips"], world.truth["new"], "snips"),
            (found["champion"], world.truth["old"], "old"),
            (found["difference"], world.truth["new"] - world.truth["old"], "difference"),
        ):
            held[name].append(told["low"] <= truth <= told["high"])
            errors[name].append(told["value"] - truth)
        assert found["effective_rows"] < found["rows"] == len(labels)
    for name, inside in held.items():
        assert 0.905 <= np.mean(inside) <= 0.985, name
    rmse = {name: np.sqrt(np.mean(np.square(error))) for name, error in errors.items()}
    print({name: (f"{np.mean(held[name]):.3f}", f"{rmse[name]:.4f}", f"{np.mean(errors[name]):+.4f}") for name in held})
    assert rmse["new"] < 0.95 * rmse["snips"]
    assert abs(np.mean(errors["new"])) < 0.25 * rmse["new"]
    logged = np.mean([world.log(seed)[0].mean() for seed in range(20)])
    assert abs(logged - world.truth["new"]) > 3 * rmse["new"]  # what was logged says nothing of it


def test_a_policy_that_no_row_can_be_of_is_told_as_none() -> None:
    none = policy.Weighed(np.zeros(4), np.zeros(4), np.zeros(4))
    assert policy.compared(np.array([0, 1, 0, 1]), {"": none}, np.arange(4), None, resamples=10, seed=0) is None


# ---- slates -----------------------------------------------------------------------------------------------------

LOOKED = np.array([1.0, 0.6, 0.35, 0.2])  # at each position
PLACES = len(LOOKED)


def slates(seed: int, count: int = 400):
    """Slates of four. Half of them are in the order of popularity, half in any; clicks fall with the position."""
    rng = np.random.default_rng(seed)
    good_SP, popular_SP = rng.random((count, PLACES)), rng.random((count, PLACES))  # by item
    usual_SP = np.argsort(np.argsort(-popular_SP, axis=1), axis=1)
    chance_SP = np.argsort(rng.random((count, PLACES)), axis=1)
    place_SP = np.where(rng.random((count, 1)) < 0.5, usual_SP, chance_SP)
    propensity = 0.5 * (place_SP == usual_SP) + 0.5 / PLACES
    label = (rng.random((count, PLACES)) < good_SP * LOOKED[place_SP]).astype(np.int8)
    score = good_SP + rng.normal(size=good_SP.shape) * 0.1
    slate = np.arange(count).repeat(PLACES) * 7 - 100
    best_SP = np.argsort(np.argsort(-score, axis=1), axis=1)
    truth = (good_SP * LOOKED[best_SP]).mean()
    order = rng.permutation(count * PLACES)  # a slate's rows need not follow each other
    flat = [a.ravel()[order] for a in (label, score, popular_SP, propensity, place_SP + 1, slate)]
    return *flat, truth


def test_slates_intervals_hold_the_truth_and_doubly_robust_has_less_error() -> None:
    truth = float(np.mean([slates(1000 + seed)[-1] for seed in range(200)]))
    held, errors, logged = [], defaultdict(list), []
    for seed in range(200):
        label, score, popular, propensity, position, slate, _ = slates(seed)
        policies = {
            "": policy.reranked(score, score, label, propensity, position, slate),
            "old": policy.reranked(popular, score, label, propensity, position, slate),
        }
        units = np.unique(slate, return_inverse=True)[1]
        found = policy.compared(label, policies, units, None, resamples=200, seed=seed)
        assert found is not None and found["difference"]["value"] > 0
        held.append(found["low"] <= truth <= found["high"])
        errors["value"].append(found["value"] - truth)
        errors["snips"].append(found["snips"]["value"] - truth)
        logged.append(label.mean())
    rmse = {name: np.sqrt(np.mean(np.square(error))) for name, error in errors.items()}
    print(f"{np.mean(held):.3f}", rmse)
    assert 0.905 <= np.mean(held) <= 0.985
    assert rmse["value"] < 0.9 * rmse["snips"]
    assert abs(np.mean(errors["value"])) < 0.25 * rmse["value"]
    assert abs(np.mean(logged) - truth) > 2 * rmse["value"]


def test_a_slate_that_keeps_its_order_keeps_its_weight() -> None:
    slate, position = np.array([4, 4, 9, 9, 9]), np.array([1, 2, 3, 1, 2], dtype=np.int16)
    score = np.array([0.9, 0.1, 0.2, 0.3, 0.6])  # of 9: its rows go to positions 3, 2 and 1
    weighed = policy.reranked(score, score, np.array([1, 0, 0, 1, 0]), np.full(5, 0.5), position, slate)
    assert weighed.weight.tolist() == [2, 2, 2, 0, 0]
    looked = {1: 2 / (0.9 + 0.3), 2: 0.0, 3: 0.0}
    np.testing.assert_allclose(weighed.expected, [score[i] * looked[p] for i, p in enumerate(position)])
    np.testing.assert_allclose(weighed.direct, [score[i] * looked[p] for i, p in enumerate((1, 2, 3, 2, 1))])
