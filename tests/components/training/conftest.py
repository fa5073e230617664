"""A small dataset, the config that the tests start from, and `train.run` in a folder of its own."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.common.artifacts import write_json
from components.training import train
from components.training.config import TrainConfig
from models.checkpoint import CHECKPOINT_FILES


@pytest.fixture
def config(networks) -> Callable[..., TrainConfig]:
    def make(model: str = "qin", **changes: Any) -> TrainConfig:
        values = {
            "seed": 1, "batch_size": 128, "max_epochs": 4, "patience": 4, "lr": 0.01, "lr_factor": 0.5,
            "lr_patience": 0, "min_lr": 1e-6, "embedding_l2": 1e-6, "network_l2": 0.0, "ema": 0.0,
            "clip_norm": 10.0, "device": "cpu",
            "precision": "fp32", "compile": False, "network": networks[model],
        }  # fmt: skip
        return TrainConfig(**(values | changes))

    return make


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, raw_rows, write_dataset) -> Path:
    return write_dataset(tmp_path_factory.mktemp("train") / "dataset", raw_rows())


class Run:
    """`train.run` in a work folder of its own."""

    def __init__(self, root: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.dataset, self.monkeypatch = root, dataset, monkeypatch
        self.start = root / "start"
        write_json(self.start / "start.json", {"champion": None})
        self.state = root / ".scratch/train/qin/state.safetensors"

    def __call__(self, config: TrainConfig, name: str, model: str = "qin") -> dict[str, bytes]:
        """The checkpoint's bytes by file."""
        self.monkeypatch.chdir(self.root)
        out = self.root / name
        train.run(config, model, self.dataset, self.start, out / model, out / "metrics.json", out / "history.csv")
        return {file: (out / model / file).read_bytes() for file in CHECKPOINT_FILES}

    def history(self, name: str) -> list[dict[str, float]]:
        with (self.root / name / "history.csv").open() as opened:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(opened)]

    def killed_after(self, steps: int, config: TrainConfig, name: str, model: str = "qin") -> None:
        """The same run, dead in front of an optimizer step, with no time to save anything."""
        step, done = torch.optim.Adam.step, 0

        def interrupted(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done > steps:
                raise KeyboardInterrupt
            return step(optimizer, *arguments)

        with self.monkeypatch.context() as patched:
            patched.setattr(torch.optim.Adam, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                self(config, name, model)


@pytest.fixture
def run(tmp_path, dataset, monkeypatch) -> Run:
    return Run(tmp_path, dataset, monkeypatch)
