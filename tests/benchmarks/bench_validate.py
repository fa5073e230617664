"""Seconds and peak memory of `validate` on simulated impressions of 91,717 items with 768-d texts and 512-d images.

    python tests/benchmarks/bench_validate.py [MILLIONS OF ROWS ...]     default: 0.9 1.8 3.6

Each size is a process of its own, Data Docs included, ingest not. The peer is what the smaller size would take if time
or memory were in proportion to rows; the first size has none, and is its own peer.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from harness import ROOT, report

DAYS, ITEMS, USERS = 14, 91_717, 1_000_000
TEXT, IMAGE = 768, 512


def write(rows: int, canonical: Path) -> None:
    """Ingest a world of this many impressions."""
    from components import ingest
    from components.config import load

    config = load(ROOT / "params.yaml", "ingest", ingest.IngestConfig)
    sizes = {"days": DAYS, "items": ITEMS, "users": USERS, "impressions_per_day": rows // DAYS}
    world = replace(config.simulator, **sizes, text_dim=TEXT, image_dim=IMAGE)
    ingest.run(replace(config, simulator=world, until="2026-01-15T00:00:00+00:00"), canonical)


def judge(canonical: Path) -> tuple[float, float]:
    """Seconds, and GB at the peak."""
    from components import validate
    from components.config import load

    start = time.perf_counter()
    validate.run(
        load(ROOT / "params.yaml", "validate", validate.ValidateConfig),
        canonical, canonical.with_name("report.json"), canonical.with_name("docs"),
    )  # fmt: skip
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def alone(work: Callable[..., Any], *given: object) -> Any:
    """In a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def main() -> None:
    before: tuple[float, float, float] | None = None
    for millions in [float(size) for size in sys.argv[1:]] or [0.9, 1.8, 3.6]:
        with tempfile.TemporaryDirectory() as folder:
            canonical = Path(folder) / "canonical"
            alone(write, int(millions * 1e6), canonical)
            seconds, peak = alone(judge, canonical)
        times = millions / before[0] if before else 1
        peers = (before[1] * times, before[2] * times) if before else (seconds, peak)
        report(f"validate_{millions:g}M", seconds, "s", "in proportion", peers[0])
        report(f"validate_{millions:g}M_memory", peak, "GB", "in proportion", peers[1])
        before = (millions, seconds, peak)


if __name__ == "__main__":
    main()
