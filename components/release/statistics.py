"""How sure a figure is, and how sure the difference of two models on the same rows is.

Rows of one user are not independent, so the users are the units everywhere. Where all rows are of one user (data
without users), the rows are.

AUC            the mean over pairs of a click and a row without one. Its variance follows from the placement values of
               DeLong et al. (Biometrics 1988), computed from ranks as by Sun & Xu (IEEE Signal Processing Letters
               2014), and summed within each user as by Obuchowski (Biometrics 1997)
calibration    intercept: what is missing in the mean log-odds, at slope 1. Slope: of the labels on the log-odds (van
               Calster et al., Journal of Clinical Epidemiology 2016)
all figures    the bootstrap over users (Davison & Hinkley 1997, chapters 2 and 3). Each resample draws as many users as
               there are, with replacement: a user's rows get the number of times that the user was drawn as weight

A resample of sums over rows costs nothing: the sums are taken for each user once. Only AUC and average precision need
the rows in the order of their scores; they are sorted once.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix, hstack
from scipy.special import logit, ndtri
from scipy.stats import rankdata

BLOCK = 50  # resamples whose draws are in memory at a time
EDGE = 1e-7  # log-odds are of probabilities that far from 0 and 1
TINY = np.finfo(np.float64).eps  # a logloss is of probabilities of at least this, as in scikit-learn
FIGURES = (
    "auc", "group_auc", "average_precision", "logloss", "normalised_entropy", "calibration_error",
    "calibration_slope", "calibration_intercept",
)  # fmt: skip


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    se: float

    def interval(self, coverage: float = 0.95) -> tuple[float, float]:
        half = float(ndtri(0.5 + coverage / 2)) * self.se
        return self.value - half, self.value + half


def units_of(users: np.ndarray) -> np.ndarray:
    """Each row's unit of resampling, 0.. without gaps: its user, or the row itself where all are of one user."""
    distinct, unit_B = np.unique(users, return_inverse=True)
    return unit_B if len(distinct) > 1 else np.arange(len(users))


# ---- AUC by placement values ------------------------------------------------------------------------------------


