"""SDCNv3's cross step in C, for training on a CPU: one pass over memory where torch operations take twenty.

cross_step.c is compiled when it is first needed, which takes a second. The library's file is deleted once it is loaded.
The plain form in sdcnv3.py computes the same; `models.kernels.choice` decides which of the two runs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
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
# The parts of -ffast-math that let sums be vectorised. The rest of it would assume that there is no infinity or NaN.
FLAGS = (
    *("-O3", "-march=native", "-fno-strict-aliasing"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
REALS = {torch.float32: ("float", ctypes.c_float), torch.float64: ("double", ctypes.c_double)}
ROWS_A_THREAD = 1024  # fewer are not worth a thread


class UnavailableError(RuntimeError):
    """cross_step.c cannot run here; the text says why."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """cross_step.c's functions, compiled for float32 or float64. Raises UnavailableError."""
    if dtype not in REALS:
        raise UnavailableError(f"it is written for {' and '.join(map(str, REALS))}")
    if (compiler := shutil.which("cc")) is None:
        raise UnavailableError("there is no C compiler `cc` on PATH; install gcc or clang")
    name, real = REALS[dtype]
    with tempfile.TemporaryDirectory(prefix="clickloop-") as folder:
        file = Path(folder) / "cross_step.so"
        command = [compiler, *FLAGS, f"-Dreal={name}", "-shared", "-fPIC", str(SOURCE), "-o", str(file), "-lm"]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
            found = ctypes.CDLL(str(file))
        except subprocess.CalledProcessError as error:
            raise UnavailableError(
                f"{compiler} failed with exit code {error.returncode}: {error.stderr.strip()}"
            ) from None
        except OSError as error:  # for example, the folder for temporary files is mounted with noexec
            raise UnavailableError(f"the compiled library does not load: {error}") from None
    sizes, array = [ctypes.c_long] * 4, ctypes.c_void_p
    # p, x, y; mean, factor, shift; bias, w, s; eps; seed, before, dropped, scale
    common: list[Any] = [*sizes, *[array] * 9, real, ctypes.c_uint64, ctypes.c_long, ctypes.c_int, real]
    found.cross_moment.argtypes = [*sizes, ctypes.c_int, *[array] * 3]
    found.cross_forward.argtypes = [*common, array]
    found.cross_backward.argtypes = [*common, *[array] * 9]
    found.cross_backward_norm.argtypes = [*sizes, *[array] * 6]
    return found


class CrossStep(torch.autograd.Function):
    """Batch normalisation and `sdcnv3.cross_step` in one, on the CPU, in a dtype that has a `library`.

    p, x, first           W x, the running x and, in the shallow tower, x_1
    scale, offset         the batch normalisation's, [H]; None normalises nothing
    bias, weight, shift   the gate's, and the LayerNorm's two
    rate, seed, first_row   of dropout: the rate, the seed of `layers.random_bits`, the first row's place in the batch

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
        first_row: int,
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
        mask = seed % 2**64, first_row * len(mean_H), dropped, 2**15 / (2**15 - dropped)
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
    """(first row, rows) for each of torch's threads; fewer parts if there are few rows."""
    rows = p_BHK.shape[0] * p_BHK.shape[1]
    count = max(1, min(torch.get_num_threads(), rows // ROWS_A_THREAD))
    bounds = [rows * i // count for i in range(count + 1)]
    return [(start, end - start) for start, end in pairwise(bounds)]


def _run(name: str, p_BHK: Tensor, *arguments: Tensor | float | None) -> None:
    """Call a function of the library on each part of the rows.

    A part gets an array [B, H, …] from the part's first row on, an array [parts, …] from its own row on, and an array
    [n] whole.
    """
    function = getattr(library(p_BHK.dtype), name)

    def part(index: int, start: int, rows: int) -> None:
        def there(argument: Tensor | float | None) -> float | None:
            if not isinstance(argument, Tensor):
                return argument
            row = {1: 0, 2: index, 3: start}[argument.dim()]
            return argument.data_ptr() + row * argument.shape[-1] * argument.element_size()

        function(start, rows, *p_BHK.shape[1:], *map(there, arguments))

    mine, *others = enumerate(_parts(p_BHK))  # a call into C releases Python's lock, so the threads run at once
    waiting = [_threads(len(others)).submit(part, index, *rows) for index, rows in others]
    part(mine[0], *mine[1])
    for other in waiting:
        other.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "cross-step")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads
