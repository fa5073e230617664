"""One row a feature: how many values it has, and how well it alone predicts the label."""

from __future__ import annotations

import numpy as np
import pandas as pd

from components.common.contracts import Canonical
from components.data.frames.days import Recent
from components.data.frames.rows import features
from components.data.thresholds import FEWEST_LABELS, ValidateConfig


def column_frame(recent: Recent, data: Canonical, config: ValidateConfig) -> pd.DataFrame:
    """One row a feature: its number of `values`, and `tells_label`, 0 to 1: how well it predicts the label on that of
    the newest days on which it does so best, or on all of them together. Together they have values that repeat over
    days alone, and enough rows if each day has few.
    """
    label_R = recent.events["label"].fill_null(0).to_numpy()
    days = [recent.day_R == day for day in np.flatnonzero(recent.enough_D)]
    days.append(recent.day_R >= len(recent.days) - config.trailing_days)
    found = []
    for name, code_R in features(recent.events, data):
        code_R = code_R + 1  # a missing value is a value: it can predict the label too
        tells = [tells_label(code_R[rows], label_R[rows], config.min_day_rows) for rows in days]
        found.append({"column": name, "values": len(np.unique(code_R)), "tells_label": max(tells)})
    return pd.DataFrame(found, columns=["column", "values", "tells_label"])


def tells_label(code_R: np.ndarray, label_R: np.ndarray, fewest: int) -> float:
    """How well a column predicts the labels of rows that it has not seen: 0 not at all, 1 exactly.

    Each row's label y is predicted by m, the mean label of the *other* rows with the row's value:

        sqrt(max(0, Σ (y - ȳ)(m - ȳ) / Σ (y - ȳ)²))    over the rows whose value another row has too

    With many rows a value, this is Cramér's V. With few rows a value, V fits the labels by chance, the more the more
    values there are; here a row never predicts itself, so a column that says nothing stays near 0 and a copy of the
    label gives 1, however many values it has.

    0 if fewer than `fewest` rows, or fewer than FEWEST_LABELS of either label, share their value with another row.
    """
    shared_R = np.bincount(code_R)[code_R] > 1
    code_R, label_R = code_R[shared_R], label_R[shared_R].astype(float)
    clicks = label_R.sum()
    if len(label_R) < fewest or min(clicks, len(label_R) - clicks) < FEWEST_LABELS:
        return 0.0
    away_R = label_R - label_R.mean()
    rows_V, sum_V, squares_V = (np.bincount(code_R, weights) for weights in (None, away_R, away_R**2))
    explained = ((sum_V**2 - squares_V) / np.maximum(rows_V - 1, 1)).sum() / squares_V.sum()
    return float(np.clip(explained, 0, 1) ** 0.5)
