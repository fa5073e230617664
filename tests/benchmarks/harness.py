"""What every benchmark does: time alternately with its peer, and print one JSON line.

Figures are medians over rounds in which value and peer take turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]  # this project's code, and the published forms in tests/models


def one_thread() -> None:
    """Numerical libraries on one thread; call it before they are imported."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"


def seconds(*runs: Callable[[], object], rounds: int = 5) -> list[float]:
    """Median seconds of each run, after a round that is not counted; the runs take turns."""
    found: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for run, own in zip(runs, found, strict=True):
            start = time.perf_counter()
            run()
            if round_:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in found]


def report(name: str, value: float, unit: str, peer: str, peer_value: float, device: str = "cpu") -> None:
    """The line of a benchmark; `ratio` is value / peer_value."""
    line = {
        "name": name,
        "value": _rounded(value),
        "unit": unit,
        "peer": peer,
        "peer_value": _rounded(peer_value),
        "ratio": _rounded(value / peer_value),
        "machine": machine(device),
    }
    print(json.dumps(line), flush=True)


def machine(device: str = "cpu") -> str:
    """Where a figure was measured: the CPU and its threads, or the name of a CUDA device."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    used = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{_processor()}, {used} of {os.cpu_count()} cores, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    best = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({' '.join(best)})"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
