"""Rows a second of QIN's training on one GPU: published configuration, batch 8192, 3.6M rows on the device.

Whole epochs of the trainer's own, compiled steps in bfloat16 that are replayed as one CUDA graph. The peer is the
published form in eager float32 (products in TF32), on the same device and batches. Needs CUDA.
"""

from __future__ import annotations

from gpu import compare

if __name__ == "__main__":
    compare("qin_train_gpu", "qin/microlens", rows=3_600_000)
