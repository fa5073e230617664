"""QIN, the Quadratic Interest Network (arXiv 2504.17699; 2nd in the WWW 2025 MM-CTR challenge, task 2).

    item           e = [categoricals ‖ set means ‖ W_p vector]            t of the candidate, s_l of the history
    attention      a_l = ReLU( (W_q t)·(W_k s_l) / √A ),  0 at padding    one head, no softmax, no bias
                   o = W_o Σ_l a_l W_v s_l + t
    input          x_0 = [fields ‖ t ‖ o]                                 without a history: [fields ‖ t]
    layer          z = x ⊙ Σ_r Dropout(W x + b)_r,  W: D → R·D            R rows of width D
                   x ← Dropout(PReLU(BatchNorm(z))) + x
    logit          w·x + b

What runs is the same function with less work:
- (W_q t)·(W_k s) = (W_kᵀ W_q t)·s and W_o Σ a W_v s = (W_o W_v) Σ a s: the query and the pooled vector are
  projected, the L history positions never are;
- the item tower sees each distinct catalog row of a batch once;
- without dropout Σ_r (W x + b)_r is one D × D product.

Shapes: those of `models.layers`, and A attention width, D width of x, R rows of a quadratic layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.layers import (
    ImpressionFields,
    ItemTower,
    Ranker,
    distinct_rows,
    initialise,
    require_names,
    require_positive,
    require_rate,
)
from models.losses import bce
from models.schema import PADDING, Batch, Catalog, Logits, Schema, history_rows


@dataclass(frozen=True, kw_only=True)
class QINConfig:
    """The defaults are the published run on MicroLens_1M_x1.

    dim            width of every embedding and of the projected item vector
    attention_dim  A, width of query, key and value
    layers, rows   quadratic layers, and R rows in each (the authors advise 3 where 4 is unstable)
    dropout        rate in every quadratic layer
    exclude        schema features that the model leaves out
    """

    dim: int = 128
    attention_dim: int = 768
    layers: int = 4
    rows: int = 4
    dropout: float = 0.1
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "dim", "attention_dim", "layers", "rows")
        require_rate(self, "dropout")
        require_names(self, "exclude")


class SparseTargetAttention(nn.Module):
    """Pools the history items that the candidate asks for; ReLU leaves the others at exactly zero."""

    def __init__(self, item_width: int, attention_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(item_width, attention_dim, bias=False)
        self.key = nn.Linear(item_width, attention_dim, bias=False)
        self.value = nn.Linear(item_width, attention_dim, bias=False)
        self.out = nn.Linear(attention_dim, item_width, bias=False)
        self.scale = attention_dim**-0.5

    def forward(self, target_BM: Tensor, hist_BLM: Tensor, real_BL: Tensor) -> Tensor:
        """o_BM; `real_BL` is False at padding."""
        q_BM = F.linear(target_BM, self.key.weight.T @ self.query.weight * self.scale)
        # [1, M] × [M, L], not [L, M] × [M, 1]: on a CPU the second order is five times slower
        score_B1L = torch.bmm(q_BM[:, None], hist_BLM.transpose(1, 2))
        weight_B1L = score_B1L.relu().masked_fill(~real_BL[:, None], 0)
        pooled_BM = torch.bmm(weight_B1L, hist_BLM).squeeze(1)
        return F.linear(pooled_BM, self.out.weight @ self.value.weight) + target_BM


class QuadraticLayer(nn.Module):
    """One more product with x: the degree of the polynomial grows by a factor of two a layer."""

    def __init__(self, width: int, rows: int, dropout: float) -> None:
        super().__init__()
        self.rows = rows
        self.dropout = dropout
        self.project = nn.Linear(width, rows * width)
        self.norm = nn.BatchNorm1d(width)
        self.activation = nn.PReLU()

    def forward(self, x_BD: Tensor) -> Tensor:
        shape = (self.rows, x_BD.shape[1])
        if self.training and self.dropout > 0:
            h_BD = F.dropout(self.project(x_BD), self.dropout).unflatten(1, shape).sum(1)
        else:
            h_BD = F.linear(x_BD, self.project.weight.unflatten(0, shape).sum(0), self.project.bias.view(shape).sum(0))
        z_BD = self.activation(self.norm(x_BD * h_BD))
        return F.dropout(z_BD, self.dropout, self.training) + x_BD


class QIN(Ranker):
    """The quadratic interest network of a schema. BatchNorm needs two rows or more when training."""

    def __init__(self, config: QINConfig, schema: Schema) -> None:
        super().__init__()
        self.history_length = schema.history_length
        self.fields = ImpressionFields(schema, config.exclude, config.dim)
        self.items = ItemTower(schema, config.exclude, config.dim)
        if len(self.items) == 0:
            raise ValueError(f"QIN: no item feature left (exclude = {config.exclude}); keep one, or train SDCNv3")
        item_width = len(self.items) * config.dim
        width = len(self.fields.tables) * config.dim + item_width
        self.attention = None
        if schema.history_length > 0:
            self.attention = SparseTargetAttention(item_width, config.attention_dim)
            width += item_width
        self.layers = nn.Sequential(*(QuadraticLayer(width, config.rows, config.dropout) for _ in range(config.layers)))
        self.out = nn.Linear(width, 1)
        initialise(self)

    def forward(self, batch: Batch, catalog: Catalog, clicks_C: Tensor) -> Logits:
        parts = self.fields(batch.fields_BF)
        if self.attention is None:
            parts += self.items(batch.item_B, catalog)
        else:
            hist_BL = history_rows(clicks_C, batch.start_B, batch.end_B, self.history_length)
            rows_N = torch.cat((batch.item_B, hist_BL.flatten()))
            rows_U, index_N = distinct_rows(rows_N, len(catalog))
            item_UM = torch.cat(self.items(rows_U, catalog), 1)
            index_B, index_BL = index_N.split((batch.item_B.numel(), hist_BL.numel()))
            target_BM = item_UM.index_select(0, index_B)
            hist_BLM = item_UM.index_select(0, index_BL).unflatten(0, hist_BL.shape)
            parts += [target_BM, self.attention(target_BM, hist_BLM, hist_BL != PADDING)]
        return Logits(self.out(self.layers(torch.cat(parts, 1))).squeeze(1))

    def loss(self, logits: Logits, label_B: Tensor) -> Tensor:
        return bce(logits, label_B)
