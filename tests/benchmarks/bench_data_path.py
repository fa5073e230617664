"""From raw impressions to training arrays at MicroLens's scale: seconds, peak memory and bytes on disk, by stage.

    python tests/benchmarks/bench_data_path.py [--rows ROWS …]     default: 900000 1800000 3600000

A million users of the simulator see 91,717 items with texts of 768 and images of 512 values. Each stage is the command
of dvc.yaml in a process of its own, as DVC runs it, so that the peak is its own; it may use all of the machine's cores.
The peers are the goals, or what the size before would take in proportion to rows: there a ratio above 1 is growth that
is more than linear. The first size has none, and is its own peer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import yaml
from harness import ROOT, report
from safetensors import safe_open

DAYS, ITEMS, USERS = 14, 91_717, 1_000_000
TEXT, IMAGE, FUSED = 768, 512, 128
# Goals: figure -> (unit, most). Of all stages, of validate alone (Data Docs included), and of a row of the dataset.
GOALS = {
    "all_seconds": ("s", 240),
    "all_memory": ("GB", 6),
    "validate_seconds": ("s", 60),
    "validate_memory": ("GB", 2),
    "row": ("B", 25),
}


def stages(folder: Path) -> dict[str, list[str]]:
    """Stage -> the arguments of its command. `folder` is laid out as the project is."""
    data = folder / "data"
    canonical, checked = data / "canonical", data / "validation" / "report.json"
    embedding, features, repo = data / "embedding", data / "features", folder / "feature_repo"
    of = {
        "ingest": {"output": canonical},
        "validate": {"canonical": canonical, "output": checked, "docs": checked.with_name("docs")},
        "embed": {"canonical": canonical, "validation": checked, "output": embedding},
        "features": {"canonical": canonical, "validation": checked, "embedding": embedding, "repo": repo,
                     "output": features},
        "dataset": {"canonical": canonical, "features": features, "repo": repo, "output": data / "dataset"},
    }  # fmt: skip
    params = ["--params", str(folder / "params.yaml")]
    return {
        stage: [*params, *(word for name, path in paths.items() for word in (f"--{name}", str(path)))]
        for stage, paths in of.items()
    }


def lay_out(folder: Path, rows: int) -> None:
    """The project's parameters for this many impressions, and its Feast repo, whose paths are relative to it."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["ingest"] |= {"source": "simulator", "raw": "components/data/sources/simulator.py"}
    params["ingest"] |= {"until": "2026-01-15T00:00:00+00:00", "window_days": DAYS, "lead_days": 0}
    params["ingest"]["simulator"] |= {
        "items": ITEMS, "users": USERS, "impressions_per_day": rows // DAYS,
        "text_dim": TEXT, "image_dim": IMAGE,
    }  # fmt: skip
    params["embed"]["dim"] = FUSED
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(ROOT / "feature_repo", folder / "feature_repo", ignore=shutil.ignore_patterns("__pycache__"))


def alone(stage: str, arguments: list[str]) -> tuple[float, float]:
    """Seconds of the stage's command, its start included, and GB at its peak. Ends the run where the command fails."""
    program = [sys.executable, "-m", "components", stage, *arguments]
    with tempfile.TemporaryFile() as said:
        both = [(os.POSIX_SPAWN_DUP2, said.fileno(), stream) for stream in (1, 2)]
        start = time.perf_counter()
        _, status, used = os.wait4(os.posix_spawn(sys.executable, program, os.environ, file_actions=both), 0)
        seconds = time.perf_counter() - start
        if code := os.waitstatus_to_exitcode(status):
            said.seek(0)
            raise SystemExit(f"{' '.join(program)} ended with {code}:\n{said.read().decode()}")
    return seconds, used.ru_maxrss * 1024 / 1e9


def size(path: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def row_bytes(dataset: Path) -> float:
    """Bytes of rows.safetensors a row, users' ids included. They are mapped: on disk is in memory. The click log is
    counted by clicks, not by rows, and of all sources the simulator alone has an oracle: both are left out."""
    with safe_open(dataset / "rows.safetensors", framework="np") as opened:
        columns = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    counted = sum(column.nbytes for name, column in columns.items() if name not in ("click_log", "oracle"))
    return counted / len(columns["label"])


def run(rows: int) -> tuple[dict[str, tuple[str, float]], float]:
    """Of one size: figure -> (unit, value), and the bytes of a row."""
    with tempfile.TemporaryDirectory(prefix="clickloop-bench-") as name:
        folder = Path(name)
        lay_out(folder, rows)
        spent = {}
        for stage, arguments in stages(folder).items():
            print(f"{rows:,} rows: {stage}", file=sys.stderr, flush=True)
            spent[stage] = alone(stage, arguments)
        found = {"all_seconds": ("s", sum(seconds for seconds, _ in spent.values()))}
        found["all_memory"] = ("GB", max(peak for _, peak in spent.values()))
        for stage, (seconds, peak) in spent.items():
            found |= {f"{stage}_seconds": ("s", seconds), f"{stage}_memory": ("GB", peak)}
        found["all_disk"] = ("GB", size(folder / "data") / 1e9)
        return found, row_bytes(folder / "data" / "dataset")


def main(sizes: list[int]) -> None:
    os.chdir(ROOT)
    before, rows_before = None, 0
    for rows in sizes:
        found, row = run(rows)
        called = f"data_path_{rows / 1e6:g}M"
        for name, (unit, value) in found.items():
            peer = value if before is None else before[name][1] * rows / rows_before
            report(f"{called}_{name}", value, unit, "in proportion to rows", peer)
        for name, (unit, most) in GOALS.items():
            report(f"{called}_{name}", row if name == "row" else found[name][1], unit, "goal", most)
        before, rows_before = found, rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[900_000, 1_800_000, 3_600_000], help="impressions")
    main(sorted(parser.parse_args().rows))
