"""QIN's attention pool for CUDA, in Triton: each pass reads the history rows once, from the table of items.

    w_bl = ReLU(q_b · t_i),  i = index[b, l];  0 where it is not real          pooled_b = Σ_l w_bl t_i

    backward, of g_b:   s_bl = g_b · t_i where w_bl > 0, else 0                q_b's is Σ_l s_bl t_i
                        t_i's is the sum of w_bl g_b + s_bl q_b over where it occurs

A program handles one row of the batch. The gradient of an item row is summed by atomic adds, in no fixed order, so its
last bits differ from run to run. `qin.gathered_pool` is the same in plain torch. Triton comes with torch for CUDA.

Shapes: those of `models.schema`, and M item vector, U item rows.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels have no Python types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 2  # numbers that a program holds at once; with more warps, they wait for each other's sums


@triton.jit
def _pool(
    q_BM, item_UM, index_BL, real_BL, weight_BL, pooled_BM,
    L: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    b = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    q_m = tl.load(q_BM + b * M + m, m < M, 0).to(kind)
    pooled_m = tl.zeros((BLOCK_M,), kind)
    for start in range(0, L, BLOCK_L):
        place_l = start + tl.arange(0, BLOCK_L)
        real_l = tl.load(real_BL + b * L + place_l, place_l < L, 0) != 0
        row_l = tl.load(index_BL + b * L + place_l, real_l, 0)
        t_lm = tl.load(item_UM + row_l[:, None] * M + m[None, :], real_l[:, None] & (m < M)[None, :], 0).to(kind)
        score_l = tl.sum(t_lm * q_m[None, :], 1)
        weight_l = tl.where(score_l <= 0, 0, score_l)  # NaN stays, as it does in relu
        tl.store(weight_BL + b * L + place_l, weight_l, place_l < L)
        pooled_m += tl.sum(weight_l[:, None] * t_lm, 0)
    tl.store(pooled_BM + b * M + m, pooled_m, m < M)


@triton.jit
def _pool_backward(
    grad_BM, q_BM, item_UM, index_BL, weight_BL, grad_q_BM, grad_item_UM,
    L: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    b = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    g_m = tl.load(grad_BM + b * M + m, m < M, 0).to(kind)
    q_m = tl.load(q_BM + b * M + m, m < M, 0).to(kind)
    grad_q_m = tl.zeros((BLOCK_M,), kind)
    for start in range(0, L, BLOCK_L):
        place_l = start + tl.arange(0, BLOCK_L)
        weight_l = tl.load(weight_BL + b * L + place_l, place_l < L, 0)
        counts_l = weight_l > 0  # the rows that were pooled; the others have no gradient
        row_l = tl.load(index_BL + b * L + place_l, counts_l, 0)
        number_lm = row_l[:, None] * M + m[None, :]
        there_lm = counts_l[:, None] & (m < M)[None, :]
        t_lm = tl.load(item_UM + number_lm, there_lm, 0).to(kind)
        score_l = tl.sum(t_lm * g_m[None, :], 1)
        grad_q_m += tl.sum(score_l[:, None] * t_lm, 0)
        grad_lm = weight_l[:, None] * g_m[None, :] + score_l[:, None] * q_m[None, :]
        tl.atomic_add(grad_item_UM + number_lm, grad_lm, there_lm, sem="relaxed")
    tl.store(grad_q_BM + b * M + m, grad_q_m, m < M)


def _sizes(index_BL: Tensor, item_UM: Tensor) -> dict[str, Any]:
    """The settings of a launch: a program reads its history in pieces of BLOCK numbers."""
    length, width = index_BL.shape[1], item_UM.shape[1]
    block_m = triton.next_power_of_2(width)
    block_l = max(1, min(BLOCK // block_m, triton.next_power_of_2(length)))
    exact = item_UM.dtype == torch.float64
    return {"L": length, "M": width, "EXACT": exact, "BLOCK_L": block_l, "BLOCK_M": block_m, "num_warps": WARPS}


@torch.library.custom_op("clickloop::pointer_pool", mutates_args=())
def _op(q_BM: Tensor, item_UM: Tensor, index_BL: Tensor, real_BL: Tensor) -> tuple[Tensor, Tensor]:
    """pooled_BM in q's dtype, and the weights, float64 for float64 and else float32."""
    pooled_BM, weight_BL = _empty(q_BM, item_UM, index_BL, real_BL)
    args = (t.contiguous() for t in (q_BM, item_UM, index_BL, real_BL))
    _pool[(len(q_BM),)](*args, weight_BL, pooled_BM, **_sizes(index_BL, item_UM))
    return pooled_BM, weight_BL


@_op.register_fake
def _empty(q_BM: Tensor, item_UM: Tensor, index_BL: Tensor, real_BL: Tensor) -> tuple[Tensor, Tensor]:
    return q_BM.new_empty(q_BM.shape), q_BM.new_empty(index_BL.shape, dtype=_wide(item_UM))


@torch.library.custom_op("clickloop::pointer_pool_backward", mutates_args=())
def _op_backward(
    grad_BM: Tensor, q_BM: Tensor, item_UM: Tensor, index_BL: Tensor, weight_BL: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of q, in its dtype, and of the item rows, as wide as the weights."""
    grad_q_BM = q_BM.new_empty(q_BM.shape)
    grad_item_UM = item_UM.new_zeros(item_UM.shape, dtype=_wide(item_UM))
    args = (t.contiguous() for t in (grad_BM, q_BM, item_UM, index_BL, weight_BL))
    _pool_backward[(len(q_BM),)](*args, grad_q_BM, grad_item_UM, **_sizes(index_BL, item_UM))
    return grad_q_BM, grad_item_UM


@_op_backward.register_fake
def _(grad_BM: Tensor, q_BM: Tensor, item_UM: Tensor, index_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
    return q_BM.new_empty(q_BM.shape), item_UM.new_empty(item_UM.shape, dtype=_wide(item_UM))


def _wide(item_UM: Tensor) -> torch.dtype:
    return torch.float64 if item_UM.dtype == torch.float64 else torch.float32


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BM, item_UM, index_BL, _ = inputs
    ctx.save_for_backward(q_BM, item_UM, index_BL, output[1])


def _backward(ctx: Any, grad_BM: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    q_BM, item_UM, index_BL, weight_BL = ctx.saved_tensors
    grad_q_BM, grad_item_UM = _op_backward(grad_BM, q_BM, item_UM, index_BL, weight_BL)
    return grad_q_BM, grad_item_UM.to(item_UM.dtype), None, None


_op.register_autograd(_backward, setup_context=_keep)


def pointer_pool(q_BM: Tensor, item_UM: Tensor, index_BL: Tensor, real_BL: Tensor) -> Tensor:
    """pooled_BM of queries and item rows of one dtype; index int64, `real_BL` bool."""
    return _op(q_BM, item_UM, index_BL, real_BL)[0]
