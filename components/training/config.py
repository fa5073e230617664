"""How a ranker is trained: one section `train.MODEL` of params.yaml."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """seed          of initialisation, order and dropout
    batch_size    rows a step, of all processes together. 0 takes the power of two next to 2·√N for N training rows
    max_epochs    the most epochs
    patience      training stops after so many epochs that are not better than the best one. The best epoch, which is
                  kept, has the highest valid AUC − logloss: both count, and neither is bought with the other
    lr            Adam's learning rate at the start
    lr_factor, lr_patience, min_lr   after more than lr_patience epochs that are not better, the rate is multiplied by
                  lr_factor, down to min_lr
    embedding_l2  L2 on embeddings and the vector projection: l2/2 · ‖p‖² is added to the loss summed over the training
                  rows, which is l2/N in a step's mean loss. So one value fits few rows and many
    network_l2    the same for all other weights
    ema           0, or the decay of a running mean of the weights at each step. That mean is then scored and kept
    clip_norm     the largest gradient norm of a step
    device        auto, cpu, or a CUDA device such as cuda:0; torchrun needs auto or cpu
    precision     fp32 (on CUDA its matrix products are TF32), or bf16: forward and backward under autocast. Weights,
                  loss and valid scores are fp32 in both
    compile       train through torch.compile; on CUDA each step is one CUDA graph. Compiled code is kept in
                  .scratch/inductor
    network       the model's own config, see models/

    The values of the published runs: `PRESETS` (network) and `TRAINING` (the rest) in models/families.py.
    """

    seed: int
    batch_size: int
    max_epochs: int
    patience: int
    lr: float
    lr_factor: float
    lr_patience: int
    min_lr: float
    embedding_l2: float
    network_l2: float
    ema: float
    clip_norm: float
    device: str
    precision: str
    compile: bool
    network: dict[str, Any]

    def __post_init__(self) -> None:
        if self.batch_size < 0 or self.batch_size == 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 2 (for BatchNorm), or 0")
        for name in ("max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"lr_factor is {self.lr_factor}; it must be in (0, 1]")
        for name in ("embedding_l2", "network_l2", "lr_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must be in [0, 1), and 0 keeps the last weights")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr is {self.min_lr}; it must be in [0, lr], and lr is {self.lr}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")

    def for_rows(self, rows: int) -> TrainConfig:
        """The same config with a batch size for so many training rows, where it leaves that open."""
        return self if self.batch_size else replace(self, batch_size=2 ** round(math.log2(2 * math.sqrt(rows))))
