"""SDCNv3, the Shallow & Deep Cross Network v3 (arXiv 2407.13349 v1; later FCN, its halves ECN and LCN).

    fields     impression fields, item categoricals, item set means, the projected item vector, and with a history
               its means of E_item_id and of the projected vectors;  F' fields in all, tables d·H wide
    layout     head h of a field is d of its d·H numbers; x_1 of a head = [first halves ‖ second halves], D = F'·d
    layer      c = BatchNorm(W x),  W: D → D/2 without bias
               g = [c ‖ c ⊙ ReLU(LayerNorm(c))] + b
               deep:     x ← Dropout(x ⊙ g + x)        degree doubles a layer
               shallow:  x ← Dropout(x_1 ⊙ g + x)      degree grows by one a layer
    logit      each tower: mean over heads of w·x + b;  (deep + shallow) / 2
    loss       Tri-BCE of the logit and the two towers

The heads share all weights. `towers="deep"` is DCNv3 (ECN): the deep tower and BCE alone.
What runs is the same function with less work: the two first layers, which both read x_1, are one product, and
histories are pooled before they are projected, (1/n) Σ W v = W (1/n) Σ v.

Shapes: those of `models.schema`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.kernels import choice
from models.kernels.cross_step import CrossStep
from models.layers import (
    ImpressionFields,
    ItemTower,
    Ranker,
    distinct_rows,
    initialise,
    keep_mask,
    mask_seed,
    mean_rows,
    require,
    require_flag,
    require_names,
    require_positive,
    require_rate,
)
from models.losses import bce, tri_bce
from models.schema import PADDING, Batch, Catalog, Logits, Part, Schema, history_rows


@dataclass(frozen=True, kw_only=True)
class SDCNv3Config:
    """The defaults are the best published run on MovieLens-1M.

    dim                              d, an even width of a field in one head; tables are dim × heads wide
    heads                            H
    deep_layers, shallow_layers      cross layers of each tower
    deep_dropout, shallow_dropout    rate after each layer
    layer_norm, batch_norm           the two norms of a layer
    towers                           "both" (SDCNv3) or "deep" (DCNv3; the shallow settings are then unused)
    detach_loss_weights              keep gradients out of Tri-BCE's weights; the published form lets them in
    exclude                          schema features that the model leaves out
    """

    dim: int = 16
    heads: int = 1
    deep_layers: int = 3
    shallow_layers: int = 4
    deep_dropout: float = 0.2
    shallow_dropout: float = 0.1
    layer_norm: bool = True
    batch_norm: bool = True
    towers: Literal["both", "deep"] = "both"
    detach_loss_weights: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "dim", "heads", "deep_layers", "shallow_layers")
        require(self, "dim", self.dim % 2 == 0, "give an even number: every field is cut in two halves")
        require_rate(self, "deep_dropout", "shallow_dropout")
        require_flag(self, "layer_norm", "batch_norm", "detach_loss_weights")
        require(self, "towers", self.towers in ("both", "deep"), "give 'both' or 'deep'")
        require_names(self, "exclude")


def cross_step(
    c_BHK: Tensor,
    x_BHD: Tensor,
    first_BHD: Tensor | None,
    bias_D: Tensor,
    norm: nn.LayerNorm | None,
    keep_BHD: Tensor | None,
) -> Tensor:
    """x ← keep ⊙ (y ⊙ g + x), g = [c ‖ c ⊙ ReLU(LayerNorm c)] + b;  y is x_1, or x where `first` is None.

    `keep` is a dropout mask or None. Training on a CPU runs the same function in C (`models.kernels.cross_step`).
    """
    normal_BHK = c_BHK if norm is None else norm(c_BHK)
    gate_BHD = torch.cat((c_BHK, c_BHK * normal_BHK.relu()), -1) + bias_D
    out_BHD = torch.addcmul(x_BHD, x_BHD if first_BHD is None else first_BHD, gate_BHD)
    return out_BHD if keep_BHD is None else out_BHD * keep_BHD


class CrossLayer(nn.Module):
    """What follows W x in a layer: the norms and the bias."""

    def __init__(self, width: int, config: SDCNv3Config) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(config.heads) if config.batch_norm else nn.Identity()
        self.layer_norm = nn.LayerNorm(width // 2) if config.layer_norm else None
        self.bias = nn.Parameter(torch.rand(width))

    def forward(
        self, projected_BHK: Tensor, x_BHD: Tensor, first_BHD: Tensor | None, rate: float, part: Part | None
    ) -> Tensor:
        """The next x_BHD, with dropout at this rate; `part` is the batch's."""
        projected_BHK = projected_BHK.to(x_BHD.dtype)  # autocast gives projections in bfloat16
        eager = x_BHD.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.training and eager and self.layer_norm is not None and choice.runs("cross_step", x_BHD.dtype) == "c":
            return self.in_c(projected_BHK, x_BHD, first_BHD, rate, part)
        keep_BHD = keep_mask(x_BHD, rate, part) if rate else None
        return cross_step(self.batch_norm(projected_BHK), x_BHD, first_BHD, self.bias, self.layer_norm, keep_BHD)

    def in_c(
        self, projected_BHK: Tensor, x_BHD: Tensor, first_BHD: Tensor | None, rate: float, part: Part | None
    ) -> Tensor:
        norm, layer_norm = self.batch_norm, self.layer_norm
        assert layer_norm is not None
        of_norm: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0)
        if own := type(norm) is nn.BatchNorm1d and norm.training:
            of_norm = norm.weight, norm.bias, norm.eps
        else:  # no norm, a norm over the rows of all processes, or a frozen one
            projected_BHK = norm(projected_BHK)
        of_gate = self.bias, layer_norm.weight, layer_norm.bias, layer_norm.eps
        mask = (rate, mask_seed(), 0 if part is None else part.first) if rate else (0.0, 0, 0)
        out_BHD, mean_H, var_H = CrossStep.apply(projected_BHK, x_BHD, first_BHD, *of_norm, *of_gate, *mask)
        if own:
            follow(norm, mean_H, var_H, projected_BHK.numel() // len(mean_H))
        return out_BHD  # type: ignore[no-any-return]


@torch.no_grad()
def follow(norm: nn.Module, mean_H: Tensor, var_H: Tensor, count: int) -> None:
    """Update the batch normalisation's running mean and variance with those of a batch of `count` numbers."""
    assert isinstance(norm, nn.BatchNorm1d) and norm.momentum is not None
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    norm.running_mean.lerp_(mean_H.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((var_H * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
    norm.num_batches_tracked += 1


class CrossTower(nn.Module):
    """Cross layers and their logit; `deep` multiplies by the running x, shallow by x_1."""

    def __init__(self, width: int, layers: int, dropout: float, deep: bool, config: SDCNv3Config) -> None:
        super().__init__()
        self.deep = deep
        self.dropout = dropout
        self.projections = nn.ModuleList(nn.Linear(width, width // 2, bias=False) for _ in range(layers))
        self.gates = nn.ModuleList(CrossLayer(width, config) for _ in range(layers))
        self.out = nn.Linear(width, 1)

    @property
    def first_weight(self) -> Tensor:
        return self.projections[0].get_parameter("weight")

    def forward(self, first_BHD: Tensor, projected_BHK: Tensor, part: Part | None) -> Tensor:
        """Logits [B], from x_1 and the first layer's W x_1, which the model computes for all towers at once."""
        x_BHD, rate = first_BHD, self.dropout if self.training else 0.0
        for i, (project, gate) in enumerate(zip(self.projections, self.gates, strict=True)):
            projected_BHK = projected_BHK if i == 0 else project(x_BHD)
            x_BHD = gate(projected_BHK, x_BHD, None if self.deep else first_BHD, rate, part)
        return self.out(x_BHD).squeeze(2).mean(1)


class SDCNv3(Ranker):
    """The cross network of a schema, with or without items, vectors and histories.

    BatchNorm needs two rows or more when training.
    """

    def __init__(self, config: SDCNv3Config, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.history_length = schema.history_length
        table_width = config.dim * config.heads
        self.fields = ImpressionFields(schema, config.exclude, table_width)
        self.items = ItemTower(schema, config.exclude, table_width)
        history_fields = (self._has_item_id + (self.items.project is not None)) if schema.history_length > 0 else 0
        width = (len(self.fields.tables) + len(self.items) + history_fields) * config.dim
        if width == 0:
            raise ValueError(f"SDCNv3: no feature left (exclude = {config.exclude}); keep one")
        self.deep = CrossTower(width, config.deep_layers, config.deep_dropout, True, config)
        self.shallow = None
        if config.towers == "both":
            self.shallow = CrossTower(width, config.shallow_layers, config.shallow_dropout, False, config)
        initialise(self)

    def forward(self, batch: Batch, catalog: Catalog, clicks_C: Tensor) -> Logits:
        fields = self.fields(batch.fields_BF)
        if len(self.items):
            rows_U, index_B = distinct_rows(batch.item_B.long(), len(catalog))
            items_UE = torch.cat(self.items(rows_U, catalog), 1)
            fields += F.embedding(index_B, items_UE).chunk(len(self.items), 1)
        if self.history_length > 0:
            fields += self.history(history_rows(clicks_C, batch.start_B, batch.end_B, self.history_length), catalog)
        return self.cross(torch.stack(fields, 1), batch.part)

    def cross(self, fields_BFE: Tensor, part: Part | None = None) -> Logits:
        """The towers on F' fields, each E = d·H wide; `part` is the batch's, for dropout."""
        # [B, F', H, 2, d/2] -> [B, H, 2, F', d/2]: in each head all first halves, then all second halves
        split = fields_BFE.unflatten(2, (self.config.heads, 2, self.config.dim // 2))
        x_BHD = split.permute(0, 2, 3, 1, 4).flatten(2).to(self.deep.first_weight.dtype)  # products may be bfloat16
        if self.shallow is None:
            return Logits(self.deep(x_BHD, F.linear(x_BHD, self.deep.first_weight), part))
        both_weights = torch.cat((self.deep.first_weight, self.shallow.first_weight))
        deep_BHK, shallow_BHK = F.linear(x_BHD, both_weights).chunk(2, -1)
        deep_B, shallow_B = self.deep(x_BHD, deep_BHK, part), self.shallow(x_BHD, shallow_BHK, part)
        return Logits((deep_B + shallow_B) / 2, (deep_B, shallow_B))

    def loss(self, logits: Logits, label_B: Tensor) -> Tensor:
        if self.config.towers == "deep":
            return bce(logits, label_B)
        return tri_bce(logits, label_B, self.config.detach_loss_weights)

    @property
    def _has_item_id(self) -> bool:
        return 0 in self.items.columns  # the schema puts item_id first among the item's categoricals

    def ranking(self, catalog: Catalog) -> SDCNv3Ranking:
        return SDCNv3Ranking(self, catalog)

    def history(self, hist_BL: Tensor, catalog: Catalog) -> list[Tensor]:
        """Means over the items of the history, [B, table width] each; an empty history gives zeros."""
        means = []
        if self._has_item_id:
            index_BL = catalog.categorical_IG[:, 0][hist_BL].long()
            table = self.items.categoricals[0].get_parameter("weight")
            means.append(mean_rows(table, index_BL))
        if self.items.project is not None:
            assert catalog.vector_IE is not None, "the schema has an item vector, the catalog has none"
            mean_BE = mean_rows(catalog.vector_IE, hist_BL)
            means.append(self.items.project(mean_BE.to(self.items.project.weight.dtype)))
        return means


class SDCNv3Ranking:
    """SDCNv3 for serving: item fields in a table, and the history's means once for all candidates."""

    @torch.inference_mode()
    def __init__(self, model: SDCNv3, catalog: Catalog) -> None:
        self.model, self.catalog = deepcopy(model).eval(), catalog
        rows_I = torch.arange(len(catalog))
        parts = model.items(rows_I, catalog)
        self.item_IPE = torch.stack(parts, 1) if parts else None

    @torch.inference_mode()
    def __call__(self, fields_NF: Tensor, item_N: Tensor, hist_K: Tensor) -> Tensor:
        fields = [field[:, None] for field in self.model.fields(fields_NF)]
        if self.item_IPE is not None:
            fields.append(self.item_IPE[item_N])
        if self.model.history_length > 0:
            hist_1K = F.pad(hist_K[None], (1, 0), value=PADDING)  # padding: a mean needs one number at least
            means = self.model.history(hist_1K, self.catalog)
            fields += [mean[:, None].expand(len(item_N), 1, -1) for mean in means]
        return self.model.cross(torch.cat(fields, 1)).logit_B
