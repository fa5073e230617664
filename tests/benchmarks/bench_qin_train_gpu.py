"""Rows a second of QIN's training on one GPU: published configuration, batch 8192, 3.6M rows on the device.

Through the trainer's own step: rows gathered on the device, bfloat16 autocast, torch.compile with CUDA graphs, fused
Adam on the whole tables. The peer is the same step in eager float32. Needs CUDA; `--device cpu --rows 4096 --batch 64
--steps 1` runs the same code anywhere, to see that it works.
"""

from __future__ import annotations

from gpu import compare

if __name__ == "__main__":
    compare("qin_train_gpu", "qin/microlens", rows=3_600_000, batch=8192, lr=2e-3, embedding_l2=2e-4)
