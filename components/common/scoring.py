"""Logits of a dataset's rows, for training's valid days and evaluation's test days alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from components.common.dataset import Dataset
from models.layers import Ranker

SCORE_BATCH = 16_384  # rows scored at once


@torch.inference_mode()
def score(model: Ranker, data: Dataset, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Logits and labels, float32 [rows], of a range of rows."""
    pieces = (slice(start, min(start + SCORE_BATCH, rows[1])) for start in range(*rows, SCORE_BATCH))
    logit_B, label_B = torch.cat([torch.stack(scored) for scored in score_pieces(model, data, pieces)], 1)
    return logit_B, label_B


def score_pieces(model: Ranker, data: Dataset, pieces: Iterable[slice]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for each slice of rows, in one forward pass a slice. The caller holds inference mode."""
    model.eval()
    for batch in data.batches(pieces):
        assert batch.label_B is not None
        yield model(batch, data.catalog, data.click_log).logit_B.float(), batch.label_B
