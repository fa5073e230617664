"""What another ranking would have earned, in clicks a row, from rows that tell how likely they were to be shown.

The policy that is judged must give every item that it may show a known probability. It comes from the scores in two
ways, by what the rows tell:

slates    rows were shown together, and the propensity is that of the item at its position in this slate. The policy
          shows the same items, best first. A row counts if it keeps its position (item-position model of Li et al.,
          Offline Evaluation of Ranking Policies with Click Models, KDD 2018). So a click at a position stands for
          that position alone, whatever is looked at there
alone     a row is a request of its own, and nobody knows what else could have been shown. The policy draws some of the
          items that the test days show, each as likely as another, and shows the best of them. All of these were in
          the log's reach, and the policy's probability of the row's own item needs nothing but scores of drawn items.
          So it is identified, up to a factor that is the same in all rows, the number of items. Self-normalisation
          removes that

Estimates, of weights w = probability under the policy / propensity:

snips     sum w·click / sum w (Swaminathan & Joachims, NIPS 2015)
value     doubly robust: what an outcome model expects of what the policy shows, and the weighted mean of what it misses
          on the rows (Dudík et al., Statistical Science 2014), with the same normalisation. The propensities are known,
          so a bad outcome model costs certainty, and no truth

effective_rows   (sum w)² / sum w²: so many rows of equal weight tell as much (Kish 1965)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import comb

from components.release import statistics

DRAWS = 2  # so many times the policy's candidates are drawn for a row: all choices among them count


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """rows        of the test days that it is estimated from, where rows are alone
    candidates  of which the best is shown
    """

    rows: int
    candidates: int

    def __post_init__(self) -> None:
        for name in ("rows", "candidates"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 2")


class Weighed(NamedTuple):
    """A policy on the logged rows, float64 [rows] each.

    weight    its probability of the row over the propensity, up to a factor
    expected  the outcome model on the row, as it was shown
    direct    the outcome model on what the policy shows instead
    """

    weight: np.ndarray
    expected: np.ndarray
    direct: np.ndarray


def evenly_drawn(rng: np.random.Generator, items: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Rows whose items are drawn: each item that has a row is as likely, then each of its rows. int64 of `shape`"""
    by_item = np.argsort(items, kind="stable")
    _, first, count = np.unique(items[by_item], return_index=True, return_counts=True)
    item = rng.integers(0, len(first), shape)
    return by_item[first[item] + (rng.random(shape) * count[item]).astype(np.int64)]


def best_of(
    rng: np.random.Generator, candidates: int, score_B: np.ndarray, drawn_BK: np.ndarray, expected_B: np.ndarray,
    expected_BK: np.ndarray, propensity_B: np.ndarray,
) -> Weighed:  # fmt: skip
    """The policy that shows the best of `candidates` items. Equal scores are put in order by chance.

    score_B, drawn_BK        new scores of the row's item, and of items that were drawn for it, K >= candidates
    expected_B, expected_BK  the outcome model's, of the same
    """
    others, draws = candidates - 1, drawn_BK.shape[1]
    assert draws >= candidates
    score_BK = np.concatenate([score_B[:, None], drawn_BK], 1)
    order_BK = np.lexsort((rng.random(score_BK.shape), score_BK), axis=-1)
    beaten_B = np.argmax(order_BK == 0, axis=1)
    weight_B = comb(beaten_B, others) / comb(draws, others) / propensity_B
    order_BK = order_BK[order_BK > 0].reshape(drawn_BK.shape) - 1  # without the row's own, the worst first
    best_K = comb(np.arange(draws), others) / comb(draws, candidates)  # by place: is it the best of a random choice
    direct_B = np.take_along_axis(expected_BK, order_BK, 1).astype(np.float64) @ best_K
    return Weighed(weight_B, expected_B.astype(np.float64), direct_B)


