"""A warm start: a new model takes the champion's weights, moved to where today's vocabularies put each value.

    embedding tables   a value takes its row of the champion's table. A value that is new today takes the row of
                       UNKNOWN, which the champion serves for it. A value that is gone today is dropped
    vector projection  copied where the vectors are the same (embedding_version). For vectors of a new fit it is the
                       least-squares projection that gives the items of both catalogs the projections that they had.
                       If both catalogs share too few items, it is a fresh one
    all else           copied

So before its first step the model scores as the champion does, where the champion's catalog has the row's items and
today's vocabularies have the values that it knows. An item that is new to the champion is unknown there, without
categories, tags and vector; here it has its own. If features were added, removed or put in another order, the inner
weights would read something else: then only the tables are taken. The optimizer always starts from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.common.artifacts import folder_hash, read_json
from components.common.dataset import Dataset
from models.checkpoint import Checkpoint, load
from models.families import network_config
from models.layers import Ranker
from models.schema import SPECIAL, UNKNOWN, Encoder, Feature, Schema, lookup

ITEMS_A_COLUMN = 4  # a projection needs so many shared items for each value of the vector


@dataclass(frozen=True)
class Start:
    """What `start` wrote for a model.

    champion    the version to start from, or None
    checkpoint  its checkpoint, or None
    sha256      of the folder
    """

    champion: str | None
    checkpoint: Checkpoint | None
    sha256: str

    @classmethod
    def read(cls, folder: Path) -> Start:
        """Raises ValueError where it is not whole."""
        version = read_json(folder / "start.json", "start")["champion"]
        return cls(version, None if version is None else load(folder / "checkpoint"), folder_hash(folder))


def knows_valid_days(champion: Checkpoint, data: Dataset) -> str | None:
    """In words, where the champion has seen a valid day: epochs could not be chosen by it. None where it has not."""
    seen, valid = champion.facts.get("train_until"), data.midnight("valid_from")
    if seen is None or valid is None or seen <= valid:
        return None
    return f"has seen the days until {seen}, and the valid days begin at {valid}"


def take_weights(model: Ranker, network: dict[str, Any], data: Dataset, champion: Checkpoint) -> str | None:
    """Overwrite a fresh model's weights with those of a champion of the same family.

    Returns what was taken, in words. Where the networks differ in any key, takes nothing and returns None.
    """
    config = network_config(champion.family, network)
    if config != network_config(champion.family, champion.network):
        return None
    old, new = champion.encoder.schema.without(config.exclude), data.schema.without(config.exclude)
    mine, theirs = tables(model, new), tables(champion.model, old)
    said = []
    with torch.no_grad():
        for name, (feature, table) in mine.items():
            there = _rows_there(feature, data.encoder, champion.encoder) if name in theirs else None
            if there is None:
                said.append(f"{name} is a new feature")
                continue
            table.copy_(theirs[name][1][there])
            said.append(
                f"{int((there[SPECIAL:] == UNKNOWN).sum()):,} of {len(there) - SPECIAL:,} values of {name} are new"
            )
        if model.items.project is not None and champion.model.items.project is not None:
            said.append(_take_projection(model.items.project.weight, data, champion))
        named, its = _inner(model), _inner(champion.model)
        same = [(f.name, f.owner, f.kind) for f in old.features] == [(f.name, f.owner, f.kind) for f in new.features]
        if same and {k: v.shape for k, v in named.items()} == {k: v.shape for k, v in its.items()}:
            for key, tensor in named.items():
                tensor.copy_(its[key])
        else:
            said.append("the features changed: the layers that read them start afresh")
    return "; ".join(said)


def tables(model: Ranker, schema: Schema) -> dict[str, tuple[Feature, Tensor]]:
    """Feature name -> the feature and its embedding table; `schema` is without what the model excludes."""
    pairs = (
        *zip(schema.impression_fields, model.fields.tables, strict=True),
        *zip(schema.item_fields, model.items.categoricals, strict=True),
        *zip(schema.item_sets, model.items.sets, strict=True),
    )
    return {feature.name: (feature, module.get_parameter("weight")) for feature, module in pairs}


def _rows_there(feature: Feature, here: Encoder, there: Encoder) -> Tensor | None:
    """For each index of today, the value's row in the champion's table; None where the values have another type."""
    was = next(f for f in there.schema.features if f.name == feature.name)
    if (was.vocab is None) != (feature.vocab is None) or was.kind != feature.kind:
        return None
    if feature.vocab is None:
        values = lookup(there.integers[feature.name], here.integers[feature.name])
    else:
        values = there.encode(feature.name, feature.vocab)
    return torch.cat([torch.arange(SPECIAL), values])


def _take_projection(weight_dE: Tensor, data: Dataset, champion: Checkpoint) -> str:
    project, catalog = champion.model.items.project, champion.catalog
    assert project is not None and catalog.vector_IE is not None and data.catalog.vector_IE is not None
    if data.schema.embedding_version == champion.encoder.schema.embedding_version:
        weight_dE.copy_(project.weight)
        return "the vectors are of the same fit"
    row = catalog.rows(data.catalog.item_ids_I)
    old, new = catalog.vector_IE[row].double(), data.catalog.vector_IE.double()
    both = (row >= SPECIAL) & old.any(1) & new.any(1)
    wanted, given = old[both] @ project.weight.double().T, new[both]
    if len(given) < ITEMS_A_COLUMN * given.shape[1]:
        return (
            f"the vectors are of another fit and {len(given):,} items tell too little: their projection starts afresh"
        )
    solved = torch.linalg.lstsq(given, wanted, driver="gelsd").solution
    weight_dE.copy_(solved.T)
    kept = 1 - float((given @ solved - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))
    return f"the vectors are of another fit: {len(given):,} items keep {kept:.1%} of their projections"


def _inner(model: Ranker) -> dict[str, Tensor]:
    """Weights and running statistics beyond tables and projection."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith(("fields.", "items."))}
