"""Nights, one after another, in a folder of their own; then the same days as a backfill, in parallel and in reverse.

python tests/benchmarks/bench_nights.py                ten nights of the tests' world, 1,500 impressions a day
python tests/benchmarks/bench_nights.py --nights 3     fewer
python tests/benchmarks/bench_nights.py --size 30000   more impressions a day; users and items grow with them

The backfills run in fresh clones with caches of their own, which know the tags. So each day keeps its judge, and each
stage runs again: `nights_same_hashes` counts the outputs that come out the same. What a model that is never trained
again loses is measured by bench_stale.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import replace
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import ROOT, one_thread, report
from rich.console import Console
from rich.table import Table

FIRST = date(2026, 1, 6)
# Nights of a world this small differ by luck: the rules beside the champion are wide, so that nights promote.
JUDGED = {"gate.margin": 1.0, "gate.alpha": None, "gate.max_slice_loss": None, "run.promote": "auto"}
SIZES = {"users": 0.2, "items": 0.08}  # of a day's impressions, as in the tests' world


def main() -> None:
    from bench_stale import AFTER, GOAL, loss, stale_loss

    from components.operations.day import tagged
    from components.operations.retention import disk
    from tests.conftest import copy_project

    options = argparse.ArgumentParser()
    options.add_argument("--nights", type=int, default=10)
    options.add_argument("--size", type=int, default=1500)
    options.add_argument("--jobs", type=int, default=2)
    asked = options.parse_args()
    days = [FIRST + timedelta(n) for n in range(asked.nights)]
    world = {f"ingest.simulator.{name}": int(asked.size * share) for name, share in SIZES.items()}
    world |= {"ingest.simulator.impressions_per_day": asked.size, "run.keep_worktrees": asked.nights + 1}
    os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, however many days run at a time
    with tempfile.TemporaryDirectory(prefix="clickloop-nights-") as folder:
        home = Path(folder)
        clone = copy_project(home / "nights/project", home / "nights/cache", JUDGED | world)
        rows, mib = [], [disk([home / "nights"])]
        for day in days:
            clone.python("-m", "components", "run", str(day))
            rows.append(json.loads((clone.root / f".runs/reports/{day}.json").read_text()))
            mib.append(disk([home / "nights"]))
            print(f"{day}: {rows[-1]['verdict']}, {rows[-1]['seconds']:.0f} s", flush=True)
        nights = {day: tagged(clone.root, f"run/{day}")["hashes"] for day in days}
        show(rows, mib, next_days(clone.root, days))
        for way in ("parallel", "reverse"):
            backfill = fresh_clone(clone, home / way)
            if way == "parallel":
                range_ = ("--from", str(days[0]), "--to", str(days[-1]), "--jobs", str(asked.jobs))
                backfill.python("-m", "components", "run", *range_)
            for day in reversed(days) if way == "reverse" else ():
                backfill.python("-m", "components", "run", str(day))
            champions = [git(project, "tag", "--list", "*#champion#*") for project in (clone, backfill)]
            assert champions[0] == champions[1], "a backfill moved the champion"
            compare(way, nights, {day: tagged(backfill.root, f"run/{day}")["hashes"] for day in days})
        report("nights_overhead_seconds", statistics.median(row["overhead"] for row in rows), "s", "goal", 60)
        per_day = (mib[-1] - mib[1]) / max(1, len(days) - 1)
        report("nights_disk_mib_a_day", per_day, "MiB", "the first night", mib[1] - mib[0])
    report("nights_stale_loss", loss(stale_loss()), f"AUC in {AFTER} days without training", "least", GOAL)


def git(project: Any, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=project.root, env=project.env, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def fresh_clone(clone: Any, folder: Path) -> Any:
    """Another clone: the same commit and tags, a copy of the remote, and nothing in its cache."""
    folder.mkdir()
    git(clone, "clone", "-q", str(clone.root), str(folder / "project"))
    other = replace(clone, root=folder / "project")
    shutil.copytree(clone.root / ".dvc-remote", other.root / ".dvc-remote")
    return other


def next_days(root: Path, days: list[date]) -> list[tuple[float, float] | None]:
    """For each night but the last: AUC on the next day of what shipped, and of what the gate judged."""
    from next_day import auc_on

    found: list[tuple[float, float] | None] = []
    for day, after in pairwise(days):
        tree, dataset = root / f".runs/{day}", root / f".runs/{after}/data/dataset"
        decision = json.loads((tree / "artifacts/refit/decision.json").read_text())
        if decision["verdict"] != "approve":
            found.append(None)
            continue
        checkpoints = tree / "checkpoints"
        found.append((auc_on(checkpoints / "refit", dataset), auc_on(checkpoints / decision["model"], dataset)))
    both = [pair for pair in found if pair]
    if both:
        shipped, judged = (statistics.mean(values) for values in zip(*both, strict=True))
        print(f"next day's AUC, {len(both)} nights: what shipped {shipped:.4f}, what was judged {judged:.4f}")
        report("nights_refit_gain", shipped - judged, "AUC", "judged", judged)
    return [*found, None]


def show(rows: list[dict[str, Any]], mib: list[float], next_: list[tuple[float, float] | None]) -> None:
    table = Table("day", "rows", "late", "verdict", "champion", "next day's AUC", "seconds", "overhead", "disk MiB")
    for row, before, after, pair in zip(rows, mib, mib[1:], next_, strict=False):
        auc = f"{pair[0]:.4f}" if pair else ""
        figures = (f"{row['seconds']:.0f}", f"{row['overhead']:.0f}", f"{after - before:.1f}")
        table.add_row(
            row["day"], f"{row['rows']:,}", f"{row['late']:,}", row["verdict"], row["champion"], auc, *figures
        )
    Console().print(table)


def compare(way: str, nights: dict[date, dict[str, str]], others: dict[date, dict[str, str]]) -> None:
    table = Table("day", "output", "night", way, title=f"Nights and backfill, {way}")
    same = total = 0
    for day, hashes in nights.items():
        differ = {path for path in hashes.keys() | others[day].keys() if hashes.get(path) != others[day].get(path)}
        same, total = same + len(hashes) - len(differ), total + len(hashes)
        for path in sorted(differ) or ["data/dataset", "checkpoints/refit"]:
            table.add_row(str(day), path, hashes.get(path, "")[:12], others[day].get(path, "")[:12])
    Console().print(table)
    report("nights_same_hashes", same, f"outputs, {way}", "outputs of the nights", total)


if __name__ == "__main__":
    one_thread()
    os.chdir(ROOT)
    main()
