"""The bytes that we write into an online store are those that Feast's own materialization writes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from components.common.artifacts import write_json
from components.common.contracts import TIMESTAMP
from components.features import layout, online, publish
from components.features.store import feature_store, newest_rows
from components.features.views import ONLINE_VIEWS
from tests.components.small_world import PUBLISH, Folders, new_repo

DAY = 86_400_000_000
UNTIL = 1_767_225_600_000_000  # 2026-01-01
REDIS = {"type": "redis", "connection_string": "${CLICKLOOP_REDIS}", "skip_dedup": True}


@pytest.fixture
def made(tmp_path: Path) -> Folders:
    """Sources with every type in use, nulls, empty lists and empty texts, keys and times of all sizes. An item has
    several rows, in no order, and one that is known only later."""
    folders = Folders(tmp_path)
    new_repo(folders)
    sources = folders.features / "sources"
    sources.mkdir(parents=True)
    rng = np.random.default_rng(1)
    users = np.array([0, 1, -1, 127, 128, 255, 256, 2**31, 2**63 - 1, -(2**63), *rng.integers(-(2**62), 2**62, 40)])
    count = len(users)

    def some(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([None, *(values[i % len(values)] for i in range(count - 1))], kind)

    def write(name: str, times: Any, **columns: Any) -> None:
        table = pa.table({**columns, "event_timestamp": pa.array(times).cast(TIMESTAMP)})
        pq.write_table(table, sources / f"{name}.parquet")

    lists: list[Any] = [[], [0], [1, -1, 2**63 - 1, -(2**63)], [127, 128, 16_383, 16_384], list(range(200))]
    write(
        "user_profile",
        UNTIL - rng.integers(0, 400, count) * DAY // 7,
        user_id=users,
        region=some(["", "north", "Ærø, 東京", "x" * 300], pa.string()),
        level=some([0, 1, 300, 2**40, 7], pa.int64()),
        path=some(lists, pa.list_(pa.int64())),
        vector=some([[], [0.0], [1.5, -2.25, 3e38], [0.1] * 128], pa.list_(pa.float32())),
    )
    write("user_history", [UNTIL - 1] * count, user_id=users, history=some(lists[1:], pa.list_(pa.int64())))
    write("user_clicks", [UNTIL] * count, user_id=users, clicks_start=users, clicks_end=users)
    items = rng.permutation(np.repeat(np.arange(30), 3))
    known = UNTIL - DAY * rng.permutation(90) + 2 * DAY
    write("item_popularity", known, item_id=items, views=np.arange(90), clicks=np.arange(90) % 4)
    write("item_embedding", [UNTIL] * 3, item_id=[5, 6, 7], embedding=pa.array([[0.5] * 3] * 3, pa.list_(pa.float32())))
    pq.write_table(pa.table({"item_id": pa.array([], pa.int64())}), folders.features / "click_log.parquet")
    write_json(folders.features / "receipt.json", {"known_until": "2026-01-01T00:00:00+00:00"})
    return folders


def use(repo: Path, **settings: Any) -> None:
    file = repo / "feature_store.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"online_store": settings}))


def held(store: Path) -> dict[Any, Any]:
    """Every byte that the online store holds, without the store's own name."""
    project = yaml.safe_load((store / "feature_store.yaml").read_text())["project"]
    if (store / "online.db").exists():
        names = "entity_key, feature_name, value, value_text, vector_value, event_ts, created_ts"
        with closing(sqlite3.connect(store / "online.db")) as db:
            return {
                view: sorted(db.execute(f'select {names} from "{project}_{view}"').fetchall(), key=lambda row: row[:2])
                for view in ONLINE_VIEWS
            }
    with feature_store(store) as opened:
        online_store: Any = opened._get_provider().online_store
        client = online_store._get_client(opened.config.online_store)
        own = project.encode()
        return {key.removesuffix(own): client.hgetall(key) for key in client.scan_iter(match=b"*" + own)}


def served(store: Path, made: Folders) -> dict[str, Any]:
    """Every value with its time, as Feast reads it."""
    found = {}
    with feature_store(store) as opened:
        for name in ONLINE_VIEWS:
            view = opened.get_feature_view(name)
            (key,) = view.join_keys
            ids = [*dict.fromkeys(pq.read_table(made.features / "sources" / f"{name}.parquet")[key].to_pylist()), 99]
            names = [f"{name}:{feature.name}" for feature in view.features]
            answer = opened.get_online_features(names, [{key: one} for one in ids])
            found[name] = answer.to_dict(include_event_timestamps=True)
    return found


