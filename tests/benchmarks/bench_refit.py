"""What the refit brings: next day's AUC of the model that ships, beside the one that the gate judged.

    make bench ONLY=refit
    python tests/benchmarks/bench_refit.py --scale 1 --days 10 --models qin sdcnv3 --seeds 1 2    # the demo's size

Each day's window is made by the project's stages and trained on, then refitted, and both models are asked about the day
after. The last line has the means over days, models and seeds: `refit_next_day_auc`, beside the judged model's.
`expected` counts each row as click and no click by its true probability, so it has none of the labels' luck.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import chdir
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from frame import build, say, settings
from harness import report
from next_day import score_on

from components.common.artifacts import read_json, write_json
from components.data.ingest import IngestConfig
from components.features.dataset import DatasetConfig
from components.features.views import FeaturesConfig
from components.training import refit, train
from components.training.config import TrainConfig
from components.training.refit import RefitConfig
from models.checkpoint import checkpoint_hash


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.2, help="of the demo's users, items and impressions")
    parser.add_argument("--days", type=int, default=5, help="windows, each a day later")
    parser.add_argument("--models", nargs="+", default=["qin"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    asked = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        datasets = [window(asked.scale, day, root / f"day{day}") for day in range(asked.days + 1)]
        for today, tomorrow in pairwise(datasets):
            for model in asked.models:
                for seed in asked.seeds:
                    lines.append(gained(root / "run", today, tomorrow, model, seed))
                    say(lines[-1])
    gains = [line["expected"] - line["judged_expected"] for line in lines]
    error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    say({"name": "refit_gain", "value": round(mean(gains), 5), "standard_error": round(error, 5), "runs": len(gains)})
    ships, judged = (mean(line[name] for line in lines) for name in ("expected", "judged_expected"))
    report("refit_next_day_auc", ships, "AUC", "the judged model", judged)


def window(scale: float, later: int, folder: Path) -> Path:
    """The dataset of params.yaml's window so many days later, in a smaller or larger world."""
    asked: IngestConfig = settings("ingest", IngestConfig)
    assert asked.until is not None
    world = replace(
        asked.simulator,
        **{name: round(scale * getattr(asked.simulator, name)) for name in ("users", "items", "impressions_per_day")},
    )
    until = (datetime.fromisoformat(asked.until) + timedelta(days=later)).isoformat()
    source = settings("ingest", IngestConfig, until=until, simulator=world)
    build(source, settings("features", FeaturesConfig), settings("dataset", DatasetConfig), folder)
    return folder / "data/dataset"


def gained(folder: Path, today: Path, tomorrow: Path, model: str, seed: int) -> dict[str, Any]:
    """Train and refit as the stages do, and ask both models about tomorrow."""
    config = settings(f"train.{model}", TrainConfig, seed=seed, device="cpu")
    checkpoints, decision = folder / "checkpoints", folder / "gate.json"
    write_json(folder / "start/start.json", {"champion": None})
    with chdir(folder):
        train.run(config, model, today, folder / "start", checkpoints / model, folder / "m.json", folder / "h.csv")
        data_sha256 = read_json(today / "dataset.json", "dataset")["data_sha256"]
        judged = {"verdict": "approve", "model": model, "checkpoint_sha256": checkpoint_hash(checkpoints / model)}
        write_json(decision, judged | {"data_sha256": data_sha256, "reasons": []})
        every = settings("refit", RefitConfig, device="cpu")
        out, shipped = folder / "refit", folder / "shipped.json"
        ships = refit.run(every, decision, checkpoints, folder, today, out, shipped)["shipped"]
    auc, expected = score_on(folder / "refit", tomorrow)
    judged_auc, judged_expected = score_on(checkpoints / model, tomorrow)
    return {
        "model": model, "seed": seed, "until": ships["train_until"], "ships": ships["kind"],
        "auc": round(auc, 5), "judged_auc": round(judged_auc, 5),
        "expected": round(expected, 5), "judged_expected": round(judged_expected, 5),
        "checks": {check["rule"]: round(check["value"], 5) for check in ships["checks"]},
    }  # fmt: skip


if __name__ == "__main__":
    main()
