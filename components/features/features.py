"""features: Feast sources, `feast apply`, materialization into the online store, and a check of what it serves.

user_profile      the users' attributes
user_clicks       at each click: where the user's history lies in the click log, known one second later at the
                  earliest, so that clicks at the same second as an impression stay out of its history
user_history      the newest clicks themselves, for serving
item_popularity   views and clicks of the last whole days, known from the next midnight on
item_embedding    the fused vector, known from the item's creation on

Where events say when they arrived (`created_at`), nothing is known before that: a click that comes late is in no
history of an impression before its arrival, and in every history after it stands where it became known.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from datetime import UTC as ZONE
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.artifacts import read_json, sync, write_json
from components.common.contracts import ARRIVAL, HISTORY, USERS, UTC, Canonical, attributes, read_parquet
from components.common.verdict import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from feast import FeatureStore

SOURCES = ("user_profile", "user_clicks", "user_history", "item_popularity", "item_embedding")
NO_ATTRIBUTES = "known"  # what a view of users without attributes serves, for it must serve some; no model reads it
TREES_KIB = 512 * 1024  # of the online store: two million users' keys
REDIS_BATCH = 10_000  # keys
ONLINE = ("user_profile", "user_history", "item_popularity", "item_embedding")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """availability_lag_seconds  a click, or a day's counts, is known this long after it happened
    popularity_days           days that views and clicks are counted over
    history_length            newest clicks kept for serving
    online_sample             users and items read back from the online store and compared
    """

    availability_lag_seconds: int
    popularity_days: int
    history_length: int
    online_sample: int

    def __post_init__(self) -> None:
        if self.availability_lag_seconds < 0:
            raise ValueError(f"availability_lag_seconds is {self.availability_lag_seconds}; it cannot be negative")
        for name in ("popularity_days", "history_length", "online_sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(
    config: FeaturesConfig, canonical: Path, validation: Path, embedding: Path, repo: Path, output: Path
) -> dict[str, Any]:
    """Write sources/, click_log.parquet, registry.db, online.db and, last, receipt.json.

    Feast's stores are opened by the paths of feature_store.yaml, so they are made in their final place: a folder
    without receipt.json is not whole, and no later step takes it.

    Raises ValueError where the repo reads other sources than `output`'s, or the online store serves other values.
    """
    require(validation, canonical)
    output = output.resolve()  # Feast runs in the repo's folder
    shutil.rmtree(output, ignore_errors=True)
    (output / "sources").mkdir(parents=True)
    log_until, end = write_sources(config, Canonical(canonical), embedding, output)
    with feature_store(repo) as store:
        apply(store, output)
        print(f"materialize {', '.join(ONLINE)} until {end:%Y-%m-%d %H:%M:%S} UTC", flush=True)
        with hastened(store):
            store.materialize(start_date=datetime(1990, 1, 1, tzinfo=ZONE), end_date=end, feature_views=list(ONLINE))
        forget(store, output / "sources")
        checked = check_online(store, output / "sources", config.online_sample)
    receipt = {
        "rows": {name: pq.ParquetFile(output / "sources" / f"{name}.parquet").metadata.num_rows for name in SOURCES},
        "clicks": pq.ParquetFile(output / "click_log.parquet").metadata.num_rows,
        "log_until": log_until.isoformat(),
        "materialized_until": end.isoformat(),
        "online_values_compared": checked,
        "embedding_version": read_json(embedding / "fit.json", "embed")["version"],
    }
    sync(output)
    write_json(output / "receipt.json", receipt)
    return receipt


# ---- the sources ------------------------------------------------------------------------------------------------


def write_sources(config: FeaturesConfig, data: Canonical, embedding: Path, output: Path) -> tuple[datetime, datetime]:
    """The parquet files that Feast joins and materializes. Returns two times: of the newest event, and of the last
    that becomes known."""
    events = data.events()
    lag_us = config.availability_lag_seconds * SECOND
    with duckdb.connect() as db:
        never_late = pa.repeat(pa.scalar(None, UTC), len(events))
        arrival = events[ARRIVAL] if ARRIVAL in events.column_names else never_late
        db.register(
            "events",
            pa.table(
                {
                    "user_id": events["user_id"],
                    "item_id": events["item_id"],
                    "label": events["label"],
                    "us": events["timestamp"].cast(pa.int64()),
                    "arrival": arrival.cast(pa.int64()).fill_null(0),
                }
            ),
        )
        # Clicks once, by user and by when they are known; a row's position in this order is what every history
        # points at.
        db.execute(CLICKS, {"second": SECOND, "lag": lag_us})

        def ask(query: str, **values: int) -> pa.Table:
            return _known_at(db.sql(query, params=values).to_arrow_table())

        tables = {
            "click_log": db.sql("select user_id, item_id, us from clicks order by position").to_arrow_table(),
            "user_clicks": ask(USER_CLICKS),
            "user_history": ask(USER_HISTORY, length=config.history_length),
            "item_popularity": ask(ITEM_POPULARITY, day=DAY, lag=lag_us, days=config.popularity_days),
        }
    if (histories := data.histories()) is not None:
        tables |= given_histories(config, events, histories)
    first = pc.min(events["timestamp"])
    users = data.users()
    tables["user_profile"] = users.append_column("event_timestamp", pa.repeat(first, len(users)).cast(UTC))
    if not attributes(users, USERS):
        tables["user_profile"] = tables["user_profile"].append_column(NO_ATTRIBUTES, pa.repeat("yes", len(users)))
    vectors = read_parquet(embedding / "item_embedding.parquet")
    vectors = vectors.filter(pc.is_valid(vectors["embedding"]))
    tables["item_embedding"] = pa.table(
        {
            "item_id": vectors["item_id"],
            "embedding": vectors["embedding"].cast(pa.list_(pa.float32())),
            "event_timestamp": vectors["created_at"],
        }
    )
    pq.write_table(tables.pop("click_log"), output / "click_log.parquet")
    for name, table in tables.items():
        pq.write_table(table, output / "sources" / f"{name}.parquet")
    known_until = max(pc.max(table["event_timestamp"]).as_py() for table in tables.values() if len(table))
    return pc.max(events["timestamp"]).as_py(), known_until


def given_histories(config: FeaturesConfig, events: pa.Table, histories: pa.ChunkedArray) -> dict[str, pa.Table]:
    """The tables of a source that gives the histories itself: an event's is known at that very event.

    Its times are an order and no more, so there is no popularity.
    """
    rows = pa.table(
        {
            "user_id": events["user_id"],
            "clicks_start": events[HISTORY[0]],
            "clicks_end": events[HISTORY[1]],
            "event_timestamp": events["timestamp"],
        }
    ).sort_by([("user_id", "ascending"), ("event_timestamp", "ascending")])
    users = rows["user_id"].to_numpy()
    newest = rows.take(pa.array(np.flatnonzero(np.append(users[1:] != users[:-1], True))))
    end = newest["clicks_end"].to_numpy()
    length = np.minimum(end - newest["clicks_start"].to_numpy(), config.history_length)
    offsets = np.concatenate([[0], np.cumsum(length)])
    items = histories.take(pa.array(np.repeat(end - offsets[1:], length) + np.arange(offsets[-1]))).combine_chunks()
    history = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items)
    nothing = pa.schema(
        [("item_id", pa.int64()), ("event_timestamp", UTC), ("views", pa.int64()), ("clicks", pa.int64())]
    )
    return {
        "click_log": pa.table({"item_id": histories}),
        "user_clicks": rows,
        "user_history": pa.table(
            {"user_id": newest["user_id"], "history": history, "event_timestamp": newest["event_timestamp"]}
        ).filter(pa.array(length > 0)),
        "item_popularity": nothing.empty_table(),
    }


SECOND = 1_000_000  # microseconds, as in the canonical timestamps
DAY = 86_400 * SECOND

CLICKS = """
    create table clicks as
    select *, row_number() over (order by user_id, known, us, item_id) - 1 as position
    from (
        select user_id, item_id, us, greatest((us // $second + 1) * $second + $lag, arrival) as known
        from events
        where label = 1
    )
"""

USER_CLICKS = """
    select user_id, min(first) as clicks_start, max(position) + 1 as clicks_end, known as us
    from (select *, min(position) over (partition by user_id) as first from clicks)
    group by user_id, known
    order by user_id, us
"""

USER_HISTORY = """
    select user_id, list(item_id order by position) as history, max(known) as us
    from (select *, row_number() over (partition by user_id order by position desc) as age from clicks)
    where age <= $length
    group by user_id
    order by user_id
"""

# A running sum over the days on which something enters the window or leaves it: rows grow with events, not with days.
# A late event enters at the first midnight after its arrival, and leaves with its own day.
ITEM_POPULARITY = """
    with daily as (
        select item_id, us // $day as day, greatest(us // $day, (arrival - $lag - 1) // $day) as enters,
               count(*) as views, sum(label)::bigint as clicks
        from events
        group by all
    ), steps as (
        select item_id, enters as day, views, clicks from daily where enters < day + $days
        union all select item_id, day + $days, -views, -clicks from daily where enters < day + $days
    ), sums as (
        select item_id, day, sum(views) as views, sum(clicks) as clicks from steps group by all
    )
    select item_id, (day + 1) * $day + $lag as us,
           sum(views) over past :: bigint as views, sum(clicks) over past :: bigint as clicks
    from sums
    where day <= (select max(us) // $day from events)
    window past as (partition by item_id order by day)
    order by item_id, us
"""


def _known_at(table: pa.Table) -> pa.Table:
    """Microseconds `us` -> the event_timestamp that Feast joins on."""
    position = table.column_names.index("us")
    return table.set_column(position, "event_timestamp", table["us"].cast(pa.int64()).cast(UTC))


def popularity_level(counts: np.ndarray) -> np.ndarray:
    """floor(log2(1 + count)): 0, 1, 1, 2, 2, 2, 2, 3, … int64, any shape."""
    return np.floor(np.log2(1.0 + counts)).astype(np.int64)


# ---- Feast ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def feature_store(repo: Path) -> Iterator[FeatureStore]:
    """Feast's store, opened in the repo's folder as Feast's own command does: its paths are relative to it."""
    if not (repo / "feature_store.yaml").is_file():
        raise ValueError(f"{repo}/feature_store.yaml is not there; name the Feast repo's folder")
    logging.getLogger("feast").setLevel(logging.WARNING)
    os.environ.setdefault("CLICKLOOP_REDIS", "localhost:6379")  # feature_store.yaml may name it
    from feast import FeatureStore

    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Ibis warns of its own calls, once a query
    with contextlib.chdir(repo):
        sys.path.append(str(Path.cwd()))  # as Feast's own command does: feature_store.yaml names a class of asof.py
        try:
            store = FeatureStore(repo_path=".")
        finally:
            sys.path.pop()
        yield store


def apply(store: FeatureStore, output: Path) -> None:
    """Register the repo's definitions, as `feast apply` does. Raises ValueError where a source is not `output`'s."""
    from feast import FileSource, PushSource
    from feast.repo_operations import parse_repo

    sys.path.insert(0, str(Path.cwd()))
    known = set(sys.modules)
    try:
        found = parse_repo(Path.cwd())
    finally:
        sys.path.pop(0)
        for name in set(sys.modules) - known:  # a second store in this process reads its own definitions anew
            if str(getattr(sys.modules[name], "__file__", "")).startswith(f"{Path.cwd()}/"):
                del sys.modules[name]
    for source in found.data_sources:
        if isinstance(source, PushSource):  # Feast lists the file behind it too
            continue
        assert isinstance(source, FileSource), "the repo's sources are parquet files"
        wanted = (output / "sources" / f"{source.name}.parquet").resolve()
        if Path(source.path).resolve() != wanted:
            raise ValueError(
                f"feature_repo: source {source.name} is read from {source.path}, not from {wanted}; "
                "write to the folder that feature_repo/definitions.py reads, or mend the path there"
            )
    store.apply([*found.entities, *found.data_sources, *found.feature_views, *found.feature_services])


@contextlib.contextmanager
def hastened(store: FeatureStore) -> Iterator[None]:
    """For a store that is written at once. Feast makes millions of small objects, none of them in a cycle: looking for
    cycles takes a third of its time. In SQLite entities come in no order, so its trees stay in memory, and nothing is
    made to last before the receipt; any other online store is left as it is."""
    from feast.infra.online_stores.sqlite import SqliteOnlineStore

    online = store._get_provider().online_store
    if isinstance(online, SqliteOnlineStore):
        db = online._get_conn(store.config)
        for setting in (f"cache_size = -{TREES_KIB}", "journal_mode = memory", "synchronous = off"):
            db.execute(f"pragma {setting}")
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def forget(store: FeatureStore, sources: Path) -> None:
    """SQLite's file is made anew, Redis is written over: remove what its views still have of entities that left their
    sources. What was pushed to those goes too, as in SQLite; `push` gives a new store what its log does not have."""
    if store.config.online_store.type != "redis":
        return
    from feast.infra.online_stores.helpers import _mmh3, _redis_key_prefix

    online: Any = store._get_provider().online_store
    client = online._get_client(store.config.online_store)
    project = store.project.encode()
    for view in map(store.get_feature_view, ONLINE):
        known = read_parquet(sources / f"{view.name}.parquet")[view.join_keys[0]].to_numpy()
        # A key is what names the entity, the id's type and length (4 bytes each), the id, and the project.
        prefix = _redis_key_prefix(view.join_keys)
        found = client.scan_iter(prefix + b"*" + project, count=REDIS_BATCH)
        keys = np.array([key for key in found if len(key) == len(prefix) + 16 + len(project)], dtype=np.bytes_)
        ids = np.frombuffer(b"".join(key[len(prefix) + 8 :][:8] for key in keys.tolist()), "<i8")
        fields = [f"_ts:{view.name}", *(_mmh3(f"{view.name}:{feature.name}") for feature in view.features)]
        gone = keys[~np.isin(ids, known)].tolist()
        for start in range(0, len(gone), REDIS_BATCH):
            with client.pipeline(transaction=False) as pipe:
                for key in gone[start : start + REDIS_BATCH]:
                    pipe.hdel(key, *fields)
                pipe.execute()


def check_online(store: FeatureStore, sources: Path, sample: int) -> int:
    """Read a sample of users and items back and compare. Returns the values compared.

    Raises ValueError that names view, feature and entity where the online store serves something else.
    """
    compared = 0
    for view in ONLINE:
        table = read_parquet(sources / f"{view}.parquet")
        if not len(table):
            continue
        key = table.column_names[0]
        newest = table.to_pandas().sort_values("event_timestamp", kind="stable").groupby(key).tail(1)
        newest = newest.sort_values(key).iloc[:: max(1, len(newest) // sample)].head(sample)
        names = [name for name in newest.columns if name not in (key, "event_timestamp")]
        served = store.get_online_features(
            features=[f"{view}:{name}" for name in names], entity_rows=[{key: int(v)} for v in newest[key]]
        ).to_dict()
        for name in names:
            for entity, offline, online in zip(newest[key], newest[name], served[name], strict=True):
                compared += 1
                if not _same(offline, online):
                    raise ValueError(
                        f"online store: {view}:{name} of {key} {entity} is {online!r}, offline {offline!r}; "
                        "delete the store and run `dvc repro --force features`"
                    )
    return compared


def _same(offline: Any, online: Any) -> bool:
    if offline is None or online is None:
        return offline is None and online is None
    return bool(np.array_equal(np.asarray(offline), np.asarray(online, dtype=np.asarray(offline).dtype)))
