"""What the models share: embeddings of impression fields, the item tower, initialisation, config checks.

    field f of a row:             v_f = E_f[index]                            E_f: size_f × d
    categorical of an item:       v_g = E_g[index]
    set of an item (T values):    v_s = Σ_t E_s[index_t] / #{t : index_t ≠ 0}  (zero where the set is empty)
    vector of an item:            v   = W vector,  W: E → d without bias       (zero where the item has none)

E[0] = 0 and stays so: index 0 means missing or padding, so catalog row 0 is the zero vector.

Shapes: those of `models.schema`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.schema import PADDING, Batch, Catalog, Feature, Logits, Part, Schema


class ImpressionFields(nn.Module):
    """One embedding, `width` wide, for every impression field that is not excluded."""

    def __init__(self, schema: Schema, exclude: Sequence[str], width: int) -> None:
        super().__init__()
        if bad := [f.name for f in schema.features if f.owner == "impression" and f.kind != "categorical"]:
            raise ValueError(f"schema: impression features {bad} are not categorical; make them item features")
        self.columns, kept = _kept(schema.impression_fields, schema, exclude)
        self.tables = nn.ModuleList(nn.Embedding(f.size, width, padding_idx=PADDING) for f in kept)

    def forward(self, fields_BF: Tensor) -> list[Tensor]:
        """[B, width] for each field, in the schema's order."""
        return [table(fields_BF[:, i]) for i, table in zip(self.columns, self.tables, strict=True)]


class ItemTower(nn.Module):
    """The parts of an item, each `width` wide: categoricals, means of sets, the projected vector.

    `project` is None where the schema has no item vector or leaves it out.
    """

    def __init__(self, schema: Schema, exclude: Sequence[str], width: int) -> None:
        super().__init__()
        self.columns, categoricals = _kept(schema.item_fields, schema, exclude)
        _, sets = _kept(schema.item_sets, schema, exclude)
        vector = schema.without(exclude).vector
        self.set_names = [f.name for f in sets]
        self.categoricals = nn.ModuleList(nn.Embedding(f.size, width, padding_idx=PADDING) for f in categoricals)
        self.sets = nn.ModuleList(nn.EmbeddingBag(f.size, width, mode="mean", padding_idx=PADDING) for f in sets)
        self.project = None if vector is None else nn.Linear(vector.size, width, bias=False)

    def __len__(self) -> int:
        return len(self.categoricals) + len(self.sets) + (self.project is not None)

    def forward(self, rows_N: Tensor, catalog: Catalog) -> list[Tensor]:
        """[N, width] for each part of the items in these catalog rows (int64)."""
        index_NG = catalog.categorical_IG[rows_N].long()
        parts = [table(index_NG[:, i]) for i, table in zip(self.columns, self.categoricals, strict=True)]
        for name, table in zip(self.set_names, self.sets, strict=True):
            parts.append(mean_rows(table.get_parameter("weight"), catalog.sets[name][rows_N].long()))
        if self.project is not None:
            assert catalog.vector_IE is not None, "the schema has an item vector, the catalog has none"
            parts.append(self.project(catalog.vector_IE[rows_N].to(self.project.weight.dtype)))
        return parts


class Ranking(Protocol):
    """A model's eval-mode logits for one user's candidates, prepared for serving: all that can be computed once is."""

    def __call__(self, fields_NF: Tensor, item_N: Tensor, hist_K: Tensor) -> Tensor:
        """Logits [N] of candidates `item_N` (catalog rows) with impression fields `fields_NF`, both int64.

        `hist_K` is the user's history as catalog rows, oldest first: K ≤ L, none of them padding.
        """


class Ranker(nn.Module, ABC):
    """What training, evaluation and serving know of every model."""

    fields: ImpressionFields
    items: ItemTower

    @abstractmethod
    def forward(self, batch: Batch, catalog: Catalog, clicks_C: Tensor) -> Logits:
        """Logits of the rows of a batch; `clicks_C` is the flat click log, catalog rows of any int dtype."""

    @abstractmethod
    def loss(self, logits: Logits, label_B: Tensor) -> Tensor:
        """The scalar to minimise."""

    @abstractmethod
    def ranking(self, catalog: Catalog) -> Ranking:
        """The model as it is now, prepared to rank these items; later changes of the model do not change it."""

    def regularised_parameters(self) -> list[nn.Parameter]:
        """What the published L2 covers: every embedding table and the vector projection."""
        return [*self.fields.parameters(), *self.items.parameters()]


def mean_rows(table_VE: Tensor, index_NT: Tensor) -> Tensor:
    """[N, E]: the mean of the table's rows at the indices that are not padding; zero where all are. Row 0 must be zero.

    Not on a CPU, rows are gathered and summed: torch.compile makes one kernel of that, and does not of a bag.
    """
    if index_NT.device.type == "cpu":
        return nn.functional.embedding_bag(index_NT, table_VE, mode="mean", padding_idx=PADDING)
    sum_NE = nn.functional.embedding(index_NT, table_VE, padding_idx=PADDING).sum(1)
    return sum_NE / (index_NT != PADDING).sum(1, keepdim=True).clamp(min=1)


