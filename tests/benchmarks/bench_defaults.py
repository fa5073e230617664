"""Whether the defaults travel: params.yaml as it is, beside settings tuned for each of six datasets.

    python tests/benchmarks/bench_defaults.py                                     # four seeded sets, one seed
    python tests/benchmarks/bench_defaults.py --movielens FOLDER --seed 1 2       # and MovieLens, by time and at random

    demo               the simulator as params.yaml has it: 240,000 training rows
    small              a sixth of it: 500 users, 40,000 training rows
    wide               tabular: 40 categorical columns of 2 to 5,000 values, 48,000 training rows, no items
    long               60 users with histories of up to 128 clicks, 48,000 training rows
    movielens_time     MovieLens-1M in the order of its times
    movielens_random   the paper's random split of it, seven fields, no histories
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from frame import ROOT, build, settings

from components.data.ingest import IngestConfig
from components.features.dataset import Dataset, DatasetConfig
from components.features.features import FeaturesConfig
from models.schema import SPECIAL, UNKNOWN, Catalog, Encoder, Feature, Schema, schema_hash

WIDE_ROWS, WIDE_COLUMNS, WIDE_SEED = 60_000, 40, 7
MIN_COUNT = 2  # as dataset.min_count


def simulated(folder: Path, history: int = 32, **changes: object) -> Dataset:
    """The demo's world with these changes, through the project's stages."""
    code = str(ROOT / "components/data/sources/simulator.py")
    source = settings("ingest", IngestConfig, source="simulator", raw=code, until=None)
    source = replace(source, simulator=replace(source.simulator, **changes))
    rows = settings("dataset", DatasetConfig, history_length=history)
    return build(source, settings("features", FeaturesConfig), rows, folder)


def movielens(raw: Path, folder: Path) -> Dataset:
    """By time, as the project's stages read it."""
    source = settings("ingest", IngestConfig, source="movielens", raw=str(raw.resolve()), until=None)
    return build(source, settings("features", FeaturesConfig), settings("dataset", DatasetConfig), folder)


def wide(rows: int = WIDE_ROWS) -> Dataset:
    """Columns of power-law values; half of them and six pairs of them tell the label, the others are noise."""
    rng = np.random.default_rng(WIDE_SEED)
    sizes = np.geomspace(2, 5000, WIDE_COLUMNS).astype(int)
    sizes = rng.permutation(sizes)
    columns = [rng.choice(size, rows, p=_power_law(size)) for size in sizes]
    telling = rng.permutation(WIDE_COLUMNS)[: WIDE_COLUMNS // 2]
    logit = np.zeros(rows)
    for column in telling:
        logit += rng.normal(0, 0.35, sizes[column])[columns[column]]
    for left, right in telling[:12].reshape(6, 2):
        a, b = (rng.normal(0, 0.6, (sizes[column], 3))[columns[column]] for column in (left, right))
        logit += (a * b).sum(1)
    label = (rng.random(rows) < 1 / (1 + np.exp(1.5 - logit))).astype(np.uint8)
    train, valid = int(rows * 0.8), int(rows * 0.9)
    features, integers, encoded = [], {}, {}
    for at, column in enumerate(columns):
        name, counts = f"c{at:02}", np.bincount(column[:train], minlength=sizes[at])
        values = np.flatnonzero(counts >= MIN_COUNT)
        index = np.full(sizes[at], UNKNOWN)
        index[values] = np.arange(len(values)) + SPECIAL
        integers[name] = torch.from_numpy(values)
        encoded[f"field.{name}"] = torch.from_numpy(index[column])
        size = len(values) + SPECIAL
        features.append(Feature(name=name, owner="impression", kind="categorical", size=size, origin="context"))
    encoder = Encoder(Schema(features=tuple(features), history_length=0), integers)
    no_items = Catalog(torch.full((SPECIAL,), torch.iinfo(torch.int64).min), torch.zeros(SPECIAL, 0).long(), {}, None)
    zeros = torch.zeros(rows, dtype=torch.int64)
    shared = {"label": torch.from_numpy(label), "item": zeros + UNKNOWN, "user": zeros, "end": zeros, "length": zeros}
    facts = {
        "splits": {"train": (0, train), "valid": (train, valid), "test": (valid, rows)},
        "data_sha256": f"wide, {rows} rows, seed {WIDE_SEED}",
        "schema_hash": schema_hash(encoder.schema, integers, no_items),
    }
    return Dataset(encoder, no_items, {**encoded, **shared, "click_log": torch.zeros(0, dtype=torch.int32)}, facts)


def _power_law(size: int) -> np.ndarray:
    weight = np.arange(1, size + 1) ** -0.8
    return weight / weight.sum()


SETS: dict[str, Callable[[Path], Dataset]] = {
    "demo": simulated,
    "small": lambda folder: simulated(folder, users=500, items=400, impressions_per_day=5000),
    "wide": lambda _: wide(),
    "long": lambda folder: simulated(folder, history=128, users=60, items=800, impressions_per_day=6000, click_rate=0.3),
}
