"""The published networks written plainly, position by position and layer by layer: slow, and the oracle of the tests.

They read the parameters and buffers of our modules by name and take nothing else from them. `training` selects
BatchNorm's statistics and dropout. Masks are drawn in the published order: one seed and one `dropout` replay them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from models.qin import QINConfig
from models.schema import Batch, Catalog, Schema
from models.sdcnv3 import SDCNv3Config

State = dict[str, Tensor]
Dropout = Callable[[Tensor, float, bool], Tensor]


def embed(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table whose row 0 is zero and gets no gradient."""
    return F.embedding(index.long(), table, padding_idx=0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last but one dimension where the mask is set; zero where it is nowhere."""
    return (values * mask.unsqueeze(-1)).sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)


def field_parts(state: State, schema: Schema, exclude: tuple[str, ...], fields_BF: Tensor) -> list[Tensor]:
    kept = [column for column, f in enumerate(schema.impression_fields) if f.name not in exclude]
    return [embed(state[f"fields.tables.{i}.weight"], fields_BF[:, column]) for i, column in enumerate(kept)]


def item_parts(state: State, schema: Schema, exclude: tuple[str, ...], rows: Tensor, catalog: Catalog) -> list[Tensor]:
    """Every part of the items in `rows`, whatever its shape."""
    kept = [column for column, f in enumerate(schema.item_fields) if f.name not in exclude]
    parts = [
        embed(state[f"items.categoricals.{i}.weight"], catalog.categorical_IG[rows][..., column])
        for i, column in enumerate(kept)
    ]
    for i, name in enumerate(f.name for f in schema.item_sets if f.name not in exclude):
        values = catalog.sets[name][rows]
        parts.append(masked_mean(embed(state[f"items.sets.{i}.weight"], values), values != 0))
    if schema.vector is not None and schema.vector.name not in exclude:
        weight = state["items.project.weight"]
        parts.append(catalog.vector_IE[rows].to(weight.dtype) @ weight.T)
    return parts


def histories(batch: Batch, clicks_C: Tensor, length: int) -> Tensor:
    """[B, L], the last clicks of each row, row by row."""
    rows = []
    for start, end in zip(batch.start_B.tolist(), batch.end_B.tolist(), strict=True):
        clicks = clicks_C[start:end].tolist()[-length:]
        rows.append([0] * (length - len(clicks)) + clicks)
    return torch.tensor(rows, dtype=torch.int64)


def batch_norm(state: State, prefix: str, x: Tensor, training: bool) -> Tensor:
    """Over the batch and every dimension after the channels."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        mean, var = x.mean(dims).view(shape), x.var(dims, unbiased=False).view(shape)
    else:
        mean, var = state[f"{prefix}.running_mean"].view(shape), state[f"{prefix}.running_var"].view(shape)
    normal = (x - mean) / torch.sqrt(var + 1e-5)
    return normal * state[f"{prefix}.weight"].view(shape) + state[f"{prefix}.bias"].view(shape)


def qin(
    state: State,
    config: QINConfig,
    schema: Schema,
    batch: Batch,
    catalog: Catalog,
    hist_BL: Tensor,
    *,
    training: bool,
    dropout: Dropout = F.dropout,
) -> Tensor:
    """Logits [B], with keys and values for every history position."""
    x = field_parts(state, schema, config.exclude, batch.fields_BF)
    parts = item_parts(state, schema, config.exclude, batch.item_B.long(), catalog)
    t = torch.cat(parts, -1) if parts else x[0][:, :0]
    x.append(t)
    if schema.history_length > 0 and parts:
        s = torch.cat(item_parts(state, schema, config.exclude, hist_BL, catalog), -1)
        q = t @ state["attention.query.weight"].T
        k = s @ state["attention.key.weight"].T
        v = s @ state["attention.value.weight"].T
        scores = (q.unsqueeze(1) @ k.transpose(1, 2)).squeeze(1)
        a = torch.relu(scores / sqrt(config.attention_dim) * (hist_BL != 0))
        pooled = (a.unsqueeze(1) @ v).squeeze(1)
        x.append(pooled @ state["attention.out.weight"].T + t)
    x = torch.cat(x, -1)
    for i in range(config.layers):
        layer = f"layers.{i}"
        h = x @ state[f"{layer}.project.weight"].T + state[f"{layer}.project.bias"]
        h = dropout(h, config.dropout, training).view(len(x), config.rows, x.shape[1])
        z = sum(x * h[:, r] for r in range(config.rows))
        z = batch_norm(state, f"{layer}.norm", z, training)
        z = torch.where(z > 0, z, state[f"{layer}.activation.weight"] * z)
        x = dropout(z, config.dropout, training) + x
    return (x @ state["out.weight"].T + state["out.bias"]).squeeze(-1)


def sdcnv3(
    state: State,
    config: SDCNv3Config,
    schema: Schema,
    batch: Batch,
    catalog: Catalog,
    hist_BL: Tensor,
    *,
    training: bool,
    dropout: Dropout = F.dropout,
) -> tuple[Tensor, Tensor | None]:
    """Logits [B] of the deep and of the shallow tower (None where there is none)."""
    fields = field_parts(state, schema, config.exclude, batch.fields_BF)
    fields += item_parts(state, schema, config.exclude, batch.item_B.long(), catalog)
    if schema.history_length > 0:
        if schema.item_fields and "item_id" not in config.exclude:
            ids = embed(state["items.categoricals.0.weight"], catalog.categorical_IG[hist_BL][..., 0])
            fields.append(masked_mean(ids, hist_BL != 0))
        if schema.vector is not None and schema.vector.name not in config.exclude:
            weight = state["items.project.weight"]
            projected = catalog.vector_IE[hist_BL].to(weight.dtype) @ weight.T
            fields.append(masked_mean(projected, hist_BL != 0))
    heads = []
    for h in range(config.heads):
        own = [field[:, h * config.dim : (h + 1) * config.dim] for field in fields]
        first = [field[:, : config.dim // 2] for field in own]
        second = [field[:, config.dim // 2 :] for field in own]
        heads.append(torch.cat(first + second, -1))
    x1 = torch.stack(heads, 1)

    def tower(name: str, layers: int, rate: float) -> Tensor:
        x = x1
        for i in range(layers):
            gate = f"{name}.gates.{i}"
            c = x @ state[f"{name}.projections.{i}.weight"].T
            if config.batch_norm:
                c = batch_norm(state, f"{gate}.batch_norm", c, training)
            normal = c
            if config.layer_norm:
                mean, var = c.mean(-1, keepdim=True), c.var(-1, unbiased=False, keepdim=True)
                normal = (c - mean) / torch.sqrt(var + 1e-5)
                normal = normal * state[f"{gate}.layer_norm.weight"] + state[f"{gate}.layer_norm.bias"]
            g = torch.cat([c, c * torch.relu(normal)], -1) + state[f"{gate}.bias"]
            x = (x if name == "deep" else x1) * g + x
            x = dropout(x, rate, training)
        logits = x @ state[f"{name}.out.weight"].T + state[f"{name}.out.bias"]
        return sum(logits[:, h, 0] for h in range(config.heads)) / config.heads

    deep = tower("deep", config.deep_layers, config.deep_dropout)
    if config.towers == "deep":
        return deep, None
    return deep, tower("shallow", config.shallow_layers, config.shallow_dropout)
