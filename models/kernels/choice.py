"""Which form of a kernel runs: chosen by name when a model first needs the kernel, and logged once.

    kernel         fast form                       used by
    cross_step     "c", in cross_step.py           SDCNv3, training on a CPU; a choice for each dtype
    pointer_pool   "triton", in pointer_pool.py    QIN, not on a CPU; a choice for each type of device

Every kernel also has the form "torch": the same function in plain torch, in the model's file. It runs where the fast
form cannot, and a warning then says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from models.kernels import cross_step

log = logging.getLogger(__name__)

_forms: dict[tuple[str, torch.dtype | str], str] = {}  # what this process has chosen, by kernel and kind


def runs(kernel: str, kind: torch.dtype | str) -> str:
    """The form that runs: "c", "triton" or "torch". `kind` is cross_step's dtype, or pointer_pool's type of device.

    Who compiles a model first calls `torch.compiler.assume_constant_result(runs)`, so that torch.compile asks once,
    while it traces. It is no decorator here, because it imports the compiler, which takes seconds.
    """
    if (kernel, kind) not in _forms:
        fast, why_not = FAST[kernel]
        if reason := why_not(kind):
            log.warning("%s for %s runs in plain torch, which is slower than %s: %s", kernel, kind, fast, reason)
        else:
            log.info("%s for %s runs in %s", kernel, kind, fast)
        _forms[kernel, kind] = "torch" if reason else fast
    return _forms[kernel, kind]


def chosen() -> dict[str, str]:
    """The form of each kernel that this process has needed so far, such as {"cross_step torch.float32": "c"}."""
    return {f"{kernel} {kind}": form for (kernel, kind), form in _forms.items()}


def _no_c(dtype: torch.dtype) -> str:
    """Why cross_step.c cannot run; empty where it can."""
    try:
        cross_step.library(dtype)
    except cross_step.UnavailableError as error:
        return str(error)
    return ""


def _no_triton(device: str) -> str:
    """Why pointer_pool.py cannot run; empty where it can."""
    if device != "cuda" or torch.version.cuda is None:
        return "the kernel is written for CUDA"
    try:
        import models.kernels.pointer_pool  # noqa: F401 - takes seconds, and only a GPU needs it
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install the package triton"
    return ""


FAST: dict[str, tuple[str, Callable[[Any], str]]] = {"cross_step": ("c", _no_c), "pointer_pool": ("triton", _no_triton)}
