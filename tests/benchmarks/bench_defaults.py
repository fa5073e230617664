"""Do the defaults travel? params.yaml as it is, beside settings tuned for each dataset, and the defaults before.

    python tests/benchmarks/bench_defaults.py                          # small, wide, long: 20 minutes on one core
    python tests/benchmarks/bench_defaults.py --sets small --epochs 2  # shows in a minute that it runs
    python tests/benchmarks/bench_defaults.py --sets all --movielens FOLDER --seeds 1 2 3

    demo               the simulator as params.yaml has it: 240,000 training rows
    small              500 users of it, 40,000 training rows
    wide               tabular: 40 categorical columns of 2 to 5,000 values, 48,000 training rows, no items
    long               60 users with histories of up to 128 clicks, 48,000 training rows
    movielens_time     MovieLens-1M in the order of its times, 287,225 training rows
    movielens_random   the paper's random split of it: seven fields, no histories, 591,209 training rows

Each run is a line of JSON. The table at the end has the means over the seeds, on the test rows; `loses` is what the
defaults lose against the tuned settings. Epochs and settings were chosen by the valid rows alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import ml1m_random_split
import numpy as np
import torch
from frame import ROOT, build, run, say, settings
from harness import machine
from rich.console import Console
from rich.table import Table

from components.common.dataset import Dataset
from components.data.ingest import IngestConfig
from components.features.dataset import DatasetConfig
from components.features.views import FeaturesConfig
from components.training.config import TrainConfig
from models import families
from models.schema import SPECIAL, UNKNOWN, Catalog, Encoder, Feature, Schema, schema_hash

WIDE_ROWS, WIDE_COLUMNS, WIDE_SEED = 60_000, 40, 7
MIN_COUNT = 2  # as dataset.min_count


# params.yaml before its defaults were chosen by this benchmark
BEFORE: dict[str, dict[str, Any]] = {
    "qin": {"batch_size": 512, "lr": 0.002, "lr_factor": 0.5},
    "sdcnv3": {"batch_size": 1024, "lr": 0.001, "lr_factor": 0.1},
}
BEFORE_L2 = {"qin": 2e-4, "sdcnv3": 1e-3}  # of a step, however many rows there were
BEFORE_SHARED = {"max_epochs": 6, "patience": 2, "lr_patience": 0, "network_l2": 0.0, "ema": 0.0}
BEFORE_NETWORK: dict[str, dict[str, Any]] = {"qin": {"dropout": 0.1, "exclude": ["user_id"]}, "sdcnv3": {}}
# What differs from params.yaml in the best of about 35 settings a set, by the valid rows of seed 1; network.KEY too
LONGER = {"max_epochs": 20, "patience": 4}
QIN, SDCNV3 = LONGER | {"network.dropout": 0.1, "network_l2": 0.0}, LONGER
CUT = {"lr": 0.002, "lr_factor": 0.5, "lr_patience": 1}
TUNED: dict[str, dict[str, dict[str, Any]]] = {
    "qin": {
        "demo": QIN | CUT | {"embedding_l2": 2000.0, "max_epochs": 12},
        "small": QIN | {"lr": 0.002, "embedding_l2": 8000.0},
        "wide": QIN | {"embedding_l2": 2000.0, "network_l2": 1000.0},
        "long": QIN | {"embedding_l2": 2000.0, "network_l2": 100.0},
        "movielens_time": QIN | {"embedding_l2": 2000.0, "network.dropout": 0.3, "max_epochs": 12},
        "movielens_random": QIN | {"embedding_l2": 2000.0, "network_l2": 100.0, "max_epochs": 15},
    },
    "sdcnv3": {
        "demo": SDCNV3 | {"max_epochs": 12},
        "small": SDCNV3,
        "wide": SDCNV3 | CUT | {"embedding_l2": 2000.0},
        "long": SDCNV3 | {"embedding_l2": 2000.0},
        "movielens_time": SDCNV3 | {"max_epochs": 12},
        "movielens_random": SDCNV3 | {"embedding_l2": 500.0, "max_epochs": 15},
    },
}
GOAL = 0.005  # AUC and nats that the defaults may lose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["small", "wide", "long"], help="of those above, or: all")
    parser.add_argument("--movielens", type=Path, help="a folder in the ml-1m layout; needed for movielens_*")
    parser.add_argument("--models", nargs="+", choices=list(TUNED), default=list(TUNED))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="of initialisation, order and dropout")
    parser.add_argument("--epochs", type=int, help="at most, whatever the settings say")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    sets = list(SETS) if asked.sets == ["all"] else asked.sets
    if unknown := sorted(set(sets) - set(SETS)):
        parser.error(f"--sets: {unknown} is not known; give some of {list(SETS)}, or all")
    if asked.movielens is None:
        sets = [name for name in sets if not name.startswith("movielens")]

    table = Table(title="Test AUC / logloss")
    for heading in ("set", "model", *asked.settings, "loses", "goal"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as scratch:
        for name in sets:
            data = SETS[name](Path(scratch) / name, asked.movielens)
            for model in asked.models:
                means = {}
                for kind in asked.settings:
                    lines = []
                    for seed in asked.seeds:
                        config = replace(chosen(kind, model, name, data), seed=seed, device=asked.device)
                        if asked.epochs:
                            config = replace(config, max_epochs=min(asked.epochs, config.max_epochs))
                        _, found = run(model, partial(families.build, model, config.network), config, data)
                        lines.append({"name": "defaults", "set": name, "model": model, "settings": kind, **found})
                        say(lines[-1] | {"machine": machine(asked.device)})
                    means[kind] = [mean(line[key] for line in lines) for key in ("test_auc", "test_logloss")]
                shown = [f"{auc:.4f} / {logloss:.4f}" for auc, logloss in means.values()]
                if {"default", "tuned"} <= means.keys():
                    auc, logloss = (own - best for own, best in zip(means["default"], means["tuned"], strict=True))
                    shown += [f"{-auc:.4f} / {logloss:.4f}", "kept" if max(-auc, logloss) <= GOAL else "missed"]
                table.add_row(name, model, *shown)
    Console(width=120).print(table)


def chosen(kind: str, model: str, name: str, data: Dataset) -> TrainConfig:
    """The settings of a kind for a model on a set."""
    config: TrainConfig = settings(f"train.{model}", TrainConfig)
    if kind == "default":
        return config
    if kind == "tuned":
        changes = TUNED[model][name]
        network = {key.removeprefix("network."): value for key, value in changes.items() if key.startswith("network.")}
        changes = {key: value for key, value in changes.items() if not key.startswith("network.")}
    else:
        first, last = data.splits["train"]
        changes = {**BEFORE_SHARED, **BEFORE[model], "embedding_l2": BEFORE_L2[model] * (last - first)}
        network = BEFORE_NETWORK[model]
    known = {feature.name for feature in data.schema.features}
    network = config.network | network
    network["exclude"] = [feature for feature in network["exclude"] if feature in known]
    return replace(config, network=network, **changes)


def simulated(folder: Path, history: int = 32, **changes: Any) -> Dataset:
    """The demo's world with these changes, through the project's stages."""
    code = str(ROOT / "components/data/sources/simulator.py")
    source = settings("ingest", IngestConfig, source="simulator", raw=code)
    source = replace(source, simulator=replace(source.simulator, **changes))
    rows = settings("dataset", DatasetConfig, history_length=history)
    return build(source, settings("features", FeaturesConfig), rows, folder)


def movielens(folder: Path, raw: Path) -> Dataset:
    """By time, as the project's stages read it."""
    source = settings("ingest", IngestConfig, source="movielens", raw=str(raw.resolve()), until=None, window_days=None)
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


SETTINGS = ("before", "default", "tuned")
SETS: dict[str, Callable[[Path, Path], Dataset]] = {
    "demo": lambda folder, _: simulated(folder),
    "small": lambda folder, _: simulated(folder, users=500, items=400, impressions_per_day=5000),
    "wide": lambda *_: wide(),
    "long": lambda folder, _: simulated(
        folder, history=128, users=60, items=800, impressions_per_day=6000, click_rate=0.3
    ),
    "movielens_time": movielens,
    "movielens_random": lambda _, raw: ml1m_random_split.dataset(raw, split=1, history=0),
}

if __name__ == "__main__":
    main()
