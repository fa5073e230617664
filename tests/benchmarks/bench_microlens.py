"""`ingest` of the source `microlens` at its size: 3.6M rows of a million users, each with a sequence of 100 items.

The files are made here, in the challenge's layout: a row's sequence is what its user had clicked by then, and most
users clicked little. The peer is a plain read of the same files with pyarrow.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from bench_data_path import alone
from harness import ROOT, report

USERS, ITEMS, LENGTH, MEAN = 1_000_000, 91_717, 100, 12
ROWS = {"train": 3_600_000, "valid": 10_000}
CHUNK = 200_000


def main() -> None:
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="clickloop-bench-") as name:
        folder = Path(name)
        make(folder / "raw")
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["ingest"] |= {"source": "microlens", "raw": str(folder / "raw")}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        print("ingest", file=sys.stderr, flush=True)
        arguments = ["--params", str(folder / "params.yaml"), "--output", str(folder / "canonical")]
        seconds, peak = alone("ingest", arguments)
        start = time.perf_counter()
        for file in ROWS:
            for batch in pq.ParquetFile(folder / "raw" / f"{file}.parquet").iter_batches():
                batch.validate()
        report("microlens_ingest", seconds, "s", "pyarrow's read of the files", time.perf_counter() - start)
        report("microlens_ingest_peak", peak, "GB", "the sequences in memory", sum(ROWS.values()) * LENGTH * 8 / 1e9)


def make(raw: Path) -> None:
    raw.mkdir()
    rng = np.random.default_rng(7)
    life_U = np.minimum(rng.geometric(1 / MEAN, USERS), LENGTH)
    start_U = np.cumsum(life_U) - life_U
    clicks = rng.zipf(1.3, int(life_U.sum())) % ITEMS + 1
    for name, rows in ROWS.items():
        writer = None
        for first in range(0, rows, CHUNK):
            user_B = rng.integers(0, USERS, min(CHUNK, rows - first))
            known_B = rng.integers(0, life_U[user_B] + 1)
            place_BL = known_B[:, None] - np.arange(LENGTH, 0, -1)
            seq_BL = np.where(place_BL >= 0, clicks[start_U[user_B][:, None] + place_BL.clip(0)], 0)
            table = pa.table(
                {
                    "user_id": user_B + 1,
                    "item_id": rng.integers(1, ITEMS + 1, len(user_B)),
                    "item_seq": lists(seq_BL, pa.int64()),
                    "likes_level": rng.integers(0, 11, len(user_B)),
                    "views_level": rng.integers(0, 11, len(user_B)),
                    "label": rng.integers(0, 2, len(user_B)),
                }
            )
            writer = writer or pq.ParquetWriter(raw / f"{name}.parquet", table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
    items = {
        "item_id": np.arange(1, ITEMS + 1),
        "item_tags": lists(rng.integers(1, 11_740, (ITEMS, 5)), pa.int64()),
        "item_emb_d128": lists(rng.normal(size=(ITEMS, 128)).astype(np.float32), pa.float32()),
    }
    pq.write_table(pa.table(items), raw / "item_info.parquet")


def lists(values: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), values.shape[1])


if __name__ == "__main__":
    main()
