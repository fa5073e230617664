"""SDCNv3's cross step in C, for training on a CPU: one pass over memory where torch operations take twenty.

cross_step.c is compiled when it is first needed, which takes a second, and the library's file is gone at once. Where
there is no C compiler (`cc`), `kernels` is None and the plain form in sdcnv3.py does the same.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.layers import dropped_of

SOURCE = Path(__file__).with_suffix(".c")
# What of -ffast-math lets sums be vectorised; all of it would have infinities and NaN taken for numbers.
FLAGS = (
    *("-O3", "-march=native", "-fno-strict-aliasing"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
REALS = {torch.float32: ("float", ctypes.c_float), torch.float64: ("double", ctypes.c_double)}
ROWS_A_THREAD = 1024  # less is not worth a thread


@cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """cross_step.c's functions for float32 or float64; None where they cannot be had."""
    if dtype not in REALS or (compiler := shutil.which("cc")) is None:
        return None
    name, real = REALS[dtype]
    with tempfile.TemporaryDirectory(prefix="clickloop-") as folder:
        library = Path(folder) / "cross_step.so"
        command = [compiler, *FLAGS, f"-Dreal={name}", "-shared", "-fPIC", str(SOURCE), "-o", str(library), "-lm"]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
            found = ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError) as error:  # the first: of a folder that nothing may run from
            said = getattr(error, "stderr", "")
            warnings.warn(f"SDCNv3 trains slower, {SOURCE.name} not being compiled: {error} {said}", stacklevel=2)
            return None
    sizes, array = [ctypes.c_long] * 4, ctypes.c_void_p
    # p, x, y; mean, factor, shift; bias, w, s; eps; seed, before, dropped, scale
    common: list[Any] = [*sizes, *[array] * 9, real, ctypes.c_uint64, ctypes.c_long, ctypes.c_int, real]
    found.cross_moment.argtypes = [*sizes, ctypes.c_int, *[array] * 3]
    found.cross_forward.argtypes = [*common, array]
    found.cross_backward.argtypes = [*common, *[array] * 9]
    found.cross_backward_norm.argtypes = [*sizes, *[array] * 6]
    return found


