"""The config of training: bad values are named, and the published settings are configs."""

from __future__ import annotations

from dataclasses import fields

import pytest

from components.training.config import TrainConfig
from models.families import PRESETS, TRAINING

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": -1}, {"batch_size": 1}, {"max_epochs": 0}, {"patience": 0}, {"lr": 0.0}, {"lr": float("nan")},
        {"clip_norm": 0.0}, {"lr_factor": 0.0}, {"lr_factor": 1.5}, {"embedding_l2": -1.0},
        {"network_l2": -1.0}, {"ema": 1.0}, {"lr_patience": -1},
        {"min_lr": -1.0}, {"min_lr": 0.5}, {"precision": "fp8"},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_value_is_named(config, bad) -> None:
    ((key, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"{key} is {value!r}"):
        config(**bad)


@pytest.mark.parametrize("preset", sorted(TRAINING))
def test_the_published_settings_are_a_config(config, preset) -> None:
    """Beside what says where a run takes place and how exactly it computes, they have every key."""
    of_the_run = {"seed", "device", "precision", "compile", "network"}
    assert set(TRAINING[preset]) == {field.name for field in fields(TrainConfig)} - of_the_run
    config(**TRAINING[preset], network=PRESETS[preset])
