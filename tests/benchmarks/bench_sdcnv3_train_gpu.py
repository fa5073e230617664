"""Rows a second of SDCNv3's training on one GPU: Criteo's shape (39 fields, d = 16), batch 4096.

As bench_qin_train_gpu.py: whole epochs of the trainer's own beside the published form.
"""

from __future__ import annotations

from gpu import compare

if __name__ == "__main__":
    compare("sdcnv3_train_gpu", "sdcnv3/criteo", rows=4_000_000)
