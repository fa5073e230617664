"""AUC on the device is scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from models.metrics import auc


@pytest.mark.parametrize("rows", [2, 3, 17, 4096])
@pytest.mark.parametrize("values", [1, 2, 5, None], ids=["one score", "two scores", "many ties", "no ties"])
def test_auc_is_that_of_sklearn(rows: int, values: int | None) -> None:
    rng = np.random.default_rng([rows, values or 0])
    label = rng.random(rows) < 0.3
    label[0], label[1] = True, False
    score = (rng.normal(size=rows) + label if values is None else rng.integers(values, size=rows)).astype(np.float32)
    found = auc(torch.from_numpy(label.astype(np.float32)), torch.from_numpy(score))
    assert found == pytest.approx(roc_auc_score(label, score), abs=1e-12)


def test_auc_of_a_perfect_and_of_a_reversed_order() -> None:
    label, score = torch.tensor([0.0, 0, 1, 1]), torch.tensor([-2.0, -1, 1, 2])
    assert (auc(label, score), auc(label, -score), auc(label, torch.zeros(4))) == (1.0, 0.0, 0.5)


def test_auc_of_many_rows_does_not_lose_counts() -> None:
    """Ranks sum to more than float32 can count."""
    label = torch.arange(400_000) % 2
    assert auc(label.float(), label.float()) == 1.0


@pytest.mark.parametrize("clicks", [0, 3])
def test_one_class_alone_has_no_auc(clicks: int) -> None:
    with pytest.raises(ValueError, match=f"auc: {clicks} clicks among 3 rows; both classes"):
        auc(torch.full((3,), float(clicks > 0)), torch.arange(3.0))
