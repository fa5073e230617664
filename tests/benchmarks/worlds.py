"""Random datasets of the published shapes, and the project's own training steps on them.

What a step costs depends on shapes and popularity, not on what was clicked.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import ROOT
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from components.common.config import load
from components.common.dataset import Dataset
from components.training.config import TrainConfig
from components.training.loop import Loop
from models.families import PRESETS, TRAINING, build, network_config
from models.losses import tri_bce
from models.schema import SPECIAL, Catalog, Encoder, Feature, Logits, Schema, history_rows
from tests.models import published

# MicroLens_1M_x1 as the published run of QIN reads it
ITEMS, TAGS, TAGS_OF_AN_ITEM, VECTOR, HISTORY = 91_718, 11_740, 5, 128, 64
# Vocabularies of the authors' log of SDCNv3 on MovieLens-1M
ML_1M = {"UserID": 6042, "Gender": 4, "Age": 9, "Occupation": 23}
ML_1M_ITEMS = {"MovieID": 3643, "Release": 10}
# 39 fields of some 910,000 values in all, as Criteo's at a minimum count of 10: 13 of 50 values, 26 up to 300,000
CRITEO = [50] * 13 + [int(300_000 * 0.7**i) + 10 for i in range(26)]


class Training:
    """A preset in training on a dataset, as published but for `changes`; `step` and `epoch` are the trainer's."""

    def __init__(self, preset: str, data: Dataset, **changes: Any) -> None:
        family = preset.split("/")[0]
        network = PRESETS[preset]
        config = load(ROOT / "params.yaml", f"train.{family}", TrainConfig)
        config = replace(config, **{"network": network, **TRAINING[preset], **changes})
        torch.manual_seed(7)
        self.data = data
        self.model = build(family, network, data.schema).to(data.device).train()
        self.loop = Loop(family, config, self.model, data, scratch=Path(os.devnull))  # it saves nothing

    def step(self, rows: Tensor) -> Tensor:
        """On a batch of these rows, which is gathered, as in an epoch. Returns its loss."""
        (fetched,) = self.data.fetched([rows])
        return self.loop.step(fetched, len(rows))

    def epoch(self) -> float:
        """All rows, in an order of its own. Returns their mean loss."""
        progress = self.loop.state.progress
        progress.step = 0
        loss = self.loop.epoch(lambda: None)
        progress.epoch += 1
        return loss


class Published:
    """The same in the published form: its forward pass, whole-table L2 in autograd, Adam with clipped gradients."""

    def __init__(self, preset: str, data: Dataset) -> None:
        self.family = preset.split("/")[0]
        self.network = network_config(self.family, PRESETS[preset])
        self.data, self.trained = data, TRAINING[preset]
        torch.manual_seed(7)
        self.model = build(self.family, PRESETS[preset], data.schema).to(data.device)
        self.named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.trained["lr"])

    def step(self, rows: Tensor) -> Tensor:
        """Returns the batch's loss."""
        data, batch = self.data, self.data.batch(rows)
        hist_BL = history_rows(data.click_log, batch.start_B, batch.end_B, data.schema.history_length)
        read = self.named, self.network, data.schema, batch, data.catalog, hist_BL
        assert batch.label_B is not None
        if self.family == "qin":
            loss = F.binary_cross_entropy_with_logits(published.qin(*read, training=True), batch.label_B)
        else:
            deep_B, shallow_B = published.sdcnv3(*read, training=True)
            assert shallow_B is not None
            loss = tri_bce(Logits((deep_B + shallow_B) / 2, (deep_B, shallow_B)), batch.label_B)
        penalty = sum((table**2).sum() for table in self.model.regularised_parameters())
        self.optimizer.zero_grad()
        (loss + self.trained["embedding_l2"] / len(data.columns["label"]) / 2 * penalty).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.trained["clip_norm"])
        self.optimizer.step()
        return loss.detach()


