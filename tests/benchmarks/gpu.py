"""What the GPU benchmarks share: epochs of the trainer's own, beside steps of the published form on the same device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from harness import report, seconds
from torch import Tensor
from worlds import Published, Training, criteo, microlens

from components.common.dataset import Dataset
from models.families import TRAINING

WORLDS: dict[str, Callable[[int], Dataset]] = {"qin/microlens": microlens, "sdcnv3/criteo": criteo}


def compare(name: str, preset: str, rows: int) -> None:
    options = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument("--rows", type=int, default=rows)
    options.add_argument("--batch", type=int, default=TRAINING[preset]["batch_size"])
    options.add_argument("--steps", type=int, default=20, help="of the published form, a round")
    asked = options.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"{name}: no CUDA device here; `--device cpu --rows 2048 --batch 512 --steps 2` only shows that it runs"
        )
    torch.set_float32_matmul_precision("high")
    data = WORLDS[preset](asked.rows).to(device)
    compiled = device.type == "cuda"
    own = Training(preset, data, precision="bf16", compile=compiled, batch_size=asked.batch, device=asked.device)
    published = Published(preset, data)

    def steps() -> None:
        order = torch.randperm(asked.rows, device=device)
        losses: list[Tensor] = [published.step(chunk) for chunk in order.split(asked.batch)[: asked.steps]]
        assert torch.stack(losses).isfinite().all()

    epoch_seconds, steps_seconds = seconds(own.epoch, steps, rounds=3)
    peer = min(asked.steps * asked.batch, asked.rows) / steps_seconds
    report(name, asked.rows / epoch_seconds, "rows/s", "published form, fp32", peer, asked.device)
