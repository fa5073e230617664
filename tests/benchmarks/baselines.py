"""Three well-known rankers in the project's own frame, for comparison alone: the same fields, batches and trainer.

    LogisticRegression   w·x over every value: fields, item, tags, vector; of the history its items' mean weight
    DIN                  Deep Interest Network (arXiv 1706.06978): an MLP weighs each history item for the candidate,
                         their sum goes into a tower with Dice
    DCNv2                Deep & Cross Network v2 (arXiv 2008.13535): full-rank cross layers beside an MLP

The history enters LogisticRegression and DCNv2 as SDCNv3 reads it: means over the items' ids and vectors.
Shapes: those of `models.layers`, and M item vector, D width of the network's input.
"""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy

import harness  # noqa: F401 - this project's code on the path
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.layers import ImpressionFields, ItemTower, Ranker, Ranking, distinct_rows, initialise
from models.losses import bce
from models.schema import PADDING, Batch, Catalog, Logits, Schema, history_rows


class Baseline(Ranker):
    """Embeddings and their regulariser as the project's models have them; BCE."""

    def __init__(self, schema: Schema, dim: int) -> None:
        super().__init__()
        self.fields, self.items = ImpressionFields(schema, (), dim), ItemTower(schema, (), dim)
        self.history_length = schema.history_length

    @abstractmethod
    def logits(self, fields: list[Tensor], target: list[Tensor], hist_BL: Tensor, catalog: Catalog) -> Tensor:
        """[B], from [B, d] for every field and every part of the candidate. `hist_BL` has no column without history."""

    def forward(self, batch: Batch, catalog: Catalog, clicks_C: Tensor) -> Logits:
        rows_U, index_B = distinct_rows(batch.item_B, len(catalog))
        target = [part_UE[index_B] for part_UE in self.items(rows_U, catalog)]
        hist_BL = history_rows(clicks_C, batch.start_B, batch.end_B, self.history_length)
        return Logits(self.logits(self.fields(batch.fields_BF), target, hist_BL, catalog))

    def loss(self, logits: Logits, label_B: Tensor) -> Tensor:
        return bce(logits, label_B)

    def ranking(self, catalog: Catalog) -> Ranking:
        model = deepcopy(self).eval()

        @torch.inference_mode()
        def rank(fields_NF: Tensor, item_N: Tensor, hist_K: Tensor) -> Tensor:
            first_N = torch.zeros_like(item_N)
            return model(Batch(fields_NF, item_N, first_N, first_N + len(hist_K)), catalog, hist_K).logit_B

        return rank

    def history_means(self, items: ItemTower, hist_BL: Tensor, catalog: Catalog) -> list[Tensor]:
        """Means over the history, [B, d] each: of the items' ids, and of their vectors where there are any."""
        if self.history_length == 0:
            return []
        assert isinstance(items.categoricals[0], nn.Embedding)
        index_BL = catalog.categorical_IG[:, 0][hist_BL].long()
        means = [F.embedding_bag(index_BL, items.categoricals[0].weight, mode="mean", padding_idx=PADDING)]
        if items.project is not None and catalog.vector_IE is not None:
            mean_BE = F.embedding_bag(hist_BL, catalog.vector_IE, mode="mean", padding_idx=PADDING)
            means.append(items.project(mean_BE))
        return means


class LogisticRegression(Baseline):
    def __init__(self, schema: Schema) -> None:
        super().__init__(schema, 1)
        self.clicked = ItemTower(schema, (), 1)  # a click's weight is not the candidate's
        self.bias = nn.Parameter(torch.zeros(1))
        initialise(self)

    def logits(self, fields: list[Tensor], target: list[Tensor], hist_BL: Tensor, catalog: Catalog) -> Tensor:
        parts = [*fields, *target, *self.history_means(self.clicked, hist_BL, catalog)]
        return torch.cat(parts, 1).sum(1) + self.bias

    def regularised_parameters(self) -> list[nn.Parameter]:
        return [*super().regularised_parameters(), *self.clicked.parameters()]


class Dice(nn.Module):
    """p ⊙ x + (1 − p) ⊙ α x, p = sigmoid(BatchNorm x): a PReLU whose corner moves with the data."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.slope = nn.Parameter(torch.zeros(width))

    def forward(self, x_BD: Tensor) -> Tensor:
        p_BD = self.norm(x_BD).sigmoid()
        return x_BD * (p_BD + (1 - p_BD) * self.slope)


class DIN(Baseline):
    """weights_l = MLP[t ‖ s ‖ t − s ‖ t ⊙ s], without softmax; MLP of [fields ‖ t ‖ Σ weights_l s_l]."""

    def __init__(self, schema: Schema, dim: int = 16, attention: int = 32, hidden: tuple[int, ...] = (200, 80)) -> None:
        super().__init__(schema, dim)
        item = len(self.items) * dim
        width = len(self.fields.tables) * dim + item * (2 if schema.history_length else 1)
        self.attention = nn.Sequential(nn.Linear(4 * item, attention), nn.Sigmoid(), nn.Linear(attention, 1))
        self.tower = tower(width, hidden, 0.0, dice=True)
        self.out = nn.Linear(hidden[-1], 1)
        initialise(self)

    def logits(self, fields: list[Tensor], target: list[Tensor], hist_BL: Tensor, catalog: Catalog) -> Tensor:
        t_BM = torch.cat(target, 1)
        parts = [*fields, t_BM]
        if self.history_length:
            rows_U, index_N = distinct_rows(hist_BL.flatten(), len(catalog))
            s_BLM = torch.cat(self.items(rows_U, catalog), 1)[index_N].view(*hist_BL.shape, -1)
            t_BLM = t_BM[:, None].expand_as(s_BLM)
            weight_BL = self.attention(torch.cat((t_BLM, s_BLM, t_BLM - s_BLM, t_BLM * s_BLM), 2)).squeeze(2)
            parts.append(((weight_BL * (hist_BL != PADDING))[:, None] @ s_BLM).squeeze(1))
        return self.out(self.tower(torch.cat(parts, 1))).squeeze(1)


class DCNv2(Baseline):
    """x ← x_0 ⊙ (W x + b) + x beside an MLP of x_0; w·[cross ‖ MLP]."""

    def __init__(
        self, schema: Schema, dim: int = 16, layers: int = 3, hidden: tuple[int, ...] = (256, 128), dropout: float = 0.2
    ) -> None:
        super().__init__(schema, dim)
        means = 0 if schema.history_length == 0 else 1 + (self.items.project is not None)
        width = (len(self.fields.tables) + len(self.items) + means) * dim
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.tower = tower(width, hidden, dropout)
        self.out = nn.Linear(width + hidden[-1], 1)
        initialise(self)

    def logits(self, fields: list[Tensor], target: list[Tensor], hist_BL: Tensor, catalog: Catalog) -> Tensor:
        first_BD = torch.cat([*fields, *target, *self.history_means(self.items, hist_BL, catalog)], 1)
        x_BD = first_BD
        for cross in self.crosses:
            x_BD = torch.addcmul(x_BD, first_BD, cross(x_BD))
        return self.out(torch.cat((x_BD, self.tower(first_BD)), 1)).squeeze(1)


def tower(width: int, hidden: tuple[int, ...], dropout: float, dice: bool = False) -> nn.Sequential:
    """Linear, activation (ReLU or Dice) and dropout for each width in `hidden`."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), Dice(size) if dice else nn.ReLU(), nn.Dropout(dropout)]
        width = size
    return nn.Sequential(*layers)