def native_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def microlens(rows: int, history: int = HISTORY, clicks: int = 1_000_000) -> Dataset:
    """All histories are full."""
    rng = torch.Generator().manual_seed(7)
    schema = Schema(
        features=(
            Feature(name="likes_level", owner="impression", kind="categorical", size=11),
            Feature(name="views_level", owner="impression", kind="categorical", size=11),
            Feature(name="item_id", owner="item", kind="categorical", size=ITEMS),
            Feature(name="item_tags", owner="item", kind="multi", size=TAGS, length=TAGS_OF_AN_ITEM),
            Feature(name="item_emb_d128", owner="item", kind="vector", size=VECTOR),
        ),
        history_length=history,
    )
    tags_IT = torch.randint(1, TAGS, (ITEMS, TAGS_OF_AN_ITEM), generator=rng)
    vector_IE = torch.randn(ITEMS, VECTOR, generator=rng)
    tags_IT[0], vector_IE[0] = 0, 0
    catalog = Catalog(
        torch.arange(ITEMS) - SPECIAL, torch.arange(ITEMS)[:, None].int(), {"item_tags": tags_IT.short()}, vector_IE
    )
    columns = {
        "end": torch.randint(history, clicks, (rows,), generator=rng).int(),
        "length": torch.full((rows,), history, dtype=torch.uint8),
        "item": popular(rows, ITEMS, rng).int(),
        "click_log": popular(clicks, ITEMS, rng).int(),
    }
    return _dataset(schema, catalog, columns, rows, rng)


def ml_1m(rows: int) -> Dataset:
    """MovieLens-1M as the published run of SDCNv3 reads it: seven fields, no history."""
    rng = torch.Generator().manual_seed(7)
    genres = Feature(name="Genres", owner="item", kind="multi", size=20, length=5)
    schema = Schema(
        features=(
            *(Feature(name=n, owner="impression", kind="categorical", size=s) for n, s in ML_1M.items()),
            *(Feature(name=n, owner="item", kind="categorical", size=s) for n, s in ML_1M_ITEMS.items()),
            genres,
        ),
        history_length=0,
    )
    movies = ML_1M_ITEMS["MovieID"]
    fields = [torch.arange(movies), torch.randint(1, ML_1M_ITEMS["Release"], (movies,), generator=rng)]
    genres_IT = torch.randint(0, genres.size, (movies, genres.length), generator=rng)
    catalog = Catalog(torch.arange(movies) - SPECIAL, torch.stack(fields, 1).int(), {"Genres": genres_IT.short()}, None)
    return _dataset(schema, catalog, {"item": popular(rows, movies, rng).short()}, rows, rng)


def criteo(rows: int) -> Dataset:
    """Criteo's 39 fields, all of the impression; no items, no history."""
    rng = torch.Generator().manual_seed(7)
    fields = (Feature(name=f"C{i}", owner="impression", kind="categorical", size=size) for i, size in enumerate(CRITEO))
    nothing = torch.full((SPECIAL,), torch.iinfo(torch.int64).min)
    catalog = Catalog(nothing, torch.zeros(SPECIAL, 0, dtype=torch.int32), {}, None)
    columns = {"item": torch.ones(rows, dtype=torch.uint8)}
    return _dataset(Schema(features=tuple(fields), history_length=0), catalog, columns, rows, rng)


def popular(count: int, items: int, rng: torch.Generator) -> Tensor:
    """Catalog rows from 1 on, drawn with P ∝ rank^-0.8 as the simulator does."""
    mass = torch.arange(1, items, dtype=torch.float64).pow(-0.8).cumsum(0)
    drawn = torch.searchsorted(mass, torch.rand(count, generator=rng, dtype=torch.float64) * mass[-1])
    return 1 + torch.randperm(items - 1, generator=rng)[drawn.clamp(max=items - 2)]


def _dataset(schema: Schema, catalog: Catalog, columns: dict[str, Tensor], rows: int, rng: torch.Generator) -> Dataset:
    nothing = {name: torch.zeros(rows, dtype=torch.uint8) for name in ("end", "length")}
    fields = {f"field.{f.name}": popular(rows, f.size, rng).int() for f in schema.impression_fields}
    label = {"label": torch.randint(2, (rows,), generator=rng).to(torch.uint8)}
    log = {"click_log": torch.zeros(0, dtype=torch.int32)}
    facts = {"splits": {"train": (0, rows)}, "data_sha256": "", "schema_hash": ""}  # training asks whose state it finds
    return Dataset(Encoder(schema, {}), catalog, nothing | fields | label | log | columns, facts)
