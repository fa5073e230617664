"""A model on the day after its run: the rows that it would have been asked about, had it served them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from harness import ROOT  # noqa: F401 - this project's code
from sklearn.metrics import roc_auc_score

from components.common.dataset import UNSEEN, Dataset
from components.release.evaluate import predict_translated
from models.checkpoint import load


def auc_on(checkpoint: Path, dataset: Path) -> float:
    """AUC of a checkpoint, by its own vocabularies and catalog, on the newest day of a later run's dataset.

    Raises ValueError where it has seen that day.
    """
    return score_on(checkpoint, dataset)[0]


def score_on(checkpoint: Path, dataset: Path) -> tuple[float, float]:
    """The same, and the AUC that the labels would give on average: each row counts as both, by its true probability.

    The second has none of the labels' luck, so that it shows small differences. Needs a simulated dataset.
    """
    import pyarrow.parquet as pq

    model, data = load(checkpoint), Dataset.open(dataset)
    seen, ends = model.facts["train_until"], data.midnight("ends")
    if seen >= ends:
        raise ValueError(f"{checkpoint} has seen the days until {seen}, and {dataset} ends at {ends}")
    start, end = data.newest_day
    scores = predict_translated(model, data, pq.read_table(dataset / UNSEEN), (start, end))
    labels = data.columns["label"][start:end].numpy()
    true = data.columns["oracle"][start:end].double().numpy() if "oracle" in data.columns else labels
    twice = np.concatenate([np.ones_like(scores), np.zeros_like(scores)])
    expected = roc_auc_score(twice, np.tile(scores, 2), sample_weight=np.concatenate([true, 1 - true]))
    return float(roc_auc_score(labels, scores)), float(expected)
