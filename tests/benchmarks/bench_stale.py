"""A model that is never retrained: its AUC on each of the thirty days after, beside the oracle's.

    python tests/benchmarks/bench_stale.py [--model qin sdcnv3]        `make bench ONLY=stale`

The demo's world at a third of its size. A model is trained as the demo's is, on the days of its window, and scores the
days after as a server does: it gets the features of each moment, and knows no item that is younger than itself. Each
day is a line of JSON. The last line is what the last days lose against the first, each beside the oracle of its day.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from frame import ROOT, build, run, say, settings
from harness import machine, report
from sklearn.metrics import roc_auc_score

from components.common.config import parse_time
from components.common.contracts import SPLIT, Canonical
from components.common.dataset import Dataset
from components.common.scoring import score
from components.data import sources
from components.data.ingest import IngestConfig
from components.data.sources import RawTables, Window, simulator
from components.data.sources.simulator import SimulatorConfig
from components.features.dataset import DatasetConfig
from components.features.views import FeaturesConfig
from components.training.config import TrainConfig
from models import families
from models.schema import UNKNOWN

AFTER = 30  # days that the model is not retrained
MEAN_OF = 3  # days at either end, whose mean is compared: one day's AUC is off by .005
GOAL = 0.02  # AUC that it loses at least
SHARE = 3  # of the demo's users, items and impressions: one in so many


class Day(NamedTuple):
    """day   1 is the first after the valid day"""

    day: int
    auc: float
    oracle: float


def read(raw: str, config: SimulatorConfig, window: Window, rows: int | None = None) -> RawTables:
    """The simulator's rows, the last AFTER days marked as test rows and the day before as valid rows."""
    found = simulator.read(raw, config, window, rows)
    assert window.until is not None
    bounds = [window.until - timedelta(days=AFTER + ahead) for ahead in (1, 0)]
    times = found.events["timestamp"].to_numpy()
    part = np.searchsorted(np.array([bound.replace(tzinfo=None) for bound in bounds], times.dtype), times, "right")
    return replace(found, events=found.events.append_column(SPLIT, [np.array(["train", "valid", "test"])[part]]))


def stale_loss(model: str = "sdcnv3", data: Dataset | None = None) -> list[Day]:
    """The AUC of each day after training, and the oracle's."""
    if data is None:
        with tempfile.TemporaryDirectory() as scratch:
            return stale_loss(model, dataset(Path(scratch)))
    config: TrainConfig = settings(f"train.{model}", TrainConfig, device="cpu")
    trained, figures = run(model, partial(families.build, model, config.network), config, data)
    say({"name": "stale", "model": model, **figures, "machine": machine()})
    start, end = data.splits["test"]
    logit_B, label_B = score(trained, data, (start, end))
    day_B = np.cumsum(data.columns["day_begins"][start:end].numpy())
    oracle_B = data.columns["oracle"][start:end].numpy()
    return [
        Day(day, *(float(roc_auc_score(label_B[rows], score_B[rows])) for score_B in (logit_B, oracle_B)))
        for day in range(1, AFTER + 1)
        if len(rows := np.flatnonzero(day_B == day))
    ]


def dataset(folder: Path) -> Dataset:
    """Of the demo's window and the days after it; what is younger than the window is unknown in it."""
    source = settings("ingest", IngestConfig, source="simulator", raw=str(ROOT / sources.SIMULATOR_RAW))
    trained_until = parse_time("ingest.until", str(source.until))
    small = {name: getattr(source.simulator, name) // SHARE for name in ("users", "items", "impressions_per_day")}
    source = replace(
        source,
        until=(trained_until + timedelta(days=AFTER)).isoformat(),
        window_days=source.window_days + AFTER,
        simulator=replace(source.simulator, **small),
    )
    before = sources.ADAPTERS["simulator"]
    sources.ADAPTERS["simulator"] = Path(__file__).stem
    try:
        data = build(source, settings("features", FeaturesConfig), settings("dataset", DatasetConfig), folder)
    finally:
        sources.ADAPTERS["simulator"] = before
    canonical = Canonical(folder / "data" / "canonical")
    items = canonical.items()
    is_young = items["created_at"].to_numpy() >= np.datetime64(trained_until.replace(tzinfo=None))
    young = torch.zeros(len(data.catalog), dtype=torch.bool)
    young[data.catalog.rows(torch.from_numpy(items["item_id"].to_numpy()[is_young]))] = True
    frozen: dict[str, Any] = {
        name: torch.where(young[data.columns[name].long()], UNKNOWN, data.columns[name]).to(data.columns[name].dtype)
        for name in ("item", "click_log")
    }
    day_B = canonical.events()["timestamp"].to_numpy()[-len(data.columns["label"]) :].astype("datetime64[D]")
    frozen["day_begins"] = torch.from_numpy(np.diff(day_B, prepend=day_B[:1] - 1).astype(int))
    return replace(data, columns={**data.columns, **frozen})


def loss(days: list[Day]) -> float:
    """What the last days lose against the first, beside what the oracle loses."""
    gap = [day.oracle - day.auc for day in days]
    return float(np.mean(gap[-MEAN_OF:]) - np.mean(gap[:MEAN_OF]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(families.FAMILIES), default=["sdcnv3"])
    with tempfile.TemporaryDirectory() as scratch:
        data = dataset(Path(scratch))
        for model in parser.parse_args().model:
            days = stale_loss(model, data)
            for day in days:
                say({"name": "stale_day", "model": model, **day._asdict()})
            report("nights_stale_loss", loss(days), f"AUC in {AFTER} days, {model}", "least", GOAL)


if __name__ == "__main__":
    main()
