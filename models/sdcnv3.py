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

Shapes: those of `models.layers`, and H heads, D width of a head, K = D/2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.layers import (
    ImpressionFields,
    ItemTower,
    Ranker,
    initialise,
    require,
    require_flag,
    require_names,
    require_positive,
    require_rate,
)
from models.losses import bce, tri_bce
from models.schema import PADDING, Batch, Catalog, Logits, Schema, history_rows


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


class Gate(nn.Module):
    """g of one layer from its projection W x: the linear half, the self-masked half, the bias."""

    def __init__(self, width: int, config: SDCNv3Config) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(config.heads) if config.batch_norm else nn.Identity()
        self.layer_norm = nn.LayerNorm(width // 2) if config.layer_norm else nn.Identity()
        self.bias = nn.Parameter(torch.rand(width))

    def forward(self, projected_BHK: Tensor) -> Tensor:
        c_BHK = self.batch_norm(projected_BHK)
        return torch.cat((c_BHK, c_BHK * self.layer_norm(c_BHK).relu()), -1) + self.bias


class CrossTower(nn.Module):
    """Cross layers and their logit; `deep` multiplies by the running x, shallow by x_1."""

    def __init__(self, width: int, layers: int, dropout: float, deep: bool, config: SDCNv3Config) -> None:
        super().__init__()
        self.deep = deep
        self.dropout = dropout
        self.projections = nn.ModuleList(nn.Linear(width, width // 2, bias=False) for _ in range(layers))
        self.gates = nn.ModuleList(Gate(width, config) for _ in range(layers))
        self.out = nn.Linear(width, 1)

    @property
    def first_weight(self) -> Tensor:
        return self.projections[0].get_parameter("weight")

    def forward(self, first_BHD: Tensor, projected_BHK: Tensor) -> Tensor:
        """Logits [B], from x_1 and the first layer's W x_1, which the model computes for all towers at once."""
        x_BHD = first_BHD
        for i, (project, gate) in enumerate(zip(self.projections, self.gates, strict=True)):
            gate_BHD = gate(projected_BHK if i == 0 else project(x_BHD))
            x_BHD = torch.addcmul(x_BHD, x_BHD if self.deep else first_BHD, gate_BHD)
            x_BHD = F.dropout(x_BHD, self.dropout, self.training)
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
        fields = self.fields(batch.fields_BF) + self.items(batch.item_B, catalog)
        if self.history_length > 0:
            fields += self._history(history_rows(clicks_C, batch.start_B, batch.end_B, self.history_length), catalog)
        # [B, F', H, 2, d/2] -> [B, H, 2, F', d/2]: in each head all first halves, then all second halves
        split = torch.stack(fields, 1).unflatten(2, (self.config.heads, 2, self.config.dim // 2))
        x_BHD = split.permute(0, 2, 3, 1, 4).flatten(2)
        if self.shallow is None:
            return Logits(self.deep(x_BHD, F.linear(x_BHD, self.deep.first_weight)))
        both_weights = torch.cat((self.deep.first_weight, self.shallow.first_weight))
        deep_BHK, shallow_BHK = F.linear(x_BHD, both_weights).chunk(2, -1)
        deep_B, shallow_B = self.deep(x_BHD, deep_BHK), self.shallow(x_BHD, shallow_BHK)
        return Logits((deep_B + shallow_B) / 2, (deep_B, shallow_B))

    def loss(self, logits: Logits, label_B: Tensor) -> Tensor:
        if self.config.towers == "deep":
            return bce(logits, label_B)
        return tri_bce(logits, label_B, self.config.detach_loss_weights)

    @property
    def _has_item_id(self) -> bool:
        return 0 in self.items.columns  # the schema puts item_id first among the item's categoricals

    def _history(self, hist_BL: Tensor, catalog: Catalog) -> list[Tensor]:
        """Means over the items of the history, [B, table width] each; an empty history gives zeros."""
        means = []
        if self._has_item_id:
            index_BL = catalog.categorical_IG[:, 0][hist_BL].long()
            table = self.items.categoricals[0].get_parameter("weight")
            means.append(F.embedding_bag(index_BL, table, mode="mean", padding_idx=PADDING))
        if self.items.project is not None:
            assert catalog.vector_IE is not None, "the schema has an item vector, the catalog has none"
            mean_BE = F.embedding_bag(hist_BL, catalog.vector_IE, mode="mean", padding_idx=PADDING)
            means.append(self.items.project(mean_BE.to(self.items.project.weight.dtype)))
        return means
