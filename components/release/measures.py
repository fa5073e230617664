"""What is measured of scores on rows with labels; `statistics` says how sure each figure is.

auc                 area under the ROC curve
group_auc           mean of the users' own AUCs, weighted by their impressions; users with one class are left out.
                    For data without users it is the AUC. Where no user has both classes there is none
calibration_error   mean |predicted - observed| over equally filled bins, weighted by rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss, roc_auc_score, roc_curve

from components.release.policy import PolicyConfig
from components.release.slices import SlicesConfig

ROC_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """seed              of the resampling
    bootstrap         resamples of users (of rows, where there is one user) behind each interval
    calibration_bins  equally filled bins of the predicted probability
    slices            what the test rows are cut by
    policy            of the off-policy view
    """

    seed: int
    bootstrap: int
    calibration_bins: int
    slices: SlicesConfig
    policy: PolicyConfig

    def __post_init__(self) -> None:
        for name in ("bootstrap", "calibration_bins"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 2")


def measure(config: EvaluateConfig, labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> dict[str, Any]:
    """rows, label_rate, auc, group_auc, logloss, calibration_error, base_logloss; None where a figure means nothing."""
    curve = calibration_curve(labels, scores, config.calibration_bins)
    both = 0 < labels.mean() < 1
    rate = labels.mean(dtype=np.float64)
    return {
        "rows": len(labels),
        "label_rate": float(rate),
        "auc": float(roc_auc_score(labels, scores)) if both else None,
        "group_auc": group_auc(labels, scores, users),
        "logloss": float(log_loss(labels, scores.astype(np.float64), labels=[0, 1])),
        "base_logloss": float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate)) if both else 0.0,
        "calibration_error": float(
            (curve["rows"] * (curve["predicted"] - curve["observed"]).abs()).sum() / len(labels)
        ),
    }


def group_auc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float | None:
    """Users' own AUCs weighted by their impressions; None where no user has both classes."""
    frame = pd.DataFrame({"user": users, "label": labels.astype(np.int64), "score": scores})
    frame["rank"] = frame.groupby("user")["score"].rank()
    frame["clicked_rank"] = frame["rank"] * frame["label"]
    by_user = frame.groupby("user").agg(n=("label", "size"), p=("label", "sum"), ranks=("clicked_rank", "sum"))
    by_user = by_user[(by_user.p > 0) & (by_user.p < by_user.n)]
    if by_user.empty:
        return None
    area = (by_user.ranks - by_user.p * (by_user.p + 1) / 2) / (by_user.p * (by_user.n - by_user.p))
    return float((area * by_user.n).sum() / by_user.n.sum())


def calibration_curve(labels: np.ndarray, scores: np.ndarray, bins: int) -> pd.DataFrame:
    """predicted, observed, rows of equally filled bins of the predicted probability."""
    order = np.argsort(scores, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return pd.DataFrame(
        {
            "predicted": [scores[part].mean(dtype=np.float64) for part in parts],
            "observed": [labels[part].mean(dtype=np.float64) for part in parts],
            "rows": [len(part) for part in parts],
        }
    )


def roc_points(labels: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
    false, true, _ = roc_curve(labels, scores)
    at = np.linspace(0, 1, ROC_POINTS)
    return pd.DataFrame({"false_positive_rate": at, "true_positive_rate": np.interp(at, false, true)})