def distinct_rows(rows_N: Tensor, catalog_size: int) -> tuple[Tensor, Tensor]:
    """(rows_U, index_N) with rows_U[index_N] = rows_N: catalog rows to compute once, int64.

    On a CPU these are the sorted distinct rows, as from `torch.unique`, found with a mask of the catalog's size.
    Elsewhere they are the whole catalog or, if the batch has fewer rows than that, the batch's rows as they are: the
    number of distinct rows is known only after they are computed, and a GPU would have to wait for it.
    """
    if rows_N.device.type != "cpu" or torch.compiler.is_compiling():
        if rows_N.numel() < catalog_size:
            return rows_N, torch.arange(rows_N.numel(), device=rows_N.device)
        return torch.arange(catalog_size, device=rows_N.device), rows_N
    seen_I = torch.zeros(catalog_size, dtype=torch.bool)
    seen_I[rows_N] = True
    return seen_I.nonzero().squeeze(1), (seen_I.cumsum(0) - 1)[rows_N]


def mask_seed() -> int:
    """The seed of a dropout mask, drawn from torch's generator."""
    return int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))


def random_bits(x: Tensor, seed: int, first: int) -> Tensor:
    """int16, shape of x [b, …, D]: 16 random bits for each entry. They depend only on the seed and the entry's place.

    splitmix64, on the CPU: four entries of the last dimension share one 64-bit number. x starts at row `first`.
    """
    places = prod(x.shape[1:-1]) * (numbers := -(-x.shape[-1] // 4))
    z = torch.arange(first * places + 1, (first + x.shape[0]) * places + 1)
    z.mul_(_int64(0x9E3779B97F4A7C15)).add_(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z.bitwise_xor_((z >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(_int64(factor))
    z.bitwise_xor_((z >> 31).bitwise_and_(2**33 - 1))
    return z.view(torch.int16).view(*x.shape[:-1], 4 * numbers)[..., : x.shape[-1]]


def _int64(number: int) -> int:
    """The signed integer with the same 64 bits."""
    return number - 2**64 if number >= 2**63 else number


def dropped_of(rate: float) -> int:
    """The rate in units of 1/32768: on a CPU, an entry is dropped if its lower 15 random bits are below this."""
    return min(round(rate * 2**15), 2**15 - 1)


def keep_mask(x: Tensor, rate: float, part: Part | None) -> Tensor:
    """Shape (rows first) and dtype of x: 0 with probability `rate`, else 1 / (1 − rate).

    `part` is the batch's: processes that share a batch draw, from the same seed, the rows of the mask of the whole.

    On a CPU from `random_bits`: torch's own dropout draws one number per entry and is the slowest step of a network.
    """
    first, rows = (0, x.shape[0]) if part is None else part
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        whole = x.new_empty((rows, *x.shape[1:])).bernoulli_(1 - rate)
        return whole[first : first + x.shape[0]].div_(1 - rate)
    dropped = dropped_of(rate)
    # The sign bit of the difference, shifted through, gives 0 where the entry is dropped and -1 elsewhere.
    minus_kept = (dropped - 1 - random_bits(x, mask_seed(), first).bitwise_and(2**15 - 1)).bitwise_right_shift_(15)
    return minus_kept.to(x.dtype).mul_(-(2**15) / (2**15 - dropped))


def dropout(x: Tensor, rate: float, training: bool, part: Part | None) -> Tensor:
    """x ⊙ keep_mask; x itself unless training. `part` is the batch's."""
    return x * keep_mask(x, rate, part) if training and rate > 0 else x


def initialise(model: nn.Module) -> None:
    """The published initialisation: Linear xavier-normal with zero bias, embeddings N(0, std 1e-4), padding zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            nn.init.normal_(module.weight, std=1e-4)
            with torch.no_grad():
                module.weight[PADDING].zero_()


def require(config: object, field: str, holds: bool, remedy: str) -> None:
    """ValueError that names a config's field, its value and what to give instead, unless `holds`."""
    if not holds:
        raise ValueError(f"{type(config).__name__}.{field} = {getattr(config, field)!r}: {remedy}")


def require_positive(config: object, *fields: str) -> None:
    for field in fields:
        require(config, field, _is_int(value := getattr(config, field)) and value > 0, "give a whole number from 1 up")


def require_rate(config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        holds = (isinstance(value, float) or _is_int(value)) and 0 <= value < 1
        require(config, field, holds, "give a number from 0 up to, not including, 1")


def require_flag(config: object, *fields: str) -> None:
    for field in fields:
        require(config, field, isinstance(getattr(config, field), bool), "give true or false")


def require_names(config: object, field: str) -> None:
    names = getattr(config, field)
    holds = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    require(config, field, holds, "give a tuple of feature names")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kept(features: Sequence[Feature], schema: Schema, exclude: Sequence[str]) -> tuple[list[int], list[Feature]]:
    """Columns and features that stay. Columns count in the full schema, which is how batch and catalog are laid out."""
    left = {feature.name for feature in schema.without(exclude).features}
    kept = [(column, feature) for column, feature in enumerate(features) if feature.name in left]
    return [column for column, _ in kept], [feature for _, feature in kept]
