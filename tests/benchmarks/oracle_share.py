"""How much of what can be known the models learn: their share of the oracle's AUC - 0.5 on a simulated world's test day.

The oracle scores with the true click probability: it knows today's fashion and every user's interests of today, which
no log tells. So some share is out of reach; `--sharpness 4`, the demo's world, shows how much (see docs/results.md).

    python tests/benchmarks/oracle_share.py                                     # 3.6M impressions, both models
    python tests/benchmarks/oracle_share.py --impressions 300000 --model qin    # a small one

Users and items grow with the impressions: 300 impressions a user, 600 an item. Ten days: eight train, one validates,
one tests. What the models read is made by the project's stages; training is the project's trainer.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from frame import build, run, say, settings, with_history
from harness import machine
from rich.console import Console
from rich.table import Table

from components.dataset import DatasetConfig
from components.features import FeaturesConfig
from components.ingest import IngestConfig
from components.train import TrainConfig
from models import registry

A_USER, AN_ITEM = 300, 600  # impressions
DAYS = 10
HISTORY = {"qin": 64, "sdcnv3": 128}  # newest clicks that a model reads
# What differs from params.yaml, chosen by the AUC of the valid day at 0.9M impressions.
TRAIN = {
    "qin": {"batch_size": 2048, "max_epochs": 5, "lr": 0.002, "embedding_l2": 1e-5},
    "sdcnv3": {"batch_size": 2048, "max_epochs": 5, "lr": 0.001, "embedding_l2": 1e-5},
}
NETWORK = {"qin": {"exclude": []}, "sdcnv3": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=3_600_000, help="of all ten days together")
    parser.add_argument("--model", nargs="+", choices=list(TRAIN), default=list(TRAIN))
    parser.add_argument(
        "--sharpness", type=float, default=8.0, help="how much interests decide; the demo's world has 4"
    )
    parser.add_argument("--seed", type=int, default=7, help="of the models; the world's stays 7")
    asked = parser.parse_args()

    table = Table(
        "model", "valid share", "test share", "test AUC", "oracle", "epochs", "seconds", title="Share of the oracle"
    )
    with tempfile.TemporaryDirectory() as scratch:
        data = build(world(asked.impressions, asked.sharpness), *frame(), Path(scratch))
        for name in asked.model:
            config = settings(f"train.{name}", TrainConfig, seed=asked.seed, device="cpu", **TRAIN[name])
            config = replace(config, network=config.network | NETWORK[name])
            own = with_history(data, HISTORY[name])
            _, found = run(name, lambda schema: registry.build(name, config.network, schema), config, own)
            say(
                {
                    "model": name,
                    "impressions": asked.impressions,
                    "sharpness": asked.sharpness,
                    **found,
                    "machine": machine(),
                }
            )
            table.add_row(
                name, f"{found['valid_share']:.1%}", f"{found['test_share']:.1%}", f"{found['test_auc']:.4f}",
                f"{found['test_oracle']:.4f}", f"{found['epochs']}", f"{found['seconds']:.0f}",
            )  # fmt: skip
    Console(width=120).print(table)


def world(impressions: int, sharpness: float) -> IngestConfig:
    """The demo's laws at another size."""
    source = settings("ingest", IngestConfig, source="simulator", raw="components/sources/simulator.py", until=None)
    simulator = replace(
        source.simulator,
        days=DAYS,
        users=impressions // A_USER,
        items=impressions // AN_ITEM,
        impressions_per_day=impressions // DAYS,
        sharpness=sharpness,
    )
    return replace(source, simulator=simulator)


def frame() -> tuple[FeaturesConfig, DatasetConfig]:
    """Yesterday's views and clicks of an item instead of a week's: fashion moves every day."""
    length = max(HISTORY.values())
    featured = settings("features", FeaturesConfig, popularity_days=1, history_length=length)
    return featured, settings("dataset", DatasetConfig, history_length=length)


if __name__ == "__main__":
    main()
