"""The online store through Feast, beside a plain Redis client that reads the same bytes; and a pushed click.

    one user's history      50 items                         what a request of the server reads
    500 items' vectors      128 floats each                  what the server keeps in its process instead
    a pushed click          from the push until a read has it

p50 and p99 in milliseconds. Redis where redis-server and Python's redis are there, a server of the benchmark's own;
without them, and for the push, the peer is what is allowed: the server's time limit, and a second.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ROOT, one_thread, report

if TYPE_CHECKING:
    import numpy as np

one_thread()

USERS, ITEMS, WIDTH, HISTORY, CANDIDATES = 2_000, 5_000, 128, 50, 500
READS, WARM = 200, 20


def main() -> None:
    from bento.service import STORE_TIMEOUT

    peers = {name: ("time limit of the server", [1e3 * STORE_TIMEOUT] * 2) for name in ("user", "items")}
    peers["push"] = ("a second", [1e3] * 2)
    if shutil.which("redis-server") and importlib.util.find_spec("redis"):
        with tempfile.TemporaryDirectory() as folder, redis_server():
            found = measure("redis", Path(folder))
            peers |= {name: ("plain redis-py", value) for name, value in plain_redis().items()}
            tell("redis", found, peers)
    else:
        print("redis-server or Python's redis is not there: SQLite alone", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        tell("sqlite", measure("sqlite", Path(folder)), peers)


def measure(kind: str, root: Path) -> dict[str, list[float]]:
    """p50 and p99 of a filled store of this kind that is read and pushed to, by what was done."""
    from datetime import UTC, datetime

    import numpy as np

    from bento.store import Reader
    from components.features import clicks, publish
    from components.operations.push import Click, Histories

    rng = np.random.default_rng(7)
    live, config = root / "live", publish.PublishConfig(online_sample=20, keep=1)
    deployed = publish.publish(config, root / "data" / "features", make_repo(kind, root, rng), live, "a benchmark")
    assert deployed and deployed.store
    store, histories, fetch = clicks.open_store(deployed.store), Histories(live), Reader(str(live / "current/online"))
    users = iter(rng.integers(0, USERS, 10 * READS).tolist())
    candidates = [rng.choice(ITEMS, CANDIDATES, replace=False).tolist() for _ in range(READS + WARM)]

    def user() -> None:
        assert len(fetch(next(users))["history"]) == HISTORY

    def items() -> None:
        rows = [{"item_id": item} for item in candidates.pop()]
        found = store.get_online_features(features=["item_embedding:embedding"], entity_rows=rows).to_dict()
        assert len(found["embedding"][-1]) == WIDTH

    def click() -> None:
        user_id = next(users)
        assert histories.add([Click(user_id, -1, datetime.now(UTC))]) == 1
        assert fetch(user_id)["history"][-1] == -1

    return {"user": quantiles(user), "items": quantiles(items), "push": quantiles(click)}


def plain_redis() -> dict[str, list[float]]:
    """The same keys and fields as Feast's store reads, in one pipeline, and nothing done with the bytes."""
    import redis

    client = redis.Redis(port=int(os.environ["CLICKLOOP_REDIS"].split(":")[1]))
    by_size: dict[int, list[bytes]] = {}
    for key in client.scan_iter(count=1000):  # a user's hash has two views, an item's one
        by_size.setdefault(client.hlen(key), []).append(key)
    keys = {"items": by_size[2], "user": by_size[4]}
    fields = {name: client.hkeys(own[0]) for name, own in keys.items()}
    at = iter(range(10**6))

    def read(name: str, count: int) -> Callable[[], None]:
        def one() -> None:
            with client.pipeline(transaction=False) as pipe:
                start = next(at) * count % (len(keys[name]) - count)
                for key in keys[name][start : start + count]:
                    pipe.hmget(key, fields[name])
                assert all(all(values) for values in pipe.execute())

        return one

    return {"user": quantiles(read("user", 1)), "items": quantiles(read("items", CANDIDATES))}


def make_repo(kind: str, root: Path, rng: np.random.Generator) -> Path:
    """Sources of the sizes above, and a copy of the project's Feast repo with a store of this kind."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import yaml

    from components.common.artifacts import write_json
    from components.common.contracts import TIMESTAMP
    from components.features.views import VIEWS

    sources = root / "data" / "features" / "sources"
    sources.mkdir(parents=True)
    at = 1_767_225_600_000_000

    def write(name: str, rows: int, **columns: object) -> None:
        table = pa.table({**columns, "event_timestamp": pa.repeat(pa.scalar(at).cast(TIMESTAMP), rows)})
        pq.write_table(table, sources / f"{name}.parquet")

    users, items = np.arange(USERS), np.arange(ITEMS)
    write("user_profile", USERS, user_id=users, region=pa.repeat("north", USERS))
    write("user_clicks", USERS, user_id=users, clicks_start=users, clicks_end=users)
    write("user_history", USERS, user_id=users, history=rng.integers(0, ITEMS, (USERS, HISTORY)).tolist())
    write("item_popularity", 0, item_id=items[:0], views=items[:0], clicks=items[:0])  # an item's hash is its vector
    vectors = pa.array(rng.normal(size=(ITEMS, WIDTH)).tolist(), pa.list_(pa.float32()))
    write("item_embedding", ITEMS, item_id=items, embedding=vectors)
    assert {file.stem for file in sources.iterdir()} == set(VIEWS)
    log = pa.table({"user_id": users, "item_id": users, "us": np.full(USERS, at)})
    pq.write_table(log, sources.parent / "click_log.parquet")
    known = dict.fromkeys(("until", "log_until", "known_until"), "2026-01-01T00:00:00+00:00")
    write_json(sources.parent / "receipt.json", {**known, "history_length": HISTORY})
    shutil.copytree(ROOT / "feature_repo", root / "feature_repo", ignore=shutil.ignore_patterns("__pycache__"))
    if kind == "redis":
        file = root / "feature_repo" / "feature_store.yaml"
        settings = yaml.safe_load(file.read_text())
        settings["online_store"] = {"type": "redis", "connection_string": "${CLICKLOOP_REDIS}", "skip_dedup": True}
        file.write_text(yaml.safe_dump(settings))
    return root / "feature_repo"


@contextmanager
def redis_server() -> Iterator[None]:
    """On a free port of this machine, until the benchmark is through."""
    import redis

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    os.environ["CLICKLOOP_REDIS"] = f"localhost:{port}"
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                redis.Redis(port=port).ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "redis-server did not answer"
                time.sleep(0.05)
        yield
    finally:
        server.terminate()
        server.wait()


def quantiles(run: Callable[[], None]) -> list[float]:
    """p50 and p99 in milliseconds."""
    import numpy as np

    found = []
    for round_ in range(WARM + READS):
        start = time.perf_counter()
        run()
        if round_ >= WARM:
            found.append(1e3 * (time.perf_counter() - start))
    return np.quantile(found, [0.5, 0.99]).tolist()


def tell(kind: str, found: dict[str, list[float]], peers: dict[str, tuple[str, list[float]]]) -> None:
    """A line for each quantile."""
    names = {"user": "read_of_a_user", "items": f"read_of_{CANDIDATES}_items", "push": "push_until_served"}
    for what, values in found.items():
        peer, allowed = peers[what]
        for quantile, value, other in zip(("p50", "p99"), values, allowed, strict=True):
            report(f"{kind}_{names[what]}_{quantile}", value, "ms", peer, other)


if __name__ == "__main__":
    main()
