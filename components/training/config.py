"""How a ranker is trained: one section `train.MODEL` of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """seed          of initialisation, order and dropout
    batch_size    rows a step, of all processes together
    max_epochs    the most epochs
    patience      training stops after so many epochs without a better valid AUC
    lr            Adam's learning rate at the start
    lr_factor, lr_patience, min_lr   after more than lr_patience epochs without a better valid AUC, the rate is
                  multiplied by lr_factor, down to min_lr
    embedding_l2  L2 on embeddings and the vector projection: l2/2 · ‖p‖² is a term of the loss
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
        for name in ("batch_size", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_size < 2:
            raise ValueError("batch_size is 1; BatchNorm needs 2 rows or more")
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
