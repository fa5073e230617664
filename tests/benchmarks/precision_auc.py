"""Valid AUC of both models trained in bfloat16 beside float32: same seed, same batches, same epochs.

On the dataset that `make demo` leaves in data/dataset, or the folder that `--dataset` names, with the settings of
params.yaml. Where the device has no native bfloat16 the figures are as valid, only slow to come.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from harness import ROOT, report

from components.common.config import load
from components.common.dataset import Dataset
from components.training.config import TrainConfig
from components.training.loop import Loop
from models.families import build


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--dataset", type=Path, default=ROOT / "data/dataset")
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = options.parse_args()
    for family in ("qin", "sdcnv3"):
        found = {precision: best_auc(asked, family, precision) for precision in ("bf16", "fp32")}
        report(f"{family}_bf16_auc", found["bf16"], "valid AUC", "fp32", found["fp32"], asked.device)


def best_auc(asked: argparse.Namespace, family: str, precision: str) -> float:
    """Of so many epochs, through the trainer."""
    data = Dataset.open(asked.dataset)
    config = load(ROOT / "params.yaml", f"train.{family}", TrainConfig)
    config = replace(config, precision=precision, max_epochs=asked.epochs, device=asked.device)
    torch.manual_seed(config.seed)
    model = build(family, config.network, data.schema).to(asked.device)
    with tempfile.TemporaryDirectory() as scratch:
        loop = Loop(family, config, model, data, scratch=Path(scratch))
        loop.run()
    return loop.state.progress.best_auc


if __name__ == "__main__":
    main()