class CrossStep(torch.autograd.Function):
    """Batch normalisation and `sdcnv3.cross_step` in one, on the CPU, in a dtype that has `kernels`.

    p, x, first           W x, the running x and, in the shallow tower, x_1
    scale, offset         the batch normalisation's, [H]; None normalises nothing
    bias, weight, shift   the gate's, and the LayerNorm's two
    rate, seed, before    dropout's, the seed of its `layers.random_bits`, and the rows of the batch before this part

    Returns the next x, and the batch's mean and variance of p by head, float64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        p_BHK: Tensor,
        x_BHD: Tensor,
        first_BHD: Tensor | None,
        scale_H: Tensor | None,
        offset_H: Tensor | None,
        batch_eps: float,
        bias_D: Tensor,
        weight_K: Tensor,
        shift_K: Tensor,
        layer_eps: float,
        rate: float,
        seed: int,
        before: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        p_BHK, x_BHD = p_BHK.contiguous(), x_BHD.contiguous()
        first_BHD = None if first_BHD is None else first_BHD.contiguous()
        given = [t for t in (x_BHD, first_BHD, scale_H, offset_H, bias_D, weight_K, shift_K) if t is not None]
        if wrong := {t.dtype for t in given} - {p_BHK.dtype}:  # C would read other memory
            raise TypeError(f"cross step: {wrong} beside {p_BHK.dtype}; the layer and its input must have one dtype")
        assert all(t.is_contiguous() for t in given)
        mean_H = p_BHK.new_zeros(p_BHK.shape[1], dtype=torch.float64)
        var_H = factor_H = torch.ones_like(mean_H)
        if scale_H is not None:
            mean_H = _moment(p_BHK, 1, mean_H)
            var_H = _moment(p_BHK, 2, mean_H)
            factor_H = scale_H * (var_H + batch_eps).rsqrt()
        level_H = torch.zeros_like(mean_H, dtype=p_BHK.dtype) if offset_H is None else offset_H
        read = p_BHK, x_BHD, first_BHD, mean_H, factor_H, level_H, bias_D, weight_K, shift_K
        ctx.save_for_backward(*read, var_H)
        dropped = dropped_of(rate)
        mask = seed % 2**64, before * len(mean_H), dropped, 2**15 / (2**15 - dropped)
        ctx.settings = (layer_eps, *mask), None if scale_H is None else batch_eps
        ctx.mark_non_differentiable(mean_H, var_H)
        out_BHD = torch.empty_like(x_BHD)
        _run("cross_forward", p_BHK, *read, layer_eps, *mask, out_BHD)
        return out_BHD, mean_H, var_H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHD: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *read, var_H = ctx.saved_tensors
        p_BHK, x_BHD, first_BHD, mean_H, factor_H, _, *of_gate = read
        settings, batch_eps = ctx.settings
        grad_p_BHK, grad_x_BHD = torch.empty_like(p_BHK), torch.empty_like(x_BHD)
        grad_first_BHD = None if first_BHD is None else torch.empty_like(first_BHD)
        written = grad_BHD.contiguous(), grad_p_BHK, grad_x_BHD, grad_first_BHD
        sums = [t.new_zeros(len(_parts(p_BHK)), len(t)) for t in (mean_H, mean_H, *of_gate)]
        _run("cross_backward", p_BHK, *read, *settings, *written, *sums)
        grad_offset_H, along_H, *grads = (of_parts.sum(0) for of_parts in sums)
        if batch_eps is None:
            return grad_p_BHK, grad_x_BHD, grad_first_BHD, None, None, None, *grads, None, None, None, None
        rstd_H, count = (var_H + batch_eps).rsqrt(), p_BHK.numel() / len(mean_H)
        level_H, slope_H = grad_offset_H / count, along_H * rstd_H.square() / count
        _run("cross_backward_norm", p_BHK, p_BHK, mean_H, factor_H, level_H, slope_H, grad_p_BHK)
        of_norm = ((along_H * rstd_H).to(p_BHK.dtype), grad_offset_H.to(p_BHK.dtype), None)
        return grad_p_BHK, grad_x_BHD, grad_first_BHD, *of_norm, *grads, None, None, None, None


def _moment(p_BHK: Tensor, power: int, mean_H: Tensor) -> Tensor:
    """float64, [H]: the mean of (p - mean) to a power of 1 or 2."""
    sums = mean_H.new_zeros(len(_parts(p_BHK)), len(mean_H))
    _run("cross_moment", p_BHK, power, p_BHK, mean_H, sums)
    return sums.sum(0) / (p_BHK.numel() / len(mean_H))


def _parts(p_BHK: Tensor) -> list[tuple[int, int]]:
    """(first row, rows) for each of torch's threads, fewer where there is little to do."""
    rows = p_BHK.shape[0] * p_BHK.shape[1]
    count = max(1, min(torch.get_num_threads(), rows // ROWS_A_THREAD))
    bounds = [rows * i // count for i in range(count + 1)]
    return [(start, end - start) for start, end in pairwise(bounds)]


def _run(name: str, p_BHK: Tensor, *arguments: Tensor | float | None) -> None:
    """Call a kernel on each part of the rows: [B, H, …] from its first row on, [parts, …] from its own, [n] whole."""
    kernel = getattr(kernels(p_BHK.dtype), name)

    def part(index: int, start: int, rows: int) -> None:
        def there(argument: Tensor | float | None) -> float | None:
            if not isinstance(argument, Tensor):
                return argument
            row = {1: 0, 2: index, 3: start}[argument.dim()]
            return argument.data_ptr() + row * argument.shape[-1] * argument.element_size()

        kernel(start, rows, *p_BHK.shape[1:], *map(there, arguments))

    mine, *others = enumerate(_parts(p_BHK))  # a call into C lets the other threads of Python run
    waiting = [_threads(len(others)).submit(part, index, *rows) for index, rows in others]
    part(mine[0], *mine[1])
    for other in waiting:
        other.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "cross-step")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads
