"""The ASOF join of feature_repo/asof.py gives the rows that Feast's own join of its DuckDB store gives."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Int64, String

from components.common.contracts import Canonical
from components.features import views
from components.features.dataset import point_in_time
from components.features.store import feature_store, scratch_store
from tests.components.small_world import FEATURES as CONFIG
from tests.components.small_world import PROJECT, hand_tables, prepare

SECOND = 1_000_000
ROWS, KEYS, SECONDS = 400, 7, 40


def nulls(rng: np.random.Generator, values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(values, kind, mask=rng.random(len(values)) < 0.1)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few keys and few moments: features tie with each other and with the rows; keys, times and values are null."""
    rng = np.random.default_rng(4)
    root = tmp_path_factory.mktemp("asof") / "feature_repo"
    root.mkdir()
    for name in ("asof.py", "feature_store.yaml"):
        shutil.copy(PROJECT / "feature_repo" / name, root / name)
    (root.parent / "data" / "features").mkdir(parents=True)
    utc = pa.timestamp("us", tz="UTC")
    at = rng.permutation(KEYS * SECONDS)[: KEYS * SECONDS // 2]  # one row a user and second, in no order
    pq.write_table(
        pa.table(
            {
                "user_id": nulls(rng, at // SECONDS, pa.int64()),
                "event_timestamp": pa.array(at % SECONDS * SECOND, utc),
                "score": nulls(rng, rng.integers(0, 99, len(at)), pa.int64()),
                "path": pa.array([None if n == 3 else list(range(n)) for n in rng.integers(0, 5, len(at))]),
            }
        ),
        root / "users.parquet",
    )
    moments = np.repeat(
        rng.integers(0, SECONDS, 60), 3
    )  # three rows an item and moment, of which the last created counts
    pq.write_table(
        pa.table(
            {
                "item_id": np.repeat(rng.integers(0, KEYS, 60), 3),
                "made": nulls(rng, moments * SECOND, utc),
                "stored": pa.array(rng.permutation(len(moments)) * SECOND, utc),
                "old_name": [f"v{i}" for i in range(len(moments))],
            }
        ),
        root / "items.parquet",
    )
    return root


def stores(repo: Path, ttl: timedelta) -> Iterator[FeatureStore]:
    """The same views in our store and in Feast's own."""
    user, item = (Entity(name=n, join_keys=[f"{n}_id"], value_type=ValueType.INT64) for n in ("user", "item"))
    of_users = FileSource(name="users", path="users.parquet", timestamp_field="event_timestamp")
    of_items = FileSource(
        name="items", path="items.parquet", timestamp_field="made", created_timestamp_column="stored",
        field_mapping={"old_name": "name"},
    )  # fmt: skip
    views = [
        FeatureView(
            name="of_users", entities=[user], ttl=ttl, source=of_users,
            schema=[Field(name="score", dtype=Int64), Field(name="path", dtype=Array(Int64))],
        ),
        FeatureView(
            name="of_items", entities=[item], ttl=ttl, source=of_items, schema=[Field(name="name", dtype=String)]
        ),
    ]  # fmt: skip
    yaml = (PROJECT / "feature_repo" / "feature_store.yaml").read_text()
    for kind in ("asof.AsofOfflineStore", "duckdb"):
        (repo / "feature_store.yaml").write_text(yaml.replace("asof.AsofOfflineStore", kind))
        with feature_store(repo) as store:
            store.apply([user, item, of_users, of_items, *views])
            yield store


def rows() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    frame = pd.DataFrame(
        {
            "row_id": np.arange(ROWS),
            "user_id": pd.array(np.where(rng.random(ROWS) < 0.1, None, rng.integers(0, KEYS + 1, ROWS)), dtype="Int64"),
            "item_id": rng.integers(0, KEYS + 1, ROWS),
            "event_timestamp": pd.to_datetime(rng.integers(-3, SECONDS + 9, ROWS), unit="s", utc=True).astype(
                "datetime64[us, UTC]"
            ),
        }
    )
    return pd.concat([frame, frame.head(20).assign(row_id=ROWS + np.arange(20))], ignore_index=True)  # repeated rows


FEATURES = ["of_users:score", "of_users:path", "of_items:name"]


@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(seconds=4)], ids=["forever", "four seconds"])
@pytest.mark.parametrize("prefixed", [False, True])
def test_the_rows_are_those_of_feasts_own_join(repo: Path, ttl: timedelta, prefixed: bool) -> None:
    found = []
    for store in stores(repo, ttl):
        job = store.get_historical_features(entity_df=rows(), features=FEATURES, full_feature_names=prefixed)
        table = job.to_arrow().sort_by("row_id")
        found.append({name: table[name].to_pylist() for name in sorted(table.column_names)})
        kind = type(store._get_provider().offline_store).__name__
        assert kind == ("AsofOfflineStore" if len(found) == 1 else "DuckDBOfflineStore")
    ours, feasts = found
    assert ours == feasts
    assert len(ours["row_id"]) == ROWS + 20
    name = ours["of_items__name" if prefixed else "name"]
    assert 20 < sum(value is None for value in name) < ROWS - 20


def test_a_cutoff_by_created_timestamp_is_feasts(repo: Path) -> None:
    def names(store: FeatureStore, cutoff: bool) -> list[str | None]:
        job = store.get_historical_features(
            entity_df=rows(), features=FEATURES, filter_by_created_timestamp=cutoff
        )  # fmt: skip
        return job.to_arrow().sort_by("row_id")["name"].to_pylist()

    (ours, every), (feasts, _) = ((names(s, True), names(s, False)) for s in stores(repo, timedelta(0)))
    assert ours == feasts != every


@pytest.mark.parametrize("kind", ["asof.AsofOfflineStore", "duckdb", "file"])
def test_two_candidates_of_one_user_at_one_time(tmp_path: Path, kind: str) -> None:
    """They are two rows of the join, and one of them twice is three. Feast's `file` store, its default, takes a view's
    key and time for the row's own and keeps one of a kind: no training set comes out of it."""
    world = prepare(hand_tables(), tmp_path)
    (world.features / "sources").mkdir(parents=True)
    data = Canonical(world.canonical)
    views.write_sources(CONFIG, data, world.embedding, world.features)
    settings = world.repo / "feature_store.yaml"
    settings.write_text(settings.read_text().replace("asof.AsofOfflineStore", kind))
    events = data.events()
    user, last = events["user_id"][-1].as_py(), events["timestamp"][-1]
    items = events["item_id"].unique().to_pylist()[:2]
    items.append(items[0])
    rows = pa.table({"user_id": [user] * 3, "item_id": items, "event_timestamp": pa.repeat(last, 3)})
    with scratch_store(world.repo, world.features) as store:
        if kind == "file":
            with pytest.raises(ValueError, match="3 rows went into Feast's join, 1 came back"):
                point_in_time(store, "training", rows)
            return
        joined = point_in_time(store, "training", rows).to_pylist()
    assert [row["item_id"] for row in joined] == items
    assert joined[0] == joined[2] and joined[0]["views"] != joined[1]["views"]
    assert joined[0]["clicks_end"] == joined[1]["clicks_end"] is not None
