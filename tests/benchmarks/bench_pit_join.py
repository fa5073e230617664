"""The point-in-time join of the training set through Feast, beside an ASOF join in DuckDB written by hand.

`python tests/benchmarks/bench_pit_join.py [rows …]`; each join runs in a process of its own, so that its peak memory
is its own. `…_ratio` sets value / peer beside the goal. The smallest size has Feast's own join of its DuckDB store too.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, one_thread, report

from components.features import views

ROUNDS, GOAL = 3, 2.0  # the most that Feast may take of what the join by hand takes
SIZES = (300_000, 900_000, 3_600_000)
ITEMS, DAYS, DAY = 91_717, 20, 86_400


def main(sizes: list[int]) -> None:
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_world(Path(folder), rows)
            (feast, feast_peak), (hand, hand_peak) = (timed(folder, join) for join in ("feast", "hand"))
            for what, unit, ours, peer in (("", "s", feast, hand), ("_peak", "MiB", feast_peak, hand_peak)):
                report(f"pit_join_{rows}{what}", ours, unit, "DuckDB ASOF by hand", peer)
                report(f"pit_join_{rows}{what}_ratio", ours / peer, "times by hand", "goal", GOAL)
            if rows == min(sizes):
                own, own_peak = timed(folder, "own")
                report(f"pit_join_{rows}_of_feast's_duckdb_store", own, "s", "DuckDB ASOF by hand", hand)
                report(f"pit_join_{rows}_of_feast's_duckdb_store_peak", own_peak, "MiB", "by hand", hand_peak)


def timed(folder: str, join: str) -> tuple[float, float]:
    """Median seconds and peak MiB."""
    done = subprocess.run([sys.executable, __file__, folder, join], check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def make_world(root: Path, rows: int) -> None:
    """Impressions of rows / 4 users and popular items over DAYS, as Feast's sources and a repo that reads them."""
    import shutil

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from components.common.contracts import TIMESTAMP, Canonical, write_days

    rng = np.random.default_rng(7)
    mass = np.arange(1, ITEMS + 1) ** -0.8
    start = 1_767_225_600  # 2026-01-01
    users = np.arange(rows // 4)
    events = pa.table(
        {
            "user_id": rng.integers(0, len(users), rows),
            "item_id": rng.choice(ITEMS, rows, p=mass / mass.sum()),
            "timestamp": pa.array(np.sort(start + rng.integers(0, DAYS * DAY, rows)) * 1_000_000).cast(TIMESTAMP),
            "label": (rng.random(rows) < 0.3).astype(np.int8),
        }
    )
    write_days(events, root / "canonical" / "events")
    pq.write_table(pa.table({"user_id": users, "region": (users % 9).astype(str)}), root / "canonical/users.parquet")
    (root / "embedding").mkdir()
    known = pa.repeat(pa.scalar(start * 1_000_000).cast(TIMESTAMP), ITEMS)
    vectors = pa.array(rng.normal(size=(ITEMS, 4)).tolist(), pa.list_(pa.float32()))
    table = {"item_id": np.arange(ITEMS), "created_at": known, "embedding": vectors}
    pq.write_table(pa.table(table), root / "embedding" / "item_embedding.parquet")
    output = root / "data" / "features"
    (output / "sources").mkdir(parents=True)
    config = views.FeaturesConfig(
        availability_lag_seconds=0, popularity_days=7, history_length=50
    )  # fmt: skip
    views.write_sources(config, Canonical(root / "canonical"), root / "embedding", output)
    shutil.copytree(ROOT / "feature_repo", root / "feature_repo", ignore=shutil.ignore_patterns("__pycache__"))


def joined(root: Path, join: str) -> list[float]:
    """Seconds of the rounds of one join: feast, own (Feast's own DuckDB store) or hand."""
    import duckdb

    from components.common.contracts import Canonical
    from components.features.dataset import point_in_time
    from components.features.store import scratch_store

    names = ["user_id", "item_id", "event_timestamp"]
    rows = Canonical(root / "canonical").events().select(["user_id", "item_id", "timestamp"]).rename_columns(names)
    if join == "own":
        yaml = root / "feature_repo" / "feature_store.yaml"
        yaml.write_text(yaml.read_text().replace("asof.AsofOfflineStore", "duckdb"))

    def by_hand() -> None:
        sources = root / "data" / "features" / "sources"
        with duckdb.connect() as db:
            db.execute("set timezone = 'UTC'")
            db.register("rows", rows)
            table = db.sql(
                f"""
                select r.*, p.region, c.clicks_start, c.clicks_end, i.views, i.clicks
                from (select *, row_number() over () as row_id from rows) r
                asof left join '{sources}/user_profile.parquet' p
                    on r.user_id = p.user_id and r.event_timestamp >= p.event_timestamp
                asof left join '{sources}/user_clicks.parquet' c
                    on r.user_id = c.user_id and r.event_timestamp >= c.event_timestamp
                asof left join '{sources}/item_popularity.parquet' i
                    on r.item_id = i.item_id and r.event_timestamp >= i.event_timestamp
                order by row_id
                """
            ).to_arrow_table()
        assert len(table) == len(rows)

    found = []
    with scratch_store(root / "feature_repo", root / "data" / "features") as store:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            by_hand() if join == "hand" else point_in_time(store, "training", rows)
            found.append(time.perf_counter() - start)
    return found


if __name__ == "__main__":
    one_thread()
    if len(sys.argv) == 3 and not sys.argv[1].isdigit():
        seconds = joined(Path(sys.argv[1]), sys.argv[2])
        print(json.dumps([sorted(seconds)[ROUNDS // 2], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
    else:
        main([int(rows) for rows in sys.argv[1:]] or list(SIZES))
