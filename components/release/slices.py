"""Slices of the test rows: what is hard about them, or what they are of. bool [rows] each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from components.common.dataset import Dataset
from models.schema import SPECIAL, Feature

VALUES = 10  # of a column: its most frequent values in the test rows


@dataclass(frozen=True, kw_only=True)
class SlicesConfig:
    """history     lengths at which a new slice of histories begins; below the first is a slice too
    popularity  shares of the training impressions: items are cut into so many groups, the most shown first
    columns     features whose values are slices: of impressions (a context, a user's attribute) or of items (such as a
                category)
    """

    history: list[int]
    popularity: list[float]
    columns: list[str]

    def __post_init__(self) -> None:
        for name in ("history", "popularity"):
            edges = getattr(self, name)
            if any(later <= earlier for earlier, later in pairwise([0, *edges])):
                raise ValueError(f"{name} is {edges}; give numbers above 0 that rise")
        if any(share >= 1 for share in self.popularity):
            raise ValueError(f"popularity is {self.popularity}; give shares below 1")


def masks(config: SlicesConfig, data: Dataset) -> dict[str, np.ndarray]:
    """Slice -> bool [test rows]. Raises ValueError on a column that is no feature of these data."""
    train, test = (slice(*data.splits[name]) for name in ("train", "test"))
    item, user = data.columns["item"].long(), data.columns["user"].long()
    views_I = torch.bincount(item[train], minlength=len(data.catalog))
    seen_user = torch.zeros(int(user.max()) + 1, dtype=torch.bool)
    seen_user[user[train]] = True
    found = {"new items": views_I[item[test]] == 0, "new users": ~seen_user[user[test]]}
    found |= dict(_histories(config.history, data.columns["length"][test].long()))
    found |= dict(_popularity(config.popularity, views_I, item[test]))
    if data.catalog.vector_IE is not None:
        found["no item vector"] = ~(data.catalog.vector_IE != 0).any(1)[item[test]]
    for name in config.columns:
        found |= dict(_values(name, data, test))
    return {name: mask.numpy() for name, mask in found.items()}


def _histories(edges: list[int], length_B: Tensor) -> Iterator[tuple[str, Tensor]]:
    for low, high in pairwise([0, *edges]):
        name = f"history {low}" if high == low + 1 else f"history {low}-{high - 1}"
        yield name, (length_B >= low) & (length_B < high)
    last = edges[-1] if edges else 0
    yield f"history {last}+", length_B >= last


def _popularity(edges: list[float], views_I: Tensor, item_B: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Items by how often training showed them. The first group is the fewest items that hold its share."""
    order_I = torch.argsort(views_I, descending=True, stable=True)
    before_I = torch.empty(len(views_I), dtype=torch.float64)
    before_I[order_I] = (views_I[order_I].cumsum(0) - views_I[order_I]).double() / max(int(views_I.sum()), 1)
    share_B, seen_B = before_I[item_B], views_I[item_B] > 0
    for low, high in pairwise([0.0, *edges, 1.0]):
        if edges:
            yield f"popularity {low:.0%}-{high:.0%}", (share_B >= low) & (share_B < high) & seen_B


def _values(name: str, data: Dataset, test: slice) -> Iterator[tuple[str, Tensor]]:
    index_B, feature = _column(name, data, test)
    count_V = torch.bincount(index_B, minlength=feature.size)
    for value in torch.argsort(count_V, descending=True, stable=True)[:VALUES].tolist():
        if count_V[value]:
            yield f"{name} {_word(feature, value, data)}", index_B == value


def _column(name: str, data: Dataset, test: slice) -> tuple[Tensor, Feature]:
    for feature in data.schema.impression_fields:
        if feature.name == name:
            return data.columns[f"field.{name}"][test].long(), feature
    for at, feature in enumerate(data.schema.item_fields):
        if feature.name == name:
            return data.catalog.categorical_IG[:, at].long()[data.columns["item"][test].long()], feature
    known = sorted(f.name for f in (*data.schema.impression_fields, *data.schema.item_fields))
    raise ValueError(f"evaluate.slices.columns: no feature {name!r} in these data; known are {', '.join(known)}")


def _word(feature: Feature, value: int, data: Dataset) -> str:
    if value < SPECIAL:
        return ("missing", "unknown")[value]
    if feature.vocab is None:
        return str(int(data.encoder.integers[feature.name][value - SPECIAL]))
    return feature.vocab[value - SPECIAL]
