"""The online store of a million users: published whole, and an hour later; beside Feast's own materialization.

    python tests/benchmarks/bench_publish.py [--users USERS] [--share SHARE]      default: 1000000 20

Every user has a profile and a history of 1 to 50 items (7 in the mean), each of 91,717 items eight rows of popularity
and a vector of 128 floats: about what 3.6 million impressions leave. In the hour, one user in a hundred clicks, and one
item in ten has another popularity. Each figure is of a process of its own, its start and imports included, so that the
peak is its own. Feast materializes one SHARE-th of users and items into SQLite; its seconds beside its own start are
multiplied by SHARE.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from harness import ROOT, report

ITEMS, WIDTH, LONGEST, MEAN = 91_717, 128, 50, 7
START, DAY = 1_767_225_600_000_000, 86_400_000_000
MOST = {"seconds": 60, "mib": 2 * 10**9 / 2**20}  # the goal for a million users


def make(features: Path, users: int, items: int, hour: int = 0) -> None:
    """What the stage `features` writes, `hour` hours after the first time."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from components.common.artifacts import write_json
    from components.common.contracts import TIMESTAMP

    (features / "sources").mkdir(parents=True)
    rng = np.random.default_rng(7)
    user, item = 100 + 3 * np.arange(users), 5_000_000 + 7 * np.arange(items)

    def write(name: str, times: np.ndarray, **columns: object) -> None:
        table = pa.table({**columns, "event_timestamp": pa.array(times).cast(TIMESTAMP)})
        pq.write_table(table, features / "sources" / f"{name}.parquet")

    write("user_profile", np.full(users, START), user_id=user, region=pa.array(rng.choice(["north", "south"], users)))
    length = np.minimum(LONGEST, rng.geometric(1 / MEAN, users))
    start = np.concatenate([[0], np.cumsum(length)])
    clicked = item[rng.integers(0, items, start[-1])]
    known = START + rng.integers(0, 14 * 86_400, users) * 1_000_000
    if hour:
        some = rng.choice(users, users // 100, replace=False)
        clicked[start[1:][some] - 1] = item[rng.integers(0, items, len(some))]
        known[some] = START + 14 * DAY
    history = pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(clicked))
    write("user_history", known, user_id=user, history=history)
    write("user_clicks", known, user_id=user, clicks_start=start[:-1], clicks_end=start[1:])
    views = rng.integers(0, 900, 8 * items)
    if hour:
        views[:: 10 * 8] += 1
        views[7 :: 10 * 8] += 1
    days = np.tile(START + np.arange(8) * DAY, items)
    write("item_popularity", days, item_id=np.repeat(item, 8), views=views, clicks=views // 9)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=items * WIDTH).astype("f4")), WIDTH)
    write("item_embedding", np.full(items, START), item_id=item, embedding=vectors.cast(pa.list_(pa.float32())))
    log = {"user_id": np.repeat(user, length), "item_id": clicked, "us": np.arange(len(clicked)) + START}
    pq.write_table(pa.table(log), features / "click_log.parquet")
    until = datetime.fromtimestamp(START / 1e6 + 14 * 86_400 + 3600 * hour, UTC).isoformat()
    receipt = dict.fromkeys(("until", "log_until", "known_until"), until) | {"history_length": LONGEST}
    write_json(features / "receipt.json", receipt)


def alone(*words: str) -> tuple[float, float]:
    """Seconds of this file's command in a process of its own, and the number that it prints last. Its CPU seconds go to
    standard error: on a busy machine they say more."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{words[0]}: {seconds:.1f} s, {spent:.1f} s of CPU", file=sys.stderr, flush=True)
    return seconds, float(done.stdout.split()[-1])


def one(what: str, folder: Path, features: Path) -> None:
    """Publish into the live folder, and print the peak; or let Feast materialize, and print its seconds."""
    os.chdir(ROOT)
    if what == "publish":
        from components.features.publish import PublishConfig, publish

        assert publish(PublishConfig(online_sample=200, keep=2), features, ROOT / "feature_repo", folder, "bench")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    from components.features.store import scratch_store
    from components.features.views import ONLINE_VIEWS

    with scratch_store(ROOT / "feature_repo", features) as store:
        begun = time.perf_counter()
        store.materialize(datetime(1990, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC), list(ONLINE_VIEWS))
        print(time.perf_counter() - begun)


def main(users: int, share: int) -> None:
    with tempfile.TemporaryDirectory(prefix="clickloop-bench-") as name:
        root = Path(name)
        for hour in (0, 1):
            make(root / f"features{hour}", users, ITEMS, hour)
        make(root / "small", users // share, ITEMS // share)
        _, feast = alone("feast", str(root), str(root / "small"))
        full, mib = alone("publish", str(root / "live"), str(root / "features0"))
        hourly, hourly_mib = alone("publish", str(root / "live"), str(root / "features1"))
        peer = f"Feast's materialization of 1/{share}, times {share}"
        report("publish_full_seconds", full, "s", peer, share * feast)
        report("publish_full_seconds", full, "s", "goal", MOST["seconds"])
        report("publish_full_mib", mib, "MiB", "goal", MOST["mib"])
        report("publish_hourly_seconds", hourly, "s", "the full publish", full)
        report("publish_hourly_mib", hourly_mib, "MiB", "the full publish", mib)
        shutil.rmtree(root / "live")


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in ("publish", "feast"):
        one(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--users", type=int, default=1_000_000)
        parser.add_argument("--share", type=int, default=20, help="Feast's part is one SHARE-th")
        given = parser.parse_args()
        main(given.users, given.share)
