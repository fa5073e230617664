"""MovieLens-1M with its times: QIN and SDCNv3 beside three baselines, and with each kind of input taken away.

    python tests/benchmarks/ml1m_time_split.py --raw ../shared/data/ml-1m               # all of it, one seed
    python tests/benchmarks/ml1m_time_split.py --raw ../shared/data/ml-1m --seeds 1 2 3 --only logistic sdcnv3

The last days that hold a tenth of the rows test, a tenth before them validates. A row sees the clicks known at its
second. Texts are embedded by TF-IDF, images are the vectors given; "no text" and "no image" embed the other alone.
The raw folder is in the ml-1m layout (ratings.dat or .gz, users.dat, movies.dat, item_text.parquet,
item_image.parquet); MovieLens' licence forbids redistribution, so bring your own copy.
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

from baselines import DIN, DCNv2, LogisticRegression
from frame import build, run, say, settings, with_history
from harness import machine
from rich.console import Console
from rich.table import Table

from components.common.dataset import Dataset
from components.data.ingest import IngestConfig
from components.features.dataset import DatasetConfig
from components.features.views import FeaturesConfig
from components.training.config import TrainConfig
from models import families
from models.layers import Ranker
from models.schema import Schema

RATINGS = ("ratings.dat", "ratings.dat.gz", "users.dat", "movies.dat")
TEXT, IMAGE = "item_text.parquet", "item_image.parquet"
ROWS = 287_225
# The same for all, on top of params.yaml's train.sdcnv3, or train.qin; embedding_l2 by the AUC of the valid days.
# Chosen as the L2 of a step, on ROWS training rows.
SHARED = {
    "batch_size": 1024, "max_epochs": 10, "patience": 2, "lr": 0.001, "lr_factor": 0.5, "network_l2": 0.0, "ema": 0.999,
}  # fmt: skip
TRAIN: dict[str, dict[str, Any]] = {
    "logistic": {"lr": 0.005, "embedding_l2": 1e-5 * ROWS},
    "din": {"embedding_l2": 1e-3 * ROWS},
    "dcnv2": {"embedding_l2": 1e-3 * ROWS},
    "qin": {"embedding_l2": 5e-3 * ROWS},
    "sdcnv3": {"embedding_l2": 5e-3 * ROWS},
}
NETWORK: dict[str, dict[str, Any]] = {"qin": {"dropout": 0.1}, "sdcnv3": {}}
FORMATS = {"test_auc": ".4f", "test_group_auc": ".4f", "test_logloss": ".4f", "epochs": ".1f", "seconds": ".0f"}
BASELINES: dict[str, Callable[[Schema], Ranker]] = {"logistic": LogisticRegression, "din": DIN, "dcnv2": DCNv2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="a folder in the ml-1m layout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of initialisation, order and dropout")
    parser.add_argument("--only", nargs="+", choices=list(TRAIN), default=list(TRAIN), help="of the models")
    asked = parser.parse_args()

    table = Table("model", "input", "AUC", "group AUC", "logloss", "epochs", "seconds", title="ML-1M, the last days")
    with tempfile.TemporaryDirectory() as scratch:
        for taken, data, exclude in datasets(asked.raw.resolve(), Path(scratch)):
            for name in asked.only:
                if taken != "everything" and name in BASELINES:
                    continue
                lines = []
                for seed in asked.seeds:
                    config, make = trainer(name, seed, exclude)
                    _, found = run(name, make, config, data)
                    lines.append({"model": name, "input": taken, **found, "machine": machine()})
                    say(lines[-1])
                means = {key: mean(line[key] for line in lines) for key in FORMATS}
                table.add_row(name, taken, *(f"{means[key]:{form}}" for key, form in FORMATS.items()))
    Console(width=120).print(table)


def datasets(raw: Path, scratch: Path) -> list[tuple[str, Dataset, list[str]]]:
    """What is taken away, the dataset without it, and the features that a model then leaves out."""
    made = {}
    for kept in ((TEXT, IMAGE), (IMAGE,), (TEXT,)):
        folder = scratch / "-".join(Path(name).stem for name in kept)
        (folder / "raw").mkdir(parents=True)
        for name in (*RATINGS, *kept):
            if (raw / name).is_file():
                (folder / "raw" / name).symlink_to(raw / name)
        source = settings(
            "ingest", IngestConfig, source="movielens", raw=str(folder / "raw"), until=None, window_days=None
        )
        made[kept] = build(source, settings("features", FeaturesConfig), settings("dataset", DatasetConfig), folder)
    everything = made[TEXT, IMAGE]
    return [
        ("everything", everything, []),
        ("no text", made[IMAGE,], []),
        ("no image", made[TEXT,], []),
        ("no text, no image", everything, ["embedding"]),
        ("no history", with_history(everything, 0), []),
    ]


def trainer(name: str, seed: int, exclude: list[str]) -> tuple[TrainConfig, Callable[[Schema], Ranker]]:
    """How a model is trained, and what makes it."""
    section = name if name in families.FAMILIES else "sdcnv3"
    config = settings(f"train.{section}", TrainConfig, seed=seed, device="cpu", **SHARED | TRAIN[name])
    if name in BASELINES:
        return replace(config, network={}), BASELINES[name]
    network = config.network | NETWORK[name]
    network["exclude"] = [*network["exclude"], *exclude]
    return replace(config, network=network), partial(families.build, name, network)


if __name__ == "__main__":
    main()
