"""The Triton kernels pool, and differentiate, as plain torch does: on a CUDA device, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from models.qin import gathered_pool

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton: uv pip install --group triton"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def pointer_pool():
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
    from models.pointer_pool import pointer_pool

    yield pointer_pool
    os.environ.pop("TRITON_INTERPRET", None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "items", "width", "length"),
    [(1, 1, 1, 1), (5, 7, 12, 3), (3, 9, 48, 65), (2, 11, 384, 20), (2, 3, 3000, 2)],
    ids=["one", "small", "long", "published", "wide"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_pools_and_differentiates_as_what_is_gathered(pointer_pool, rows, items, width, length, dtype, seed):
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
    error = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == dtype
        assert (own.double() - other).norm() <= error * other.norm()


def test_what_is_no_number_is_not_hidden(pointer_pool):
    q_BM = torch.full((1, 4), torch.nan, device=DEVICE)
    item_UM, index_BL = torch.ones(2, 4, device=DEVICE), torch.tensor([[0, 1]], device=DEVICE)
    assert pointer_pool(q_BM, item_UM, index_BL, torch.ones_like(index_BL, dtype=torch.bool)).isnan().all()
