"""The metric that training watches, on the device where the scores are."""

from __future__ import annotations

import torch
from torch import Tensor


def auc(label_B: Tensor, score_B: Tensor) -> float:
    """Area under the ROC curve: P(score of a click > score of a non-click), a tie counting one half.

    Raises ValueError if the rows are all clicks or all non-clicks.
    """
    positives = int(label_B.sum())
    negatives = len(label_B) - positives
    if not positives or not negatives:
        raise ValueError(f"auc: {positives} clicks among {len(label_B)} rows; both classes are needed")
    _, index_B, counts = torch.unique(score_B, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    rank_B = (last - (counts - 1) / 2)[index_B]  # mean rank of a tie, from 1
    return float((rank_B[label_B > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))
