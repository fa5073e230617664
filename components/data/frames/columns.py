"""One row a feature: how many values it has, and how well it alone predicts the label."""

from __future__ import annotations

import numpy as np
import pandas as pd

from components.common.contracts import Canonical
from components.data.frames.days import Recent
from components.data.frames.rows import features


def column_frame(recent: Recent, data: Canonical) -> pd.DataFrame:
    """One row a feature: its `values`, and how well it alone `tells_label` on the day where it does so best, of those
    with enough rows: Cramér's V, 0 to 1, less what its number of values gives it by chance (Bergsma 2013)."""
    label_R = recent.events["label"].fill_null(0).to_numpy().astype(float)
    found = []
    for name, code_R in features(recent.events, data):
        code_R = code_R + 1  # a missing value can tell it too
        rows_DV, clicks_DV = recent.table(code_R), recent.table(code_R, label_R)
        n_D, values_D = rows_DV.sum(axis=1), (rows_DV > 0).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            rate_D1 = clicks_DV.sum(axis=1, keepdims=True) / n_D[:, None]
            parts_DV = np.nan_to_num((clicks_DV - rows_DV * rate_D1) ** 2 / rows_DV)
            phi_D = parts_DV.sum(axis=1) / (n_D * (rate_D1 * (1 - rate_D1))[:, 0]) - (values_D - 1) / (n_D - 1)
            freedom_D = np.minimum(values_D - 1 - (values_D - 1) ** 2 / (n_D - 1), 1 - 1 / (n_D - 1))
            told_D = np.where(freedom_D > 1e-9, np.clip(phi_D, 0, None) / freedom_D, 0.0)
        told_D = np.nan_to_num(told_D[recent.enough_D])
        found.append({"column": name, "values": int((rows_DV.sum(axis=0) > 0).sum()),
                      "tells_label": float(min(told_D.max(initial=0.0), 1.0) ** 0.5)})  # fmt: skip
    return pd.DataFrame(found, columns=["column", "values", "tells_label"])
