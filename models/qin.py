"""QIN, the Quadratic Interest Network (arXiv 2504.17699; 2nd in the WWW 2025 MM-CTR challenge, task 2).

    item           e = [categoricals ‖ set means ‖ W_p vector]            t of the candidate, s_l of the history
    attention      a_l = ReLU( (W_q t)·(W_k s_l) / √A ),  0 at padding    one head, no softmax, no bias
                   o = W_o Σ_l a_l W_v s_l + t
    input          x_0 = [fields ‖ t ‖ o]                                 without a history: [fields ‖ t],
                                                                          without items: [fields]
    layer          z = x ⊙ Σ_r Dropout(W x + b)_r,  W: D → R·D            R rows of width D
                   x ← Dropout(PReLU(BatchNorm(z))) + x
    logit          w·x + b

What runs is the same function with less work:
- (W_q t)·(W_k s) = (W_kᵀ W_q t)·s and W_o Σ a W_v s = (W_o W_v) Σ a s: the query and the pooled vector are
  projected, the L history positions never are;
- the item tower sees each distinct catalog row of a batch once;
- without dropout Σ_r (W x + b)_r is one D × D product.

Shapes: those of `models.schema`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F  # noqa: N812

from models.kernels import choice
from models.layers import (
    ImpressionFields,
    ItemTower,
    Ranker,
    distinct_rows,
    dropout,
    initialise,
    require_names,
    require_positive,
    require_rate,
)
from models.losses import bce
from models.schema import PADDING, Batch, Catalog, Logits, Part, Schema, history_rows


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


class PointerPool(torch.autograd.Function):
    """pooled_b = Σ_l ReLU(q_b · t_i) t_i with i = index[b, l], without a B × L × M array of gathered item rows.

    A score is what an embedding bag calls the gradient of a weight, so both directions run in the bag's kernels.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q_BM: Tensor, item_UM: Tensor, index_BL: Tensor, real_BL: Tensor) -> Tensor:
        index_BL = index_BL.contiguous()
        weight_BL = _scores(q_BM, item_UM, index_BL).relu_().masked_fill_(~real_BL, 0)
        ctx.save_for_backward(q_BM, item_UM, index_BL, weight_BL)
        return F.embedding_bag(index_BL, item_UM, per_sample_weights=weight_BL, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_BM: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q_BM, item_UM, index_BL, weight_BL = ctx.saved_tensors
        grad_BM = grad_BM.contiguous()
        score_BL = torch.where(weight_BL > 0, _scores(grad_BM, item_UM, index_BL), 0)
        grad_q_BM = F.embedding_bag(index_BL, item_UM, per_sample_weights=score_BL, mode="sum")
        # An item row gets weight · grad for what was pooled and score · q for its scores: 2 B bags, one pass.
        index_N = index_BL.flatten().repeat(2)
        length = index_BL.shape[1]
        bag_N = torch.arange(2 * len(index_BL)).repeat_interleave(length)
        grad_item_UM = torch.ops.aten._embedding_bag_dense_backward(
            torch.cat((grad_BM, q_BM)), index_N, bag_N, torch.full((2 * len(index_BL),), length), bag_N[:0],
            len(item_UM), False, 0, torch.cat((weight_BL, score_BL)).flatten(),
        )  # fmt: skip
        return grad_q_BM, grad_item_UM, None, None


def _scores(q_BM: Tensor, item_UM: Tensor, index_BL: Tensor) -> Tensor:
    """q_b · t_i, [B, L]."""
    rows, length = index_BL.shape
    starts_B = torch.arange(0, rows * length, length)
    bag_N = torch.arange(rows).repeat_interleave(length)
    scores_N: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        q_BM, item_UM, index_BL.flatten(), starts_B, bag_N, 0
    )
    return scores_N.view(rows, length)


def gathered_pool(q_BM: Tensor, item_UM: Tensor, index_BL: Tensor, real_BL: Tensor) -> Tensor:
    """What PointerPool computes, from gathered rows: the plain form on other devices than the CPU."""
    hist_BLM = item_UM[index_BL]
    weight_B1L = torch.bmm(q_BM[:, None], hist_BLM.transpose(1, 2)).relu().masked_fill(~real_BL[:, None], 0)
    return torch.bmm(weight_B1L, hist_BLM).squeeze(1)


def device_pool(q_BM: Tensor, item_UM: Tensor, index_BL: Tensor, real_BL: Tensor) -> Tensor:
    """What PointerPool computes, on other devices than the CPU: in Triton where it runs, else `gathered_pool`."""
    if choice.runs("pointer_pool", item_UM.device.type) == "triton":
        from models.kernels.pointer_pool import pointer_pool  # a server on a CPU does not load Triton

        return pointer_pool(q_BM, item_UM, index_BL, real_BL)
    return gathered_pool(q_BM, item_UM, index_BL, real_BL)