def placements(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """For a click, the share of the rows without one that it is above; for the others, the share of clicks below which
    they are. Ties count half. The mean over the clicks, and over the others, is the AUC. float64 [rows]"""
    is_click = labels.astype(bool)
    clicks = int(is_click.sum())
    others = len(labels) - clicks
    rank_B = rankdata(scores)
    found = np.empty(len(labels))
    found[is_click] = (rank_B[is_click] - rankdata(scores[is_click])) / others
    found[~is_click] = 1 - (rank_B[~is_click] - rankdata(scores[~is_click])) / clicks
    return found


def auc(labels: np.ndarray, scores: np.ndarray, units: np.ndarray, *, minus: np.ndarray | None = None) -> Estimate:
    """The AUC, or its difference to the AUC of other scores on the same rows, with its standard error.

    With units of one row each this is DeLong's variance (up to n / (n - 1)).
    """
    placed = placements(labels, scores) - (0 if minus is None else placements(labels, minus))
    is_click = labels.astype(bool)
    value = placed[is_click].mean()
    share = np.where(is_click, 1 / is_click.sum(), 1 / (~is_click).sum())
    part_U = np.bincount(units, (placed - value) * share)
    count = len(part_U)
    return Estimate(float(value), float(np.sqrt(count / (count - 1) * (part_U**2).sum())))


# ---- the bootstrap ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Sums over the rows of each unit, [units, sums], and how figures follow from their weighted totals."""

    linear_US: csr_matrix
    bins: int

    def figures(self, totals_RS: np.ndarray) -> dict[str, np.ndarray]:
        rows, clicks, loss, areas, area_rows, rest, weight, g0, g1, h00, h01, h11 = totals_RS[:, :12].T
        predicted_RK, observed_RK = np.split(totals_RS[:, 12:], 2, axis=1)
        rate = clicks / rows
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
            determinant = h00 * h11 - h01**2
            return {
                "group_auc": areas / area_rows,
                "logloss": loss / rows,
                "normalised_entropy": loss / rows / entropy,
                "calibration_error": np.abs(predicted_RK - observed_RK).sum(1) / rows,
                "calibration_intercept": rest / weight,
                "calibration_slope": (h00 * g1 - h01 * g0) / determinant,
            }


class Scored:
    """One model's scores on labelled rows, ready to be measured under any weights of the units.

    labels  0 or 1; scores  probabilities; units  as `units_of` gives them; bins  equally filled, of the scores
    """

    def __init__(self, labels: np.ndarray, scores: np.ndarray, units: np.ndarray, bins: int) -> None:
        labels = labels.astype(np.float64)
        order = np.argsort(-scores, kind="stable")
        self._unit, self._click = units[order].astype(np.int32), labels[order]
        ordered = scores[order]
        # the last row of each group of equal scores: a threshold lies between two scores, never within one
        self._last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        self._shift, self._slope = shift(labels, scores), calibration(labels, scores)
        self._sums = self._per_unit(labels, scores.astype(np.float64), units, order, bins)

    def _per_unit(
        self, labels: np.ndarray, scores: np.ndarray, units: np.ndarray, order: np.ndarray, bins: int
    ) -> _Sums:
        count = int(units.max()) + 1
        z_B = logit(np.clip(scores, EDGE, 1 - EDGE))
        shift, (intercept, slope) = self._shift, self._slope
        shifted_B, fitted_B = (1 / (1 + np.exp(-x_B)) for x_B in (shift + z_B, intercept + slope * z_B))
        rest_B, weight_B = labels - fitted_B, fitted_B * (1 - fitted_B)
        area_U, area_rows_U = _own_areas(labels, scores, units, count)
        certain_B = np.clip(np.where(labels > 0, scores, 1 - scores), TINY, 1)
        loss_B = -np.log(certain_B)
        columns = [np.ones_like(labels), labels, loss_B]
        gradients = [
            labels - shifted_B, shifted_B * (1 - shifted_B),
            rest_B, rest_B * z_B, weight_B, weight_B * z_B, weight_B * z_B**2,
        ]  # fmt: skip
        dense_US = np.stack(
            [*(np.bincount(units, c, count) for c in columns), area_U * area_rows_U, area_rows_U,
             *(np.bincount(units, c, count) for c in gradients)], 1
        )  # fmt: skip
        bin_B = np.empty(len(labels), dtype=np.int64)
        bin_B[order] = np.arange(len(labels)) * bins // len(labels)
        shape = (count, bins)
        binned = [csr_matrix((values, (units, bin_B)), shape) for values in (scores, labels)]
        return _Sums(linear_US=csr_matrix(hstack([csr_matrix(dense_US), *binned])), bins=bins)

    def figures(self, weights_RU: np.ndarray) -> dict[str, np.ndarray]:
        """FIGURES under each row of weights, [resamples] each; NaN where a figure means nothing."""
        found = self._sums.figures(np.asarray((self._sums.linear_US.T @ weights_RU.T).T))
        found["calibration_intercept"] += self._shift  # one Newton step from the fit on all rows
        found["calibration_slope"] += self._slope[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            areas = np.array([self._areas(weights_U) for weights_U in weights_RU])
        return {"auc": areas[:, 0], "average_precision": areas[:, 1], **found}

    def _areas(self, weights_U: np.ndarray) -> tuple[float, float]:
        """Areas under the ROC curve (trapezoids) and under precision-recall (steps: average precision)."""
        weight_B = weights_U[self._unit]
        clicked = np.cumsum(weight_B * self._click)[self._last]
        shown = np.cumsum(weight_B)[self._last]
        missed = shown - clicked
        step = np.diff(clicked, prepend=0.0)
        # a click is above the rows without one that come after it, and above half of those with its own score
        before = missed - np.diff(missed, prepend=0.0) / 2
        auc_ = 1 - float(step @ before) / (clicked[-1] * missed[-1])
        precision = np.divide(clicked, shown, out=np.zeros_like(clicked), where=shown > 0)
        return auc_, float(step @ precision) / clicked[-1]


def _own_areas(labels: np.ndarray, scores: np.ndarray, units: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Each unit's own AUC, and its rows as weight: 0 where it has one class. float64 [units] each"""
    order = np.lexsort((scores, units))
    unit, value, click = units[order], scores[order], labels[order]
    start = np.flatnonzero(np.append(True, (unit[1:] != unit[:-1]) | (value[1:] != value[:-1])))
    size = np.diff(np.append(start, len(order)))
    first_U = np.searchsorted(unit, np.arange(count))
    rank = np.repeat(start + (size + 1) / 2, size) - first_U[unit]
    rows_U, clicks_U = np.bincount(unit, minlength=count), np.bincount(unit, click, count)
    pairs_U = clicks_U * (rows_U - clicks_U)
    above_U = np.bincount(unit, rank * click, count) - clicks_U * (clicks_U + 1) / 2
    has_both = pairs_U > 0
    return np.divide(above_U, pairs_U, out=np.zeros(count), where=has_both), np.where(has_both, rows_U, 0).astype(float)


def shift(labels: np.ndarray, scores: np.ndarray, steps: int = 50) -> float:
    """What must be added to the scores' log-odds so that their mean is the share of clicks: calibration in the large, 0
    where it holds. By Newton's method; NaN where there is one class."""
    if not 0 < labels.mean() < 1:
        return float("nan")
    z_B = logit(np.clip(scores.astype(np.float64), EDGE, 1 - EDGE))
    found = 0.0
    for _ in range(steps):
        fitted_B = 1 / (1 + np.exp(-(found + z_B)))
        step = float((labels - fitted_B).sum() / max((fitted_B * (1 - fitted_B)).sum(), EDGE))
        found += float(np.clip(step, -2, 2))
        if abs(step) < 1e-10:
            break
    return found


def calibration(labels: np.ndarray, scores: np.ndarray, steps: int = 25) -> tuple[float, float]:
    """Intercept and slope of the labels' logistic regression on the scores' log-odds: 0 and 1 where they are
    calibrated (Cox 1958). By Newton's method; (NaN, NaN) where it does not converge, as for one class."""
    z_B = logit(np.clip(scores.astype(np.float64), EDGE, 1 - EDGE))
    found = np.array([0.0, 1.0])
    for _ in range(steps):
        fitted_B = 1 / (1 + np.exp(-(found[0] + found[1] * z_B)))
        rest_B, weight_B = labels - fitted_B, fitted_B * (1 - fitted_B)
        h00, h01, h11 = weight_B.sum(), (weight_B * z_B).sum(), (weight_B * z_B**2).sum()
        g0, g1 = rest_B.sum(), (rest_B * z_B).sum()
        determinant = h00 * h11 - h01**2
        if not determinant > 0:
            break
        step = np.array([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0]) / determinant
        found += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            return float(found[0]), float(found[1])
    return float("nan"), float("nan")


def draws(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each unit was drawn, a row a resample, in blocks: float64 [block, units]."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        drawn = rng.integers(0, units, (min(BLOCK, resamples - start), units))
        yield np.stack([np.bincount(row, minlength=units) for row in drawn]).astype(np.float64)


def bootstrap(
    labels: np.ndarray, scores: dict[str, np.ndarray], users: np.ndarray, *, bins: int, resamples: int, seed: int,
    threads: int = 1,
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """Model -> figure -> [1 + resamples]: on all rows first, then on each resample. Every model sees the same ones, so
    differences of two models are paired."""
    units = units_of(users)
    count = int(units.max()) + 1
    models = {name: Scored(labels, of_model, units, bins) for name, of_model in scores.items()}

    def measured(weights_RU: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        return {name: model.figures(weights_RU) for name, model in models.items()}

    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter where the time is spent
        blocks = [measured(np.ones((1, count))), *pool.map(measured, draws(count, resamples, seed))]
    return {name: {f: np.concatenate([block[name][f] for block in blocks]) for f in FIGURES} for name in models}


def interval(sample: np.ndarray, coverage: float = 0.95) -> tuple[float, float]:
    """The percentile interval of a figure's resamples; the figure itself, at the front, does not count."""
    resampled = sample[1:][np.isfinite(sample[1:])]
    if not len(resampled):
        return float("nan"), float("nan")
    low, high = np.quantile(resampled, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def drift(before: np.ndarray, now: np.ndarray, bins: int = 10) -> float:
    """Population stability index of two samples of scores, over bins that are equally filled before. Under .1 it counts
    as stable, over .25 as another distribution (Siddiqi, Credit Risk Scorecards, 2006)."""
    edges = np.unique(np.quantile(before, np.linspace(0, 1, bins + 1)[1:-1]))
    shares = [
        (np.bincount(np.searchsorted(edges, sample, "right"), minlength=len(edges) + 1) + 0.5)
        / (len(sample) + 0.5 * (len(edges) + 1))
        for sample in (before, now)
    ]
    return float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
