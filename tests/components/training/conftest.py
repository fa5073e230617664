"""The config that the tests of training start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from components.training.config import TrainConfig


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