@pytest.fixture(params=["sqlite", "redis"])
def kind(request: pytest.FixtureRequest, made: Folders, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "redis":
        monkeypatch.setenv("CLICKLOOP_REDIS", request.getfixturevalue("redis_server"))
        use(made.repo, **REDIS)
    return request.param


@pytest.mark.parametrize("zone", ["UTC", "America/St_Johns"])
def test_a_store_is_that_of_feasts_own_materialization(
    kind: str, zone: str, made: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import time

    monkeypatch.setenv("TZ", zone)
    time.tzset()
    monkeypatch.setattr(layout, "BATCH", 7)
    monkeypatch.setattr(online, "ROWS_A_COMMAND", 3)
    try:
        ours, feasts = made.root / "ours", made.root / "feasts"
        publish.fill(PUBLISH, made.features, made.repo, ours)
        assert "Feast itself" not in capsys.readouterr().out
        monkeypatch.setattr(online, "unknown", lambda *_: "this test wants it")
        publish.fill(PUBLISH, made.features, made.repo, feasts)
        assert "item_embedding: this test wants it, so Feast itself writes it" in capsys.readouterr().out
        assert held(ours) == held(feasts) and len(held(ours)) == (4 if kind == "sqlite" else 80)
        found = served(ours, made)
        assert found == served(feasts, made)
        views = found["item_popularity"]["views"]
        assert None not in views[:-1] and max(views[:-1]) < 90 and views[-1] is None
        assert [] in found["user_profile"]["path"] and "" in found["user_profile"]["region"]
    finally:
        monkeypatch.undo()
        time.tzset()


def rewritten(view: str, column: str, values: Callable[[int], pa.Array]) -> Callable[[Folders], None]:
    def change(made: Folders) -> None:
        file = made.features / "sources" / f"{view}.parquet"
        table = pq.read_table(file)
        at = table.column_names.index(column)
        pq.write_table(table.set_column(at, column, values(len(table))), file)

    return change


def defined(before: str, after: str) -> Callable[[Folders], None]:
    def change(made: Folders) -> None:
        file = made.repo / "definitions.py"
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after))

    return change


UNKNOWN: dict[str, tuple[Callable[[Folders], None], set[str], str]] = {
    "a type": (
        rewritten("user_profile", "level", lambda n: pa.array(np.arange(n) / 7)),
        {"user_profile"},
        "user_profile: level is Float64, as double in the source, so Feast itself writes it",
    ),
    "another type than declared": (
        defined('Field(name="views", dtype=Int64)', 'Field(name="views", dtype=Float32)'),
        {"item_popularity"},
        "views is Float32, as int64 in the source",
    ),
    "a setting of the store": (
        lambda made: use(made.repo, type="sqlite", path="x", enable_openai_compatible_store=True),
        set(ONLINE_VIEWS),
        "the online store has enable_openai_compatible_store: True",
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_not_known_is_left_to_feast(what: str, made: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    """And then serves what the sources have: `fill` compares it."""
    change, left, told = UNKNOWN[what]
    change(made)
    receipt = publish.fill(PUBLISH, made.features, made.repo, made.root / "store")
    printed = capsys.readouterr().out
    assert told in printed
    lines = [line for line in printed.splitlines() if "so Feast itself writes it" in line]
    assert {line.partition(":")[0] for line in lines} == left
    assert receipt["values_compared"] > 250


def test_a_redis_with_a_time_to_live_is_left_to_feast(
    made: Folders, redis_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLICKLOOP_REDIS", redis_server)
    use(made.repo, **REDIS, key_ttl_seconds=1000)
    publish.fill(PUBLISH, made.features, made.repo, made.root / "store")
    assert "the online store has key_ttl_seconds: 1000" in capsys.readouterr().out


def test_varints_of_every_length() -> None:
    from google.protobuf.internal.encoder import _VarintBytes

    values = [0, 1, 127, *(2**bits + off for bits in range(7, 63) for off in (-1, 0, 1)), 2**63 - 1, -1, -(2**63)]
    data, start = layout.varints(np.array(values, np.int64))
    wanted = [_VarintBytes(value % 2**64) for value in values]
    assert [data[a:b] for a, b in pairwise(start)] == wanted
    assert layout.varints(np.array([], np.int64)) == (b"", pytest.approx([0]))


def test_the_newest_row_of_an_entity_counts(made: Folders) -> None:
    from datetime import UTC, datetime

    table = pq.read_table(made.features / "sources" / "item_popularity.parquet").to_pylist()
    until = datetime(2026, 1, 1, tzinfo=UTC)
    found = newest_rows(made.features / "sources", "item_popularity", "item_id", until).to_pylist()
    known = [row for row in table if row["event_timestamp"] <= until]
    wanted = {row["item_id"]: row for row in sorted(known, key=lambda row: row["event_timestamp"])}
    assert {row["item_id"]: row for row in found} == wanted and len(found) == len(wanted) < len(known)