def reranked(
    scores: np.ndarray, expected: np.ndarray, labels: np.ndarray, propensity: np.ndarray, position: np.ndarray,
    slate: np.ndarray,
) -> Weighed:  # fmt: skip
    """The policy that puts each slate's items into the order of the new scores, on the positions that it has.

    How much is looked at each position is estimated, for the outcome model alone: clicks over what it expects.
    """
    by_score, by_position = np.lexsort((-scores, slate)), np.lexsort((position, slate))
    place = np.empty_like(position)
    place[by_score] = position[by_position]  # row -> the position that it gets
    _, of_logged = np.unique(position, return_inverse=True)
    clicks, hoped = (np.bincount(of_logged, values / propensity) for values in (labels, expected))
    looked = dict(zip(np.unique(position).tolist(), (clicks / np.maximum(hoped, 1e-12)).tolist(), strict=True))
    looked_at = np.vectorize(looked.__getitem__, otypes=[np.float64])
    return Weighed(
        np.where(place == position, 1 / propensity, 0), expected * looked_at(position), expected * looked_at(place)
    )


def values(labels: np.ndarray, weighed: Weighed, units: np.ndarray, weights_RU: np.ndarray) -> dict[str, np.ndarray]:
    """`snips` and `value` under each row of weights of the units, [resamples] each; NaN where no row has a weight."""
    w = weighed.weight
    sums_SU = np.stack([np.bincount(units, part) for part in
                        (np.ones(len(w)), weighed.direct, w, w * labels, w * (labels - weighed.expected))])  # fmt: skip
    rows, direct, weight, clicks, missed = sums_SU @ weights_RU.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"snips": clicks / weight, "value": direct / rows + missed / weight}


def effective_rows(weight: np.ndarray) -> float:
    return float(weight.sum() ** 2 / max(float((weight**2).sum()), 1e-300))


def compared(
    labels: np.ndarray, policies: dict[str, Weighed], units: np.ndarray, oracle: np.ndarray | None, *, resamples: int,
    seed: int,
) -> dict[str, Any] | None:  # fmt: skip
    """Each policy with 95% intervals over resampled users, and what the first earns more than the second.

    policies  the model's, and the champion's where there is one
    oracle    true click probabilities of the rows: without the chance in the clicks, the same estimate is `by_oracle`

    None where no row could be shown by a policy.
    """
    if not all(policy.weight.any() for policy in policies.values()):
        return None
    count = int(units.max()) + 1
    blocks = [np.ones((1, count)), *statistics.draws(count, resamples, seed)]
    as_logged = Weighed(np.ones(len(labels)), np.zeros(len(labels)), np.zeros(len(labels)))
    drawn = {name: _stacked(labels, policy, units, blocks) for name, policy in policies.items()}
    found = []
    for name, policy in policies.items():
        told = _told(drawn[name]["value"]) | {
            "snips": _told(drawn[name]["snips"]),
            "effective_rows": effective_rows(policy.weight),
        }
        if oracle is not None:
            told["by_oracle"] = float(values(oracle, policy, units, blocks[0])["value"][0])
        found.append(told)
    names = list(policies)
    difference = _told(drawn[names[0]]["value"] - drawn[names[1]]["value"]) if len(names) > 1 else None
    return {
        "rows": len(labels),
        **found[0],
        "logged": _told(_stacked(labels, as_logged, units, blocks)["snips"]),
        "champion": found[1] | {"version": names[1]} if len(names) > 1 else None,
        "difference": difference,
    }


def _stacked(labels: np.ndarray, policy: Weighed, units: np.ndarray, blocks: list[np.ndarray]) -> dict[str, np.ndarray]:
    parts = [values(labels, policy, units, weights_RU) for weights_RU in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _told(sample: np.ndarray) -> dict[str, float]:
    low, high = statistics.interval(sample)
    return {"value": float(sample[0]), "se": float(np.nanstd(sample[1:], ddof=1)), "low": low, "high": high}
