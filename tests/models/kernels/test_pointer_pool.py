"""The Triton kernels pool, and differentiate, as plain torch does: on a CUDA device, else in Triton's interpreter.

In a process of its own, which is this file as a program: Triton reads that it shall interpret when it is imported, and
torch.compile imports it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch

from models.qin import gathered_pool
from tests.parts import need

ROOT = Path(__file__).parents[3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 1, 1, 1), (5, 7, 12, 3), (3, 9, 48, 65), (2, 11, 384, 20), (2, 3, 3000, 2)]  # rows, items, width, length
ERRORS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def test_the_kernels_pool_and_differentiate_as_what_is_gathered() -> None:
    need("triton")
    settings = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0" if DEVICE == "cuda" else "1"}
    done = subprocess.run([sys.executable, __file__], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{len(SIZES) * len(ERRORS) * 2} cases hold, and NaN stays"


def main() -> None:
    cases = list(product(SIZES, ERRORS, (0, 1)))
    for size, dtype, seed in cases:
        compare(*size, dtype, seed)
    nan_stays()
    print(f"{len(cases)} cases hold, and NaN stays")


def compare(rows: int, items: int, width: int, length: int, dtype: torch.dtype, seed: int) -> None:
    from models.kernels.pointer_pool import pointer_pool

    rng = torch.Generator().manual_seed(seed)
    q_BM, item_UM, grad_BM = (
        torch.randn(n, width, generator=rng).to(DEVICE, dtype).requires_grad_() for n in (rows, items, rows)
    )
    index_BL = torch.randint(items, (rows, length), generator=rng).to(DEVICE)
    real_BL = (torch.rand(rows, length, generator=rng) < 0.7).to(DEVICE)
    exact = [t.detach().double().requires_grad_() for t in (q_BM, item_UM)]
    pooled_BM = gathered_pool(*exact, index_BL, real_BL)
    wanted = pooled_BM, *torch.autograd.grad(pooled_BM, exact, grad_BM.double())
    found_BM = pointer_pool(q_BM, item_UM, index_BL, real_BL)
    found = found_BM, *torch.autograd.grad(found_BM, (q_BM, item_UM), grad_BM)
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == dtype
        off = (own.double() - other).norm()
        assert off <= ERRORS[dtype] * other.norm(), (rows, items, width, length, dtype, seed, off)


def nan_stays() -> None:
    from models.kernels.pointer_pool import pointer_pool

    q_BM, item_UM = torch.full((1, 4), torch.nan, device=DEVICE), torch.ones(2, 4, device=DEVICE)
    index_BL = torch.tensor([[0, 1]], device=DEVICE)
    assert pointer_pool(q_BM, item_UM, index_BL, torch.ones_like(index_BL, dtype=torch.bool)).isnan().all()


if __name__ == "__main__":
    main()