class SparseTargetAttention(nn.Module):
    """Pools the history items that the candidate asks for; ReLU leaves the others at exactly zero."""

    def __init__(self, item_width: int, attention_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(item_width, attention_dim, bias=False)
        self.key = nn.Linear(item_width, attention_dim, bias=False)
        self.value = nn.Linear(item_width, attention_dim, bias=False)
        self.out = nn.Linear(attention_dim, item_width, bias=False)
        self.scale = attention_dim**-0.5

    def forward(self, target_BM: Tensor, item_UM: Tensor, index_BL: Tensor, real_BL: Tensor) -> Tensor:
        """o_BM, for histories item_UM[index_BL]; `real_BL` is False at padding."""
        q_BM = F.linear(target_BM, self.key.weight.T @ self.query.weight * self.scale)
        if item_UM.device.type == "cpu":
            pooled_BM = PointerPool.apply(q_BM.to(item_UM.dtype), item_UM, index_BL, real_BL)
        else:  # rows move in q's dtype, under autocast bfloat16
            pooled_BM = device_pool(q_BM, item_UM.to(q_BM.dtype), index_BL, real_BL)
        return F.linear(pooled_BM, self.out.weight @ self.value.weight) + target_BM


class QuadraticLayer(nn.Module):
    """One more product with x: each layer doubles the degree of the polynomial."""

    def __init__(self, width: int, rows: int, dropout: float) -> None:
        super().__init__()
        self.rows = rows
        self.dropout = dropout
        self.project = nn.Linear(width, rows * width)
        self.norm = nn.BatchNorm1d(width)
        self.activation = nn.PReLU()

    def forward(self, x_BD: Tensor, part: Part | None) -> Tensor:
        """The next x_BD; `part` is the batch's, for dropout."""
        if self.training and self.dropout > 0:
            h_BD = dropout(self.project(x_BD), self.dropout, True, part).unflatten(1, (self.rows, -1)).sum(1)
        else:
            h_BD = F.linear(x_BD, *self._summed_rows())
        z_BD = self.activation(self.norm(x_BD * h_BD))
        return dropout(z_BD, self.dropout, self.training, part) + x_BD

    def folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(weight D × D, bias, shift, slope) of the eval-mode layer x + PReLU(x ⊙ (weight x + bias) + shift)."""
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        scale = self.norm.weight * (var + self.norm.eps).rsqrt()
        weight, bias = self._summed_rows()
        return scale[:, None] * weight, scale * bias, self.norm.bias - scale * mean, self.activation.weight.clone()

    def _summed_rows(self) -> tuple[Tensor, Tensor]:
        rows = (self.rows, -1)
        return self.project.weight.unflatten(0, rows).sum(0), self.project.bias.unflatten(0, rows).sum(0)


class QIN(Ranker):
    """The quadratic interest network of a schema, with or without items. BatchNorm needs two rows or more to train."""

    def __init__(self, config: QINConfig, schema: Schema) -> None:
        super().__init__()
        self.history_length = schema.history_length
        self.fields = ImpressionFields(schema, config.exclude, config.dim)
        self.items = ItemTower(schema, config.exclude, config.dim)
        item_width = len(self.items) * config.dim
        width = len(self.fields.tables) * config.dim + item_width
        if width == 0:
            raise ValueError(f"QIN: no feature left (exclude = {config.exclude}); keep one")
        self.attention = None
        if schema.history_length > 0 and item_width > 0:
            self.attention = SparseTargetAttention(item_width, config.attention_dim)
            width += item_width
        self.layers = nn.ModuleList(QuadraticLayer(width, config.rows, config.dropout) for _ in range(config.layers))
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
            parts += [target_BM, self.attention(target_BM, item_UM, index_BL.view(hist_BL.shape), hist_BL != PADDING)]
        x_BD = torch.cat(parts, 1)
        for layer in self.layers:
            x_BD = layer(x_BD, batch.part)
        return Logits(self.out(x_BD).squeeze(1))

    def loss(self, logits: Logits, label_B: Tensor) -> Tensor:
        return bce(logits, label_B)

    def ranking(self, catalog: Catalog) -> QINRanking:
        return QINRanking(self, catalog)


class QINRanking:
    """QIN for serving: item rows in a table, and one product a layer.

    Candidates share their history, so it is the history that is projected, twice: t·(W_kᵀ W_q)ᵀ s = t·(s W_kᵀ W_q).
    The R rows and BatchNorm fold into one weight: BN(x ⊙ (W x + b)) = x ⊙ (αW x + αb) + β.
    """

    @torch.inference_mode()
    def __init__(self, model: QIN, catalog: Catalog) -> None:
        self.fields = deepcopy(model.fields)
        parts = model.items(torch.arange(len(catalog)), catalog)
        self.item_IM = torch.cat(parts, 1) if parts else torch.empty(len(catalog), 0)
        attention = model.attention
        self.projections = None
        if attention is not None:
            query_MM = attention.key.weight.T @ attention.query.weight * attention.scale
            self.projections = query_MM, (attention.out.weight @ attention.value.weight).T.contiguous()
        self.layers = [layer.folded() for layer in model.layers if isinstance(layer, QuadraticLayer)]
        self.out = deepcopy(model.out)

    @torch.inference_mode()
    def __call__(self, fields_NF: Tensor, item_N: Tensor, hist_K: Tensor) -> Tensor:
        target_NM = self.item_IM[item_N]
        parts = [*self.fields(fields_NF), target_NM]
        if self.projections is not None:
            key_KM, value_KM = (self.item_IM[hist_K] @ projection for projection in self.projections)
            parts.append(torch.addmm(target_NM, F.linear(target_NM, key_KM).relu_(), value_KM))
        x_ND = torch.cat(parts, 1)
        for weight, bias, shift, slope in self.layers:
            z_ND = torch.addcmul(shift, x_ND, F.linear(x_ND, weight, bias))
            x_ND += F.prelu(z_ND, slope)
        return self.out(x_ND).squeeze(1)
