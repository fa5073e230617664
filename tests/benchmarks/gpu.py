"""What the GPU benchmarks share: the trainer's step, compiled in bfloat16, beside eager float32 on the same device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from harness import machine, report, seconds
from torch import Tensor
from worlds import Training, criteo, microlens

from components.dataset import Dataset

WORLDS: dict[str, Callable[[int], Dataset]] = {"qin/microlens": microlens, "sdcnv3/criteo": criteo}
STEPS = 50  # a round


def compare(name: str, preset: str, *, rows: int, batch: int, lr: float, embedding_l2: float) -> None:
    options = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument("--rows", type=int, default=rows)
    options.add_argument("--batch", type=int, default=batch)
    options.add_argument("--steps", type=int, default=STEPS)
    asked = options.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"{name}: no CUDA device here; `--device cpu --rows 16384 --batch 512 --steps 2` only shows that it runs"
        )
    torch.set_float32_matmul_precision("high")
    data = WORLDS[preset](asked.rows).to(device)
    changes = {"lr": lr, "embedding_l2": embedding_l2, "clip_norm": 10.0, "device": asked.device}
    fast = Training(preset, data, precision="bf16", compile=device.type == "cuda", **changes)
    plain = Training(preset, data, precision="fp32", compile=False, **changes)

    def steps(training: Training) -> None:
        order = torch.randperm(asked.rows, device=device)
        losses: list[Tensor] = [training.step(chunk) for chunk in order.split(asked.batch)[: asked.steps]]
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert torch.stack(losses).isfinite().all()

    own, peer = seconds(lambda: steps(fast), lambda: steps(plain), rounds=5)
    count = min(asked.steps, -(-asked.rows // asked.batch)) * asked.batch
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    report(name, count / own, "rows/s", "eager fp32", count / peer, where)
